import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.codegen.roles import fusion_roles
from tilewright.passes.base import Report
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fold_batch_norm import FoldBatchNorm
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.fuse_operators import FuseOperators
from tilewright.passes.fusion.operators import part
from tilewright.passes.graph.regions import body, is_region

ROLES = fusion_roles()


class Function(nn.Module):
    """A module that calls a function of its inputs and itself, with a few layers to use."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, y=None):
        return self.function(self, x) if y is None else self.function(self, x, y)


@pytest.fixture
def fused(exported, run_pass):
    """``fused(module or function, *inputs) -> (program, report)``, checked for legality, numbers and a second run."""

    def run(what, *inputs, dynamic_shapes=None, again=None):
        torch.manual_seed(0)
        module = what if isinstance(what, nn.Module) else Function(what)
        program = exported(module, *inputs, dynamic_shapes=dynamic_shapes)
        for prepare in (Canonicalize(), FoldBatchNorm(), FoldConstants()):
            prepare.run(program, Report())
        report = run_pass(FuseOperators(ROLES), program, again)
        check_regions(program)
        return program, report

    return run


def kernels(program):
    """What each kernel computes: its operators without views, in order."""
    found = []
    for node in program.graph.nodes:
        if is_region(node, "kernel"):
            inner = [one for one in body(node).graph.nodes if one.op == "call_function"]
            working = [one for one in inner if part(one, ROLES) not in ("view", "item")] or inner
            found.append(" ".join(one.target._schema.name.removeprefix("aten::") for one in working))
    return found


def results(node):
    (returned,) = body(node).graph.output_node().args
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def check_regions(program):
    """Every rule of a region, looked at from outside: nothing bare, one anchor, one shape, views only where allowed."""
    for node in program.graph.nodes:
        what = part(node, ROLES)
        if is_region(node, "kernel"):
            check_region(node)
        elif node.op == "call_function" and what != "size":
            assert what == "unknown", f"{node} is outside of any region"
            assert all(is_region(source) or part(source, ROLES) == "unknown" or source.op != "call_function"
                       for source in node.all_input_nodes)  # fmt: skip


def check_region(node):
    inner = [one for one in body(node).graph.nodes if one.op == "call_function"]
    assert inner, f"{node} is empty"
    assert all(part(one, ROLES) not in ("unknown", "size") for one in inner)
    shapes = {tuple(map(str, result.meta["val"].shape)) for result in results(node)}
    assert len(shapes) == 1, f"{node} gives {shapes}"
    assert all(result.op == "call_function" for result in results(node))
    used = set(results(node))
    assert all(one in used or one.users for one in inner), f"{node} computes what nothing uses"
    anchors = [one for one in inner if one.target in ROLES.anchors]
    family = node.meta["region"].family
    if not anchors:
        assert family == "loop"
        return
    (anchor,) = anchors
    role = ROLES.anchors[anchor.target]
    assert family == role.family and len(results(node)) == 1
    for position, operand in enumerate(anchor.args):
        if isinstance(operand, torch.fx.Node) and operand.op != "placeholder":
            assert position in role.data or (family == "attention" and position == 3)
            if position in role.data:
                while operand.op != "placeholder":
                    inlined = position in role.inlines and part(operand, ROLES) in ("pointwise", "gather")
                    assert inlined or part(operand, ROLES) == "view", f"{operand} before {anchor}"
                    operand = operand.args[0]
    if role.epilogue:
        result = results(node)[0]
        assert [str(size) for size in result.meta["val"].shape] == [str(size) for size in anchor.meta["val"].shape]
        after = {anchor}
        for one in inner:
            if any(source in after for source in one.all_input_nodes):
                assert part(one, ROLES) == "pointwise"
                after.add(one)


# -- golden graphs -----------------------------------------------------------------------------------------------------


def test_mlp(fused, show, golden):
    batch = torch.export.Dim("batch", min=1, max=64)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4), nn.Softmax(-1))
    program, _ = fused(module, torch.randn(3, 8), dynamic_shapes=({0: batch},), again=(torch.randn(1, 8),))
    assert kernels(program) == ["linear relu", "linear gelu", "linear", "softmax"]
    golden(show(program))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x, mask):
        batch, length, width = x.shape
        q, k, v = (
            part.reshape(batch, length, 4, 4).permute(0, 2, 1, 3) for part in self.qkv(self.norm(x)).split(width, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :] != 0)
        x = x + self.out(y.permute(0, 2, 1, 3).reshape(batch, length, width))
        return self.last(x), x


def test_attention_block(fused, show, golden):
    batch, length = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("length", min=1, max=64)
    axes = {0: batch, 1: length}
    program, report = fused(
        Attention(), torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.int64), dynamic_shapes=(axes, axes),
        again=(torch.randn(3, 1, 16), torch.ones(3, 1, dtype=torch.int64)),
    )  # fmt: skip
    assert kernels(program) == ["layer_norm", "linear", "ne scaled_dot_product_attention", "linear add", "layer_norm"]
    assert any("takes in nothing but views" in note.text for note in report.refusals)
    golden(show(program))


class Residual(nn.Module):
    """A block of a residual network; ``down`` is the shortcut's convolution."""

    def __init__(self, channels=8, down=False):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.down = nn.Conv2d(channels, channels, 1) if down else nn.Identity()

    def forward(self, x):
        y = self.norm1(self.first(x)).relu()
        return (self.norm2(self.second(y)) + self.down(x)).relu()


