"""Compiling with --quantize: the artifact against the quantized model, the table of layers, what is refused."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tilewright
from tilewright.compiler.cli import cli
from tilewright.compiler.options import CompileOptions
from tilewright.passes.graph.quantized_ops import DEQUANTIZE, QUANTIZE_WEIGHT
from tilewright.runtime.errors import CompileError, UsageError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up = nn.Embedding(12, 32), nn.Linear(32, 40)
        self.down, self.narrow = nn.Linear(40, 24, bias=False), nn.Linear(24, 5)

    def forward(self, tokens):
        return self.narrow(self.down(torch.relu(self.up(self.table(tokens)))))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model.tw"
    tokens = torch.tensor([[3, 0, 11]])
    done = tilewright.compile(Model().eval(), (tokens,), output=folder, quantize="int4-g32", activations="float")
    return done, tokens


def test_kernels_compute_what_quantization_left(artifact):
    done, tokens = artifact
    assert done.errors and all(item.error < 1e-5 for item in done.errors)
    net, form = Model(), (4, 32, True)

    def rounded(weight, *form):
        return DEQUANTIZE(QUANTIZE_WEIGHT(weight, *form, True), weight.shape[1], *form)

    with torch.no_grad():
        net.table.weight.copy_(rounded(net.table.weight, 8, 0, True))
        net.up.weight.copy_(rounded(net.up.weight, *form))
        net.down.weight.copy_(rounded(net.down.weight, *form))
        expected = net(tokens)
    with tilewright.load(done.path) as model:
        torch.testing.assert_close(torch.from_numpy(model(tokens.numpy())), expected, rtol=1e-5, atol=1e-6)


def test_lists_what_was_asked_and_applied(artifact):
    done, _ = artifact
    found = json.loads((done.path / "manifest.json").read_text())["info"]["quantization"]
    assert (found["asked"], found["activations"]) == ("int4-g32", "float")
    layers = {item["layer"]: item for item in found["layers"]}
    assert {name: item["applied"] for name, item in layers.items()} == {
        "table.weight": "int8",
        "up.weight": "int4-g32",
        "down.weight": "int4-g32",
        "narrow.weight": None,
    }
    assert "24 columns" in layers["narrow.weight"]["why"]
    assert layers["up.weight"]["bytes"] == 40 * (16 + 4)
    weight = Model().up.weight.detach()
    off = DEQUANTIZE(QUANTIZE_WEIGHT(weight, 4, 32, True, True), 32, 4, 32, True) - weight
    assert layers["up.weight"]["error"] == pytest.approx(float(off.norm() / weight.norm()), rel=1e-3)
    assert layers["table.weight"]["error"] < 0.01 < layers["up.weight"]["error"]
    assert 0 < found["deviation"]["main"]["output"] < 0.2


def test_inspect_shows_the_table(artifact):
    done, _ = artifact
    shown = CliRunner().invoke(cli, ["inspect", str(done.path), "quantization"]).output
    assert "up.weight" in shown and "int4-g32" in shown and "narrow.weight: it has 24 columns" in shown
    lines = CliRunner().invoke(cli, ["inspect", str(done.path)]).output.splitlines()
    (line,) = (line for line in lines if line.startswith("quantization: "))
    assert len(line) < 120 + len(str(done.path)) and line.endswith("quantization` lists them")
    data = CliRunner().invoke(cli, ["inspect", str(done.path), "quantization", "--json"]).output
    assert json.loads(data)["quantization"]["asked"] == "int4-g32"


def test_options_that_do_not_fit():
    with pytest.raises(UsageError, match="choose int8"):
        CompileOptions(quantize="int2")
    with pytest.raises(UsageError, match="add --quantize"):
        CompileOptions(activations="int8")
    assert CompileOptions(quantize="int8").recipe("cuda").of("x", "linear").activations == -1
    assert CompileOptions(quantize="int8").recipe("cpu").of("x", "linear").activations == 0


def test_numbers_too_large_for_their_scale_name_the_weight(tmp_path):
    net, output = Model().eval(), tmp_path / "model.tw"
    with torch.no_grad():
        net.up.weight[7, 3] = 1e6
    with pytest.raises(CompileError, match=r'the weight up\.weight .* up to 1e\+06.* int8 .*"up\.weight": "none"'):
        tilewright.compile(net, (torch.tensor([[1, 2, 3]]),), output=output, quantize="int4-g32", verify="off")
    assert not output.exists()


def test_an_embedding_and_a_head_that_share_their_rows(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens))

    torch.manual_seed(0)
    tokens = torch.tensor([3, 0, 11])
    done = tilewright.compile(Tied().eval(), (tokens,), output=tmp_path / "tied.tw", quantize="int8")
    assert done.errors and max(item.error for item in done.errors) < 1e-5
