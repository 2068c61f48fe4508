"""An embedding and the output layer that is tied to it: the matrix is stored once, and both read the same panels."""

import numpy as np
import pytest
import torch
from torch import nn

from tilewright.runtime.errors import InputError

TOKENS = torch.export.Dim("tokens", max=64)


class Tied(nn.Module):
    """``rows`` and ``columns`` that fill neither panels nor words."""

    def __init__(self, rows, columns, dtype, more=None):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(rows, columns, dtype=dtype)
        self.norm = nn.RMSNorm(columns, dtype=dtype)
        self.more = more

    def forward(self, tokens):
        x = self.table(tokens)
        logits = nn.functional.linear(self.norm(x), self.table.weight)
        return (logits, self.more(self.table.weight, tokens)) if self.more else (logits, x)


def matrices(model):
    return [constant for constant in model.artifact.plans["main"].constants if len(constant.shape) > 1]


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "rows, columns, dtype",
    [(101, 48, torch.float32), (64, 33, torch.float32), (77, 33, torch.bfloat16), (64, 64, torch.bfloat16)],
    ids=["fp32-101x48", "fp32-64x33", "bf16-77x33", "bf16-64x64"],
)
def test_the_matrix_is_stored_once(compiled, rows, columns, dtype):
    module = Tied(rows, columns, dtype).eval()
    tokens = torch.arange(6).reshape(2, 3)
    model = compiled(module, (tokens,), ({1: TOKENS},), precision="fp32" if dtype == torch.float32 else "bf16")
    (stored,) = matrices(model)
    assert stored.sources == ("table.weight",) and "panels" in stored.key
    assert stored.dtype == str(dtype).removeprefix("torch.")
    for count in (1, 7, 50):
        tokens = torch.randint(0, rows, (2, count), generator=torch.Generator().manual_seed(count))
        tokens[0, 0] = rows - 1  # of the last panel
        logits, x = model(tokens.numpy())
        expected, found = module(tokens)
        np.testing.assert_array_equal(np.asarray(x, np.float32), found.detach().float().numpy())
        error = np.abs(np.asarray(logits, np.float32) - expected.detach().float().numpy()).max()
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max().item()
    with pytest.raises(InputError):
        model(np.array([[0, rows, 0], [0, 0, 0]]))


def test_other_readers_keep_rows(compiled):
    """What adds up the columns of the table wants its rows; the product streams through its own panels."""
    module = Tied(50, 32, torch.float32, lambda weight, tokens: (weight * tokens.sum()).sum(1)).eval()
    tokens = torch.arange(6).reshape(2, 3)
    model = compiled(module, (tokens,))
    assert sum("panels" in constant.key for constant in matrices(model)) == 1 < len(matrices(model))
    for got, expected in zip(model(tokens.numpy()), module(tokens), strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