@pytest.mark.parametrize("down", [False, True])
def test_residual_block(down, fused, show, golden):
    program, _ = fused(Residual(down=down), torch.randn(2, 8, 6, 6))
    assert sorted(kernels(program)) == ["convolution"] * down + ["convolution add relu", "convolution relu"]
    golden(show(program))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.reduce, self.gate = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = F.hardswish(self.expand(x))
        return x * F.hardsigmoid(self.gate(self.reduce(x.mean((2, 3), keepdim=True)).relu()))


def test_squeeze_excite(fused, show, golden):
    program, report = fused(SqueezeExcite(), torch.randn(2, 4, 5, 5))
    assert kernels(program) == ["convolution hardswish", "mean", "convolution relu", "convolution hardsigmoid", "mul"]
    golden(show(program))


def test_add_and_layer_norm_with_residual(fused, show, golden):
    """The sum is needed twice: by the norm in whose kernel it is computed, and by the residual after it."""

    def block(m, x, y):
        total = x * 2.0 + y
        return total + m.linear(m.norm(total)).tanh()

    program, _ = fused(block, torch.randn(3, 5, 8), torch.randn(3, 5, 8))
    assert kernels(program) == ["mul add layer_norm", "linear tanh add"]
    first = next(node for node in program.graph.nodes if is_region(node, "kernel"))
    assert len(results(first)) == 2
    golden(show(program))


