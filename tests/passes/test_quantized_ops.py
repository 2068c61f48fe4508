import numpy as np
import pytest
import torch

from tilewright.passes.graph import quantized_ops
from tilewright.passes.graph.quantized_ops import (
    DEQUANTIZE,
    QUANTIZE_WEIGHT,
    QUANTIZED_EMBEDDING,
    QUANTIZED_LINEAR,
    quantize_rows,
)
from tilewright.passes.graph.quantized_rows import Parts, RowFormat

FORMATS = [(8, 0), (8, 32), (4, 0), (4, 32), (4, 64)]
SHAPES = [(5, 64), (3, 33), (7, 1), (2, 95), (1, 128)]


def weights(rows, columns, seed=0):
    """Most numbers around 0, some far off, so that scales matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3 * 0.02


def values(rows, columns, bits, group, symmetric):
    """What quantized rows stand for, by the text of the format, in float64 and a number at a time."""
    data = rows.numpy()
    size = group or columns
    groups = -(-columns // size)
    width = columns if bits == 8 else (columns + 1) // 2
    result = np.zeros((len(data), columns))
    for n, row in enumerate(data):
        scales = np.frombuffer(row[width : width + 4 * groups].tobytes(), "<f4").astype(np.float64)
        zeros = row[width + 4 * groups :]
        for k in range(columns):
            code = int(row[k].view(np.int8)) if bits == 8 else int(row[k // 2]) >> 4 * (k % 2) & 15
            zero = 8 if bits == 4 else 0
            if not symmetric:
                zero = int(zeros[k // size].view(np.int8)) if bits == 8 else int(zeros[k // size])
            result[n, k] = (code - zero) * scales[k // size]
    return result


def errors_of_groups(weight, found, group):
    size = group or weight.shape[1]
    off = torch.nn.functional.pad((weight - found).double() ** 2, (0, -weight.shape[1] % size))
    return off.unflatten(1, (-1, size)).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_mean_what_the_format_says(shape, bits, group, symmetric):
    weight = weights(*shape)
    for search in (False, True):
        rows = QUANTIZE_WEIGHT(weight, bits, group, symmetric, search)
        form = RowFormat(shape[1], bits, group, symmetric)
        assert rows.shape == (shape[0], form.row_bytes)
        found = DEQUANTIZE(rows, shape[1], bits, group, symmetric)
        expected = values(rows, shape[1], bits, group, symmetric)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=0)
        parts = form.split(rows)
        assert torch.equal(form.join(parts), rows)
        if bits == 4:
            assert torch.equal(parts.scales.half().float(), parts.scales)
        else:
            assert parts.codes.min() >= -127


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits,group", FORMATS)
def test_plain_rounding_is_off_by_half_a_step_at_most(bits, group, symmetric):
    weight = weights(6, 200)
    rows = QUANTIZE_WEIGHT(weight, bits, group, symmetric, False)
    scales = RowFormat(200, bits, group, symmetric).split(rows).scales
    steps = scales[:, torch.arange(200) // (group or 200)]
    off = (DEQUANTIZE(rows, 200, bits, group, symmetric) - weight).abs()
    # A zero point is rounded too, and a float16 scale may leave the largest number a little beyond the last code.
    assert (off <= steps * (0.51 if symmetric else 1.02)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits,group", FORMATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_is_never_worse_and_mostly_better(bits, group, symmetric, seed):
    weight = weights(64, 320, seed)
    plain, searched = (
        errors_of_groups(weight, DEQUANTIZE(rows, 320, bits, group, symmetric), group)
        for rows in (QUANTIZE_WEIGHT(weight, bits, group, symmetric, search) for search in (False, True))
    )
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < plain.sum() * (0.97 if bits == 4 else 1.0)


def test_the_search_comes_close_to_trying_everything():
    weight = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    rows = QUANTIZE_WEIGHT(weight, 4, 32, True, True)
    found = errors_of_groups(weight, DEQUANTIZE(rows, 32, 4, 32, True), 32)[:, 0]
    scales = torch.linspace(0.5, 1.3, 400) * (weight.abs().amax(1) / 7)[:, None]
    scales = torch.cat((scales, -scales), 1).half().float()[:, :, None]
    best = (weight[:, None] - (weight[:, None] / scales).round().clamp(-8, 7) * scales).square().sum(-1).amin(1)
    plain = errors_of_groups(weight, DEQUANTIZE(QUANTIZE_WEIGHT(weight, 4, 32, True, False), 32, 4, 32, True), 32)
    assert found.sum() <= best.sum() * 1.02 < plain.sum() * 0.9


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits,group", FORMATS)
def test_zeros_stay_zeros(bits, group, symmetric):
    weight = weights(3, 70)
    weight[1] = 0
    weight[2, 40:] = 0
    found = DEQUANTIZE(QUANTIZE_WEIGHT(weight, bits, group, symmetric, True), 70, bits, group, symmetric)
    assert (found[1] == 0).all() and (found[2, 64:] == 0).all() and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_rows_change_nothing(dtype, monkeypatch):
    weight = weights(37, 100).to(dtype)
    whole = QUANTIZE_WEIGHT(weight, 4, 32, False, True)
    monkeypatch.setattr(quantized_ops, "_CHUNK", 350)
    threads = torch.get_num_threads()
    assert torch.equal(QUANTIZE_WEIGHT(weight, 4, 32, False, True), whole)
    assert torch.get_num_threads() == threads
    assert QUANTIZE_WEIGHT(weight[:0], 4, 32, False, True).shape == (0, whole.shape[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "bits,group,activations", [(8, 0, -1), (8, 0, 0), (8, 0, 32), (4, 32, -1), (4, 32, 0), (4, 32, 32), (4, 64, 32)]
)
@pytest.mark.parametrize("columns", [64, 97])
def test_a_product_is_that_of_the_integers(columns, bits, group, activations, symmetric):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(2, 3, columns, generator=generator) * 3
    x[1, 1] = 0
    bias = torch.randn(5, generator=generator)
    rows = QUANTIZE_WEIGHT(weights(5, columns), bits, group, symmetric, True)
    weight = torch.from_numpy(values(rows, columns, bits, group, symmetric))
    given = x.double()
    if activations >= 0:
        size = activations or columns
        for start in range(0, columns, size):
            part = given[..., start : start + size]
            scale = part.abs().amax(-1, keepdim=True) / 127
            given[..., start : start + size] = (part / scale.clamp_min(1e-30)).round() * scale
    expected = given @ weight.T + bias
    found = QUANTIZED_LINEAR(x, rows, bias, columns, bits, group, symmetric, activations)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    without = QUANTIZED_LINEAR(x.bfloat16(), rows, None, columns, bits, group, symmetric, activations)
    assert without.dtype == torch.bfloat16
    torch.testing.assert_close(without.double(), expected - bias, rtol=0.05, atol=0.05)


def test_activations_are_rounded_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5], [1e-31, 0, 0, 0, 0]])
    codes, scales = quantize_rows(x, 0)
    assert codes.tolist() == [[[127, 0, 2, -2, 126]], [[0, 0, 0, 0, 0]]]
    assert scales.tolist() == [[1.0], [0.0]]
    codes, scales = quantize_rows(x, 2)
    assert codes.shape == (2, 3, 2) and codes[0, 2].tolist() == [127, 0]


@pytest.mark.parametrize("bits,group,symmetric", [(8, 0, True), (4, 32, False)])
def test_rows_of_a_table(bits, group, symmetric):
    rows = QUANTIZE_WEIGHT(weights(11, 40), bits, group, symmetric, True)
    indices = torch.tensor([[0, 10, 3], [3, 3, 7]], dtype=torch.int32)
    found = QUANTIZED_EMBEDDING(indices, rows, 40, bits, group, symmetric)
    assert torch.equal(found, DEQUANTIZE(rows, 40, bits, group, symmetric)[indices])
    with pytest.raises(IndexError):
        QUANTIZED_EMBEDDING(torch.tensor([11]), rows, 40, bits, group, symmetric)


@pytest.mark.parametrize("bits,group,symmetric", [(8, 0, True), (4, 32, True), (4, 32, False)])
@pytest.mark.parametrize("shape", [(5, 33), (0, 33), (5, 64)])
def test_are_proper_operators(bits, group, symmetric, shape):
    checks = ("test_schema", "test_faketensor")
    weight = weights(*shape)
    rows = QUANTIZE_WEIGHT(weight, bits, group, symmetric, True)
    form = (shape[1], bits, group, symmetric)
    cases = [
        (QUANTIZE_WEIGHT, (weight.t().contiguous().t(), bits, group, symmetric, True)),
        (DEQUANTIZE, (rows, *form)),
        (QUANTIZED_LINEAR, (torch.randn(2, 0, shape[1]), rows, None, *form, 0)),
        (QUANTIZED_LINEAR, (torch.randn(4, shape[1]).bfloat16(), rows, torch.randn(shape[0]), *form, -1)),
        (QUANTIZED_EMBEDDING, (torch.zeros((2, 0), dtype=torch.int64), rows, *form)),
    ]
    for operator, args in cases:
        torch.library.opcheck(operator, args, test_utils=checks)


def test_say_what_does_not_fit():
    rows = QUANTIZE_WEIGHT(weights(5, 64), 4, 32, True, False)
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        QUANTIZE_WEIGHT(weights(5, 64), 3, 32, True, False)
    with pytest.raises(ValueError, match=r"not \[5\] of float32"):
        QUANTIZE_WEIGHT(weights(5, 64)[:, 0], 4, 32, True, False)
    with pytest.raises(ValueError, match="not finite"):
        QUANTIZE_WEIGHT(torch.tensor([[1.0, float("nan")]]), 8, 0, True, True)
    with pytest.raises(ValueError, match=r"up to 1e\+06, too large for a scale of 4 bits"):
        QUANTIZE_WEIGHT(torch.full((1, 32), 1e6), 4, 32, True, True)
    # Candidates that only the search would try are no reason to refuse.
    near = torch.full((1, 32), 65504.0 * 7)
    assert torch.equal(DEQUANTIZE(QUANTIZE_WEIGHT(near, 4, 32, True, True), 32, 4, 32, True), near)
    with pytest.raises(ValueError, match=r"2 scales and zero points per row is uint8 \[N, 42\], not uint8 \[5, 40\]"):
        DEQUANTIZE(rows, 64, 4, 32, False)
    with pytest.raises(ValueError, match="x is .* with 64 columns"):
        QUANTIZED_LINEAR(x[:, :63], rows, None, 64, 4, 32, True, -1)
    with pytest.raises(ValueError, match="bias is .* 5 rows"):
        QUANTIZED_LINEAR(x, rows, torch.zeros(4), 64, 4, 32, True, -1)
    with pytest.raises(ValueError, match="groups of 24; that must divide"):
        QUANTIZED_LINEAR(x, rows, None, 64, 4, 32, True, 24)
    with pytest.raises(ValueError, match="int32 or int64"):
        QUANTIZED_EMBEDDING(x, rows, 64, 4, 32, True)


def test_parts_can_be_put_together_by_hand():
    form = RowFormat(3, 4, 2, False)
    parts = Parts(
        torch.tensor([[1, 2, 3]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 4]]).byte()
    )
    assert form.join(parts)[0].tolist() == [0x21, 0x03, 0, 0, 0, 0x3F, 0, 0, 0, 0x40, 1, 4]
    assert form.values(form.join(parts)).tolist() == [[0.0, 0.5, -2.0]]
