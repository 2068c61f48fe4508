"""ONNX files that cannot be read, must not be read, or need care: refusals, external data, names, control flow."""

import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tilewright.compiler.frontends.onnx import load_onnx, unsupported
from tilewright.runtime.errors import ArtifactError, CompileError, SourceError, UnsupportedOperator

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def build(nodes, inputs, outputs, initializers=(), opset=17, **options):
    """A model; inputs and outputs are (name, type, shape), and None for the shape of an output leaves it out."""
    declared = [helper.make_tensor_value_info(*value) for value in inputs]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(nodes, "g", declared, results, list(initializers))
    opsets = [helper.make_opsetid("", opset), *options.pop("opsets", ())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **options)


def saved(tmp_path, *args, **options):
    path = tmp_path / "m.onnx"
    onnx.save(build(*args, **options), path)
    return path


def constant(name, values, dtype=np.int64):
    return numpy_helper.from_array(np.array(values, dtype), name)


def external(name, shape, location, **entries):
    """An initializer whose data lies in another file."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def add_weight(tmp_path, *weights):
    """x plus every weight."""
    nodes, last = [], "x"
    for weight in weights:
        nodes.append(helper.make_node("Add", [last, weight.name], [f"{weight.name}_sum"], name=f"add_{weight.name}"))
        last = f"{weight.name}_sum"
    return saved(tmp_path, nodes, [("x", FLOAT, ["n", 4])], [last], weights)


def export(module, *inputs, **dims):
    return torch.export.export(
        module, inputs, dynamic_shapes=(dims.get("dims") or (None,) * len(inputs),), strict=False
    )


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 100, b"this is no model\n", b"\x08\x07"])
def test_other_files_are_no_models(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    for read in (load_onnx, unsupported):
        with pytest.raises(SourceError, match="m.onnx: not an ONNX model") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_truncated_and_missing_files(tmp_path):
    path = add_weight(tmp_path, constant("w", np.ones((1, 4)), np.float32))
    whole = path.read_bytes()
    for length in (len(whole) // 3, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match="m.onnx"):
            load_onnx(path)
    path.unlink()
    with pytest.raises(SourceError, match="no such file"):
        load_onnx(path)


def test_broken_graphs(tmp_path):
    nodes = [helper.make_node("Relu", ["nowhere"], ["y"], name="lost")]
    with pytest.raises(SourceError, match="'lost' .Relu. reads 'nowhere'"):
        load_onnx(saved(tmp_path, nodes, [("x", FLOAT, [2])], ["y"]))
    with pytest.raises(SourceError, match="nothing makes the output 'z'"):
        load_onnx(saved(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [("x", FLOAT, [2])], ["z"]))
    with pytest.raises(SourceError, match="opset 999 is newer"):
        load_onnx(saved(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [("x", FLOAT, [2])], ["y"], opset=999))
    short = TensorProto(name="w", data_type=FLOAT, dims=[1, 4], raw_data=b"\0" * 12)
    with pytest.raises(SourceError, match="'w' has 12 bytes.* needs 16"):
        load_onnx(add_weight(tmp_path, short))
    four_bits = helper.make_tensor("w", TensorProto.INT4, [4], [1, 2, 3, 4])
    with pytest.raises(SourceError, match="element type INT4"):
        load_onnx(add_weight(tmp_path, four_bits))


@pytest.mark.parametrize("location", ["/etc/hostname", "../w.bin", "a/../../w.bin", "C:\\w.bin", "..\\w.bin", ""])
def test_external_data_outside_of_the_folder_is_refused(tmp_path, location):
    (tmp_path / "w.bin").write_bytes(b"\0" * 16)
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="'w' is outside the model's folder"):
        load_onnx(add_weight(folder, external("w", [1, 4], location)))


def test_external_data_behind_links_is_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"\0" * 16)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(b"\0" * 16)
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(tmp_path / "w.bin", folder / "file")
    os.symlink(tmp_path / "elsewhere", folder / "folder")
    for location in ("file", "folder/w.bin"):
        with pytest.raises(ArtifactError, match="outside the model's folder"):
            load_onnx(add_weight(folder, external("w", [1, 4], location)))
    (folder / "real").write_bytes(np.ones(4, np.float32).tobytes())
    os.symlink(folder / "real", folder / "inside")  # a link that stays inside does no harm
    load_onnx(add_weight(folder, external("w", [1, 4], "inside")))


@pytest.mark.parametrize(
    ("content", "entries", "message"),
    [
        (None, {}, "is missing"),
        (b"", {}, "is empty"),
        (b"\0" * 12, {}, "bytes 0..16, but the file has 12"),
        (b"\0" * 64, {"offset": 52}, "bytes 52..68, but the file has 64"),
        (b"\0" * 64, {"offset": -4}, "bytes -4..12"),
        (b"\0" * 64, {"length": 12}, "needs 16 bytes, its entry says 12"),
        (b"\0" * 64, {"offset": "x"}, "not a number"),
    ],
)
def test_damaged_external_data(tmp_path, content, entries, message):
    if content is not None:
        (tmp_path / "w.bin").write_bytes(content)
    path = add_weight(tmp_path, external("w", [1, 4], "w.bin", **entries))
    with pytest.raises(ArtifactError, match=message) as error:
        load_onnx(path)
    assert "w.bin" in str(error.value)
    assert unsupported(path) == []  # it reads no weights


def test_external_data_is_mapped_and_shared(tmp_path):
    values = np.arange(12, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(values.tobytes() + b"\1")
    at = {"offset": 16, "length": 16}
    weights = [external(name, [1, 4], "w.bin", **at) for name in ("layer.0.w", "layer.1.w")]
    weights.append(external("bias", [4], "w.bin", offset=32))
    module = load_onnx(add_weight(tmp_path, *weights))
    tensors = dict(module.named_buffers(remove_duplicate=False))
    first, second, bias = tensors["layer.0.w"], tensors["layer.1.w"], tensors["bias"]
    assert first.data_ptr() == second.data_ptr()
    assert bias.data_ptr() == first.data_ptr() + 16  # the same mapping
    assert first.tolist() == [[4, 5, 6, 7]]
    x = torch.zeros(2, 4)
    expected = torch.tensor([8 + 8, 10 + 9, 12 + 10, 14 + 11]).float().expand(2, 4)
    assert torch.equal(module(x)["bias_sum"], expected)
    assert torch.equal(export(module, x).module()(x)["bias_sum"], expected)


def test_every_unsupported_operator_is_listed_at_once(tmp_path):
    nodes = [
        helper.make_node("Fancy", ["x"], ["a"], name="one", domain="my.company"),
        helper.make_node("Unique", ["a"], ["b"], name="two"),
        helper.make_node("RandomNormalLike", ["b"], ["c"], name="three"),
        helper.make_node("Relu", ["c"], ["y"], name="fine"),
    ]
    path = saved(tmp_path, nodes, [("x", FLOAT, [2])], ["y"], opsets=[helper.make_opsetid("my.company", 3)])
    found = unsupported(path)
    assert [(f.node, f.op_type, f.domain, f.opset) for f in found] == [
        ("one", "Fancy", "my.company", 3),
        ("two", "Unique", "", 17),
        ("three", "RandomNormalLike", "", 17),
    ]
    assert all(f.reason and f.remedy for f in found)
    with pytest.raises(UnsupportedOperator) as error:
        load_onnx(path)
    assert all(
        part in str(error.value) for part in ("uses 3 operator", "one: my.company.Fancy (opset 3)", "two:", "three:")
    )


def test_operators_of_an_older_opset_say_from_which_one_on(tmp_path):
    nodes = [helper.make_node("Add", ["x", "x"], ["y"], name="old")]
    (found,) = unsupported(saved(tmp_path, nodes, [("x", FLOAT, [2])], ["y"], opset=6))
    assert "from opset 7 on" in found.reason
    assert "version_converter" in found.remedy


def test_training_mode_is_refused(tmp_path):
    weights = [constant(name, np.ones(3), np.float32) for name in "sbmv"]
    node = helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y", "m2", "v2"], name="bn", training_mode=1)
    (found,) = unsupported(saved(tmp_path, [node], [("x", FLOAT, [2, 3, 4])], ["y"], weights))
    assert "model.eval()" in found.reason


def test_sizes_from_data_work_in_eager_and_are_listed_for_compiling(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "sizes"], ["y"], name="shaped"),
        helper.make_node("Tile", ["y", "sizes"], ["z"], name="tiled"),
    ]
    path = saved(tmp_path, nodes, [("x", FLOAT, [6]), ("sizes", INT64, [2])], ["z"])
    assert [f.node for f in unsupported(path)] == ["shaped", "tiled"]
    module = load_onnx(path)
    x, sizes = torch.arange(6.0), torch.tensor([2, 3])
    assert torch.equal(module(x, sizes)["z"], x.reshape(2, 3).repeat(2, 3))
    with pytest.raises(UnsupportedOperator, match="(?s)shaped: Reshape.*'sizes'.*tiled: Tile"):
        export(module, x, sizes)


def test_nonzero_needs_a_constant(tmp_path):
    node = helper.make_node("NonZero", ["x"], ["y"], name="nz")
    path = saved(tmp_path, [node], [("x", FLOAT, [6])], ["y"])
    assert [f.op_type for f in unsupported(path)] == ["NonZero"]
    with pytest.raises(UnsupportedOperator, match="'nz' .NonZero"):
        load_onnx(path)(torch.ones(6))
    nodes = [
        helper.make_node("NonZero", ["mask"], ["where"]),
        helper.make_node("Transpose", ["where"], ["rows"], perm=[1, 0]),
        helper.make_node("GatherND", ["x", "rows"], ["y"]),
    ]
    path = saved(tmp_path, nodes, [("x", FLOAT, [4])], ["y"], [constant("mask", [0, 1, 0, 1])])
    assert unsupported(path) == []
    x = torch.arange(4.0)
    assert torch.equal(export(load_onnx(path), x).module()(x)["y"], torch.tensor([1.0, 3.0]))


def branches():
    then = helper.make_graph([helper.make_node("Add", ["x", "c"], ["t"])], "then", [], [onnx.ValueInfoProto(name="t")])
    then.initializer.append(constant("c", [10.0], np.float32))
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], [onnx.ValueInfoProto(name="e")])
    return {"then_branch": then, "else_branch": other}


def test_a_condition_that_is_constant_or_a_shape_is_decided(tmp_path):
    x = torch.ones(4, 3)
    node = helper.make_node("If", ["flag"], ["y"], name="if", **branches())
    for flag, expected in ((True, x + 10), (False, -x)):
        path = saved(tmp_path, [node], [("x", FLOAT, ["n", 3])], ["y"], [constant("flag", flag, bool)])
        assert unsupported(path) == []
        assert torch.equal(export(load_onnx(path), x).module()(x)["y"], expected)
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["columns"]),
        helper.make_node("Equal", ["columns", "three"], ["flag"]),
        node,
    ]
    constants = [constant("one", 1), constant("three", 3)]
    path = saved(tmp_path, nodes, [("x", FLOAT, ["n", 3])], ["y"], constants)
    exported = export(load_onnx(path), x, dims=({0: torch.export.Dim("n", min=1, max=9)},)).module()
    assert torch.equal(exported(torch.zeros(7, 3))["y"], torch.full((7, 3), 10.0))


def test_a_condition_from_data_is_refused(tmp_path):
    node = helper.make_node("If", ["flag"], ["y"], name="fork", **branches())
    path = saved(tmp_path, [node], [("x", FLOAT, [3]), ("flag", BOOL, [])], ["y"])
    (found,) = unsupported(path)
    assert (found.node, found.op_type) == ("fork", "If")
    with pytest.raises(UnsupportedOperator, match="fork: If"):
        export(load_onnx(path), torch.ones(3), torch.tensor(True))


def test_a_loop_of_known_length_is_unrolled(tmp_path):
    """y = x * 2^3, collecting x * 2^i."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "state"], ["doubled"]),
            helper.make_node("Identity", ["live"], ["still"]),
            helper.make_node("Identity", ["doubled"], ["seen"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("live", BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [onnx.ValueInfoProto(name=name) for name in ("still", "doubled", "seen")],
    )
    node = helper.make_node("Loop", ["trips", "", "x"], ["last", "all"], name="loop", body=body)
    path = saved(tmp_path, [node], [("x", FLOAT, ["n"])], ["last", "all"], [constant("trips", 3)])
    x = torch.tensor([1.0, 3.0])
    got = export(load_onnx(path), x).module()(x)
    assert torch.equal(got["last"], 8 * x)
    assert torch.equal(got["all"], torch.stack([2 * x, 4 * x, 8 * x]))


def test_functions_are_expanded(tmp_path):
    """Those that the model brings along, and operators that ONNX defines by others."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    body = [helper.make_node("Mul", ["a", "a"], ["square"]), helper.make_node("Relu", ["square"], ["r"])]
    square = helper.make_function("mine", "Square", ["a"], ["r"], body, opsets)
    nodes = [
        helper.make_node("Square", ["x"], ["s"], name="square", domain="mine"),
        helper.make_node("CenterCropPad", ["s", "target"], ["y"], name="crop", axes=[1]),
    ]
    path = saved(
        tmp_path, nodes, [("x", FLOAT, [2, 5])], ["y"], [constant("target", [3])],
        opset=18, opsets=[opsets[1]], functions=[square],
    )  # fmt: skip
    assert unsupported(path) == []
    x = torch.randn(2, 5)
    assert torch.allclose(load_onnx(path)(x)["y"], (x * x)[:, 1:4])


def test_awkward_names_of_weights(tmp_path):
    names = ["forward", "nodes", "nodes.a", "a", "a.b", "a..b", "onnx::Add_1", "0", "training", "if", "x y"]
    weights = [constant(name, np.full((1, 4), 2.0**i), np.float32) for i, name in enumerate(names)]
    path = add_weight(tmp_path, *weights)
    module = load_onnx(path)
    x = torch.zeros(3, 4)
    total = torch.full((3, 4), float(2 ** len(names) - 1))
    assert torch.equal(module(x)["x y_sum"], total)
    exported = export(module, x)
    assert torch.equal(exported.module()(x)["x y_sum"], total)
    assert "onnx__Add_1" in exported.state_dict
    assert len(exported.state_dict) == len(names)


def test_symbolic_shape_arithmetic(tmp_path):
    """x[:, (columns - 3) / 2 :: -1] reversed rows, with integer division towards zero."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["columns"]),
        helper.make_node("Sub", ["columns", "three"], ["less"]),
        helper.make_node("Div", ["less", "two"], ["half"]),
        helper.make_node("Unsqueeze", ["half", "axis"], ["start"]),
        helper.make_node("Concat", ["start", "last"], ["starts"], axis=0),
        helper.make_node("Concat", ["end", "end"], ["ends"], axis=0),
        helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"]),
    ]
    constants = [constant("one", 1), constant("two", 2), constant("three", 3), constant("axis", [0])]
    constants += [
        constant("end", [-(2**63)]),
        constant("last", [-1]),
        constant("axes", [1, 0]),
        constant("steps", [-1, -2]),
    ]
    path = saved(tmp_path, nodes, [("x", FLOAT, ["n", "m"])], ["y"], constants)
    assert unsupported(path) == []
    module = load_onnx(path)
    auto = torch.export.Dim.AUTO
    exported = export(module, torch.randn(5, 8), dims=({0: auto, 1: auto},)).module()
    for rows, columns in ((5, 8), (3, 6), (7, 31)):
        x = torch.randn(rows, columns)
        expected = x.numpy()[::-2, int((columns - 3) / 2) :: -1]
        for run in (module, exported):
            np.testing.assert_array_equal(run(x)["y"].numpy(), expected)


def test_a_failing_node_is_named(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="/encoder/layer.0/MatMul")]
    path = saved(tmp_path, nodes, [("x", FLOAT, [2, 5])], ["y"], [constant("w", np.ones((4, 3)), np.float32)])
    with pytest.raises(CompileError, match=r"'/encoder/layer.0/MatMul' \(MatMul, opset 17\) on float32\[2, 5\]"):
        load_onnx(path)(torch.ones(2, 5))


