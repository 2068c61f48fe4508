# ruff: noqa: D403, SIM108, SIM300 - conditions on types are statements in Triton
"""Functions that kernels in Triton call as ``tw.*``: elementary functions, integer arithmetic, reductions, products.

They take and give blocks (or scalar tensors); floating-point ones work in float32 and float64, by the dtype of what
they are given. NaN, infinities and the signs of zeros come out as in PyTorch unless a comment says otherwise. The same
code runs compiled and interpreted: it is built on the primitives of ``tl.math`` alone, which the compiler turns into
the device's own instructions (``tl.exp`` of float32 is then fast: its relative error grows by 2^-24 |x|).

"ULP" is the greatest error in units of the last place that tests/codegen/triton/test_math.py allows, with primitives as
numpy computes them (up to 3 ULP in ``exp``, 4 in ``log``). Subnormal results may be 0.
"""

import triton
import triton.language as tl

# ---- exponentials and logarithms ----


@triton.jit
def exp(x):
    """3 ULP."""
    return tl.exp(x)


@triton.jit
def exp2(x):
    """3 ULP."""
    return tl.exp2(x)


@triton.jit
def expm1(x):
    """5 ULP. (u - 1) x / log(u) at u = exp(x) as it was rounded (W. Kahan; Higham, "Accuracy and Stability", 1.14.1).

    What an approximate exponential loses cancels.
    """
    u = tl.exp(x)
    return tl.where(
        u == 1.0, x, tl.where((u - 1.0 == -1.0) | (u == float("inf")), u - 1.0, (u - 1.0) * (x / tl.log(u)))
    )


@triton.jit
def log(x):
    """4 ULP."""
    return tl.log(x)


@triton.jit
def log2(x):
    """4 ULP."""
    return tl.log2(x)


@triton.jit
def log10(x):
    """5 ULP."""
    return tl.log(x) * 0.43429448190325182765


@triton.jit
def log1p(x):
    """5 ULP: log(u) x / (u - 1) at u = 1 + x as it was rounded, as in :func:`expm1`."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (u - 1.0))))


# ---- sigmoids ----


@triton.jit
def _with_sign_of(x, magnitude):
    """The magnitude of an odd function of x, with x's sign; a zero and NaN as x is."""
    return tl.where(x > 0, magnitude, tl.where(x < 0, -magnitude, x))


@triton.jit
def tanh(x):
    """6 ULP: e / (e + 2) at e = expm1(2 |x|)."""
    a = tl.abs(x)
    e = expm1(2.0 * tl.where(a > 22.0, 22.0, a))
    return _with_sign_of(x, e / (e + 2.0))


@triton.jit
def sigmoid(x):
    """4 ULP."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    """5 ULP. NaN at -infinity, as in PyTorch."""
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), 5 ULP."""
    return tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def erf(x):
    """2 ULP."""
    return tl.erf(x)


@triton.jit
def gelu(x):
    """x Phi(x), Phi the normal distribution function. The error is below 2 units of x * 2^-24 (float64: x * 2^-53)."""
    return (0.5 * x) * (1.0 + tl.erf(x * 0.70710678118654752440))


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 as x sigmoid(2 ...). The error is below 4 units of x * 2^-24."""
    return x * sigmoid(x * (x * x * 0.0713548162726002488 + 1.59576912160573071176))


# ---- circular and hyperbolic functions ----


@triton.jit
def _word_of_two_over_pi(first, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Word number ``first`` of four."""
    a, b = tl.full((), A, tl.uint32), tl.full((), B, tl.uint32)
    c, d = tl.full((), C, tl.uint32), tl.full((), D, tl.uint32)
    return tl.where(first == 1, b, tl.where(first == 2, c, tl.where(first == 3, d, a)))


