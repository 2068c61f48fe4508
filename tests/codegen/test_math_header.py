"""tw_math.h against float64 references: errors in ULP, special values, integers, conversions, vectorisation."""

import math
import subprocess

import numpy as np
import pytest
import torch

from tilewright.codegen.c.toolchain import COMPILE_FLAGS, INCLUDE_DIRECTORY, find_compiler
from tilewright.codegen.targets import parse

TARGETS = [("v3", "gcc"), ("v4", "gcc"), ("v4", "zig")]
INF, NAN = math.inf, math.nan
SPECIALS = np.array([0.0, INF, NAN, 1e-45, 1.1754942e-38, 3.4028235e38, 1.0, 0.5, 2.0], np.float32)
SPECIALS = np.concatenate([SPECIALS, -SPECIALS])


def by_torch(function):
    return lambda x: function(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def sigmoid(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1.0) / (1.0 + np.exp(-np.abs(x)))


# name: (float64 reference, greatest error in ULP as the header states it)
UNARY = {
    "exp": (np.exp, 1.0),
    "exp2": (np.exp2, 1.0),
    "expm1": (np.expm1, 1.5),
    "log": (np.log, 1.0),
    "log2": (np.log2, 1.5),
    "log10": (np.log10, 1.5),
    "log1p": (np.log1p, 2.0),
    "tanh": (np.tanh, 2.5),
    "sigmoid": (sigmoid, 2.5),
    "silu": (lambda x: x * sigmoid(x), 3.5),
    "softplus": (lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), 2.0),
    "erf": (by_torch(torch.erf), 1.5),
    "sin": (np.sin, 1.6),
    "cos": (np.cos, 1.6),
    "sqrt": (np.sqrt, 0.5),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1.5),
    "reciprocal": (lambda x: 1 / x, 0.5),
    "floor": (np.floor, 0.0),
    "ceil": (np.ceil, 0.0),
    "round": (np.rint, 0.0),
    "trunc": (np.trunc, 0.0),
}
IN_UNITS_OF_X = {
    "gelu": (by_torch(torch.nn.functional.gelu), 2.0),
    "gelu_tanh": (by_torch(lambda x: torch.nn.functional.gelu(x, approximate="tanh")), 3.0),
}
VECTOR_FUNCTIONS = [*UNARY, *IN_UNITS_OF_X, "exp_nonpositive", "exp_minus_abs", "sign"]
BINARY = ["pow", "maximum", "minimum", "fmod", "remainder", "floordiv"]
SCALAR = ["fmod", "remainder", "floordiv"]
INTEGER = ["maximum", "minimum", "truncdiv", "fmod", "remainder", "floordiv", "pow"]
CONVERSIONS = {
    "f16_to_f32": ("uint16_t", "float"),
    "bf16_to_f32": ("uint16_t", "float"),
    "f32_to_f16": ("float", "uint16_t"),
    "f32_to_bf16": ("float", "uint16_t"),
    "f32_to_int32": ("float", "int32_t"),
    "f32_to_int64": ("float", "int64_t"),
}


def loop(name, arguments, source_type, result_type, simd=True):
    loads = ", ".join(f"((const {source_type} *)buf[{i}])[i]" for i in range(arguments))
    return (
        f"void run_{name}(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,"
        f" int32_t *restrict fault) {{ {result_type} *restrict y = buf[{arguments}];\n"
        f"{'#pragma omp simd' if simd else ''}\n"
        f"for (int64_t i = begin; i < end; i++) y[i] = tw_{name}({loads}); }}\n"
    )


def vector_loops():
    lines = [loop(f"{name}_f32", 1, "float", "float") for name in VECTOR_FUNCTIONS]
    lines += [loop(f"{name}_f32", 2, "float", "float") for name in BINARY if name not in SCALAR]
    lines += [loop(name, 1, *types) for name, types in CONVERSIONS.items()]
    return '#include "tw_math.h"\n' + "".join(lines)


def scalar_loops():
    lines = [loop(f"{name}_f32", 2, "float", "float", simd=False) for name in SCALAR]
    for name in INTEGER:
        lines += [loop(f"{name}_{t}", 2, c, c, simd=False) for t, c in (("i32", "int32_t"), ("i64", "int64_t"))]
    lines += [loop(f"{name}_f64", 1, "double", "double", simd=False) for name in (*UNARY, *IN_UNITS_OF_X)]
    return "".join(lines)


