"""Sources by file, name and object: what each becomes and how what is no model is refused."""

import io
import json
import pickle
import zipfile

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.export import Dim

from tilewright.compiler.options import CompileOptions, Entry
from tilewright.compiler.sources import open_source, read_samples
from tilewright.models import registry
from tilewright.runtime.errors import ArtifactError, SourceError, TilewrightError, UsageError


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.head(self.body(x))

    def encode(self, x):
        self.seen += 1
        return self.body(x)


def constants(program):
    return {
        node.meta["source"]: getattr(program.module, node.target).data_ptr()
        for node in program.graph.find_nodes(op="get_attr")
    }


def test_a_module_from_python():
    (program,) = open_source(Two().eval(), (torch.randn(3, 4),), shapes={"x": "batch:1..8,4"})
    assert program.name == "main" and [bounds.maximum for bounds in program.symbols.values()] == [8]


def test_entries_share_weights_and_states():
    module = Two().eval()
    x = torch.randn(3, 4)
    main, encode = open_source(
        module,
        (x,),
        entries={"main": Entry(), "encode": Entry("encode", (x,), dynamic_shapes={"x": {0: Dim("rows", max=9)}})},
    )
    assert (main.name, encode.name) == ("main", "encode") and not main.symbols and len(encode.symbols) == 1
    shared = constants(main).items() & constants(encode).items()
    assert {name for name, _ in shared} == {"body.weight", "body.bias"}
    assert main.states[0].name == encode.states[0].name == "seen"
    assert main.states[0].initial.data_ptr() == encode.states[0].initial.data_ptr() == module.seen.data_ptr()
    with pytest.raises(UsageError, match="its own dynamic_shapes"):
        open_source(module, (x,), shapes={"x": "3,4"}, entries={"main": Entry()})
    with pytest.raises(UsageError, match="no name for an entry point"):
        open_source(module, (x,), entries={"a b": Entry()})


