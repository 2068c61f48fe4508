"""Copies of programs that compute with few weights at a time, and quantized rows that wait on disk."""

import pytest
import torch
from torch import nn

from tilewright.compiler.capture import capture
from tilewright.compiler.copies import late_constants, reference_of
from tilewright.compiler.row_store import RowStore
from tilewright.passes.base import Report
from tilewright.passes.widen_floats import WidenFloats


@pytest.fixture(scope="module")
def widened():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(4))).eval()
    program = capture("main", net, (torch.randn(2, 16, dtype=torch.bfloat16),))
    WidenFloats().run(program, Report())
    program.module.recompile()
    return program


def most_alive(program) -> int:
    """How many converted matrices of weights are between their computation and their last use at the same time."""
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    weights = [
        (places[node], max(places[user] for user in node.users))
        for node in program.graph.nodes
        if node.op == "call_function" and node.meta["val"].dtype == torch.float32 and node.meta["val"].shape == (16, 16)
    ]
    assert len(weights) == 4
    return max(sum(first <= place < last for first, last in weights) for place in places.values())


def test_weights_are_converted_right_before_their_use(widened):
    late = late_constants(widened)
    assert most_alive(widened) == 4 and most_alive(late) == 1
    assert [node.name for node in reference_of(widened).graph.nodes] == [node.name for node in widened.graph.nodes]
    assert sorted(node.name for node in late.graph.nodes) == sorted(node.name for node in widened.graph.nodes)
    assert torch.equal(late.run(widened.sample)[0], widened.run(widened.sample)[0])


def test_rows_wait_on_disk(tmp_path):
    store = RowStore(tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (size, 7), dtype=torch.uint8, generator=generator) for size in (5, 0, 9000, 1)]
    kept = [store.put(tensor) for tensor in rows]
    for _ in range(2):
        assert all(torch.equal(mapped, tensor) for mapped, tensor in zip(kept, rows, strict=True))
        store.release()
    assert not list(tmp_path.iterdir()), "the file has no name"