@pytest.fixture(params=TARGETS, ids=lambda p: "-".join(p))
def call(request, native):
    target, compiler = request.param

    def run(name, *arrays, dtype=np.float32):
        kernel = native.build(vector_loops() + scalar_loops(), f"run_{name}", target, compiler)
        arrays = [np.ascontiguousarray(array) for array in np.broadcast_arrays(*arrays)]
        out = np.empty(arrays[0].shape, dtype)
        assert kernel([*arrays, out], [], out.size) == 0
        return out

    return run


def floats(seed, count=100_000):
    """Every magnitude there is, the ranges where functions bend, and the specials."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 1 << 32, count, np.uint32).view(np.float32)
    near = [generator.uniform(-width, width, count).astype(np.float32) for width in (1.5, 12, 110)]
    powers = np.float32(2) ** np.arange(-20, 21, dtype=np.float32)
    return np.concatenate([bits, *near, powers, -powers, SPECIALS])


def ulps(got, exact):
    """Error in units of the last place of the rounded exact value; equal infinities and NaNs count as 0."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        finite = np.isfinite(rounded)
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        # Just above the greatest float an error of an ULP may also round to infinity.
        almost = ~finite & ~np.isnan(rounded) & (np.abs(exact) < 3.40283e38) & (np.abs(got) >= 3.4028233e38)
        error = np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(np.where(finite, rounded, 1))).astype(
            np.float64
        )
        almost |= np.isinf(got) & (np.abs(exact) > 3.4028233e38) & (np.sign(got) == np.sign(exact))
    return np.where(finite & np.isfinite(got), error, np.where(same | almost, 0, np.inf))


@pytest.mark.parametrize("name", UNARY)
def test_error_in_ulp(call, name):
    reference, bound = UNARY[name]
    x = floats(seed=7)
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
        if name == "silu":
            exact[np.isneginf(x)] = NAN
    got = call(f"{name}_f32", x)
    if name == "silu":
        tail = (x < -87.3) & np.isfinite(x)
        assert (np.abs(got[tail] - exact[tail]) <= -x[tail].astype(np.float64) * 2.0**-149).all()
        got[tail] = exact[tail]
    error = ulps(got, exact)
    worst = int(error.argmax())
    assert error[worst] <= max(bound, 0.5000001 if bound else 0), (x[worst], exact[worst])


@pytest.mark.parametrize("name", IN_UNITS_OF_X)
def test_error_of_gelu(call, name):
    """Cancellation makes the relative error of the left tail meaningless: errors count in units of x."""
    reference, bound = IN_UNITS_OF_X[name]
    x = floats(seed=8)
    x = x[np.isfinite(x) & (np.abs(x) > 1e-37)]
    error = np.abs(call(f"{name}_f32", x).astype(np.float64) - reference(x.astype(np.float64))) / np.abs(x) * 2**24
    worst = int(error.argmax())
    assert error[worst] <= bound, x[worst]
    got = call(f"{name}_f32", np.array([NAN, INF, -INF, 0.0, -0.0, -1000.0], np.float32))
    assert math.isnan(got[0]) and got[1] == INF and math.isnan(got[2]) and list(got[3:]) == [0, 0, 0]


def test_exp_of_nonpositive(call):
    x = np.concatenate([-np.abs(floats(seed=9)), np.linspace(-87.3, 0, 100_001, dtype=np.float32)])
    with np.errstate(all="ignore"):
        exact = np.where(x < np.float32(-87.3), 0, np.exp(x.astype(np.float64)))
    assert ulps(call("exp_nonpositive_f32", x), exact).max() <= 1.0


def test_exp_of_minus_a_magnitude(call):
    """The bits of exp, subnormal results among them."""
    x = np.concatenate([floats(seed=10), np.linspace(-110, 110, 100_001, dtype=np.float32)])
    np.testing.assert_array_equal(call("exp_minus_abs_f32", x), call("exp_f32", -np.abs(x)))


def test_signs_of_zeros(call):
    x = np.array([0.0, -0.0], np.float32)
    for name in ("expm1", "log1p", "tanh", "erf", "sin", "sqrt", "silu", "floor", "ceil", "round", "trunc"):
        assert list(np.signbit(call(f"{name}_f32", x))) == [False, True], name
    assert list(call("sign_f32", np.array([NAN, -2, -0.0, 0, 5, INF], np.float32))) == [0, -1, 0, 0, 1, 1]