FACTORY = """
import torch
from sibling import WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, 2)
    def forward(self, x, scale=1.0, bias=None):
        y = self.linear(x) * scale
        return y if bias is None else y + bias

def bare():
    return Net().eval()

def with_args():
    return Net().eval(), (torch.zeros(1, WIDTH),)

def with_kwargs():
    return Net().eval(), (torch.zeros(1, WIDTH), 2.0), {"bias": torch.zeros(2)}

def with_shapes():
    return Net().eval(), (torch.zeros(1, WIDTH),), {}, {"x": "batch:1..16,3"}

def training():
    return Net(), (torch.zeros(1, WIDTH),)

def broken():
    return 1 / 0

def wrong():
    return "model"

def naked():
    return Net().eval(), torch.zeros(1, 3)

number = 3
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "sibling.py").write_text("WIDTH = 3\n")
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return str(path)


def test_factories(factory, tmp_path):
    (program,) = open_source(f"{factory}:with_args")
    assert program.sample[0].shape == (1, 3)
    (program,) = open_source(f"{factory}:with_kwargs")
    assert [item.name for item in program.inputs] == ["x", "bias"]
    (program,) = open_source(f"{factory}:with_shapes", shapes={"x": "rows:1..4,3"})
    assert [bounds.name for bounds in program.symbols.values()] == ["rows"]
    (program,) = open_source(f"{factory}:with_shapes")
    assert [bounds.maximum for bounds in program.symbols.values()] == [16]
    np.savez(tmp_path / "sample.npz", x=np.ones((5, 3), np.float32))
    (program,) = open_source(f"{factory}:bare", shapes={"x": "n:1..9,3"}, sample_inputs=tmp_path / "sample.npz")
    assert program.sample[0].shape == (5, 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "no function 'missing'; it defines bare, with_args"),
        ("number", "no function 'number'"),
        ("broken", "broken failed at line 29: ZeroDivisionError"),
        ("wrong", r"returned a str; it must return a module, \(module, args\)"),
        ("naked", "put them in a tuple"),
        ("training", r"training mode.*module.eval\(\)"),
    ],
)
def test_factories_that_fail(factory, function, message):
    with pytest.raises(SourceError, match=message):
        open_source(f"{factory}:{function}")


def test_a_factory_without_samples_asks_for_them(factory):
    with pytest.raises(UsageError, match="missing a required argument: 'x'"):
        open_source(f"{factory}:bare")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "cannot be imported at line 1: SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("raise ValueError('no\\nmore')", "at line 1: ValueError: no"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(f"{tmp_path / 'bad.py'}:f")
    assert "\n" not in str(caught.value)


def test_registered_models():
    assert "mlp" in registry.names()
    (program,) = open_source("mlp")
    assert [bounds.name for bounds in program.symbols.values()] == ["batch"]
    (narrow,) = open_source("mlp", shapes={"x": "rows:1..2,128"})
    assert [bounds.maximum for bounds in narrow.symbols.values()] == [2]


def test_what_is_no_source(tmp_path):
    for source, message in [
        ("mpl", "neither a file nor a registered model; did you mean the registered model mlp"),
        ("", "folder without config.json|neither"),
        (str(tmp_path), "folder without config.json"),
        (str(tmp_path / "gone.onnx"), "no such file"),
        (str(tmp_path / "gone.pt2"), "no such file"),
        (str(tmp_path / "gone.py:f"), "no such file"),
        (3, "a int is no model"),
    ]:
        with pytest.raises(SourceError, match=message):
            open_source(source)
    for name, message in [
        ("weights.pth", "names no model"),
        ("net.py", "name the function that builds the model, as in .*net.py:build"),
        ("model.safetensors", "give its folder"),
        ("notes.txt", "no model file"),
        ("model.onnx", "not an ONNX model"),
        ("model.pt2", "not a zip archive"),
    ]:
        (tmp_path / name).write_bytes(b"something else entirely")
        with pytest.raises(SourceError, match=message) as caught:
            open_source(tmp_path / name)
        assert "\n" not in str(caught.value)
    artifact = tmp_path / "model.tw"
    artifact.mkdir()
    (artifact / "manifest.json").write_text("{}")
    with pytest.raises(SourceError, match="compiled artifact already"):
        open_source(artifact)


def test_sample_files(tmp_path):
    module = Two().eval()
    np.savez(tmp_path / "ok.npz", x=np.ones((3, 4), np.float32))
    (program,) = open_source(module, sample_inputs=tmp_path / "ok.npz")
    assert torch.equal(program.sample[0], torch.ones(3, 4))
    np.savez(tmp_path / "other.npz", y=np.ones((3, 4), np.float32))
    with pytest.raises(UsageError, match="hold 'y', but the model's inputs are: x"):
        open_source(module, (torch.zeros(1, 4),), sample_inputs=tmp_path / "other.npz")
    np.save(tmp_path / "single.npy", np.ones(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no")
    for name, message in [
        ("gone.npz", "no such file"),
        ("single.npy", "single array"),
        ("objects.npz", "no .npz"),
        ("text.npz", "no .npz"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_samples(tmp_path / name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    module[2].weight = module[0].weight
    program = torch.export.export(module, (torch.randn(3, 4),), dynamic_shapes=({0: Dim.AUTO},))
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    torch.export.save(program, path)
    return path, module


def test_exported_files(saved):
    path, module = saved
    (program,) = open_source(path, shapes={"input": "batch:1..64,4"})
    assert [bounds.name for bounds in program.symbols.values()] == ["batch"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(program.run((x,))[0], module(x).detach())
    assert len(constants(program)) == 3, "tied weights stay one constant"
    (narrow,) = open_source(path, shapes={"input": "batch:1..2,4"})
    assert narrow.sample[0].shape == (2, 4), "the program's own example had three rows"
    with pytest.raises(UsageError, match="size 7 in the sample, outside 'batch:1..2'"):
        open_source(path, (torch.ones(7, 4),), shapes={"input": "batch:1..2,4"})
    with pytest.raises(UsageError, match="--shape input=batch:1..64,4"):
        open_source(path)
    with pytest.raises(UsageError, match="no input is called 'x'; the program's inputs are: input"):
        open_source(path, shapes={"x": "batch:1..64,4"})
    with pytest.raises(UsageError, match="one entry point"):
        open_source(path, entries={"main": Entry()})
    (program,) = open_source(path, (torch.ones(7, 4),), shapes={"input": "batch:1..64,4"})
    assert torch.equal(program.sample[0], torch.ones(7, 4))


def rewrite(path, target, change):
    """Copy a zip archive with some members changed: name → bytes to bytes or None."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


