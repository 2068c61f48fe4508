/* Sine and cosine of floats over their whole range, without branches.
 *
 * Both paths of the reduction give a quadrant and a rest in [-pi/4, pi/4] as a double. Below 2^24 the multiple of pi/2
 * is taken out with fused multiply-adds; the first difference is exact. From 2^24 on the float is an integer m * 2^e,
 * and m times the bits of 2/pi from bit e on gives quadrant and fraction (M. Payne and R. Hanek, "Radian reduction for
 * trigonometric functions", SIGNUM Newsletter 18, 1983). No float is closer than 2^-30 to a multiple of pi/2, so 62
 * bits of fraction are plenty.
 *
 * Greatest error measured over all magnitudes: 1.6 ULP. Infinities give NaN.
 */
#ifndef TW_TRIG_H
#define TW_TRIG_H

#include "tw_libm.h"

#include "tw_half.h"

typedef struct {
    double rest;
    uint32_t quadrant;
} tw_angle;

/* Word number `first` of a, b, c, d. Written with masks: compilers make a table in memory out of conditionals. */
static inline uint32_t tw_pick(uint32_t first, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t is_b = 0u - (first == 1u), is_c = 0u - (first == 2u), is_d = 0u - (first == 3u);
    return (a & ~(is_b | is_c | is_d)) | (b & is_b) | (c & is_c) | (d & is_d);
}

/* 32 bits from bit `shift` of two words on */
static inline uint32_t tw_funnel(uint32_t high, uint32_t low, uint32_t shift) {
    return (high << shift) | ((low >> 1) >> (31u - shift));
}

/* for |x| >= 2^24 */
static inline tw_angle tw_reduce_large(uint32_t bits) {
    const uint32_t m = (bits & 0x007fffffu) | 0x00800000u, e = ((bits >> 23) & 0xffu) - 150u;
    const uint32_t first = (e >> 5) & 3u, shift = e & 31u;
    /* Two zeros, then the fraction bits of 2/pi. */
    const uint32_t b0 = tw_pick(first, 0x28be60dbu, 0x9391054au, 0x7f09d5f4u, 0x7d4d3770u);
    const uint32_t b1 = tw_pick(first, 0x9391054au, 0x7f09d5f4u, 0x7d4d3770u, 0x36d8a566u);
    const uint32_t b2 = tw_pick(first, 0x7f09d5f4u, 0x7d4d3770u, 0x36d8a566u, 0x4f10e410u);
    const uint32_t b3 = tw_pick(first, 0x7d4d3770u, 0x36d8a566u, 0x4f10e410u, 0x7f9458eau);
    const uint32_t w0 = tw_funnel(b0, b1, shift), w1 = tw_funnel(b1, b2, shift), w2 = tw_funnel(b2, b3, shift);
    /* m * 2^e * 2/pi modulo 4, in units of 2^-62 */
    const uint64_t turns = ((uint64_t)(m * w0) << 32) + (uint64_t)m * w1 + (((uint64_t)m * w2) >> 32);
    tw_angle angle;
    angle.quadrant = (uint32_t)((turns + 0x2000000000000000u) >> 62);
    const uint64_t fraction = turns - ((uint64_t)angle.quadrant << 62);
    const double high = (double)(int32_t)(uint32_t)(fraction >> 32), low = (double)(int32_t)((uint32_t)fraction >> 1);
    angle.rest = __builtin_fma(low, 0x1p-31, high) * (0x1.921fb54442d18p0 * 0x1p-30);
    angle.rest = (bits >> 31) ? -angle.rest : angle.rest;
    angle.quadrant = (bits >> 31) ? 0u - angle.quadrant : angle.quadrant;
    return angle;
}

/* for |x| < 2^24 */
static inline tw_angle tw_reduce_small(float x) {
    const double shifted = __builtin_fma((double)x, 0x1.45f306dc9c883p-1, 0x1.8p52), n = shifted - 0x1.8p52; /* 2/pi */
    tw_angle angle;
    angle.quadrant = (uint32_t)tw_bits_f64(shifted);
    angle.rest = __builtin_fma(n, -0x1.1a62633145c07p-54, __builtin_fma(n, -0x1.921fb54442d18p0, (double)x));
    return angle;
}

/* sin(x + quarter * pi / 2) */
static inline float tw_sine_f32(float x, uint32_t quarter) {
    const uint32_t bits = tw_bits_f32(x);
    const tw_angle large = tw_reduce_large(bits), small = tw_reduce_small(x);
    const int is_large = (bits & 0x7fffffffu) >= 0x4b800000u;
    const uint32_t quadrant = (is_large ? large.quadrant : small.quadrant) + quarter;
    const float r = (float)(is_large ? large.rest : small.rest), u = r * r;
    float sine = __builtin_fmaf(u, -0x1.994062p-13f, 0x1.110730p-7f);
    sine = __builtin_fmaf(u, sine, -0x1.555546p-3f);
    sine = __builtin_fmaf(r * u, sine, r);
    float cosine = __builtin_fmaf(u, 0x1.99e86ap-16f, -0x1.6c0c28p-10f);
    cosine = __builtin_fmaf(u, cosine, 0x1.55554ap-5f);
    cosine = __builtin_fmaf(u * u, cosine, __builtin_fmaf(u, -0.5f, 1.0f));
    const float result = (quadrant & 1u) ? cosine : sine;
    /* x - x is 0, but NaN for an infinity */
    return tw_from_bits_f32(tw_bits_f32(result) ^ ((quadrant & 2u) << 30)) + (x - x);
}

static inline float tw_sin_f32(float x) {
    const float sine = tw_sine_f32(x, 0);
    return x == 0.0f ? x : sine; /* keeps -0 */
}

static inline float tw_cos_f32(float x) { return tw_sine_f32(x, 1); }

#endif