def test_sine_far_out(call):
    """Floats that come very close to multiples of pi/2, and powers of two up to the greatest."""
    x = np.float32(math.pi / 2) * np.arange(1, 200_000, dtype=np.float32)
    hard = np.array([16367173 * 2.0**72, 6381956970095103 * 2.0**-20, 1.6e38, 2.0**127], np.float32)
    for name, exact in (("sin", np.sin), ("cos", np.cos)):
        for values in (x, hard, -hard):
            assert ulps(call(f"{name}_f32", values), exact(values.astype(np.float64))).max() <= 1.6


def test_pow(call):
    generator = np.random.default_rng(10)
    low, wide = generator.uniform(0, 3, 60_000), np.exp(generator.uniform(-80, 80, 60_000))
    base = np.concatenate([wide, low]).astype(np.float32)
    exponent = np.concatenate([generator.uniform(-3, 3, 60_000), generator.uniform(-150, 150, 60_000)])
    exponent = exponent.astype(np.float32)
    base[::5] *= -1
    exponent[::3] = np.rint(exponent[::3])
    grid = np.meshgrid(np.append(SPECIALS, [-3, 7]), np.append(SPECIALS, [3, -3, 4, 2.5, 2**24]))
    x, y = (part.ravel() for part in grid)
    for a, b in ((base, exponent), (x.astype(np.float32), y.astype(np.float32))):
        with np.errstate(all="ignore"):
            exact = np.power(a.astype(np.float64), b.astype(np.float64))
            expected = exact.astype(np.float32)
        got = call("pow_f32", a, b)
        error = ulps(got, exact)
        assert error.max() <= 1.0, (a[error.argmax()], b[error.argmax()], got[error.argmax()])
        zeros = expected == 0
        assert (np.signbit(got[zeros]) == np.signbit(expected[zeros])).all()


