"""attention.c.jinja against torch.nn.functional.scaled_dot_product_attention in double precision."""

import math

import numpy as np
import pytest
import torch

from tilewright.codegen.c.attention_blocks import attention_units, blocks
from tilewright.runtime import sizes

CASES = [(*case, kind) for case in (("v3", "gcc"), ("v4", "gcc")) for kind in ("full", "causal")]
WORDS = pytest.mark.parametrize("target", ["v3", "v4base", "v4"])
BOTH = pytest.mark.parametrize("target", ["v3", "v4"])
PRELUDE = """const ELEMENT *restrict q = buf[0], *restrict k = buf[1], *restrict v = buf[2];
float *restrict o = buf[3];
const int64_t B = dim[0], H = dim[1], G = dim[2], SQ = dim[3], SK = dim[4], TOGETHER = dim[5];
(void)B, (void)TOGETHER;"""
MASKS = {
    "none": (None, ""),
    "additive": (
        ("const float *restrict row = m + ((b * H + h) * SQ + i) * SK;", "score += row[j];"),
        "const float *restrict m = buf[4];",
    ),
    "bool": (
        ("const uint8_t *restrict row = m + (b * SQ + i) * SK;", "score = row[j] ? score : -INFINITY;"),
        "const uint8_t *restrict m = buf[4];",
    ),
    "keys": (  # key padding, as encoders have it: one row of the mask per batch entry
        ("const int64_t *restrict row = m + b * SK;", "score = row[j] != 0 ? score : score - 3.4028235e38f;"),
        "const int64_t *restrict m = buf[4];",
    ),
}


