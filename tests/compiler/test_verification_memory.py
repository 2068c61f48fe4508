"""Verifying a model of many layers holds the values of few weights at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilewright.compiler.copies import reference_of
from tilewright.compiler.driver import Compilation
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.verification import expect

WIDTH, LAYERS = 512, 8
VALUES = 4 * WIDTH * WIDTH  # bytes of a layer's weight in float32
ROWS = 80  # most of any verified size


class Live(TorchDispatchMode):
    """Bytes of the memory that operators gave and that somebody still holds, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given:
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes that are held."""
        self._held = {place: item for place, item in self._held.items() if not item[0].expired()}
        return sum(size for _, size in self._held.values())


def storages(values):
    """The memory of the tensors among values that have some."""
    for leaf in tree_leaves(values):
        if torch.is_tensor(leaf) and not isinstance(leaf, FakeTensor):
            yield leaf.untyped_storage()


def layers() -> nn.Module:
    torch.manual_seed(0)
    parts = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    return nn.Sequential(*parts).bfloat16().eval()


@pytest.mark.parametrize("quantize", [None, "int8", "int4-g32"])
def test_values_of_weights_are_held_a_few_at_a_time(quantize):
    """A model in bfloat16, computed in float32: its own weights take twice as much as values, quantized ones more."""
    compilation = Compilation(CompileOptions(quantize=quantize, precision="fp32"))  # this processor may have bfloat16
    sample = torch.randn(5, WIDTH).bfloat16()
    captured = compilation.capture(layers(), (sample,), shapes={"input": f"rows:1..{ROWS},{WIDTH}"})
    reference = reference_of(captured[0])
    (lowered,) = compilation.rewrite(captured)[0]["cpu"]
    compilation.watch.quantize(lowered)
    annotated = compilation.annotated["cpu"][0] if quantize else None
    with Live() as live:
        expect(reference, lowered, "cpu", compilation.precision["cpu"], annotated, compilation.watch)
    assert VALUES < live.peak < 2 * VALUES, f"{live.peak / VALUES:.1f} weights at once"
    assert live.now() < VALUES
