"""Capturing modules: every corner of what goes in, what comes out, and what is refused."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import sympy
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from tilewright.compiler.capture import capture
from tilewright.compiler.guards import essential, holds, parse_guard
from tilewright.passes.graph.edit import insert
from tilewright.runtime.errors import SourceError, UnsupportedOperator, UsageError


def module_of(function, **attributes):
    """A module in evaluation mode whose forward is ``function(self, ...)``."""
    made = type("Made", (nn.Module,), {"forward": function})()
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            made.register_buffer(name, value)
        else:
            setattr(made, name, value)
    return made.eval()


def rebuild(tree, outputs):
    """The output that a result tree describes."""
    ((kind, content),) = tree.items()
    if kind == "leaf":
        return outputs[content]
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: rebuild(part, outputs) for key, part in content.items()}
    return (tuple if kind == "tuple" else list)(rebuild(part, outputs) for part in content)


def assert_agrees(program, module, *args, **kwargs):
    with torch.no_grad():
        expected = module(*args, **kwargs)
    outputs = program.run(program.sample)
    assert_same(rebuild(program.results, outputs), expected)


def assert_same(a, b):
    """Equal trees of tensors and values, bit by bit."""
    assert isinstance(b, type(a))
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(self.drop(self.norm(x))).relu()


def small():
    torch.manual_seed(0)
    return Small().eval()


def test_the_graph_runs_and_says_where_it_comes_from():
    module = small()
    x = torch.randn(5, 8)
    program = capture("main", module, (x,), shapes={"x": "batch:1..64,8"})
    assert_agrees(program, module, x)
    assert [item.name for item in program.inputs] == ["x"] and program.states == () and program.guards == ()
    ((symbol, bounds),) = program.symbols.items()
    assert (symbol.name, bounds.name, bounds.minimum, bounds.maximum) == ("batch", "batch", 1, 64)
    nodes = {node.name: node for node in program.graph.nodes}
    assert str(nodes["linear"].meta["val"].shape) == "torch.Size([batch, 4])"
    assert nodes["linear_weight"].op == "get_attr" and nodes["linear_weight"].meta["source"] == "linear.weight"
    for node in program.graph.nodes:
        if node.op != "output":
            assert "val" in node.meta
        if node.op == "call_function":
            assert "test_capture.py" in node.meta["stack_trace"] and node.meta["nn_module_stack"]
    assert [node.name for node in program.graph.nodes if node.op == "get_attr" and not node.users] == []


def test_a_row_alone_is_legal_at_run_time():
    module = small()
    program = capture("main", module, (torch.randn(1, 8),), shapes={"x": "batch:1..64,8"})
    assert program.sample[0].shape == (2, 8) and program.guards == ()
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(program.run((x,))[0], module(x).detach(), rtol=0, atol=1e-6)


def test_without_shapes_all_is_fixed():
    program = capture("main", small(), (torch.randn(1, 8),))
    assert program.symbols == {} and program.sample[0].shape == (1, 8)


def test_weights_are_aliased_not_copied():
    module = small()
    program = capture("main", module, (torch.randn(2, 8),))
    originals = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    weights = [node for node in program.graph.nodes if node.op == "get_attr"]
    assert len(weights) == 6
    for node in weights:
        assert getattr(program.module, node.target).data_ptr() == originals[node.meta["source"]]
        assert not getattr(program.module, node.target).requires_grad and not node.meta["val"].requires_grad


def test_passes_can_insert_nodes_with_the_named_symbols():
    program = capture("main", small(), (torch.randn(5, 8),), shapes={"x": "batch:1..64,8"})
    relu = next(node for node in program.graph.nodes if node.name == "relu")
    new = insert(program.graph, relu, torch.ops.aten.view.default, (relu.args[0], [-1]), origins=(relu,))
    assert new.meta["val"].shape[0].node.expr == 4 * next(iter(program.symbols))


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": {0: Dim("batch", max=64)}, "scale": None, "parts": None},
        ({0: Dim("batch", max=64)}, None, None),
        {"x": "batch:0..64,8"},
    ],
    ids=["dict", "tuple", "language"],
)
def test_dynamic_shapes_in_every_form(shapes):
    module = module_of(lambda self, x, scale, parts: x * scale + parts["a"][0])
    args = (torch.randn(3, 8), 2.5, {"a": [torch.randn(8)]})
    program = capture("main", module, args, shapes=shapes)
    assert [str(symbol) for symbol in program.symbols] == ["batch"]
    assert_agrees(program, module, *args)


def test_nested_inputs_get_dotted_names():
    Pair = namedtuple("Pair", "left right")

    def forward(self, x, tree, *rest, flag=True, bias=None, **extra):
        total = x + tree["a"][0] * tree["b"].left - tree["b"].right + rest[1]
        return (total + extra["late"]) * (3 if flag and bias is None else 1)

    module = module_of(forward)
    t = [torch.randn(2, 3) for _ in range(7)]
    args = (t[0], {"a": (t[1],), "b": Pair(t[2], t[3])}, t[4], t[5])
    program = capture("main", module, args, {"late": t[6], "flag": True})
    assert [item.name for item in program.inputs] == [
        "x",
        "tree.a.0",
        "tree.b.left",
        "tree.b.right",
        "rest.0",
        "rest.1",
        "late",
    ]
    assert_agrees(program, module, *args, flag=True, late=t[6])


def test_nested_inputs_take_dimensions_by_dotted_name():
    module = module_of(lambda self, x, tree: x + tree["a"][0])
    args = (torch.randn(3, 4), {"a": [torch.randn(3, 4)]})
    program = capture("main", module, args, shapes={"x": "n:1..9,4", "tree.a.0": "n,4"})
    assert program.graph.find_nodes(op="placeholder")[1].name == "tree_a_0"
    assert program.guards == () and len(program.symbols) == 1


def test_keyword_order_is_the_signature_s():
    module = module_of(lambda self, x, y=None, z=None: x - 2 * y + 3 * z)
    x, y, z = (torch.randn(2) for _ in range(3))
    program = capture("main", module, (x,), {"z": z, "y": y})
    assert [item.name for item in program.inputs] == ["x", "y", "z"]
    assert_agrees(program, module, x, y, z)


def test_a_parameter_that_is_left_out_before_one_that_is_given():
    module = module_of(lambda self, x, y=2.0, z=None: x * y + z)
    x, z = torch.randn(2), torch.randn(2)
    assert_agrees(capture("main", module, (x,), {"z": z}), module, x, z=z)


def test_dead_inputs_stay_inputs():
    module = module_of(lambda self, x, unused: x + 1)
    program = capture("main", module, (torch.randn(2), torch.randn(3, 4)), shapes={"unused": "n:1..9,4"})
    assert [item.name for item in program.inputs] == ["x", "unused"]
    assert str(program.graph.find_nodes(op="placeholder")[1].meta["val"].shape) == "torch.Size([n, 4])"


@dataclass
class Result:
    first: torch.Tensor
    second: int


def test_every_kind_of_output():
    constant = torch.arange(3.0)
    weight = nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = x * 2
        return {
            "y": y,
            "input": x,
            "view": y[1:],
            "twice": (y, y),
            "constant": self.constant,
            "weight": self.weight,
            "none": None,
            "number": 3,
            "fraction": 0.5,
            "truth": True,
            "text": "ok",
            "rows": x.shape[0],
            "columns": x.shape[1],
            "product": x.shape[0] * 2,
            "list": [y, (None, {"deep": y + 1})],
            "dataclass": Result(y - 1, 7),
            "ordered": OrderedDict(b=y, a=x),
            "empty": (),
        }

    module = module_of(forward, constant=constant, weight=weight)
    x = torch.randn(4, 3)
    program = capture("main", module, (x,), shapes={"x": "n:1..9,3"})
    outputs = program.run((x,))
    result = rebuild(program.results, outputs)
    with torch.no_grad():
        expected = module(x)
    expected["dataclass"] = {"first": expected["dataclass"].first, "second": 7}
    expected["ordered"] = dict(expected["ordered"])
    assert list(result) == list(expected)
    assert_same(result, expected)
    assert program.results["dict"]["twice"] == {"tuple": [program.results["dict"]["y"]] * 2}
    assert program.results["dict"]["number"] == {"constant": 3} and "leaf" in program.results["dict"]["rows"]
    assert len(outputs) == len(set(program.graph.output_node().args[0]))


def test_one_bare_output():
    assert capture("main", module_of(lambda self, x: x + 1), (torch.randn(2),)).results == {"leaf": 0}


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda self, x: {1: x}, SourceError, "key 1"),
        (lambda self, x: {"a": [x, {x}]}, SourceError, r"the output\['a'\]\[1\] is a builtins.set"),
        (lambda self, x: x.shape[0] * 0.5, UnsupportedOperator, "fraction computed from sizes"),
        (lambda self, x: x[x > 0], UnsupportedOperator, "index.*test_capture.py.*depends on data"),
        (lambda self, x: x if x.sum() > 0 else -x, UnsupportedOperator, "inside a tensor at .*test_capture.py"),
        (lambda self, x: x.add_(1), SourceError, "writes into its input 'x'"),
        (lambda self, x: x @ torch.zeros(5, 5), SourceError, "cannot be traced at .*test_capture.py:.*RuntimeError"),
        (lambda self, x: functional.dropout(x, 0.5, True), SourceError, "training mode.*dropout"),
        (
            lambda self, x: functional.batch_norm(x, torch.zeros(6), torch.ones(6), training=True),
            SourceError,
            "training mode.*batch_norm",
        ),
        (
            lambda self, x: torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,)),
            UnsupportedOperator,
            "control flow",
        ),
    ],
)
def test_refusals(function, error, message):
    with pytest.raises(error, match=message):
        capture("main", module_of(function), (torch.randn(4, 6),), shapes={"x": "n:1..9,6"})


def test_all_data_dependent_sizes_are_listed_at_once():
    module = module_of(lambda self, x: (x[x > 0] * 2, torch.nonzero(x)))
    with pytest.raises(UnsupportedOperator) as caught:
        capture("main", module, (torch.randn(4, 6),))
    assert len(str(caught.value).splitlines()) == 3


def test_instance_norm_is_not_training():
    module = module_of(lambda self, x: functional.instance_norm(x))
    x = torch.randn(2, 3, 4)
    assert_agrees(capture("main", module, (x,)), module, x)


def test_training_mode_is_refused():
    with pytest.raises(SourceError, match=r"training mode.*module.eval\(\)"):
        capture("main", Small(), (torch.randn(2, 8),))
    module = small()
    module.drop.train()
    with pytest.raises(SourceError, match="training mode.*in drop"):
        capture("main", module, (torch.randn(2, 8),))


def test_weights_without_data_are_refused():
    with torch.device("meta"):
        module = Small().eval()
    with pytest.raises(SourceError, match="'norm.weight' has no data"):
        capture("main", module, (torch.randn(2, 8),))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), None, "missing a required argument: 'x'"),
        ((1, 2), None, "too many positional"),
        ((), {"y": 1}, r"it takes \(x\)"),
        ((3,), None, "no tensor"),
    ],
)
def test_arguments_that_do_not_fit(args, kwargs, message):
    with pytest.raises(UsageError, match=message):
        capture("main", module_of(lambda self, x: x), args, kwargs)


def test_shapes_for_arguments_that_do_not_exist():
    module = module_of(lambda self, x: x + 1)
    with pytest.raises(UsageError, match="did you mean"):
        capture("main", module, (torch.randn(2),), shapes={"xx": "n:1..4"})
    with pytest.raises(UsageError, match="dynamic_shapes names 'y'"):
        capture("main", module, (torch.randn(2),), shapes={"y": {0: Dim("n", max=4)}})


def test_mutated_buffers_become_states():
    def forward(self, x):
        self.count += 1
        self.cache[:, : x.shape[1]].copy_(x)
        return self.cache.sum() + self.fixed, self.count

    cache = torch.zeros(2, 8)
    module = module_of(forward, count=torch.zeros((), dtype=torch.int64), cache=cache, fixed=torch.ones(1))
    x = torch.randn(2, 3)
    program = capture("main", module, (x,), shapes={"x": "2,n:1..8"})
    assert [state.name for state in program.states] == ["cache", "count"] or [s.name for s in program.states] == [
        "count",
        "cache",
    ]
    assert cache.abs().sum() == 0 and module.count == 0, "capturing must not run the module's state"
    state = {item.name: item for item in program.states}
    assert state["cache"].initial.data_ptr() == cache.data_ptr()
    outputs = program.run((x,))
    assert outputs[state["count"].output] == 1
    assert torch.equal(outputs[state["cache"].output][:, :3], x)
    assert cache.abs().sum() == 0, "a run gets fresh state"
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    assert names[0] == "x" and names[1:] == [item.placeholder for item in program.states]


def test_tied_weights_are_one_constant():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    module[2].weight = module[0].weight
    program = capture("main", module, (torch.randn(2, 4),))
    sources = [node.meta["source"] for node in program.graph.nodes if node.op == "get_attr"]
    assert sorted(sources) == ["0.bias", "0.weight", "2.bias"]


def test_buffers_that_share_memory_are_one_constant():
    table = torch.randn(3)
    module = module_of(lambda self, x: x + self.a * self.b, a=table, b=table.view(3))
    program = capture("main", module, (torch.randn(3),))
    assert [node.meta["source"] for node in program.graph.nodes if node.op == "get_attr"] == ["a"]


def test_weights_that_are_not_contiguous():
    module = nn.Linear(6, 4).eval()
    module.weight = nn.Parameter(torch.randn(6, 4).t())
    x = torch.randn(2, 6)
    program = capture("main", module, (x,))
    node = next(node for node in program.graph.nodes if node.meta.get("source") == "weight")
    assert node.meta["val"].stride() == (1, 4) and getattr(program.module, node.target).stride() == (1, 4)
    assert_agrees(program, module, x)


def test_constants_of_the_code_belong_to_their_entry():
    def plus(self, x):
        return x + torch.tensor([1.0, 2.0])

    module = module_of(plus)
    sources = [
        node.meta["source"]
        for name in ("a", "b")
        for node in capture(name, module, (torch.randn(2),)).graph.find_nodes(op="get_attr")
    ]
    assert sources == ["a.lifted_tensor_0", "b.lifted_tensor_0"]


def test_plain_tensor_attributes_are_constants_by_name():
    module = module_of(lambda self, x: x + self.table)
    object.__setattr__(module, "table", torch.arange(2.0))
    program = capture("main", module, (torch.randn(2),))
    (node,) = program.graph.find_nodes(op="get_attr")
    assert node.meta["source"] == "table" and program.module.table.data_ptr() == module.table.data_ptr()


def test_derived_dimensions():
    program = capture(
        "main", module_of(lambda self, x: x.view(-1, 16)), (torch.randn(16, 2),), shapes={"x": "16*h:1..32,2"}
    )
    ((symbol, bounds),) = program.symbols.items()
    assert (bounds.name, bounds.minimum, bounds.maximum) == ("h", 1, 32)
    assert program.inputs[0].name == "x" and program.sample[0].shape == (32, 2)
    assert program.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0].node.expr == 16 * symbol
    assert program.graph.output_node().args[0][0].meta["val"].shape[0].node.expr == 2 * symbol
    assert program.guards == ()
    assert program.run((torch.randn(16, 2),))[0].shape == (2, 16)


def test_equal_dimensions_are_unified():
    program = capture(
        "main",
        module_of(lambda self, x, y: x + y),
        (torch.randn(5, 2), torch.randn(5, 2)),
        shapes={"x": "n:1..64,2", "y": "m:2..32,2"},
    )
    ((symbol, bounds),) = program.symbols.items()
    assert (bounds.name, bounds.minimum, bounds.maximum) == ("n", 2, 32)
    for node in program.graph.find_nodes(op="placeholder"):
        assert node.meta["val"].shape[0].node.expr == symbol


def test_divisibility_becomes_a_guard():
    module = module_of(lambda self, x: x.view(-1, 24) * 2)
    program = capture("main", module, (torch.randn(8, 6),), shapes={"x": "n:1..64,6"})
    (symbol,) = program.symbols
    assert program.guards
    for size in range(1, 65):
        assert all(holds(guard, {symbol: size}) for guard in program.guards) == (size % 4 == 0), size
    assert {node.target for node in program.graph.nodes if node.op == "call_function"} == {
        torch.ops.aten.view.default,
        torch.ops.aten.mul.Tensor,
    }


def test_divisibility_over_two_dimensions_becomes_a_guard():
    module = module_of(lambda self, x: x.reshape(-1, 6))
    program = capture("main", module, (torch.randn(4, 3),), shapes={"x": "n:1..64,m:1..64"})
    n, m = program.symbols
    assert all(holds(guard, {n: 4, m: 3}) for guard in program.guards)
    assert not all(holds(guard, {n: 4, m: 2}) for guard in program.guards)


def test_sizes_that_are_equal_or_one():
    """What broadcasting assumes: true of sizes that are declared as one, else it is checked."""
    module = module_of(lambda self, x, y: torch.einsum("bij,bjk->bik", x, y))
    inputs, y = (torch.randn(2, 3, 4), torch.randn(2, 4, 5)), "b,4,5"
    program = capture("main", module, inputs, shapes={"x": "b:1..8,i:1..8,4", "y": y})
    assert program.guards == ()
    assert_agrees(program, module, *inputs)
    a, b = sympy.symbols("a b", integer=True)
    (guard,) = parse_guard("L['x'].size()[0] == 1 or 3 <= L['x'].size()[0] <= L['y'].size()[0]", lambda path, axis: {
        "L['x']": a, "L['y']": b}[path])  # fmt: skip
    assert [n for n in range(1, 7) if holds(guard, {a: n, b: 4})] == [1, 3, 4]
    assert essential([guard], {a: (1, 4), b: (4, 9)}) == (guard,) and essential([guard], {a: (3, 4), b: (4, 9)}) == ()


def test_branches_on_sizes_ask_for_a_narrower_range():
    module = module_of(lambda self, x: x * 2 if x.shape[0] > 4 else x)
    with pytest.raises(UsageError, match="Declare n as n:5..64"):
        capture("main", module, (torch.randn(8, 6),), shapes={"x": "n:1..64,6"})


def test_a_size_that_the_code_fixes_is_said():
    with pytest.raises(UsageError, match="'n' is fixed at 8 by the model's own code.*Declare n as 8"):
        capture("main", module_of(lambda self, x: x.view(8, 6) + 1), (torch.randn(8, 6),), shapes={"x": "n:1..64,6"})


def test_related_dimensions_are_taught():
    module = module_of(lambda self, x, y: torch.cat([x, x]) + y)
    with pytest.raises(UsageError, match=r"Declare m as 2\*n"):
        capture("main", module, (torch.randn(4), torch.randn(8)), shapes={"x": "n:1..64", "y": "m:2..128"})
    program = capture("main", module, (torch.randn(4), torch.randn(8)), shapes={"x": "n:1..64", "y": "2*n"})
    assert len(program.symbols) == 1


def test_names_that_are_no_identifiers():
    module = module_of(lambda self, **inputs: inputs["class"] + inputs["a.b"])
    x = torch.randn(2)
    program = capture("main", module, (), {"class": x, "a.b": x})
    assert [item.name for item in program.inputs] == ["class", "a.b"]
    assert_agrees(program, module, **{"class": x, "a.b": x})


def test_inputs_and_weights_of_one_name():
    module = module_of(lambda self, weight, forward_: weight + self.weight + forward_, weight=torch.ones(2))
    args = (torch.randn(2), torch.randn(2))
    program = capture("main", module, args)
    assert [node.meta["source"] for node in program.graph.find_nodes(op="get_attr")] == ["weight"]
    assert_agrees(program, module, *args)


def test_hooks_of_the_module_are_part_of_it():
    module = small()
    module.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(2, 8)
    assert_agrees(capture("main", module, (x,)), module, x)


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
        self.seen += 2
        return self.body(x)


def test_methods_submodules_and_callables_as_entries():
    module = Two().eval()
    x = torch.randn(2, 4)
    programs = {
        "main": capture("main", module, (x,)),
        "encode": capture("encode", module, (x,), function="encode"),
        "body": capture("body", module, (x,), function="body"),
        "part": capture("part", module, (x,), function=module.head),
        "free": capture("free", module, (x,), function=lambda a: module.head(a) * 2),
    }
    sources = {
        name: {node.meta["source"] for node in program.graph.find_nodes(op="get_attr")}
        for name, program in programs.items()
    }
    body, head = {"body.weight", "body.bias"}, {"head.weight", "head.bias"}
    assert sources == {"main": body | head, "encode": body, "body": body, "part": head, "free": head}
    assert [state.name for state in programs["main"].states] == ["seen"] == [s.name for s in programs["encode"].states]
    assert programs["main"].states[0].initial.data_ptr() == programs["encode"].states[0].initial.data_ptr()
    assert programs["encode"].run((x,))[1] == 2
    with pytest.raises(UsageError, match="no function or submodule 'nothing'"):
        capture("main", module, (x,), function="nothing")
    with pytest.raises(UsageError, match="one of its submodules"):
        capture("main", module, (x,), function=nn.Linear(4, 4))
