"""The pass manager: order, switching off, checks after each pass, dumps, verification that names the pass."""

import json

import pytest
import torch
from torch import nn

from tilewright.passes.base import Pass
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tilewright.passes.eliminate_dead_code import EliminateDeadCode
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.graph.edit import insert, replace
from tilewright.passes.manager import PassManager
from tilewright.runtime.errors import CompileError, NumericsError, UsageError

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return torch.relu(self.layer(x.view(-1, 8))) * 2 / 4


@pytest.fixture
def program(exported):
    torch.manual_seed(0)
    return exported(Model(), torch.randn(3, 8), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=16)}})


class Wrong(Pass):
    """A rewrite that does not compute the same."""

    def run(self, program, report):
        for node in list(program.graph.nodes):
            if node.target is aten.relu.default:
                report.change(node, "relu is dropped")
                replace(node, node.args[0])


class Widen(Pass):
    """A rewrite that changes an output's shape."""

    def run(self, program, report):
        output = program.graph.output_node()
        (value,) = output.args[0]
        wider = insert(program.graph, output, aten.unsqueeze.default, (value, 0), origins=(value,))
        output.args = ((wider,),)
        report.change(value, "wider")


class Silent(Pass):
    """Changes the graph and says nothing."""

    def run(self, program, report):
        Wrong().run(program, type(report)())


class Fails(Pass):
    """Raises at a node."""

    def run(self, program, report):
        for node in program.graph.nodes:
            if node.op == "call_function":
                raise RuntimeError("no idea")


class MisrecordsShape(Pass):
    """Leaves a shape that is not the value's."""

    def run(self, program, report):
        for node in program.graph.nodes:
            if node.target is aten.relu.default:
                node.meta["val"] = node.meta["val"][:, :1]
                report.change(node, "misrecorded")


def passes():
    return [FoldConstants(outline=False), Canonicalize(), EliminateCommonSubexpressions(), EliminateDeadCode()]


def test_runs_in_order_and_keeps_records(program):
    seen = []
    records = PassManager(passes(), progress=seen.append).run(program)
    assert seen == [record.label for record in records]
    assert seen[1] == "02_canonicalize" and records[1].report.changed
    assert records[1].nodes_before > records[1].nodes_after
    assert all(record.seconds >= 0 and record.error is None for record in records)


def test_disables_by_name_and_label(program):
    assert [r.label for r in PassManager(passes(), disabled=["canonicalize"]).run(program)] == [
        "01_fold_constants",
        "03_eliminate_common_subexpressions",
        "04_eliminate_dead_code",
    ]
    twice = [Canonicalize(), EliminateDeadCode(), Canonicalize()]
    labels = [label for label, _ in PassManager(twice, disabled=["03_canonicalize"]).passes]
    assert labels == ["01_canonicalize", "02_eliminate_dead_code"]
    assert [label for label, _ in PassManager(twice, disabled=["canonicalize"]).passes] == ["02_eliminate_dead_code"]


def test_stops_after_a_pass(program):
    assert len(PassManager(passes(), stop_after="canonicalize").run(program)) == 2
    twice = [Canonicalize(), EliminateDeadCode(), Canonicalize(), EliminateDeadCode()]
    assert len(PassManager(twice, stop_after="canonicalize").passes) == 3, "the last of the name"
    assert len(PassManager(twice, stop_after="01_canonicalize").passes) == 1


@pytest.mark.parametrize("option", ["disabled", "stop_after"])
def test_an_unknown_name_is_a_usage_error_with_close_matches(option):
    value = ["canonicalise"] if option == "disabled" else "canonicalise"
    with pytest.raises(UsageError, match=r"'canonicalise'; did you mean canonicalize"):
        PassManager(passes(), **{option: value})
    with pytest.raises(UsageError, match="the passes are: fold_constants, canonicalize"):
        PassManager(passes(), stop_after="zzz")


def test_verify_names_the_first_pass_that_diverges(program):
    with pytest.raises(NumericsError) as error:
        PassManager([Canonicalize(), Wrong(), EliminateDeadCode()], verify=True).run(program)
    text = str(error.value)
    assert text.startswith("pass 02_wrong: ") and "output 0: error" in text and "--disable-pass wrong" in text
    assert "01_canonicalize" in text, "passes that changed the graph before are named"
    assert "it changed %mul" in text, "so are the nodes that changed"


def test_verify_passes_and_records_the_error(program):
    records = PassManager(passes(), verify=True).run(program)
    assert records[1].error is not None and records[1].error < 1e-6


def test_verify_leaves_the_random_state_alone(program):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    PassManager(passes(), verify=True).run(program)
    assert torch.equal(torch.rand(3), expected)


def test_verify_runs_random_operators_with_the_same_numbers(exported):
    class Noise(nn.Module):
        def forward(self, x):
            return torch.rand_like(x).clone() + x * 1

    records = PassManager(passes(), verify=True).run(exported(Noise(), torch.ones(4, 4)))
    assert any(record.report.changed for record in records)
    assert all(record.error in (None, 0.0) for record in records)


def test_verify_recomputes_shapes(program):
    with pytest.raises(CompileError, match=r"pass 01_misrecords_shape: %relu = aten.relu is recorded as"):
        PassManager([MisrecordsShape()], verify=True).run(program)


def test_a_changed_output_is_an_error(program):
    with pytest.raises(CompileError, match=r"outputs\[0\] changed from f32\[batch, 4\] to f32\[1, batch, 4\]"):
        PassManager([Widen()]).run(program)


def test_a_pass_that_raises_is_named_with_its_node(program):
    with pytest.raises(CompileError, match=r"pass 01_fails: RuntimeError at %view = aten.view: no idea"):
        PassManager([Fails()]).run(program)


def test_a_change_without_a_report_is_an_error(program, tmp_path):
    with pytest.raises(CompileError, match="the graph changed but the report has no change"):
        PassManager([Silent()], dump_dir=tmp_path).run(program)


def test_dumps(program, tmp_path, show):
    before = show(program)
    records = PassManager(passes(), dump_dir=tmp_path, verify=True).run(program)
    folder = tmp_path / "02_canonicalize"
    assert sorted(path.name for path in folder.iterdir()) == ["after.txt", "before.txt", "diff", "report.txt"]
    assert (tmp_path / "01_fold_constants" / "before.txt").read_text() == before
    assert (folder / "after.txt").read_text() != (folder / "before.txt").read_text()
    diff = (folder / "diff").read_text()
    assert diff.startswith("--- before\n+++ after\n") and "\n-  %div " in diff
    report = (folder / "report.txt").read_text()
    assert "rewritten (" in report and "%div: times the reciprocal of 4" in report
    summary = json.loads((tmp_path / "passes.json").read_text())
    assert [entry["label"] for entry in summary] == [record.label for record in records]
    assert summary[1]["changes"] and summary[1]["seconds"] >= 0
    assert (tmp_path / "04_eliminate_dead_code" / "diff").read_text() == ""


def test_dumps_what_a_failed_pass_left(program, tmp_path):
    with pytest.raises(NumericsError):
        PassManager([Canonicalize(), Wrong()], dump_dir=tmp_path, verify=True).run(program)
    assert "FAILED" in (tmp_path / "02_wrong" / "report.txt").read_text()
    assert "-  %relu" in (tmp_path / "02_wrong" / "diff").read_text()
    assert len(json.loads((tmp_path / "passes.json").read_text())) == 2