@triton.jit
def _turns_of_large(x):
    """Quadrant and rest in [-pi/4, pi/4] of a float32 x of at least 2^24, an integer m * 2^e.

    m times the bits of 2/pi from bit e on gives quadrant and fraction (M. Payne and R. Hanek, "Radian reduction for
    trigonometric functions", SIGNUM Newsletter 18, 1983). No float32 is closer than 2^-30 to a multiple of pi/2.
    """
    bits = x.to(tl.uint32, bitcast=True)
    m = (bits & 0x007FFFFF) | 0x00800000
    e = ((bits >> 23) & 0xFF) - 150
    first, shift = (e >> 5) & 3, e & 31
    b0 = _word_of_two_over_pi(first, 0x28BE60DB, 0x9391054A, 0x7F09D5F4, 0x7D4D3770)
    b1 = _word_of_two_over_pi(first, 0x9391054A, 0x7F09D5F4, 0x7D4D3770, 0x36D8A566)
    b2 = _word_of_two_over_pi(first, 0x7F09D5F4, 0x7D4D3770, 0x36D8A566, 0x4F10E410)
    b3 = _word_of_two_over_pi(first, 0x7D4D3770, 0x36D8A566, 0x4F10E410, 0x7F9458EA)
    w0 = (b0 << shift) | ((b1 >> 1) >> (31 - shift))
    w1 = (b1 << shift) | ((b2 >> 1) >> (31 - shift))
    w2 = (b2 << shift) | ((b3 >> 1) >> (31 - shift))
    wide = m.to(tl.uint64)
    # m * 2^e * 2/pi modulo 4, in units of 2^-62
    turns = ((m * w0).to(tl.uint64) << 32) + wide * w1 + ((wide * w2) >> 32)
    quadrant = (turns + 0x2000000000000000) >> 62
    fraction = (turns - (quadrant << 62)).to(tl.int64, bitcast=True)
    rest = fraction.to(tl.float64) * 3.4061215800865545e-19
    quadrant = quadrant.to(tl.int32)
    return tl.where(x < 0, -quadrant, quadrant), tl.where(x < 0, -rest, rest)


@triton.jit
def _turns(x):
    """Quadrant and rest (in float32) of a float32 angle. Infinities give NaN."""
    is_large = tl.abs(x) >= 16777216.0
    wide = tl.where(is_large, 0.0, x).to(tl.float64)
    n = tl.floor(wide * 0.63661977236758134308 + 0.5)
    high = tl.full((), -1.5707963267948966192, tl.float64)  # a plain literal is float32 to fma in Triton 3.6
    low = tl.full((), -6.1232339957367658e-17, tl.float64)
    near = tl.fma(n, low, tl.fma(n, high, wide))
    quadrant, far = _turns_of_large(x)
    rest = tl.where(is_large, far, near).to(tl.float32)
    return tl.where(is_large, quadrant, n.to(tl.int32)), rest + (x - x)


@triton.jit
def _sine_and_cosine(r):
    """Of an angle in [-pi/4, pi/4], in float32: minimax polynomials."""
    u = r * r
    p = (u * -0.0001951463200384751 + 0.008332155644893646) * u - 0.16666655242443085
    q = (u * 2.443241282890085e-05 - 0.0013887309469282627) * u + 0.04166664555668831
    return (r * u) * p + r, (u * u) * q + (1.0 - 0.5 * u)


@triton.jit
def _sine(x, QUARTERS: tl.constexpr):
    """The sine of x + QUARTERS pi / 2 in float32."""
    quadrant, rest = _turns(x)
    quadrant += QUARTERS
    sine, cosine = _sine_and_cosine(rest)
    result = tl.where((quadrant & 1) != 0, cosine, sine)
    return tl.where((quadrant & 2) != 0, -result, result)


@triton.jit
def sin(x):
    """2 ULP, over the whole range."""
    if x.dtype == tl.float64:
        result = tl.sin(x)
    else:
        result = tl.where(x == 0, x, _sine(x, 0))
    return result


@triton.jit
def cos(x):
    """2 ULP, over the whole range."""
    if x.dtype == tl.float64:
        result = tl.cos(x)
    else:
        result = _sine(x, 1)
    return result


@triton.jit
def tan(x):
    """5 ULP."""
    if x.dtype == tl.float64:
        result = tl.sin(x) / tl.cos(x)
    else:
        quadrant, rest = _turns(x)
        sine, cosine = _sine_and_cosine(rest)
        odd = (quadrant & 1) != 0
        result = tl.where(odd, -cosine, sine) / tl.where(odd, sine, cosine)
        result = tl.where(x == 0, x, result)
    return result


