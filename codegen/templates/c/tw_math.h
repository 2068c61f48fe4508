/* Scalar functions for kernels: tw_<name>_<type>(...), type f32, f64, i32 or i64.
 *
 * The float versions have no branches and no calls, so that both GCC and clang turn a `#pragma omp simd` loop over them
 * into vector code. They need IEEE arithmetic (no -ffast-math) but neither errno nor trapping, and a target with FMA.
 * NaN, infinities, signed zeros and subnormal numbers come out as in C's libm unless a comment says otherwise. Double
 * versions call libm, and so do the rarely used inverse and hyperbolic functions.
 *
 * "ULP" is the greatest error found over all magnitudes against a double reference, in units of the last place of the
 * correctly rounded float; tests/codegen/test_math_header.py measures it. Polynomials are minimax fits on the interval
 * of the reduced argument (Remez exchange in 40-digit arithmetic).
 */
#ifndef TW_MATH_H
#define TW_MATH_H

#include <stdint.h>
#include <string.h>

#include "tw_half.h"
#include "tw_libm.h"
#include "tw_trig.h"

#define TW_LN2_HIGH 0x1.62e430p-1f /* log(2) as a sum of two floats */
#define TW_LN2_LOW -0x1.05c610p-29f
#define TW_LOG2E_HIGH 0x1.715476p0f /* 1 / log(2) */
#define TW_LOG2E_LOW 0x1.4ae0c0p-26f

/* ---- exponentials: 2^n times a polynomial on [-log(2)/2, log(2)/2] ---- */

/* The sum of a float below 2^22 and this has the float, rounded to an integer, in its lowest bits. */
#define TW_SHIFT 0x1.8p23f

/* x * 2^n for -252 <= n <= 254, rounding once (a subnormal result comes from the second product). */
static inline float tw_scale_f32(float x, int32_t n) {
    const int32_t half = n >> 1;
    return x * tw_from_bits_f32((uint32_t)(half + 127) << 23) * tw_from_bits_f32((uint32_t)(n - half + 127) << 23);
}

/* exp(x) = p 2^n for -104 <= x <= 89, n in the lowest bits of `shifted`. */
typedef struct { float p; uint32_t shifted; } tw_exp_parts;
static inline tw_exp_parts tw_exp_split_f32(float x) {
    const float shifted = __builtin_fmaf(x, TW_LOG2E_HIGH, TW_SHIFT), n = shifted - TW_SHIFT;
    float r = __builtin_fmaf(n, -TW_LN2_HIGH, x);
    r = __builtin_fmaf(n, -TW_LN2_LOW, r);
    float p = __builtin_fmaf(r, 0x1.6a23d0p-10f, 0x1.123a20p-7f);
    p = __builtin_fmaf(r, p, 0x1.5558f2p-5f);
    p = __builtin_fmaf(r, p, 0x1.555492p-3f);
    p = __builtin_fmaf(r, p, 0x1.fffffcp-2f);
    return (tw_exp_parts){__builtin_fmaf(r * r, p, r) + 1.0f, tw_bits_f32(shifted)};
}

/* 1 ULP */
static inline float tw_exp_f32(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    const tw_exp_parts s = tw_exp_split_f32(x);
    return tw_scale_f32(s.p, (int32_t)(s.shifted - tw_bits_f32(TW_SHIFT)));
}

/* exp(-|x|), the same bits at a third less: no factor is subnormal when the first one is 2^(n + 64). */
static inline float tw_exp_minus_abs_f32(float x) {
    const float minus = -fabsf(x);
    const tw_exp_parts s = tw_exp_split_f32(minus < -104.0f ? -104.0f : minus);
    return s.p * tw_from_bits_f32((s.shifted << 23) + 0x5f800000u) * 0x1p-64f;
}

