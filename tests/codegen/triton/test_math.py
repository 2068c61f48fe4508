"""tw_math.py against float64 and higher references: errors in ULP, special values, integers, reductions."""

import math
from itertools import product

import mpmath
import numpy as np
import pytest
import torch

from tilewright.runtime.plan import Tile, TileConstant

SEED = 5
HEAD = "import triton\nimport triton.language as tl\n\nimport tw_math as tw\n\n\n@triton.jit\n"
BLOCK = 4096
INF, NAN = math.inf, math.nan
SPECIALS = [0.0, INF, NAN, 1e-45, 1.1754942e-38, 3.4028235e38, 1.0, 0.5, 2.0, 1e9, 21.5, 22.5]
SPECIALS = np.array(SPECIALS + [-value for value in SPECIALS])


def by_torch(function):
    return lambda x: function(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def sigmoid(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1.0) / (1.0 + np.exp(-np.abs(x)))


# name: (float64 reference, greatest error in ULP as the module states it, range of the uniform samples)
UNARY = {
    "exp": (np.exp, 3, 110),
    "exp2": (np.exp2, 3, 140),
    "expm1": (np.expm1, 5, 90),
    "log": (np.log, 4, 12),
    "log2": (np.log2, 4, 12),
    "log10": (np.log10, 5, 12),
    "log1p": (np.log1p, 5, 12),
    "tanh": (np.tanh, 6, 12),
    "sigmoid": (sigmoid, 4, 80),
    "silu": (lambda x: x * sigmoid(x), 5, 80),
    "softplus": (lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), 5, 80),
    "erf": (by_torch(torch.erf), 2, 4),
    "sin": (np.sin, 2, 100),
    "cos": (np.cos, 2, 100),
    "tan": (np.tan, 5, 100),
    "asin": (np.arcsin, 6, 1.2),
    "acos": (np.arccos, 6, 1.2),
    "atan": (np.arctan, 3, 12),
    "sinh": (np.sinh, 6, 92),
    "cosh": (np.cosh, 5, 92),
    "asinh": (np.arcsinh, 6, 1e4),
    "acosh": (np.arccosh, 6, 1e4),
    "atanh": (np.arctanh, 6, 1.2),
    "sqrt": (np.sqrt, 0.51, 12),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2, 12),
    "floor": (np.floor, 0, 12),
    "ceil": (np.ceil, 0, 12),
    "round": (np.rint, 0, 12),
    "trunc": (np.trunc, 0, 12),
    "sign": (lambda x: np.where(np.isnan(x), 0, np.sign(x)), 0, 12),
}
IN_UNITS_OF_X = {
    "gelu": (by_torch(torch.nn.functional.gelu), 2.0),
    "gelu_tanh": (by_torch(lambda x: torch.nn.functional.gelu(x, approximate="tanh")), 4.0),
}
NAN_FROM_INFINITY = ("silu", "gelu", "gelu_tanh")  # at -infinity, as in PyTorch's own kernels
EXACT = {
    "exp": mpmath.exp, "expm1": mpmath.expm1, "log": mpmath.log, "log10": mpmath.log10, "log1p": mpmath.log1p,
    "tanh": mpmath.tanh, "atan": mpmath.atan, "asin": mpmath.asin, "acos": mpmath.acos, "sinh": mpmath.sinh,
    "cosh": mpmath.cosh, "asinh": mpmath.asinh, "acosh": mpmath.acosh, "atanh": mpmath.atanh, "tan": mpmath.tan,
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)), "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
}  # fmt: skip


def source(call, inputs):
    names = [f"x{position}" for position in range(inputs)]
    loads = "".join(f"    {name} = tl.load({name} + at, mask=at < n, other=1)\n" for name in names)
    return (
        f"{HEAD}def k({', '.join(names)}, y, n, BLOCK: tl.constexpr):\n"
        f"    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n{loads}"
        f"    tl.store(y + at, {call}, mask=at < n)\n"
    )