# -- what goes together ------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: (x * 3 + 1).relu().softmax(-1) * 2, ["mul add relu softmax mul"]),
        (lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(), ["mul mean add rsqrt mul"]),
        (lambda m, x: (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True), ["mean sub var div"]),
        (lambda m, x: x.exp() / x.exp().sum(-1).unsqueeze(-1), None),
        (lambda m, x: (x + 1).mean((2, 3)).sigmoid(), ["add mean sigmoid"]),
        (lambda m, x: x.permute(0, 2, 1, 3).reshape(2, 4, 24), ["permute reshape"]),
        (lambda m, x: F.max_pool2d(x, 2) * 2, ["max_pool2d mul"]),
        (lambda m, x: torch.cat([x[..., 4:], -x[..., :4]], -1) * x, ["neg cat mul"]),
        (lambda m, x: (x.tanh() * 2).permute(0, 3, 1, 2) + 1, ["tanh mul add"]),
        (lambda m, x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1]), ["silu mul"]),
        # different axes, windows, expensive values read many times, several readers: kernels of their own
        (lambda m, x: x.softmax(-1).softmax(1), ["softmax", "softmax"]),
        (lambda m, x: x.softmax(-1).sum(-1), ["softmax", "sum"]),
        (lambda m, x: x - x.mean((2, 3), keepdim=True), ["mean", "sub"]),
        (lambda m, x: F.max_pool2d(x.exp(), 3, 1), ["exp", "max_pool2d"]),
        (lambda m, x: F.max_pool2d(x * 2, 3, 1), ["mul max_pool2d"]),
        (lambda m, x: x[:, :1].exp() + x, ["exp", "add"]),
        (lambda m, x: (x[:, :1] * 2) + x, ["mul add"]),
        (lambda m, x: torch.cat([x.exp(), x], 1), ["exp", "cat"]),
        (lambda m, x: m.linear(x.relu()), ["relu", "linear"]),
        (lambda m, x: (F.max_pool2d(x * 2, 2), F.avg_pool2d(x * 2, 2)), None),
        (lambda m, x: x.cumsum(-1), ["cumsum"]),
        (lambda m, x: x.sigmoid().cumsum(-1), ["sigmoid", "cumsum"]),
        # around products
        (lambda m, x: F.silu(m.linear(x)) * m.other(x), ["linear silu", "linear mul"]),
        (lambda m, x: m.linear(x) + m.other(x), ["linear", "linear add"]),
        (lambda m, x: m.linear(x).permute(0, 2, 1, 3) + 1, ["linear", "add"]),
        (lambda m, x: (m.linear(x) * (y := m.linear(x).sigmoid()), y)[0], None),
        (lambda m, x: torch.matmul(x.transpose(-1, -2), x) * 0.5, ["matmul mul"]),
        (lambda m, x: m.linear(x) * x[:, :1, :1].relu(), ["linear relu mul"]),
        (lambda m, x: m.linear(x) * x[:, :1, :1].exp(), ["exp", "linear mul"]),
        (lambda m, x: m.linear(x) + x.exp(), ["linear exp add"]),
        (lambda m, x: m.linear(x) + x.softmax(-1), ["softmax", "linear add"]),
    ],
)  # fmt: skip
def test_what_goes_together(function, expected, fused):
    program, _ = fused(function, X)
    if expected is not None:
        assert sorted(kernels(program)) == sorted(expected)


def test_gate_and_its_argument_meet_again(fused):
    """A run of operators after a product may branch as long as it ends in one value."""
    program, _ = fused(lambda m, x: (y := m.linear(x)) * torch.sigmoid(y * 1.5) + x, torch.randn(3, 8))
    assert kernels(program) == ["linear mul sigmoid mul add"]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_rows_for_a_cache_are_rotated_where_they_are_read(norm, cached_step, fused):
    """Appending and attending compute their rows themselves, but for norms, which need a whole row."""

    def step(m, q, k, v, cos, sin, *given):
        *ragged, contexts, table, keys, values = given
        ops = torch.ops.tilewright
        if norm:
            q, k = F.rms_norm(q, (8,)), F.rms_norm(k, (8,))
        q, k = ops.rotary_embedding(q, cos, sin), ops.rotary_embedding(k, cos, sin)
        keys = ops.cache_append(keys, k, *ragged, table, True)
        values = ops.cache_append(values, v * 2, *ragged, table, False)
        return ops.paged_attention(q.to(torch.float32), keys, values, *ragged, contexts, table, 0.3, 0), keys, values

    class Step(nn.Module):
        def forward(self, x, *given):
            q, k, v = x.unflatten(-1, (4, 8)).split((2, 1, 1), 1)
            return step(self, q, k, v, *given)

    _, (_, *given) = cached_step(torch.float32, torch.float32)
    program, _ = fused(Step(), torch.randn(5, 32), torch.randn(5, 1, 8), torch.randn(5, 1, 8), *given)
    norms = ["rms_norm", "rms_norm"] if norm else []
    append, attend = "tilewright::cache_append", "tilewright::paged_attention"
    rotary = "tilewright::rotary_embedding"
    assert sorted(kernels(program)) == sorted([*norms, f"{rotary} {append}", f"mul {append}", f"{rotary} {attend}"])


def test_value_needed_elsewhere_ends_the_run(fused):
    def block(m, x):
        y = m.linear(x).relu()
        return y.tanh() + 1, y

    program, report = fused(block, torch.randn(3, 8))
    assert kernels(program) == ["linear relu", "tanh add"]