/* 1 ULP; for x <= 0 only, and 0 below -87.3 where exp is subnormal: what a softmax needs, at a third less. */
static inline float tw_exp_nonpositive_f32(float x) {
    const tw_exp_parts s = tw_exp_split_f32(x < -87.3f ? -87.3f : x);
    return x < -87.3f ? 0.0f : s.p * tw_from_bits_f32((s.shifted << 23) + 0x3f800000u);
}

/* 1 ULP */
static inline float tw_exp2_f32(float x) {
    x = x > 129.0f ? 129.0f : x;
    x = x < -151.0f ? -151.0f : x;
    const float shifted = x + TW_SHIFT, r = x - (shifted - TW_SHIFT); /* exact */
    float p = __builtin_fmaf(r, 0x1.41fb82p-13f, 0x1.5f3eacp-10f);
    p = __builtin_fmaf(r, p, 0x1.3b2d4ep-7f);
    p = __builtin_fmaf(r, p, 0x1.c6aee8p-5f);
    p = __builtin_fmaf(r, p, 0x1.ebfbdcp-3f);
    p = __builtin_fmaf(r, p, 0x1.62e430p-1f);
    p = __builtin_fmaf(r, p, 1.0f);
    return tw_scale_f32(p, (int32_t)(tw_bits_f32(shifted) - tw_bits_f32(TW_SHIFT)));
}

/* 1.5 ULP */
static inline float tw_expm1_f32(float x) {
    float c = x > 89.0f ? 89.0f : x;
    c = c < -18.0f ? -18.0f : c;
    const float shifted = __builtin_fmaf(c, TW_LOG2E_HIGH, TW_SHIFT), n = shifted - TW_SHIFT;
    float r = __builtin_fmaf(n, -TW_LN2_HIGH, c);
    r = __builtin_fmaf(n, -TW_LN2_LOW, r);
    float p = __builtin_fmaf(r, 0x1.a032c6p-13f, 0x1.6d723ep-10f);
    p = __builtin_fmaf(r, p, 0x1.11118ap-7f);
    p = __builtin_fmaf(r, p, 0x1.5554b0p-5f);
    p = __builtin_fmaf(r, p, 0x1.555554p-3f);
    p = __builtin_fmaf(r, p, 0.5f);
    p = __builtin_fmaf(r * r, p, r);
    /* Half the result first: 2^n alone overflows before the result does. */
    const float half = tw_from_bits_f32((tw_bits_f32(shifted) - tw_bits_f32(TW_SHIFT) + 126u) << 23);
    const float result = __builtin_fmaf(half, p, half - 0.5f) * 2.0f;
    return fabsf(x) < 0x1p-26f ? x : result; /* keeps -0 and every bit of a subnormal x */
}

/* ---- logarithms: x = 2^e (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2) ---- */

typedef struct {
    float e, f, tail; /* log(1 + f) = f + tail */
} tw_log_parts;