@triton.jit
def _atan_of_ratio(t):
    """The arc tangent of t in [0, 1]: pi/4 is taken out above tan(pi/8), the rest is t + t^3 P(t^2), a minimax fit."""
    far = t > 0.41421356237309504880
    t = tl.where(far, (t - 1.0) / (t + 1.0), t)
    u = t * t
    if t.dtype == tl.float64:
        p = u * 0.016328506286643123176 - 0.034611000560559576849
        p = u * p + 0.045532452048534890037
        p = u * p - 0.052308356795052598269
        p = u * p + 0.058789836831014696811
        p = u * p - 0.066664299230605112899
        p = u * p + 0.076922966730710819353
        p = u * p - 0.090909087644963191056
        p = u * p + 0.11111111105392154063
        p = u * p - 0.14285714285662441864
        p = u * p + 0.19999999999999815792
        p = u * p - 0.33333333333333333225
    else:
        p = u * -0.064666275181197430216 + 0.10748795321470029149
        p = u * p - 0.14264501207785886847
        p = u * p + 0.19999559327934911884
        p = u * p - 0.33333331863442816986
    near = (t * u) * p + t
    return tl.where(far, near + 0.78539816339744830962, near)


@triton.jit
def atan(x):
    """3 ULP."""
    a = tl.abs(x)
    angle = _atan_of_ratio(tl.where(a > 1.0, 1.0 / a, a))
    return _with_sign_of(x, tl.where(a > 1.0, 1.57079632679489661923 - angle, angle))


@triton.jit
def _is_negative(x):
    """Whether the sign bit is set: -0 is negative."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return bits < 0


@triton.jit
def atan2(y, x):
    """4 ULP; zeros and infinities as in C."""
    a, b = tl.abs(y), tl.abs(x)
    small, large = tl.where(a < b, a, b), tl.where(a < b, b, a)
    t = tl.where(large == 0, 0.0, tl.where(small == large, 1.0, small / large))
    angle = _atan_of_ratio(tl.where(small == small, t, small))
    angle = tl.where(a > b, 1.57079632679489661923 - angle, angle)
    angle = tl.where(_is_negative(x), 3.14159265358979323846 - angle, angle)
    return tl.where(_is_negative(y), angle * -1.0, angle)  # in Triton 3.6, -x is 0 - x, which loses the sign of 0


@triton.jit
def asin(x):
    """6 ULP."""
    return atan2(x, sqrt((1.0 - x) * (1.0 + x)))


@triton.jit
def acos(x):
    """6 ULP."""
    return atan2(sqrt((1.0 - x) * (1.0 + x)), x)


@triton.jit
def sinh(x):
    """6 ULP."""
    a = tl.abs(x)
    e = expm1(a)
    half = tl.exp(0.5 * a)
    return _with_sign_of(x, tl.where(a > 22.0, (0.5 * half) * half, 0.5 * (e + e / (e + 1.0))))


@triton.jit
def cosh(x):
    """5 ULP."""
    half = tl.exp(0.5 * tl.abs(x))
    square = half * half
    return tl.where(square > 1e18, (0.5 * half) * half, 0.5 * square + 0.5 / square)


@triton.jit
def asinh(x):
    """6 ULP."""
    a = tl.abs(x)
    near = tl.where(a > 1e9, 1.0, a)
    square = near * near
    result = log1p(near + square / (1.0 + sqrt(square + 1.0)))
    return _with_sign_of(x, tl.where(a > 1e9, tl.log(a) + 0.69314718055994530942, result))


@triton.jit
def acosh(x):
    """6 ULP."""
    t = tl.where(x > 1e9, 1.0, x) - 1.0
    root = tl.where(x < 1.0, float("nan"), sqrt(t * (t + 2.0)))
    return tl.where(x > 1e9, tl.log(x) + 0.69314718055994530942, log1p(t + root))


@triton.jit
def atanh(x):
    """6 ULP."""
    a = tl.abs(x)
    return _with_sign_of(x, 0.5 * log1p(2.0 * a / (1.0 - a)))


# ---- powers and roots ----


@triton.jit
def sqrt(x):
    """0.5 ULP."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def rsqrt(x):
    """2 ULP."""
    return tl.rsqrt(x)


@triton.jit
def _power(x, y):
    """|x|^y in float64: the relative error is 2^-52 times the logarithm of the result."""
    return tl.exp(y * tl.log(tl.abs(x)))