class Attention:
    """A kernel for [B, H, S, D] tensors (or [B, S, H, D] with ``interleaved``)."""

    def __init__(self, native, d, dv, target, compiler="gcc", causal=False, mask="none", interleaved=False, scale=None,
                 gathered=False, together=False, bf16=False):  # fmt: skip
        self.native, self.d, self.dv, self.interleaved, self.together = native, d, dv, interleaved, together
        self.blocks, self.bf16 = blocks(d, dv, bf16=bf16), bf16
        kind = "uint16_t" if bf16 else "float"
        hole, declaration = MASKS[mask]

        def row(name, head, heads, position, length, width):
            if interleaved:
                return f"{name} + ((b * {length} + {position}) * {heads} + {head}) * {width}"
            return f"{name} + ((b * {heads} + {head}) * {length} + {position}) * {width}"

        def rows(address, length):
            if gathered or (bf16 and length % 2):
                element = "tw_bf16_to_f32(from[d])" if bf16 else "from[d]"
                hole = native.Hole(f"const {kind} *from = {address};", f"const float element = {element};")
                return {"address": "", "gather": hole}
            return {"address": address, "gather": None}

        self.scale = d**-0.5 if scale is None else scale
        source = native.render(
            "attention.c.jinja",
            name="attention",
            prelude=PRELUDE.replace("ELEMENT", kind) + declaration,
            B="B", HEADS="H", GROUP="G", SQ="SQ", SK="SK", D=d, DV=dv,
            TOGETHER="TOGETHER" if together else 1, rows=self.blocks.rows, keys=self.blocks.keys, bf16=bf16,
            scale=float(np.float32(self.scale)).hex() + "f",
            causal=causal,
            scaled=mask != "none" or self.scale <= 0,
            q=rows(row("q", "h", "H", "i", "SQ", d), d),
            k=rows(row("k", "hk", "(H / G)", "j", "SK", d), d),
            v=rows(row("v", "hk", "(H / G)", "j", "SK", dv), 0),
            mask=native.Hole(*hole) if hole else None,
            store=native.Hole(
                f"float *restrict to = {row('o', 'h', 'H', 'i', 'SQ', dv)};", "to[d] = acc;"
            ),
        )  # fmt: skip
        self.kernel = native.build(source, "attention", target, compiler)

    def __call__(self, q, k, v, *mask, split=None):
        b, h, sq, _ = q.shape
        sk = k.shape[2]
        order = (0, 2, 1, 3) if self.interleaved else (0, 1, 2, 3)
        arrays = [np.ascontiguousarray(t.transpose(order)) for t in (q, k, v)]
        if self.bf16:
            arrays = [(array.view(np.uint32) >> 16).astype(np.uint16) for array in arrays]
        out = np.full(np.array((b, h, sq, self.dv))[list(order)], np.nan, np.float32)
        together = h // k.shape[1] if self.together else 1
        units = attention_units(b, h, sq, self.blocks, together)
        for begin, end in split or [(0, units)]:
            assert self.kernel([*arrays, out, *mask], [b, h, h // k.shape[1], sq, sk, together], begin, end) == 0
        return out.transpose(order)


def inputs(b, h, hk, sq, sk, d, dv, seed=0):
    generator = np.random.default_rng(seed)
    shapes = ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def reference(q, k, v, mask=None, causal=False, scale=None):
    q, k, v = (torch.from_numpy(t).double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if mask is not None and mask.dtype.is_floating_point:
        mask = mask.double()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).numpy()


def check(got, expected, scores=16):
    """Means of values of size 1; a score of size ``scores`` is off by some units of its last place."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=scores * 2**-22 * max(1, np.abs(expected).max(initial=0)))


SHAPES = [
    # b, heads, key heads, sq, sk, d, dv; a kernel for each pair of the last two
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7, 64, 64),
    (1, 2, 2, 100, 33, 64, 64),
    (1, 4, 2, 97, 129, 64, 64),
    (2, 6, 2, 31, 300, 33, 17),
    (1, 2, 1, 193, 128, 100, 70),
    (1, 1, 1, 60, 65, 256, 256),
    (1, 2, 2, 3, 257, 3, 130),
]


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(native, target, shape):
    q, k, v = inputs(*shape)
    check(Attention(native, *shape[5:], target)(q, k, v), reference(q, k, v))


@pytest.mark.parametrize(("target", "compiler", "kind"), [*CASES, ("v3", "zig", "causal"), ("v4", "zig", "causal")])
def test_interleaved_heads(native, target, compiler, kind):
    """Rows of a head lie apart, as a fused projection leaves them."""
    causal = kind == "causal"
    shape = (2, 6, 2, 130, 300, 33, 17)
    q, k, v = inputs(*shape)
    attention = Attention(native, *shape[5:], target, compiler, causal, interleaved=True)
    check(attention(q, k, v), reference(q, k, v, causal=causal))


@pytest.mark.sanitize("(1, 2, 2, 1, 5, 3, 130)")
@BOTH
@pytest.mark.parametrize("shape", [(2, 6, 2, 130, 300, 33, 17), (1, 2, 2, 1, 5, 3, 130)], ids=str)
def test_gathered_rows(native, target, shape):
    """Elements of a row that lie anywhere are copied; the products are those of rows in place."""
    q, k, v = inputs(*shape)
    got = Attention(native, *shape[5:], target, gathered=True)(q, k, v)
    np.testing.assert_array_equal(got, Attention(native, *shape[5:], target)(q, k, v))


@BOTH
@pytest.mark.parametrize("shape", [(2, 6, 2, 1, 300, 64, 64), (1, 8, 2, 13, 70, 33, 48)], ids=str)
def test_heads_together(native, target, shape):
    """Heads that share keys give what they give alone, bit by bit; few rows read values in place."""
    q, k, v = inputs(*shape)
    got = Attention(native, *shape[5:], target, together=True)(q, k, v)
    check(got, reference(q, k, v))
    np.testing.assert_array_equal(got, Attention(native, *shape[5:], target)(q, k, v))
    mask = np.where(np.random.default_rng(2).random((*shape[:2], *shape[3:5])) < 0.5, 0, -np.inf).astype(np.float32)
    masked = Attention(native, *shape[5:], target, together=True, mask="additive")(q, k, v, mask)
    check(masked, reference(q, k, v, torch.from_numpy(mask)))


@pytest.mark.sanitize("33-17-causal")
@WORDS
@pytest.mark.parametrize("d, dv, kind", [(64, 64, "full"), (33, 17, "full"), (33, 17, "causal")], ids=str)
def test_bfloat16(native, target, d, dv, kind):
    """Exponentials are rounded to bfloat16, each by 2^-8 of itself at the most; all else is exact or float32."""
    causal = kind == "causal"
    attention = Attention(native, d, dv, target, causal=causal, bf16=True, together=not causal)
    for shape in ((2, 4, 2, 1, 67, d, dv), (1, 4, 1, 70, 301, d, dv), (1, 2, 2, 13, 1, d, dv), (1, 2, 2, 2, 0, d, dv)):
        q, k, v = (torch.from_numpy(t).bfloat16().float().numpy() for t in inputs(*shape))
        got = attention(q, k, v)
        if shape[4] == 0:
            assert (got == 0).all()
            continue
        bound = reference(q, k, np.abs(v), causal=causal) * 2**-8 + 1e-5
        assert (np.abs(got - reference(q, k, v, causal=causal)) <= bound).all()
        np.testing.assert_array_equal(attention(q[:, :, -1:], k, v), got[:, :, -1:]) if not causal else None


@BOTH
def test_dynamic_sizes(native, target):
    """One kernel, any lengths: around the panels of 32, the blocks of 128 keys and the blocks of rows."""
    for causal in (False, True):
        attention = Attention(native, 16, 16, target, causal=causal)
        for sq, sk in (
            (1, 31),
            (2, 32),
            (31, 1),
            (33, 95),
            (96, 127),
            (97, 128),
            (191, 129),
            (193, 161),
            (0, 5),
            (4, 0),
        ):
            q, k, v = inputs(1, 2, 2, sq, sk, 16, 16, seed=sq)
            got = attention(q, k, v)
            check(got, reference(q, k, v, causal=causal) if sk else np.zeros(got.shape))


@pytest.mark.sanitize("full")
@BOTH
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_masks(native, target, causal):
    b, h, sq, sk, d = 2, 3, 70, 150, 24
    q, k, v = inputs(b, h, h, sq, sk, d, d)
    generator = np.random.default_rng(1)
    triangle = np.tril(np.ones((sq, sk), bool)) if causal else np.ones((sq, sk), bool)

    additive = generator.standard_normal((b, h, sq, sk)).astype(np.float32) * 3
    additive[generator.random(additive.shape) < 0.3] = -math.inf
    additive[0, 1, 5] = -math.inf
    seen = np.where(triangle, additive, -np.float32(math.inf))
    got = Attention(native, d, d, target, causal=causal, mask="additive")(q, k, v, additive)
    check(got, reference(q, k, v, torch.from_numpy(seen)))
    assert (got[0, 1, 5] == 0).all()
    if causal:
        return  # a mask of another kind is another line of C, whatever follows it

    allowed = generator.random((b, sq, sk)) < 0.5
    allowed[:, :, :140] &= generator.random((b, sq, 1)) < 0.8  # rows whose first keys are all masked
    allowed[1, 7] = False
    got = Attention(native, d, d, target, mask="bool")(q, k, v, allowed.astype(np.uint8))
    check(got, reference(q, k, v, torch.from_numpy(allowed)[:, None]))
    assert (got[1, :, 7] == 0).all()

    lengths = np.arange(sk) < np.array([[150], [41]])
    got = Attention(native, d, d, target, mask="keys")(q, k, v, lengths.astype(np.int64))
    check(got, reference(q, k, v, torch.from_numpy(lengths[:, None, None, :])))


@BOTH
def test_large_and_special_scores(native, target):
    """Scores beyond exp's range are fine; NaN and +infinity spoil their own row only."""
    q, k, v = inputs(1, 1, 1, 100, 200, 32, 32)
    attention = Attention(native, 32, 32, target, scale=100)
    check(attention(q, k, v), reference(q, k, v, scale=100), scores=100 * 32)
    mask = np.zeros((1, 1, 100, 200), np.float32)
    mask[0, 0, 3, 77], mask[0, 0, 50, 199], mask[0, 0, 60, 0] = math.nan, math.inf, math.nan
    mask[0, 0, 61] = -math.inf
    mask[0, 0, 61, 130] = math.nan
    mask[0, 0, 62] = np.finfo(np.float32).min
    got = Attention(native, 32, 32, target, mask="additive")(q, k, v, mask)
    bad = [3, 50, 60, 61]
    good = np.setdiff1d(np.arange(100), bad)
    assert np.isnan(got[0, 0, bad]).all()
    check(got[0, 0, good], reference(q, k, v, torch.from_numpy(mask))[0, 0, good])


@pytest.mark.parametrize(("target", "compiler", "kind"), [*CASES, ("v3", "zig", "full"), ("v4", "zig", "full")])
def test_a_row_has_the_same_bits_alone_and_in_company(native, target, compiler, kind):
    causal = kind == "causal"
    d, dv, sk = 40, 48, 300
    attention = Attention(native, d, dv, target, compiler, causal)
    q, k, v = inputs(2, 4, 2, 250, sk, d, dv)
    v[0, 0, 280] = np.nan  # also what a row does not reach must not depend on its company
    whole = attention(q, k, v)
    units = attention_units(2, 4, 250, attention.blocks)
    assert units > 20
    pieces = [(unit, unit + 1) for unit in reversed(range(units))]
    np.testing.assert_array_equal(attention(q, k, v, split=pieces), whole)
    np.testing.assert_array_equal(attention(q, k, v, split=[(0, 5), (5, 19), (19, units)]), whole)
    np.testing.assert_array_equal(attention(q[1:], k[1:], v[1:]), whole[1:])
    for rows in (1, 2, 97, 130):
        np.testing.assert_array_equal(attention(q[:, :, :rows], k, v), whole[:, :, :rows])
    if not causal:
        np.testing.assert_array_equal(attention(q[:, :, 123:124], k, v), whole[:, :, 123:124])


def test_units():
    for d, dv in ((1, 1), (64, 64), (128, 128), (256, 256), (256, 1), (96, 64)):
        for bf16 in (False, True):
            found = blocks(d, dv, bf16=bf16)
            columns, depth, packed = -(-dv // 32) * 32, d, d + -(-dv // 32) * 32
            if bf16:
                depth, packed = -(-d // 2), -(-d // 2) + columns // 2
            words = found.keys * (packed + 12) + found.rows * (depth + columns + 2)
            assert 12 <= found.rows <= 96 and 32 <= found.keys <= 256 and found.keys % 32 == 0
            assert 4 * words <= 176 * 1024, "scratch on the stack"
    units = attention_units("batch", 12, "seq", blocks(64, 64))
    assert sizes.evaluate(units, {"batch": 2, "seq": 97}) == 2 * 12 * 2
    assert sizes.evaluate(attention_units("batch", 12, "seq", blocks(64, 64), 4), {"batch": 2, "seq": 25}) == 2 * 3 * 2
    with pytest.raises(ValueError, match="1 to 256"):
        blocks(257, 64)