@pytest.fixture
def call(interpret):
    """``call("tw.exp(x0)", x)``: the function of arrays, element by element."""

    def run(text, *arrays, dtype=None):
        arrays = [np.ascontiguousarray(array) for array in np.broadcast_arrays(*arrays)]
        out = np.empty(arrays[0].shape, dtype or arrays[0].dtype)
        grid = -(-out.size // BLOCK)
        return interpret(source(text, len(arrays)), "k", [*arrays, out], [out.size], {"BLOCK": BLOCK}, grid)[-1]

    return run


def floats(dtype, width, count=8000):
    """Every magnitude there is, the range where the function bends, and the specials."""
    generator = np.random.default_rng(SEED)
    if dtype == np.float32:
        bits = generator.integers(0, 1 << 32, count, np.uint32).view(np.float32)
    else:
        bits = np.exp2(generator.uniform(-300, 300, count)) * generator.choice([-1, 1], count)
    near = [generator.uniform(-w, w, count).astype(dtype) for w in (1.0, width)]
    return np.concatenate([bits, *near, SPECIALS]).astype(dtype)


def ulps(got, exact):
    """Error in units of the last place of the rounded exact value; equal infinities and NaNs count as 0."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(got.dtype)
        info = np.finfo(got.dtype)
        finite = np.isfinite(rounded) & np.isfinite(got)
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        # Next to the greatest float an error of an ULP may also round to infinity, and subnormal results may be 0.
        same |= (np.abs(exact) > info.max * (1 - 3e-7)) & (np.abs(got) > info.max * (1 - 1e-6)) & (exact * got > 0)
        same |= (np.abs(exact) < info.tiny * 4) & (np.abs(got) < info.tiny * 4)
        spacing = np.spacing(np.abs(np.where(finite, rounded, 1))).astype(exact.dtype)
        error = np.abs(got.astype(exact.dtype) - np.where(finite, exact, 0)) / spacing
    return np.where(same, 0, np.where(finite, error, np.inf)).astype(np.float64)


@pytest.mark.parametrize("name", UNARY)
def test_error_in_ulp(call, name):
    reference, bound, width = UNARY[name]
    x = floats(np.float32, width)
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
        if name in NAN_FROM_INFINITY:
            exact[np.isneginf(x)] = NAN
    got = call(f"tw.{name}(x0)", x)
    if name in ("sigmoid", "silu"):  # where exp(-x) is infinite the result is 0
        tail = (x < -88) & np.isfinite(x)
        assert np.abs(got[tail]).max() < 1e-30
        got[tail] = exact[tail]
    error = ulps(got, exact)
    worst = int(error.argmax())
    assert error[worst] <= bound, (SEED, x[worst], got[worst], exact[worst])


@pytest.mark.parametrize("name", EXACT)
def test_error_in_ulp_of_float64(call, name):
    bound, width = UNARY[name][1:]
    generator = np.random.default_rng(SEED)
    x = np.concatenate([generator.uniform(-w, w, 300) for w in (1.0, min(width, 30))])
    domain = {"log": (0, INF), "log10": (0, INF), "log1p": (-1, INF), "acosh": (1, INF)}
    low, high = domain.get(name, (-1, 1) if name in ("asin", "acos", "atanh") else (-INF, INF))
    x = x[(x > low) & (x < high)]
    got = call(f"tw.{name}(x0)", x)
    with mpmath.workdps(40):
        error = [
            abs(mpmath.mpf(y) - EXACT[name](mpmath.mpf(value))) / mpmath.mpf(np.spacing(abs(y)))
            for value, y in zip(x.tolist(), got.tolist(), strict=True)
        ]
    worst = int(np.argmax(np.array(error, np.float64)))
    assert error[worst] <= bound, (SEED, x[worst], got[worst])


@pytest.mark.parametrize("name", IN_UNITS_OF_X)
def test_error_of_gelu(call, name):
    """Cancellation makes the relative error of the left tail meaningless: errors count in units of x."""
    reference, bound = IN_UNITS_OF_X[name]
    for dtype, unit in ((np.float32, 2.0**24), (np.float64, 2.0**52)):
        x = floats(dtype, 6)
        x = x[np.isfinite(x) & (np.abs(x) > 1e-37) & (np.abs(x) < 1e37)]
        error = np.abs(call(f"tw.{name}(x0)", x).astype(np.float64) - reference(x.astype(np.float64))) / np.abs(x)
        worst = int(error.argmax())
        assert error[worst] * unit <= bound, (SEED, dtype, x[worst])
    got = call(f"tw.{name}(x0)", np.array([NAN, INF, -INF, 0.0, -0.0, -1000.0], np.float32))
    assert math.isnan(got[0]) and got[1] == INF and math.isnan(got[2]) and list(got[3:]) == [0, 0, 0]


def test_signs_of_zeros(call):
    x = np.array([0.0, -0.0], np.float32)
    for name in ("expm1", "log1p", "tanh", "erf", "sin", "sqrt", "silu", "floor", "ceil", "round", "trunc", "asinh"):
        assert list(np.signbit(call(f"tw.{name}(x0)", x))) == [False, True], name
    assert np.signbit(call("tw.round(x0)", np.array([-0.3], np.float32)))[0]


def test_sine_far_out(call):
    """Floats that come very close to multiples of pi/2, and powers of two up to the greatest."""
    x = np.float32(math.pi / 2) * np.arange(1, 20_000, dtype=np.float32)
    hard = np.array([16367173 * 2.0**72, 6381956970095103 * 2.0**-20, 1.6e38, 2.0**127], np.float32)
    for name, exact in (("sin", np.sin), ("cos", np.cos)):
        for values in (x, hard, -hard):
            assert ulps(call(f"tw.{name}(x0)", values), exact(values.astype(np.float64))).max() <= 2


def pairs(values):
    a, b = (part.ravel() for part in np.meshgrid(values, values))
    return a, b


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_atan2(call, dtype):
    generator = np.random.default_rng(SEED)
    y, x = generator.standard_normal((2, 4000)).astype(dtype)
    specials = pairs(np.array([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN], dtype))
    for a, b in ((y, x), (y * 1e6, x), (y, x * 1e6), specials):
        exact = np.arctan2(a.astype(np.longdouble), b.astype(np.longdouble))
        got = call("tw.atan2(x0, x1)", a, b)
        assert ulps(got, exact).max() <= 4, SEED
        assert (np.signbit(got) == np.signbit(exact))[~np.isnan(exact)].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pow(call, dtype):
    generator = np.random.default_rng(SEED)
    base = np.concatenate([np.exp(generator.uniform(-80, 80, 3000)), generator.uniform(0, 3, 3000)]).astype(dtype)
    exponent = np.concatenate([generator.uniform(-3, 3, 3000), generator.uniform(-150, 150, 3000)]).astype(dtype)
    base[::5] *= -1
    exponent[::3] = np.rint(exponent[::3])
    grid = np.meshgrid(np.append(SPECIALS, [-3, 7]), np.append(SPECIALS, [3, -3, 4, 2.5, 2**24]))
    x, y = (part.ravel().astype(dtype) for part in grid)
    for a, b in ((base, exponent), (x, y)):
        with np.errstate(all="ignore"):
            exact = np.power(a.astype(np.longdouble), b.astype(np.longdouble))
            size = np.abs(np.log(np.abs(exact))).astype(np.float64)
        got = call("tw.pow(x0, x1)", a, b)
        bound = 1 if dtype == np.float32 else 2 * np.where(np.isfinite(size), size, 1500) + 3
        error = ulps(got, exact)
        if dtype == np.float64:  # overflow is where the exponential overflows
            error[(np.abs(exact) > 1e300) & (np.abs(got) > 1e300)] = 0
            error[(np.abs(exact) < 1e-300) & (np.abs(got) < 1e-300)] = 0
        worst = int((error - bound).argmax())
        assert (error <= bound).all(), (SEED, a[worst], b[worst], got[worst], exact[worst])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_floats_match_torch(call, dtype):
    generator = np.random.default_rng(SEED)
    a = (generator.standard_normal(3000) * 100).astype(dtype)
    b = np.where(generator.random(3000) < 0.3, generator.integers(-5, 6, 3000), a[::-1] / 7).astype(dtype)
    x, y = pairs(SPECIALS.astype(dtype))
    a, b = np.concatenate([a, x]), np.concatenate([b, y])
    with np.errstate(all="ignore"):
        # Where a / b overflows PyTorch's vector code gives NaN, while its scalar code and this are exact.
        used = np.isfinite(a / b) | ~np.isfinite(a) | ~np.isfinite(b) | (b == 0)
    reference = {
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "fmod": torch.fmod,
        "remainder": torch.remainder,
        "floordiv": torch.floor_divide,
    }
    for name, function in reference.items():
        keep = used if name not in ("maximum", "minimum") else np.ones_like(used)
        expected = function(torch.from_numpy(a[keep]), torch.from_numpy(b[keep])).numpy()
        np.testing.assert_array_equal(call(f"tw.{name}(x0, x1)", a[keep], b[keep]), expected, err_msg=name)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int8])
def test_integers_match_torch(call, dtype):
    info = np.iinfo(dtype)
    edges = np.array([info.min, info.min + 1, -7, -2, -1, 1, 2, 3, 7, info.max], dtype)
    a, b = (part.ravel() for part in np.meshgrid(np.append(edges, 0).astype(dtype), edges))
    reference = {
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "fmod": torch.fmod,
        "remainder": torch.remainder,
        "floordiv": torch.floor_divide,
        "truncdiv": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    }
    wraps = (a == info.min) & (b == -1)
    for name, function in reference.items():
        got = call(f"tw.{name}(x0, x1)", a, b)
        expected = function(torch.from_numpy(a[~wraps]), torch.from_numpy(b[~wraps])).numpy()
        np.testing.assert_array_equal(got[~wraps], expected, err_msg=name)
        if name in ("floordiv", "truncdiv"):
            assert (got[wraps] == info.min).all()
        by_zero = call(f"tw.{name}(x0, x1)", edges, edges * 0)
        assert name in ("maximum", "minimum") or (by_zero == 0).all()
    np.testing.assert_array_equal(call("tw.sign(x0)", edges), np.sign(edges))
    exponent = np.arange(-3, 20, dtype=dtype)
    for base in (-3, -1, 0, 1, 2, 10):
        bases = np.full(23, base, dtype)
        expected = torch.pow(torch.from_numpy(bases), torch.from_numpy(exponent)).numpy()
        got = call("tw.pow(x0, x1)", bases, exponent)
        np.testing.assert_array_equal(got[exponent >= 0], expected[exponent >= 0])
        assert list(got[:3]) == {1: [1, 1, 1], -1: [-1, 1, -1]}.get(base, [0, 0, 0])


def test_indices_divide_downwards(call):
    a = np.arange(-20, 20, dtype=np.int64)
    for b in (1, 3, 7):
        divisor = np.full_like(a, b)
        np.testing.assert_array_equal(call("tw.index_floordiv(x0, x1)", a, divisor), a // b)
        np.testing.assert_array_equal(call("tw.index_mod(x0, x1)", a, divisor), a % b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conversion_to_integers(call, dtype):
    x = np.array([0, 0.9, -0.9, 2.5, -2.5, 1e9, -1e9, 2**31, -(2**31), 1e18, -1e18, 1e19, -1e19, NAN, INF, -INF], dtype)
    for target in (torch.int64, torch.int32):
        got = call(f"tw.to_int(x0, tl.{str(target)[6:]})", x, dtype=str(target)[6:])
        info = torch.iinfo(target)
        fits = np.isfinite(x) & (x >= info.min) & (x < -float(info.min))
        np.testing.assert_array_equal(got[fits], torch.from_numpy(x[fits]).to(target).numpy())
        assert (got[~fits] == info.min).all()
    np.testing.assert_array_equal(
        call("tw.to_int(x0, tl.int8)", np.array([3.9, -3.9, 200], dtype), dtype=np.int8), [3, -3, -56]
    )


REDUCE = HEAD + (
    "def k(x, y, R: tl.constexpr):\n"
    "    rows, columns = tl.arange(0, 8)[:, None], tl.arange(0, R)[None, :]\n"
    "    tl.store(y + rows, %s)\n"
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32])
def test_reductions(interpret, dtype):
    generator = np.random.default_rng(SEED)
    x = generator.integers(-3, 4, (8, 32)).astype(dtype)
    x[1] = 0
    x[3, 5:] = 1
    if np.issubdtype(dtype, np.floating):
        x[4, 7] = x[4, 9] = NAN
        x[5, 3] = INF
        x[6] = -INF
    given = torch.from_numpy(x)
    wanted = {
        "sum": given.sum(1), "prod": given.prod(1), "max": given.amax(1), "min": given.amin(1),
        "any": (given != 0).any(1), "all": (given != 0).all(1), "argmax": given.argmax(1), "argmin": given.argmin(1),
    }  # fmt: skip
    for name, expected in wanted.items():
        arguments = "tl.load(x + rows * R + columns)" + (", columns" if name.startswith("arg") else "")
        out = np.zeros((8, 1), expected.numpy().dtype)
        got = interpret(REDUCE % f"tw.reduce_{name}({arguments})", "k", [x, out], (), {"R": 32})[1]
        np.testing.assert_array_equal(got[:, 0], expected.numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dot(interpret, dtype):
    import ml_dtypes

    text = HEAD + (
        "def k(a, b, y):\n"
        "    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]\n"
        "    acc = tl.full((16, 16), 1.0, tl.float32)\n"
        '    tl.store(y + i * 16 + j, tw.dot(tl.load(a + i * 16 + j), tl.load(b + i * 16 + j), acc, "ieee"))\n'
    )
    kind = getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype
    a, b = np.random.default_rng(SEED).standard_normal((2, 16, 16)).astype(kind)
    got = interpret(text, "k", [a, b, np.zeros((16, 16), np.float32)])[2]
    np.testing.assert_allclose(got, a.astype(np.float64) @ b.astype(np.float64) + 1, rtol=1e-5, atol=1e-5)


CALLS = [f"tw.{name}(x0)" for name in [*UNARY, *IN_UNITS_OF_X]]
CALLS2 = [f"tw.{name}(x0, x1)" for name in ("pow", "atan2", "maximum", "minimum", "fmod", "remainder", "floordiv")]


@pytest.mark.parametrize(("arch", "kind"), list(product(["sm_80", "sm_90"], ["fp32", "fp64", "i64"])))
def test_compiles(compile_cubin, arch, kind):
    """Every function, in one kernel per dtype."""
    if kind == "i64":
        names = ("maximum", "minimum", "fmod", "remainder", "floordiv", "truncdiv", "pow")
        terms = ["tw.sign(x0)", *(f"tw.{name}(x0, x1)" for name in names)]
    else:
        terms = [*CALLS, *CALLS2, "tw.to_int(x0, tl.int64)", "tw.to_int(x0, tl.int32)"]
    lines = "".join(f"    tl.store(y + at, tl.load(y + at) + {term})\n" for term in terms)
    rows = "tl.broadcast_to(x0[:, None], (BLOCK, 16)) + tl.arange(0, 16)[None, :].to(x0.dtype)"
    for name in ("sum", "prod", "max", "min", "any", "all", "argmax", "argmin"):
        more = ", tl.arange(0, 16)[None, :]" if name.startswith("arg") else ""
        lines += f"    tl.store(y + at[:, None], tw.reduce_{name}({rows}{more}).to(x0.dtype))\n"
    text = (
        f"{HEAD}def k(x, y, n, BLOCK: tl.constexpr):\n    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        f"    x0 = tl.load(x + at)\n    x1 = tl.load(x + n + at)\n{lines}"
    )
    tile = Tile("128", (TileConstant("BLOCK", 128),), warps=4, stages=1)
    compile_cubin(text, "k", (f"*{kind}", f"*{kind}", "i32"), tile, arch)
