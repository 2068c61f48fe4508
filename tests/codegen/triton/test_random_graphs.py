"""Random programs as Triton kernels, interpreted, against eager PyTorch in double precision.

Programs, sizes and tolerances are those of the tests on CPUs; this repeats one seed, or many::

    RANDOM_GRAPHS=17 pytest tests/codegen/triton/test_random_graphs.py
    RANDOM_GRAPHS=100-400 pytest tests/codegen/triton/test_random_graphs.py

With ``RANDOM_GRAPHS_PASSES=none`` every operator is a kernel of its own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from tilewright.codegen.triton.families import FAMILIES
from tilewright.runtime import sizes
from tilewright.runtime.errors import ShapeError, UsageError

FILE = Path(__file__).parents[2] / "end_to_end" / "test_random_graphs.py"
SPEC = importlib.util.spec_from_file_location("random_programs", FILE)
PROGRAMS = sys.modules["random_programs"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PROGRAMS)
SEEDS = range(1000, 1005)


def seeds():
    first, _, last = os.environ.get("RANDOM_GRAPHS", "").partition("-")
    return range(int(first), int(last or first) + 1) if first else SEEDS


@pytest.mark.parametrize("seed", seeds())
def test_random_graph(seed, lowered):
    module = PROGRAMS.make_program(seed)
    passes = os.environ.get("RANDOM_GRAPHS_PASSES") != "none"
    try:
        inputs = PROGRAMS.make_inputs(PROGRAMS.SIZES[0], seed)
        model = lowered(module, inputs, PROGRAMS.SHAPES, passes=passes, families=FAMILIES)
    except UsageError as error:
        pytest.skip(f"the exporter does not take all declared sizes: {error}")

    def run(*arrays):
        symbols = {item.name: arrays[item.input].shape[item.axis] // item.factor for item in model.plan.symbols}
        for item in model.plan.checks:
            if not sizes.evaluate(item.condition, symbols):
                raise ShapeError(item.message)
        return [tensor.numpy() for tensor in model(*map(torch.from_numpy, arrays))]

    for assignment in PROGRAMS.SIZES:
        wrong = PROGRAMS.check(run, module, seed, assignment)
        assert not wrong, PROGRAMS.report(seed, module, wrong)