def test_outputs_that_are_inputs_constants_shapes_and_duplicates(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Identity", ["w"], ["weight"]),
    ]
    path = saved(
        tmp_path, nodes, [("x", FLOAT, ["n", 4])], ["shape", "same", "x", "w", "weight"],
        [constant("w", np.arange(3), np.float32)],
    )  # fmt: skip
    module = load_onnx(path)
    x = torch.randn(5, 4)
    for run in (module, export(module, x, dims=({0: torch.export.Dim("n", min=1, max=9)},)).module()):
        got = run(x)
        assert list(got) == ["shape", "same", "x", "w", "weight"]
        assert got["shape"].tolist() == [5, 4] and got["shape"].dtype == torch.int64
        assert torch.equal(got["same"], x) and torch.equal(got["x"], x)
        assert torch.equal(got["w"], torch.arange(3.0)) and torch.equal(got["weight"], torch.arange(3.0))


def test_input_specs_and_initializers_listed_as_inputs(tmp_path):
    """Before IR version 4 every initializer is listed among the inputs too."""
    w = constant("w", np.ones(4), np.float32)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    path = saved(tmp_path, nodes, [("w", FLOAT, [4]), ("x", FLOAT, ["batch", 4])], ["y"], [w])
    model = onnx.load(path)
    model.graph.input[1].type.tensor_type.shape.dim.add()  # a size without value or name
    onnx.save(model, path)
    module = load_onnx(path)
    assert module.input_names == ("x",)
    assert module.input_specs == {"x": (torch.float32, ("batch", 4, "x_2"))}
    assert module.output_names == ("y",)
