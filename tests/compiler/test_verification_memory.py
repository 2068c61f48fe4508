"""Verifying a model of many layers holds the values of few weights at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
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
    """Bytes of the memory that operators gave and that somebody still holds: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage.data_ptr() for _, storage in with_memory((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor, storage in with_memory(result):
            place = storage.data_ptr()
            if place in self._holders or place not in given:
                self._hold(tensor, place, storage.nbytes())
        return result

    def _hold(self, tensor: torch.Tensor, place: int, size: int) -> None:
        if not self._holders.get(place):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[place] = self._holders.get(place, 0) + 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self.now -= size


def with_memory(values):
    """The tensors among values that have memory, and their storages."""
    for leaf in tree_leaves(values):
        if torch.is_tensor(leaf) and not isinstance(leaf, FakeTensor):
            yield leaf, leaf.untyped_storage()


def layers() -> nn.Module:
    torch.manual_seed(0)
    parts = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    return nn.Sequential(*parts).bfloat16().eval()


@pytest.mark.parametrize("quantize", [None, "int8", "int4-g32"])
def test_values_of_weights_are_held_a_few_at_a_time(quantize):
    """A model in bfloat16, computed in float32: its own weights take twice as much as values, quantized ones more."""
    compilation = Compilation(CompileOptions(quantize=quantize))
    sample = torch.randn(5, WIDTH).bfloat16()
    captured = compilation.capture(layers(), (sample,), shapes={"input": f"rows:1..{ROWS},{WIDTH}"})
    reference = reference_of(captured[0])
    (lowered,) = compilation.rewrite(captured)[0]["cpu"]
    compilation.watch.quantize(lowered)
    annotated = compilation.annotated["cpu"][0] if quantize else None
    with Live() as live:
        expect(reference, lowered, "cpu", compilation.precision["cpu"], annotated, compilation.watch)
    assert VALUES < live.peak < 3 * VALUES + 40 * 4 * WIDTH * ROWS, f"{live.peak / VALUES:.1f} weights at once"
    assert live.now < VALUES