class Attack:
    def __reduce__(self):
        return (print, ("code ran while loading",))


def test_exported_files_run_no_code(saved, tmp_path, capsys):
    buffer = io.BytesIO()
    torch.save(Attack(), buffer)
    bad = rewrite(
        saved[0], tmp_path / "bad.pt2", lambda name, data: buffer.getvalue() if name.endswith(".pt") else data
    )
    with pytest.raises(SourceError, match="pickled objects other than tensors") as caught:
        open_source(bad)
    assert "\n" not in str(caught.value)

    def pickled_constant(name, data):
        if name.endswith("model_constants_config.json"):
            payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"c": payload}}).encode()
        return data

    bad = rewrite(saved[0], tmp_path / "opaque.pt2", pickled_constant)
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr(archive.namelist()[0].split("/")[0] + "/data/constants/opaque_obj_0", pickle.dumps(Attack()))
    with pytest.raises(SourceError, match="no tensor but an object"):
        open_source(bad)
    assert "code ran" not in capsys.readouterr().out


def test_damaged_exported_files(saved, tmp_path):
    path, _ = saved
    data = path.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="truncated"):
        open_source(tmp_path / "cut.pt2")
    with zipfile.ZipFile(path) as archive:
        weight = next(info for info in archive.infolist() if "weights/weight_" in info.filename)
        content = archive.read(weight.filename)
    flipped = bytearray(data)
    flipped[data.index(content, weight.header_offset)] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(bytes(flipped))
    with pytest.raises(ArtifactError, match="checksum of .*weight_"):
        open_source(tmp_path / "flipped.pt2")
    for name, drop, message in [
        ("plain.pt2", "archive_format", "no exported program"),
        ("empty.pt2", "models/model.json", "no exported model"),
        ("lost.pt2", "weights/weight_0", "cannot be read by PyTorch"),
    ]:
        bad = rewrite(path, tmp_path / name, lambda member, data, drop=drop: None if member.endswith(drop) else data)
        with pytest.raises(TilewrightError, match=message) as caught:
            open_source(bad, shapes={"input": "batch:1..64,4"})
        assert "\n" not in str(caught.value)


def onnx_file(path, dims, dtype=TensorProto.FLOAT):
    value = helper.make_tensor_value_info("input.1", dtype, dims)
    output = helper.make_tensor_value_info("out", dtype, dims)
    graph = helper.make_graph([helper.make_node("Relu", ["input.1"], ["out"])], "g", [value], [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_onnx_files(tmp_path):
    path = onnx_file(tmp_path / "m.onnx", ["batch_size", 3, "s1"])
    (program,) = open_source(path)
    assert [item.name for item in program.inputs] == ["input.1"]
    assert program.results == {"dict": {"out": {"leaf": 0}}}
    assert {bounds.name: (bounds.minimum, bounds.maximum) for bounds in program.symbols.values()} == {
        "batch_size": (1, 1024),
        "dim_s1": (1, 1024),
    }
    (program,) = open_source(path, shapes={"input.1": "n:1..4,3,16"})
    assert [(bounds.name, bounds.maximum) for bounds in program.symbols.values()] == [("n", 4)]
    assert program.sample[0].shape == (2, 3, 16)
    np.savez(tmp_path / "in.npz", **{"input.1": np.ones((5, 3, 7), np.float32)})
    (program,) = open_source(path, sample_inputs=tmp_path / "in.npz")
    assert program.sample[0].shape == (5, 3, 7)


def test_options_check_themselves():
    assert CompileOptions().target == ("cpu",)
    with pytest.raises(UsageError, match="unknown verification level 'all'"):
        CompileOptions(verify="all")
    with pytest.raises(UsageError, match="no target"):
        CompileOptions(target=())
