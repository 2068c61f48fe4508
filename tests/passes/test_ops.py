import pytest
import torch

from tilewright.passes.graph.ops import ROTARY_EMBEDDING


def tables(width, dtype=torch.float32):
    angles = torch.rand(5, width, generator=torch.Generator().manual_seed(0))
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotates_pairs_by_complex_multiplication(interleaved):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    cos, sin = tables(4, torch.float64)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    got = ROTARY_EMBEDDING(x, cos, sin, interleaved)
    parts = (got[..., ::2], got[..., 1::2]) if interleaved else (got[..., :4], got[..., 4:])
    torch.testing.assert_close(parts, (turned.real, turned.imag), rtol=1e-12, atol=1e-12)
    spread = [t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)]
    assert torch.equal(ROTARY_EMBEDDING(x, *spread, interleaved), got)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (5, 8), (0, 5, 8), (2, 5, 0)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_is_a_proper_operator(interleaved, shape, dtypes):
    x = torch.randn(shape).to(dtypes[0])
    cos, sin = tables(shape[-1], dtypes[1])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ROTARY_EMBEDDING, (x, cos, sin, interleaved), test_utils=checks)
    strided = x.transpose(0, -2).contiguous().transpose(0, -2)
    torch.library.opcheck(ROTARY_EMBEDDING, (strided, cos, sin, interleaved), test_utils=checks)
    assert ROTARY_EMBEDDING(strided, cos, sin).dtype == torch.promote_types(*dtypes)


def test_says_what_does_not_fit():
    cos, sin = tables(8)
    with pytest.raises(ValueError, match="odd last dimension, 7"):
        ROTARY_EMBEDDING(torch.randn(5, 7), cos, sin)
    with pytest.raises(ValueError, match="both must have 12 or 6"):
        ROTARY_EMBEDDING(torch.randn(5, 12), cos, sin)