@triton.jit
def _pow_float(x, y):
    """1 ULP in float32, computed in float64; in float64 as :func:`_power`. Every special case of C's pow."""
    magnitude = _power(x.to(tl.float64), y.to(tl.float64)).to(x.dtype)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(0.5 * y) != 0.5 * y)
    infinite = tl.abs(y) == float("inf")
    result = tl.where(_is_negative(x) & odd & (infinite == 0), -magnitude, magnitude)
    result = tl.where((x < 0) & (x > float("-inf")) & (whole == 0), float("nan"), result)
    return tl.where((x == 1.0) | (y == 0.0) | ((x == -1.0) & infinite), 1.0, result)


@triton.jit
def _pow_int(x, y):
    """By squaring, wrapping on overflow. A negative exponent gives 0 unless |x| = 1, as in PyTorch."""
    n = tl.where(y < 0, 0, y)
    result = (x * 0 + y * 0) + 1
    power = result * x
    for _ in range(0, 63):
        result = tl.where((n & 1) != 0, result * power, result)
        power = power * power
        n = n >> 1
    ones = tl.where(x == 1, 1, tl.where(x == -1, tl.where((y & 1) != 0, -1, 1), 0))
    return tl.where(y < 0, ones.to(result.dtype), result)


@triton.jit
def pow(x, y):
    """x to the y: :func:`_pow_float` or :func:`_pow_int`."""
    if x.dtype.is_floating():
        result = _pow_float(x, y)
    else:
        result = _pow_int(x, y)
    return result


# ---- rounding and comparing: exact ----


@triton.jit
def floor(x):
    """The largest integer that is not above."""
    return tl.floor(x)


@triton.jit
def ceil(x):
    """The least integer that is not below."""
    return tl.ceil(x)


@triton.jit
def trunc(x):
    """Towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round(x):
    """To the nearest integer, halves to the even one."""
    low = tl.floor(x)
    rest = x - low
    odd = tl.floor(0.5 * low) != 0.5 * low
    up = (rest > 0.5) | ((rest == 0.5) & odd)
    result = tl.where(up, low + 1.0, low)
    return tl.where(result == 0, x * 0.0, result)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in PyTorch."""
    return ((x > 0).to(tl.int32) - (x < 0).to(tl.int32)).to(x.dtype)


@triton.jit
def maximum(a, b):
    """NaN if either is."""
    if a.dtype.is_floating():
        result = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif a.dtype == tl.int1:
        result = a | b
    else:
        result = tl.where(a > b, a, b)
    return result


@triton.jit
def minimum(a, b):
    """NaN if either is."""
    if a.dtype.is_floating():
        result = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif a.dtype == tl.int1:
        result = a & b
    else:
        result = tl.where(a < b, a, b)
    return result


# ---- division ----


@triton.jit
def _rest(a, b, STEPS: tl.constexpr):
    """|a| modulo |b| in float64, exact: each step takes up to 53 bits of the quotient away."""
    a, b = tl.abs(a), tl.abs(b)
    rest = a + b * 0.0
    for _ in range(0, STEPS):
        quotient = rest / b
        rest = tl.fma(-tl.where(quotient < 0, tl.ceil(quotient), tl.floor(quotient)), b, rest)
    rest = tl.where(rest < 0, rest + b, rest)
    rest = tl.where(rest >= b, rest - b, rest)
    return tl.where((b == float("inf")) & (a < float("inf")), a, rest)


@triton.jit
def fmod(a, b):
    """The remainder of the division rounded towards zero, with the sign of a.

    Floating-point ones are exact while the quotient is below 2^300; an integer modulo 0 is 0.
    """
    if a.dtype.is_floating():
        rest = _rest(a.to(tl.float64), b.to(tl.float64), 6).to(a.dtype)
        result = tl.where(_is_negative(a), -rest, rest)
    else:
        result = tl.where((b == 0) | (b == -1), 0, a % tl.where((b == 0) | (b == -1), 1, b)).to(a.dtype)
    return result