def test_reasons_are_given(fused):
    def reasons(function, x=X):
        return [note.text for note in fused(function, x)[1].refusals]

    assert reasons(lambda m, x: F.max_pool2d(x.exp(), 3, 1)) == ["would be recomputed for every window of max_pool2d"]
    assert reasons(lambda m, x: x[:, :1].exp() + x) == ["would be recomputed for every element of add"]
    assert reasons(lambda m, x: x.softmax(-1).softmax(1)) == ["would be recomputed for every element of softmax_1"]
    assert reasons(lambda m, x: x.sum(1) + x.amax(1)) == ["amax in the same kernel reduces as well"]
    assert reasons(lambda m, x: m.linear(x.relu())) == ["linear takes in nothing but views of its operands"]
    assert "has other users" in reasons(lambda m, x: ((y := x.exp()).sum(1), y.amax(1)))


# -- cycles ------------------------------------------------------------------------------------------------------------


def test_diamond_through_another_kernel(fused):
    """A → B → C and A → C: A is not computed in C's kernel for B to read, since B comes between."""

    def diamond(m, x):
        a = x.tanh()
        b = torch.matmul(a.unsqueeze(1), m.linear.weight).squeeze(1) if x.dim() == 1 else a.sort(-1).values
        return (a + b).softmax(-1)

    program, report = fused(diamond, torch.randn(3, 8))
    assert kernels(program) == ["tanh", "add softmax"]
    assert "would make a cycle with softmax" in [note.text for note in report.refusals]


def test_long_way_round(fused):
    """The way out of a region and back may lead through several kernels."""

    def detour(m, x):
        a = x.tanh()
        b = m.other(m.linear(a).softmax(-1))
        return F.layer_norm(a * 2 + b.sort(-1).values, (8,))

    program, report = fused(detour, torch.randn(3, 8))
    assert len(kernels(program)) == 5
    assert "would make a cycle with layer_norm" in [note.text for note in report.refusals]


def test_two_sums_in_each_others_norms(fused):
    """Two values that two norms read: each norm may hold only what does not wait for the other."""

    def crossed(m, x, y):
        a, b = x.tanh() + y, x + y.tanh()
        first = F.layer_norm(a + b.sort(-1).values, (8,))
        second = F.layer_norm(b + a.sort(-1).values, (8,))
        return first, second, a, b

    program, report = fused(crossed, torch.randn(3, 8), torch.randn(3, 8))
    assert sorted(kernels(program)) == ["add layer_norm", "tanh add", "tanh add add layer_norm"]
    assert "would make a cycle with layer_norm" in [note.text for note in report.refusals]


# -- views, sizes, constants, several results --------------------------------------------------------------------------


def test_views_are_in_every_reader(fused):
    def heads(m, x):
        y = x.reshape(2, 12, 2, 4).permute(0, 2, 1, 3)
        return y.exp().sum(-1), y.tanh().amax(-1), torch.matmul(y, y.transpose(-1, -2))

    program, _ = fused(heads, X)
    assert sorted(kernels(program)) == ["exp sum", "matmul", "tanh amax"]


def test_outputs_that_are_views(fused):
    program, _ = fused(lambda m, x: (x.permute(0, 3, 1, 2), x, x.reshape(-1)), X)
    assert sorted(kernels(program)) == ["permute", "reshape"]


def test_several_results_of_one_operator(fused):
    program, _ = fused(lambda m, x: (*x.max(-1), x.min(-1).values + 1), X)
    assert sorted(kernels(program)) == ["add", "max", "min"]


def test_parts_of_a_split(fused):
    program, _ = fused(lambda m, x: [part.exp() for part in x.split([1, 5, 2], -1)][::2], X)
    assert kernels(program) == ["exp", "exp"]


def test_unknown_operators_stay(fused):
    program, _ = fused(lambda m, x: (x * 2).sort(-1).values.relu(), X)
    assert kernels(program) == ["mul", "relu"]
    assert any(str(node.target) == "aten.sort.default" for node in program.graph.nodes)


def test_sizes_do_not_keep_values_in_memory(fused):
    batch = torch.export.Dim("batch", min=1, max=8)

    def sized(m, x):
        y = x.relu() * 2
        return y.reshape(y.shape[0] * 2, 4).softmax(-1) * y.shape[0]

    program, _ = fused(sized, torch.randn(3, 8), dynamic_shapes=({0: batch},), again=(torch.randn(1, 8),))
    assert kernels(program) == ["relu mul softmax mul"]