def test_binary_floats_match_torch(call):
    generator = np.random.default_rng(11)
    a = (generator.standard_normal(20_000) * 100).astype(np.float32)
    b = np.where(generator.random(20_000) < 0.3, generator.integers(-5, 6, 20_000), a[::-1] / 7).astype(np.float32)
    x, y = (part.ravel().astype(np.float32) for part in np.meshgrid(SPECIALS, SPECIALS))
    a, b = np.concatenate([a, x]), np.concatenate([b, y])
    reference = {
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "fmod": torch.fmod,
        "remainder": torch.remainder,
        "floordiv": torch.floor_divide,
    }
    with np.errstate(all="ignore"):
        # Where a / b overflows PyTorch's vector code gives NaN, while its scalar code and C are exact.
        used = np.isfinite(a / b) | ~np.isfinite(a) | ~np.isfinite(b) | (b == 0)
    a, b = a[used], b[used]
    for name, function in reference.items():
        expected = function(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        np.testing.assert_array_equal(call(f"{name}_f32", a, b), expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
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
        got = call(f"{name}_{dtype.replace('int', 'i')}", a, b, dtype=dtype)
        expected = function(torch.from_numpy(a[~wraps]), torch.from_numpy(b[~wraps])).numpy()
        np.testing.assert_array_equal(got[~wraps], expected, err_msg=name)
        if name in ("floordiv", "truncdiv"):
            assert (got[wraps] == info.min).all()
        by_zero = call(f"{name}_{dtype.replace('int', 'i')}", edges, edges * 0, dtype=dtype)
        assert name in ("maximum", "minimum") or (by_zero == 0).all()
    exponent = np.arange(-3, 20, dtype=dtype)
    for base in (-3, -1, 0, 1, 2, 10):
        expected = torch.pow(torch.full((23,), base, dtype=getattr(torch, dtype)), torch.from_numpy(exponent)).numpy()
        got = call(f"pow_{dtype.replace('int', 'i')}", np.full(23, base, dtype), exponent, dtype=dtype)
        np.testing.assert_array_equal(got[exponent >= 0], expected[exponent >= 0])
        assert list(got[:3]) == {1: [1, 1, 1], -1: [-1, 1, -1]}.get(base, [0, 0, 0])


def test_half_precision(call):
    """Every float16 and bfloat16 there is, and floats around all their midpoints."""
    every = np.arange(1 << 16, dtype=np.uint16)
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        exact = torch.from_numpy(every).view(dtype).float()
        np.testing.assert_array_equal(call(f"{name}_to_f32", every), exact.numpy())
        middle = exact + (exact.roll(-1) - exact) / 2
        x = torch.cat([exact, middle, middle.nextafter(torch.tensor(INF)), middle.nextafter(torch.tensor(-INF))])
        x = torch.cat([x, torch.from_numpy(floats(seed=12))])
        expected = x.to(dtype)
        got = torch.from_numpy(call(f"f32_to_{name}", x.numpy(), dtype=np.uint16)).view(dtype)
        assert torch.equal(torch.isnan(got), torch.isnan(x))
        finite = ~torch.isnan(x)
        assert torch.equal(got[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_floats_to_integers(call):
    x = np.array([1.9, -1.9, 2.0**31, -(2.0**31), 2.0**31 - 128, 2.0**63, -(2.0**63), 1e30, NAN, INF, -INF], np.float32)
    low32, low64 = np.iinfo(np.int32).min, np.iinfo(np.int64).min
    assert list(call("f32_to_int32", x, dtype=np.int32)) == [1, -1, low32, low32, 2**31 - 128, *[low32] * 6]
    assert list(call("f32_to_int64", x, dtype=np.int64))[:5] == [1, -1, 2**31, -(2**31), 2**31 - 128]
    assert set(call("f32_to_int64", x, dtype=np.int64)[5:]) == {low64}


def test_doubles(call):
    x = np.concatenate([np.random.default_rng(13).standard_normal(2000) * 3, SPECIALS.astype(np.float64)])
    for name, (reference, _) in (UNARY | IN_UNITS_OF_X).items():
        with np.errstate(all="ignore"):
            expected = reference(x)
        if name in ("silu", "gelu", "gelu_tanh"):
            expected, x_used = expected[np.isfinite(x)], x[np.isfinite(x)]
        else:
            x_used = x
        np.testing.assert_allclose(
            call(f"{name}_f64", x_used, dtype=np.float64), expected, rtol=3e-13, atol=1e-15, err_msg=name
        )


@pytest.mark.parametrize(
    ("check", "good", "found", "bad"),
    [("tw_index", [0, 4, -1, -5], [0, 4, 4, 0], (5, -6)), ("tw_row_index", [0, 4, 1, 3], [0, 4, 1, 3], (5, -1, -6))],
)
def test_index(native, check, good, found, bad):
    text = '#include "tw_math.h"\n' + (
        "void k(void *const *buf, const int64_t *dim, int64_t begin, int64_t end, int32_t *fault) {"
        " const int64_t *x = buf[0]; int64_t *y = buf[1];"
        f" for (int64_t i = begin; i < end; i++) y[i] = {check}(x[i], dim[0], fault); }}"
    )
    kernel = native.build(text, "k")
    out = np.empty(4, np.int64)
    assert kernel([np.array(good), out], [5], 4) == 0 and list(out) == found
    for outside in (*bad, 2**63 - 1, -(2**63)):
        assert kernel([np.array([outside]), out], [5], 1) == 1 and out[0] == 0


@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
@pytest.mark.parametrize("compiler", ["cc", "zig"])
def test_loops_become_vector_code(monkeypatch, tmp_path, target, compiler):
    """By the compiler's own report every float function and conversion is vectorised."""
    monkeypatch.setenv("TILEWRIGHT_CC", compiler)
    found = find_compiler()
    if (compiler == "zig") != (found.kind == "zig"):
        pytest.skip("no system compiler")
    text = vector_loops()
    (tmp_path / "loops.c").write_text(text)
    report = "-fopt-info-vec-optimized" if found.kind == "gcc" else "-Rpass=loop-vectorize"
    flags = [*COMPILE_FLAGS, *parse(target, ()).flags(found.kind), report, "-I", str(INCLUDE_DIRECTORY)]
    command = [*found.command, *flags, "-c", "loops.c", "-o", "loops.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = text.split("\n")
    scalar = []
    for number, line in enumerate(lines, 1):
        if line.startswith("void run_"):
            places = (f"loops.c:{number + 1}:", f"loops.c:{number + 2}:")  # the pragma or the loop
            if not any("vectorized" in part for part in done.stderr.splitlines() if part.startswith(places)):
                scalar.append(line.split("(")[0])
    # Conversion to 64-bit integers is one instruction per element before AVX-512.
    assert set(scalar) <= ({"void run_f32_to_int64"} if target.endswith("v3") else set())
