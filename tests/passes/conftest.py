"""What every test of a pass uses: a program from a module, a checked run of a pass, golden text, numbers, refusals."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from tilewright.compiler.capture import capture
from tilewright.passes.base import Pass, Report
from tilewright.passes.graph.cache_ops import BLOCK
from tilewright.passes.graph.printer import show as show_program
from tilewright.passes.graph.program import Program
from tilewright.passes.verify import check_shapes, fixed_symbols

torch.set_num_threads(1)


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def _small(small_programs):
    """Programs of these tests are small."""


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files of the tests that run")


@pytest.fixture
def golden(request):
    """``golden(text)`` compares text with golden/<file>.<test>.txt; ``--update-golden`` writes it."""
    stem = request.path.stem.removeprefix("test_")
    name = request.node.name.removeprefix("test_").replace("/", "_")
    path = GOLDEN / f"{stem}.{name}.txt"

    def compare(text: str) -> None:
        if request.config.getoption("--update-golden", default=False):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden file {path.name}; run the test with --update-golden and read what it writes"
        assert text == path.read_text()

    return compare


@pytest.fixture(scope="session")
def exported():
    """``exported(module, *args, dynamic_shapes=None) -> Program``, in inference mode, with random norm statistics.

    ``dynamic_shapes`` is what ``capture`` takes: dimension language per input, or as ``torch.export`` has them.
    """
    return _exported


class CachedStep(nn.Module):
    """Five tokens of two sequences: appended to a cache, then attending to it."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 32)

    def forward(self, x, positions, starts, contexts, table, keys, values):
        q, k, v = self.project(x).unflatten(-1, (4, 8)).split((2, 1, 1), 1)
        ops = torch.ops.tilewright
        keys = ops.cache_append(keys, k, positions, starts, table, True)
        values = ops.cache_append(values, v, positions, starts, table, False)
        return ops.paged_attention(q, keys, values, positions, starts, contexts, table, 0.3, 0), keys, values


@pytest.fixture(scope="session")
def cached_step():
    """``cached_step(dtype, cache)``: a module that computes in one type over caches of another, and its inputs."""

    def make(dtype, cache):
        torch.manual_seed(0)
        integers = [torch.tensor(item, dtype=torch.int32) for item in ([33, 34, 0, 1, 2], [0, 2, 5], [35, 3])]
        table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
        caches = (torch.randn(4, 1, 8, BLOCK, dtype=cache), torch.randn(4, 1, BLOCK, 8, dtype=cache))
        return CachedStep().to(dtype), (torch.randn(5, 16, dtype=dtype), *integers, table, *caches)

    return make


@pytest.fixture(scope="session")
def cloned():
    """``cloned(program)``: the same program with its own graph (tensors are shared), to compare with later."""
    return _cloned


@pytest.fixture(scope="session")
def show():
    """``show(program) -> str``: the readable text of its graph."""
    return show_program


@pytest.fixture(scope="session")
def run_pass():
    """``run_pass(pass, program) -> Report``: runs it with every check there is.

    Lint, shapes, the same numbers on the sample inputs (and on ``inputs`` if given), and a second run that changes
    nothing.
    """
    return _run_pass


@pytest.fixture(scope="session")
def assert_same_outputs():
    """``assert_same_outputs(before, after, inputs=None, tolerance=None)``: error = max|a-b| / max|ref| per output."""
    return _assert_same_outputs


@pytest.fixture(scope="session")
def refusals():
    """``refusals(pass, program) -> list[str]``: the reasons why it changed nothing (it must change nothing)."""

    def run(pass_: Pass, program: Program) -> list[str]:
        before = show_program(program)
        report = _run_pass(pass_, program)
        assert not report.changed, f"changed: {report.changes}"
        assert show_program(program) == before
        return [note.text for note in report.refusals]

    return run


@pytest.fixture(scope="session")
def targets():
    """``targets(program)``: names of the operators in graph order, such as ``["aten.linear", "aten.add.Tensor"]``."""

    def names(program: Program) -> list[str]:
        calls = [node for node in program.graph.nodes if node.op in ("call_function", "call_module")]
        return [str(node.target).removesuffix(".default") for node in calls]

    return names


def _exported(module: nn.Module, *args: torch.Tensor, dynamic_shapes=None) -> Program:
    module = module.eval()
    generator = torch.Generator().manual_seed(0)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return capture("main", module, args, shapes=dynamic_shapes)


def _cloned(program: Program) -> Program:
    return replace(program, module=_clone_module(program.module))


def _clone_module(module: fx.GraphModule) -> fx.GraphModule:
    graph, mapping = fx.Graph(), {}
    for node in module.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda used: mapping[used])
        mapping[node].meta = copy.copy(node.meta)
    clone = fx.GraphModule(module, graph)
    for name, child in list(clone.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(clone, name, _clone_module(child))
    return clone


def _run_pass(pass_: Pass, program: Program, inputs: Sequence[torch.Tensor] | None = None, *, tolerance=None) -> Report:
    before = _cloned(program)
    report = Report()
    with fixed_symbols(program):
        pass_.run(program, report)
    _check(program)
    if not report.changed:
        assert show_program(before) == show_program(program), "changed the graph without reporting it"
    for given in filter(None, (program.sample, inputs)):
        _assert_same_outputs(before, program, given, tolerance=tolerance)
    settled = show_program(program)
    again = Report()
    with fixed_symbols(program):
        pass_.run(program, again)
    assert not again.changed, f"a second run changes: {again.changes}"
    assert show_program(program) == settled, "a second run changes the graph without reporting it"
    return report


def _check(program: Program) -> None:
    program.graph.lint()
    program.module.recompile()
    for node in program.graph.nodes:
        assert node.op == "output" or "val" in node.meta or not node.users, f"{node.name} has no shape"
    check_shapes(program)


def _run(program: Program, inputs):
    """The outputs, with the same random numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return program.run(tuple(inputs))


def _assert_same_outputs(before: Program, after: Program, inputs=None, *, tolerance: float | None = None) -> None:
    inputs = before.sample if inputs is None else inputs
    expected, got = _run(before, inputs), _run(after, inputs)
    assert len(expected) == len(got)
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(want, torch.Tensor):
            assert want == have, f"output {index}: {have} instead of {want}"
            continue
        assert want.shape == have.shape and want.dtype == have.dtype, f"output {index}: {have.shape} {have.dtype}"
        if not want.dtype.is_floating_point:
            assert torch.equal(want, have), f"output {index} differs"
            continue
        limit = (
            tolerance
            or {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}[want.dtype]
        )
        assert torch.equal(want.isnan(), have.isnan()), f"output {index}: nan in other places"
        finite = want.isfinite()
        assert torch.equal(finite, have.isfinite()) and torch.equal(
            want[~finite & ~want.isnan()], have[~finite & ~want.isnan()]
        )
        want, have = want[finite].double(), have[finite].double()
        if want.numel():
            error = (want - have).abs().max() / want.abs().max().clamp_min(1e-30)
            assert error <= limit, f"output {index}: error {error:.3g} > {limit}"