@triton.jit
def remainder(a, b):
    """a - b floor(a / b), with the sign of b."""
    rest = fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def truncdiv(a, b):
    """The integer quotient rounded towards zero; 0 where b is 0, and the smallest integer over -1 wraps."""
    quotient = a // tl.where((b == 0) | (b == -1), 1, b)
    return tl.where(b == 0, 0, tl.where(b == -1, -a, quotient)).to(a.dtype)


@triton.jit
def _floordiv_float(a, b):
    """The floor of the exact quotient (rounding a / b first can give one too many), as ``torch.floor_divide``."""
    quotient = a / b
    rest = fmod(a, b)
    whole = (a - rest) / b
    whole = tl.where((rest != 0) & ((rest < 0) != (b < 0)), whole - 1.0, whole)
    down = tl.floor(whole)
    down = tl.where(whole - down > 0.5, down + 1.0, down)
    return tl.where(b == 0, quotient, tl.where(whole != 0, down, quotient * 0.0))


@triton.jit
def floordiv(a, b):
    """The quotient rounded down."""
    if a.dtype.is_floating():
        result = _floordiv_float(a, b)
    else:
        rest = fmod(a, b)
        result = truncdiv(a, b) - ((rest != 0) & ((rest < 0) != (b < 0))).to(a.dtype)
    return result


@triton.jit
def index_floordiv(a, b):
    """The floor of an index over a positive number; the index may be negative."""
    quotient = a // b
    return quotient - (a < quotient * b).to(tl.int32)


@triton.jit
def index_mod(a, b):
    """The remainder of :func:`index_floordiv`."""
    rest = a % b
    return tl.where(rest < 0, rest + b, rest)


@triton.jit
def to_int(x, DTYPE: tl.constexpr):
    """Towards zero; NaN and what 64 (for int32: 32) bits do not hold give the smallest integer, as on a CPU."""
    if DTYPE == tl.int32:
        fits = (x > -2147483904.0) & (x < 2147483648.0) & (tl.abs(x) < 2147483649.0)
        if x.dtype == tl.float64:
            fits = (x > -2147483649.0) & (x < 2147483648.0)
        result = tl.where(fits, tl.where(fits, x, 0.0).to(tl.int32), -2147483648)
    else:
        fits = (x >= -9223372036854775808.0) & (x < 9223372036854775808.0)
        result = tl.where(fits, tl.where(fits, x, 0.0).to(tl.int64), -9223372036854775808)
    return result.to(DTYPE)


# ---- reductions of a block [rows, columns] over its columns, to [rows, 1] ----


@triton.jit
def _product_of(a, b):
    return a * b


@triton.jit
def reduce_sum(x):
    """The sum."""
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def reduce_prod(x):
    """The product."""
    return tl.reduce(x, 1, _product_of, keep_dims=True)


@triton.jit
def reduce_max(x):
    """The maximum, NaN if there is one."""
    return tl.reduce(x, 1, maximum, keep_dims=True)


@triton.jit
def reduce_min(x):
    """The minimum, NaN if there is one."""
    return tl.reduce(x, 1, minimum, keep_dims=True)


@triton.jit
def reduce_any(x):
    """Whether one is not 0."""
    return tl.max((x != 0).to(tl.int32), 1, keep_dims=True) != 0


@triton.jit
def reduce_all(x):
    """Whether none is 0."""
    return tl.min((x != 0).to(tl.int32), 1, keep_dims=True) != 0


@triton.jit
def _first_of(x, best, position):
    """The least position of what is the best, or NaN."""
    found = (x == best) | (x != x)
    last = tl.full((1, 1), 4611686018427387904, tl.int64)
    return tl.min(tl.where(found, position.to(tl.int64), last), 1, keep_dims=True)


@triton.jit
def reduce_argmax(x, position):
    """The position of the first NaN, else of the first maximum, as int64; ``position`` broadcasts to x."""
    return _first_of(x, reduce_max(x), position)


@triton.jit
def reduce_argmin(x, position):
    """The position of the first NaN, else of the first minimum, as int64; ``position`` broadcasts to x."""
    return _first_of(x, reduce_min(x), position)


# ---- products ----


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """acc + a @ b; ``precision`` is how float32 is multiplied: ``"ieee"`` or ``"tf32"``.

    The interpreter converts the operands to the accumulator's dtype first, so its products are exact.
    """
    return tl.dot(a, b, acc, input_precision=precision, out_dtype=acc.dtype)