def test_positions_are_made_where_they_are_used(fused):
    """Masks of positions alone are not stored, however many kernels read them."""
    length = torch.export.Dim("length", min=1, max=32)

    def causal(m, x):
        position = torch.arange(x.shape[1])
        keep = position[:, None] >= position[None, :]
        for _ in range(5):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=keep[None])
        return x

    program, _ = fused(causal, torch.randn(2, 6, 8), dynamic_shapes=({1: length},), again=(torch.randn(2, 1, 8),))
    assert all("scaled_dot_product_attention" in kernel for kernel in kernels(program))


def test_mask_of_an_input_is_stored_once(fused):
    def masked(m, x, mask):
        bias = (1.0 - mask[:, None, :].float()) * -1e4
        for _ in range(4):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=bias)
        return x

    program, _ = fused(masked, torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.int64))
    assert kernels(program) == ["_to_copy neg add mul"] + ["scaled_dot_product_attention"] * 4


def test_cheap_value_is_computed_by_each_reader(fused):
    program, _ = fused(lambda m, x: ((y := x.relu()).softmax(-1), y.sum(1)), X)
    assert sorted(kernels(program)) == ["relu softmax", "relu sum"]


def test_dead_results_are_removed(fused):
    def wasteful(m, x):
        x.exp()
        return x.split(4, -1)[1] * 2

    program, report = fused(wasteful, X)
    assert kernels(program) == ["mul"]


# -- many graphs -------------------------------------------------------------------------------------------------------

UNARY = [torch.relu, torch.tanh, torch.exp, torch.neg, lambda x: x * 0.5, lambda x: x + 1, F.gelu]
REDUCE = [
    lambda x: x.softmax(-1),
    lambda x: x.softmax(1),
    lambda x: F.layer_norm(x, (8,)),
    lambda x: x.mean(-1, keepdim=True),
    lambda x: x.sum(1, keepdim=True),
    lambda x: x.amax((1, 2), keepdim=True),
    lambda x: x.var(-1, keepdim=True),
]
VIEW = [
    lambda x: x.transpose(1, 2).reshape(x.shape),
    lambda x: x.flip(-1),
    lambda x: torch.cat([x[..., 4:], x[..., :4]], -1),
    lambda x: x[:, :1],
    lambda x: x.reshape(2, 3, 2, 4).permute(0, 2, 1, 3).reshape(2, 3, 8),
]


def random_function(seed):
    """A random directed graph of pointwise operators, reductions, views, products and one operator without a kernel."""

    def function(m, x):
        choose = random.Random(seed)
        values = [x, x * 0.25]
        for _ in range(choose.randint(4, 18)):
            a, b = choose.choice(values[-6:]), choose.choice(values)
            kind = choose.random()
            if kind < 0.3:
                new = a + b if choose.random() < 0.5 else a * b
            elif kind < 0.55:
                new = choose.choice(UNARY)(a)
            elif kind < 0.75:
                new = choose.choice(REDUCE)(a.expand(2, 3, 8))
            elif kind < 0.85:
                new = choose.choice(VIEW)(a.expand(2, 3, 8))
            elif kind < 0.95:
                new = choose.choice([m.linear, m.other])(a.expand(2, 3, 8))
            else:
                new = a.expand(2, 3, 8).sort(-1).values
            values.append(new.clamp(-4, 4))
        return tuple(choose.sample(values[2:], choose.randint(1, 3)))

    return function


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs(seed, fused):
    print(f"seed {seed}")
    program, _ = fused(random_function(seed), torch.randn(2, 3, 8))
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    assert all(order[source] < order[node] for node in order for source in node.all_input_nodes)


def test_many_layers(exported, run_pass):
    class Layers(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(count)
            )

        def forward(self, x):
            for norm, first, second in self.layers:
                y = norm(x * 2 + torch.tanh(x))
                y = F.gelu(first(y)).reshape(2, 3, 2, 4).permute(0, 2, 1, 3).reshape(2, 3, 8) + y
                x = x + second(y.softmax(-1))
            return x

    program = exported(Layers(16), torch.randn(2, 3, 8))
    Canonicalize().run(program, Report())
    run_pass(FuseOperators(ROLES), program, tolerance=1e-4)
    check_regions(program)
    counts = Counter(kernels(program))
    assert set(counts.values()) == {16} and sum(counts.values()) == 4 * 16