/* for x > 0 and finite */
static inline tw_log_parts tw_log_split_f32(float x) {
    const int tiny = x < 0x1p-126f;
    const uint32_t bits = tw_bits_f32(tiny ? x * 0x1p23f : x) + (0x3f800000u - 0x3f3504f3u);
    tw_log_parts parts;
    parts.e = (float)((int32_t)(bits >> 23) - (tiny ? 150 : 127));
    parts.f = tw_from_bits_f32((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    const float f = parts.f, square = f * f;
    float p = __builtin_fmaf(f, -0x1.38a8a8p-4f, 0x1.055dfep-3f);
    p = __builtin_fmaf(f, p, -0x1.0d88b8p-3f);
    p = __builtin_fmaf(f, p, 0x1.22da00p-3f);
    p = __builtin_fmaf(f, p, -0x1.5471eep-3f);
    p = __builtin_fmaf(f, p, 0x1.99a006p-3f);
    p = __builtin_fmaf(f, p, -0x1.000228p-2f);
    p = __builtin_fmaf(f, p, 0x1.555554p-2f);
    parts.tail = __builtin_fmaf(f * square, p, -0.5f * square);
    return parts;
}

/* the result for x > 0 and finite, replaced where x is not */
static inline float tw_log_special(float x, float result) {
    result = x > 0.0f ? result : x == 0.0f ? -INFINITY : NAN;
    return x == INFINITY ? x : result;
}

/* 1 ULP */
static inline float tw_log_f32(float x) {
    const tw_log_parts s = tw_log_split_f32(x);
    const float rest = __builtin_fmaf(s.e, TW_LN2_LOW, s.tail);
    return tw_log_special(x, __builtin_fmaf(s.e, TW_LN2_HIGH, s.f + rest));
}

/* 1.5 ULP */
static inline float tw_log2_f32(float x) {
    const tw_log_parts s = tw_log_split_f32(x);
    const float rest = __builtin_fmaf(s.tail, TW_LOG2E_HIGH, s.f * TW_LOG2E_LOW);
    return tw_log_special(x, __builtin_fmaf(s.f, TW_LOG2E_HIGH, rest) + s.e);
}

/* 1.5 ULP */
static inline float tw_log10_f32(float x) {
    const tw_log_parts s = tw_log_split_f32(x);
    float rest = __builtin_fmaf(s.tail, 0x1.bcb7b2p-2f, s.f * -0x1.5b235ep-27f); /* log10(e) as a sum */
    rest = __builtin_fmaf(s.e, -0x1.ec10c0p-27f, rest);
    rest = __builtin_fmaf(s.f, 0x1.bcb7b2p-2f, rest);
    return tw_log_special(x, __builtin_fmaf(s.e, 0x1.344136p-2f, rest)); /* log10(2) as a sum */
}

/* 2 ULP */
static inline float tw_log1p_f32(float x) {
    const float u = 1.0f + x, lost = x - (u - 1.0f); /* 1 + x = u + lost */
    const float correction = ((u > 0.0f) & (u < INFINITY)) ? lost / u : 0.0f;
    const float result = tw_log_f32(u) + correction;
    return fabsf(x) < 0x1p-26f ? x : result;
}

/* ---- sigmoids ---- */

/* 2.5 ULP */
static inline float tw_tanh_f32(float x) {
    float a = fabsf(x);
    a = a > 10.0f ? 10.0f : a;
    const float e = tw_expm1_f32(2.0f * a);
    return __builtin_copysignf(e / (e + 2.0f), x);
}

/* 2.5 ULP */
static inline float tw_sigmoid_f32(float x) {
    const float e = tw_exp_minus_abs_f32(x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* 3.5 ULP; below -87.3, where the sigmoid is subnormal, |x| 2^-149. NaN at -infinity as in PyTorch. */
static inline float tw_silu_f32(float x) { return x * tw_sigmoid_f32(x); }

/* log(1 + exp(x)), 2 ULP; torch.nn.functional.softplus with beta and threshold is an expression around it */
static inline float tw_softplus_f32(float x) {
    return (x < 0.0f ? 0.0f : x) + tw_log1p_f32(tw_exp_minus_abs_f32(x));
}

/* 1.5 ULP. z + z P(z^2) below 0.89; 1 - exp(P(z)) above, P fitted to log(erfc) where it matters for erf, up to 3.93. */
static inline float tw_erf_f32(float x) {
    const float z = fabsf(x), u = z * z;
    float p = __builtin_fmaf(u, -0x1.3f4f72p-11f, 0x1.4876cap-8f);
    p = __builtin_fmaf(u, p, -0x1.b6bee2p-6f);
    p = __builtin_fmaf(u, p, 0x1.ce1dd2p-4f);
    p = __builtin_fmaf(u, p, -0x1.8126fap-2f);
    p = __builtin_fmaf(u, p, 0x1.06eba6p-3f);
    const float near = __builtin_fmaf(z, p, z);
    const float t = z > 3.93f ? 3.93f : z;
    float q = __builtin_fmaf(t, 0x1.a20c4cp-13f, -0x1.933940p-9f);
    q = __builtin_fmaf(t, q, 0x1.6e4ff8p-6f);
    q = __builtin_fmaf(t, q, -0x1.aaceb6p-4f);
    q = __builtin_fmaf(t, q, -0x1.4614e2p-1f);
    q = __builtin_fmaf(t, q, -0x1.20bb12p0f);
    q = __builtin_fmaf(t, q, -0x1.407f34p-13f);
    const float far = 1.0f - tw_exp_nonpositive_f32(q);
    return __builtin_copysignf(z < 0.89f ? near : far, x);
}

/* 2^p for -126 <= p <= 0, and 0 for p = -127: what an epilogue can afford. The terms are paired, so that the chain of
   operations that wait for each other is short. */
static inline float tw_exp2_short_f32(float p) {
    const float shifted = p + TW_SHIFT, r = p - (shifted - TW_SHIFT), square = r * r;
    const float low = __builtin_fmaf(r, 0x1.ebfbdcp-3f, 0x1.62e430p-1f);
    const float middle = __builtin_fmaf(r, 0x1.3b2d4ep-7f, 0x1.c6aee8p-5f);
    const float high = __builtin_fmaf(r, 0x1.41fb82p-13f, 0x1.5f3eacp-10f);
    const float rest = __builtin_fmaf(square, __builtin_fmaf(square, high, middle), low);
    return __builtin_fmaf(r, rest, 1.0f) * tw_from_bits_f32((tw_bits_f32(shifted) << 23) + 0x3f800000u);
}

/* x Phi(x), Phi the normal distribution function. The error is below 2 units of x * 2^-24: Phi(-|x|) = 2^P(|x|), P
   fitted to the logarithm up to 5.6, from where on it counts as 0. NaN at -infinity as in PyTorch. */
static inline float tw_gelu_f32(float x) {
    const float z = fabsf(x), square = z * z, fourth = square * square;
    const float p1 = __builtin_fmaf(z, -0x1.d638aep-2f, -0x1.26aee6p0f);
    const float p3 = __builtin_fmaf(z, 0x1.d02a98p-8f, -0x1.ae35d8p-5f);
    const float p5 = __builtin_fmaf(z, -0x1.9ffdd2p-13f, -0x1.1f8ae0p-13f);
    const float p7 = __builtin_fmaf(z, -0x1.55574cp-18f, 0x1.90a634p-15f);
    const float high = __builtin_fmaf(fourth, 0x1.d0a6bcp-23f, __builtin_fmaf(square, p7, p5));
    const float rest = __builtin_fmaf(fourth, high, __builtin_fmaf(square, p3, p1));
    const float tail = tw_exp2_short_f32(z > 5.6f ? -127.0f : __builtin_fmaf(z, rest, -1.0f));
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

/* x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, written as x sigmoid(2 ...). The error is below 3 units of
   x * 2^-24. NaN at -infinity as in PyTorch. */
static inline float tw_gelu_tanh_f32(float x) {
    const float p = -fabsf(x) * __builtin_fmaf(x * x, 0x1.a5a7cep-4f, 0x1.26aec2p1f);
    const float e = tw_exp2_short_f32(p < -126.0f ? -127.0f : p);
    return x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* ---- powers and roots ---- */

static inline float tw_sqrt_f32(float x) { return sqrtf(x); }          /* 0.5 ULP */
static inline float tw_rsqrt_f32(float x) { return 1.0f / sqrtf(x); }  /* 1.5 ULP */
static inline float tw_reciprocal_f32(float x) { return 1.0f / x; }    /* 0.5 ULP */

/* 1 ULP, with every special case of C's pow: 2^(y log2(x)) in double. */
static inline float tw_pow_f32(float x, float y) {
    const double a = (double)fabsf(x);
    const uint64_t bits = tw_bits_f64(a) + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    const double e = tw_from_bits_f64(0x4330000000000000u | (bits >> 52)) - (0x1p52 + 1023.0);
    const double m = tw_from_bits_f64((bits & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
    const double s = (m - 1.0) / (m + 1.0), u = s * s; /* log2(m) = s P(s^2) */
    double p = __builtin_fma(u, 0x1.f1a027a15ba30p-3, 0x1.0bb69df4743aap-2);
    p = __builtin_fma(u, p, 0x1.484fb4f210c8ap-2);
    p = __builtin_fma(u, p, 0x1.a617565777fccp-2);
    p = __builtin_fma(u, p, 0x1.2776c516c2be4p-1);
    p = __builtin_fma(u, p, 0x1.ec709dc39c8f8p-1);
    p = __builtin_fma(u, p, 0x1.71547652b82ffp+1);
    double logarithm = __builtin_fma(s, p, e);
    logarithm = a == 0.0 ? -INFINITY : logarithm;
    logarithm = a < INFINITY ? logarithm : a; /* infinity and NaN */
    double t = (double)y * logarithm;
    t = t > 160.0 ? 160.0 : t;
    t = t < -160.0 ? -160.0 : t;
    const double shifted = t + 0x1.8p52, r = t - (shifted - 0x1.8p52);
    double q = __builtin_fma(r, 0x1.61af9257bfff0p-20, 0x1.00db043ff6a81p-16);
    q = __builtin_fma(r, q, 0x1.430acd5cae663p-13);
    q = __builtin_fma(r, q, 0x1.5d8747ee13074p-10);
    q = __builtin_fma(r, q, 0x1.3b2ab5c467c1cp-7);
    q = __builtin_fma(r, q, 0x1.c6b08dd4aa5a5p-5);
    q = __builtin_fma(r, q, 0x1.ebfbdff93275cp-3);
    q = __builtin_fma(r, q, 0x1.62e42fef85fdep-1);
    q = __builtin_fma(r, q, 1.0);
    const float magnitude = (float)(q * tw_from_bits_f64((tw_bits_f64(shifted) << 52) + 0x3ff0000000000000u));
    const int whole = rintf(y) == y, odd = whole & (rintf(0.5f * y) != 0.5f * y);
    const int negative = (int)(tw_bits_f32(x) >> 31);
    float result = (negative & odd) ? -magnitude : magnitude;
    result = ((x < 0.0f) & (x > -INFINITY) & !whole) ? NAN : result;
    result = ((x == -1.0f) & (fabsf(y) == INFINITY)) ? 1.0f : result;
    return ((x == 1.0f) | (y == 0.0f)) ? 1.0f : result;
}

/* ---- rounding, comparing, dividing: exact ---- */

static inline float tw_floor_f32(float x) { return floorf(x); }
static inline float tw_ceil_f32(float x) { return ceilf(x); }
static inline float tw_round_f32(float x) { return rintf(x); } /* halves to even, in the default rounding mode */
static inline float tw_trunc_f32(float x) { return truncf(x); }
static inline int tw_isnan_f32(float x) { return x != x; }

/* -1, 0 or 1; 0 for NaN as in PyTorch */
static inline float tw_sign_f32(float x) { return (float)((x > 0.0f) - (x < 0.0f)); }

/* NaN if either is */
static inline float tw_maximum_f32(float a, float b) { return ((a > b) | (a != a)) ? a : b; }
static inline float tw_minimum_f32(float a, float b) { return ((a < b) | (a != a)) ? a : b; }

static inline float tw_fmod_f32(float a, float b) { return fmodf(a, b); }

/* a - b floor(a / b), with the sign of b */
static inline float tw_remainder_f32(float a, float b) {
    const float r = fmodf(a, b);
    return ((r != 0.0f) & ((r < 0.0f) != (b < 0.0f))) ? r + b : r;
}

/* The floor of the exact quotient (rounding a / b first can give one too many), as torch.floor_divide. a / 0 is
   infinite or NaN. */
static inline float tw_floordiv_f32(float a, float b) {
    const float quotient = a / b, r = fmodf(a, b);
    float whole = (a - r) / b;
    whole -= ((r != 0.0f) & ((r < 0.0f) != (b < 0.0f))) ? 1.0f : 0.0f;
    float down = floorf(whole);
    down += whole - down > 0.5f ? 1.0f : 0.0f;
    return b == 0.0f ? quotient : whole != 0.0f ? down : __builtin_copysignf(0.0f, quotient);
}

/* Conversion to integers: towards zero; NaN and what does not fit give the smallest integer, as x86 does. */
static inline int32_t tw_f32_to_int32(float x) {
    const int fits = (x >= -0x1p31f) & (x < 0x1p31f);
    return fits ? (int32_t)(fits ? x : 0.0f) : INT32_MIN;
}
static inline int64_t tw_f32_to_int64(float x) {
    const int fits = (x >= -0x1p63f) & (x < 0x1p63f);
    return fits ? (int64_t)(fits ? x : 0.0f) : INT64_MIN;
}
static inline int32_t tw_f64_to_int32(double x) {
    const int fits = (x > -0x1.00000002p31) & (x < 0x1p31);
    return fits ? (int32_t)(fits ? x : 0.0) : INT32_MIN;
}
static inline int64_t tw_f64_to_int64(double x) {
    const int fits = (x >= -0x1p63) & (x < 0x1p63);
    return fits ? (int64_t)(fits ? x : 0.0) : INT64_MIN;
}

/* ---- through libm ---- */

#define TW_LIBM(name) \
    static inline float tw_##name##_f32(float x) { return name##f(x); } \
    static inline double tw_##name##_f64(double x) { return name(x); }
TW_LIBM(tan) TW_LIBM(asin) TW_LIBM(acos) TW_LIBM(atan) TW_LIBM(sinh) TW_LIBM(cosh) TW_LIBM(asinh) TW_LIBM(acosh)
TW_LIBM(atanh)
#undef TW_LIBM

#define TW_LIBM_F64(name) static inline double tw_##name##_f64(double x) { return name(x); }
TW_LIBM_F64(exp) TW_LIBM_F64(exp2) TW_LIBM_F64(expm1) TW_LIBM_F64(log) TW_LIBM_F64(log2) TW_LIBM_F64(log10)
TW_LIBM_F64(log1p) TW_LIBM_F64(tanh) TW_LIBM_F64(erf) TW_LIBM_F64(sin) TW_LIBM_F64(cos) TW_LIBM_F64(sqrt)
TW_LIBM_F64(floor) TW_LIBM_F64(ceil) TW_LIBM_F64(trunc)
#undef TW_LIBM_F64

static inline float tw_atan2_f32(float y, float x) { return atan2f(y, x); }
static inline double tw_atan2_f64(double y, double x) { return atan2(y, x); }
static inline double tw_pow_f64(double x, double y) { return pow(x, y); }
static inline double tw_fmod_f64(double a, double b) { return fmod(a, b); }
static inline double tw_round_f64(double x) { return rint(x); }
static inline double tw_rsqrt_f64(double x) { return 1.0 / sqrt(x); }
static inline double tw_reciprocal_f64(double x) { return 1.0 / x; }
static inline int tw_isnan_f64(double x) { return x != x; }
static inline double tw_sign_f64(double x) { return (double)((x > 0.0) - (x < 0.0)); }
static inline double tw_maximum_f64(double a, double b) { return ((a > b) | (a != a)) ? a : b; }
static inline double tw_minimum_f64(double a, double b) { return ((a < b) | (a != a)) ? a : b; }
static inline double tw_sigmoid_f64(double x) {
    const double e = exp(-fabs(x));
    return (x < 0.0 ? e : 1.0) / (1.0 + e);
}
static inline double tw_silu_f64(double x) { return x * tw_sigmoid_f64(x); }
static inline double tw_softplus_f64(double x) { return (x < 0.0 ? 0.0 : x) + log1p(exp(-fabs(x))); }
static inline double tw_gelu_f64(double x) { return 0.5 * x * erfc(-0.70710678118654752440 * x); }
static inline double tw_gelu_tanh_f64(double x) {
    return x * tw_sigmoid_f64(1.59576912160573071176 * (x + 0.044715 * x * x * x));
}
static inline double tw_remainder_f64(double a, double b) {
    const double r = fmod(a, b);
    return ((r != 0.0) & ((r < 0.0) != (b < 0.0))) ? r + b : r;
}
static inline double tw_floordiv_f64(double a, double b) {
    const double quotient = a / b, r = fmod(a, b);
    double whole = (a - r) / b;
    whole -= ((r != 0.0) & ((r < 0.0) != (b < 0.0))) ? 1.0 : 0.0;
    double down = floor(whole);
    down += whole - down > 0.5 ? 1.0 : 0.0;
    return b == 0.0 ? quotient : whole != 0.0 ? down : __builtin_copysign(0.0, quotient);
}

/* ---- integers: wrap on overflow; division by zero gives 0 (PyTorch raises an error) ---- */

#define TW_INTEGERS(type, unsigned_type, t) \
    static inline type tw_max_##t(type a, type b) { return a > b ? a : b; } \
    static inline type tw_min_##t(type a, type b) { return a < b ? a : b; } \
    static inline type tw_maximum_##t(type a, type b) { return a > b ? a : b; } \
    static inline type tw_minimum_##t(type a, type b) { return a < b ? a : b; } \
    static inline type tw_sign_##t(type x) { return (type)((x > 0) - (x < 0)); } \
    /* towards zero; -1 is taken apart because the smallest integer over -1 traps */ \
    static inline type tw_truncdiv_##t(type a, type b) { \
        const type safe = ((b == 0) | (b == -1)) ? 1 : b, quotient = a / safe; \
        return b == 0 ? 0 : b == -1 ? (type)(0 - (unsigned_type)a) : quotient; \
    } \
    /* with the sign of a */ \
    static inline type tw_fmod_##t(type a, type b) { return ((b == 0) | (b == -1)) ? 0 : a % b; } \
    /* with the sign of b */ \
    static inline type tw_remainder_##t(type a, type b) { \
        const type r = tw_fmod_##t(a, b); \
        return ((r != 0) & ((r < 0) != (b < 0))) ? r + b : r; \
    } \
    static inline type tw_floordiv_##t(type a, type b) { \
        const type r = tw_fmod_##t(a, b), quotient = tw_truncdiv_##t(a, b); \
        return quotient - ((r != 0) & ((r < 0) != (b < 0))); \
    } \
    /* by squaring; a negative exponent gives 0 unless |x| = 1, as in PyTorch */ \
    static inline type tw_pow_##t(type x, type n) { \
        if (n < 0) { \
            return x == 1 ? 1 : x == -1 ? (n & 1 ? -1 : 1) : 0; \
        } \
        unsigned_type result = 1, power = (unsigned_type)x; \
        for (; n > 0; n >>= 1, power *= power) { \
            result *= n & 1 ? power : 1; \
        } \
        return (type)result; \
    }
TW_INTEGERS(int32_t, uint32_t, i32)
TW_INTEGERS(int64_t, uint64_t, i64)
#undef TW_INTEGERS

/* A loaded index. One outside [0, bound) sets *fault and gives 0, so that the kernel stays inside its buffers; the
   caller throws the outputs of a run with a fault away. */
static inline int64_t tw_row_index(int64_t index, int64_t bound, int32_t *fault) {
    const int outside = (uint64_t)index >= (uint64_t)bound;
    if (__builtin_expect(outside, 0)) {
        __atomic_store_n(fault, 1, __ATOMIC_RELAXED);
    }
    return outside ? 0 : index;
}

/* The same, counted from the end where negative. */
static inline int64_t tw_index(int64_t index, int64_t bound, int32_t *fault) {
    return tw_row_index(index < 0 ? index + bound : index, bound, fault);
}

#endif
