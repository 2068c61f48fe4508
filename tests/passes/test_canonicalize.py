"""The canonical form: every rule, its limits, and that nothing but the form changes."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.graph.edit import insert

aten = torch.ops.aten
BATCH = Dim("batch", min=1, max=16)
SEQ = Dim("seq", min=1, max=32)


class Function(nn.Module):
    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *args):
        return self.function(*args, **dict(self.named_buffers()))


@pytest.fixture
def canonical(exported, run_pass, targets):
    """``canonical(function, *args, **tensors)``: the operators in canonical form (checked as ``run_pass`` checks)."""

    def run(function, *args, dynamic=False, **tensors):
        torch.manual_seed(0)

        class Static(nn.Module):
            def __init__(self):
                super().__init__()
                for name, tensor in tensors.items():
                    self.register_buffer(name, tensor)

            def forward(self, x):
                return function(x, **dict(self.named_buffers()))

        shapes = {"x": {0: BATCH}} if dynamic else None
        program = exported(Static(), *args, dynamic_shapes=shapes)
        run_pass(Canonicalize(), program)
        return [name for name in targets(program) if "sym_size" not in name]

    return run


@pytest.fixture
def canonical_each(exported, run_pass):
    """``canonical_each(functions, x)``: the operators of each, all in one program."""

    def run(functions, x):
        class All(nn.Module):
            def forward(self, x):
                return tuple(function(x) for function in functions)

        program = exported(All(), x)
        run_pass(Canonicalize(), program)
        return [_operators(result) for result in program.graph.output_node().args[0]]

    return run


def _operators(result):
    """The operators that lead to a result, in graph order."""
    seen, pending = set(), [result]
    while pending:
        node = pending.pop()
        if node not in seen and node.op == "call_function":
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return [str(node.target).removesuffix(".default") for node in sorted(seen)]


def check_each(canonical_each, cases, x):
    for (function, expected), got in zip(cases, canonical_each([case[0] for case in cases], x), strict=True):
        assert got == expected, f"{expected} expected of line {function.__code__.co_firstlineno}"


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution = nn.Conv2d(3, 4, 3, padding="same", dilation=2)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x, image):
        y = self.attention(x, x, x)[0].to(torch.float32)
        y = torch.addmm(self.bias, y.reshape(-1, 8), self.weight).view(x.shape[0], x.shape[1], 6)
        y = (1 - y.square() / 4 + 0).contiguous().permute(0, 2, 1).transpose(1, 2)
        return y, self.up(self.norm(self.convolution(image)))


def test_golden(exported, run_pass, show, golden):
    torch.manual_seed(0)
    shapes = {"x": {0: BATCH, 1: SEQ}, "image": {0: BATCH}}
    program = exported(Everything(), torch.randn(3, 5, 8), torch.randn(3, 3, 9, 9), dynamic_shapes=shapes)
    run_pass(Canonicalize(), program)
    golden(show(program))


VIEWS_AND_COPIES = [
    (lambda x: x.clone().contiguous().detach().to(torch.float32) + 1, ["aten.add.Tensor"]),
    (lambda x: (x + 0) * 1 - 0, []),
    (lambda x: x / 1, []),
    (lambda x: x**1, []),
    (lambda x: x.expand(3, 4, 8).expand(-1, -1, -1), []),
    (lambda x: x.view(3, 32).view(12, 8).unflatten(0, (3, 4)), []),
    (lambda x: x.reshape(12, 8).flatten().reshape(2, 48), ["aten.reshape"]),
    (lambda x: x.transpose(1, 2).permute(2, 0, 1).transpose(0, 2), ["aten.permute"]),
    (lambda x: x.transpose(1, 2).transpose(-1, 1), []),
    (lambda x: x.movedim(0, -1), ["aten.permute"]),
    (lambda x: x.unsqueeze(1).squeeze(1), []),
    (lambda x: x.squeeze(0), []),
    (lambda x: torch.cat([x[:, :, :]]), []),
    (lambda x: x[:, 0:4, :8], []),
    (lambda x: x[:, 1:], ["aten.slice.Tensor"]),
    (lambda x: x[:, ::2], ["aten.slice.Tensor"]),
    (lambda x: torch.stack([x]), ["aten.unsqueeze"]),
    (lambda x: F.dropout(x, 0.5, training=False), []),
    (lambda x: x.repeat(1, 1, 1), []),
    (lambda x: torch.broadcast_to(x[:1], (3, 4, 8)) + x, ["aten.slice.Tensor", "aten.add.Tensor"]),
    (lambda x: x.unbind(1)[2], ["aten.select.int"]),
    (lambda x: x.split(3, -1)[2] * 2, ["aten.slice.Tensor", "aten.mul.Tensor"]),
    (lambda x: x.chunk(2, 1)[1], ["aten.slice.Tensor"]),
    (lambda x: x.permute(2, 0, 1)[3], ["aten.select.int"]),
    (lambda x: F.pad(x, (1, 2)), ["aten.constant_pad_nd"]),
    (lambda x: F.pad(x, (1, 2), mode="reflect"), ["aten.pad"]),
]


def test_views_and_copies(canonical_each):
    check_each(canonical_each, VIEWS_AND_COPIES, X)


ARITHMETIC = [
    (lambda x: 1 - x, ["aten.neg", "aten.add.Tensor"]),
    (lambda x: torch.rsub(x, x.exp()), ["aten.exp", "aten.sub.Tensor"]),
    (lambda x: x - 3, ["aten.add.Tensor"]),
    (lambda x: x / 4, ["aten.mul.Tensor"]),
    (lambda x: x / 0, ["aten.div.Tensor"]),
    (lambda x: torch.div(x, 3, rounding_mode="floor"), ["aten.div.Tensor_mode"]),
    (lambda x: 2 / x, ["aten.reciprocal", "aten.mul.Tensor"]),
    (lambda x: x / torch.tensor(4.0), ["aten.mul.Tensor"]),
    (lambda x: torch.tensor(2.0) * x, ["aten.mul.Tensor"]),
    (lambda x: torch.tensor(2.0) - x, ["aten.neg", "aten.add.Tensor"]),
    (lambda x: x.pow(2), ["aten.mul.Tensor"]),
    (lambda x: x.square(), ["aten.mul.Tensor"]),
    (lambda x: x.abs().pow(0.5), ["aten.abs", "aten.sqrt"]),
    (lambda x: x.exp().pow(-0.5), ["aten.exp", "aten.rsqrt"]),
    (lambda x: x.pow(-1), ["aten.reciprocal"]),
    (lambda x: x.pow(3), ["aten.pow.Tensor_Scalar"]),
    (lambda x: x.abs().sqrt().reciprocal(), ["aten.abs", "aten.rsqrt"]),
    (lambda x: x.neg().neg(), []),
    (lambda x: torch.add(x, x.exp(), alpha=2), ["aten.exp", "aten.mul.Tensor", "aten.add.Tensor"]),
    (lambda x: torch.sub(x, 1, alpha=3), ["aten.add.Tensor"]),
    (lambda x: x.clamp_min(0), ["aten.relu"]),
    (lambda x: x.clamp_min(1), ["aten.clamp_min"]),
    (lambda x: x + torch.zeros(8), []),
    (lambda x: x * torch.ones_like(x), []),
    (lambda x: x + torch.ones_like(x), ["aten.add.Tensor"]),
    (lambda x: F.silu(F.hardswish(x)), ["aten.hardswish", "aten.silu"]),
    (lambda x: F.softmax(x, -1, dtype=torch.float32), ["aten.softmax.int"]),
    (lambda x: x > torch.tensor(0.5), ["aten.gt.Scalar"]),
]


def test_arithmetic(canonical_each):
    check_each(canonical_each, ARITHMETIC, X)


INTEGER_ARITHMETIC_KEEPS_ITS_DTYPE = [
    # Integers divide to floating point and bytes wrap: these keep their operators.
    (lambda x: x / 2, ["aten.div.Tensor"]),
    (lambda x: x * 1.0, ["aten.mul.Tensor"]),
    (lambda x: x + 0, []),
    (lambda x: x + 0.0, ["aten.add.Tensor"]),
    (lambda x: x - 3, ["aten.add.Tensor"]),
    (lambda x: x**2, ["aten.mul.Tensor"]),
    (lambda x: x.to(torch.float32), ["aten._to_copy"]),
    (lambda x: x.to(torch.int64).to(torch.int32), []),
]


def test_integer_arithmetic_keeps_its_dtype(canonical_each):
    check_each(canonical_each, INTEGER_ARITHMETIC_KEEPS_ITS_DTYPE, torch.arange(-12, 12, dtype=torch.int32).view(3, 8))


def test_subtracting_from_bytes_is_left_alone(canonical):
    assert canonical(lambda x: x - 3, torch.arange(8, dtype=torch.uint8)) == ["aten.sub.Tensor"]


def test_bitwise_operators_have_one_form(canonical):
    x = torch.tensor([True, False, True])
    assert canonical(lambda x: (x & torch.ones((), dtype=torch.bool)) | False, x) == []
    assert canonical(lambda x: x | torch.ones((), dtype=torch.bool), x)[-1] == "aten.bitwise_or.Tensor"
    assert canonical(lambda x: x & ~x, x) == ["aten.bitwise_not", "aten.bitwise_and.Tensor"]
    assert canonical(lambda x: x.long() & 1, x) == ["aten._to_copy", "aten.bitwise_and.Scalar"]


def test_casts(canonical):
    half = X.bfloat16()
    assert canonical(lambda x: x.float().bfloat16(), half) == []
    assert canonical(lambda x: x.float().double(), half) == ["aten._to_copy"]
    assert canonical(lambda x: x.bfloat16().float(), X) == ["aten._to_copy", "aten._to_copy"], "narrowing is a rounding"
    assert canonical(lambda x: x.half().bfloat16(), X) == ["aten._to_copy", "aten._to_copy"]
    assert canonical(lambda x: x.type_as(x.exp()), X) == []


def test_reciprocals_of_half_precision_tensors_are_not_rounded_once_more(canonical):
    c = torch.tensor([3.0, 7.0])
    assert canonical(lambda x, c: x / c, torch.ones(4, 2), c=c) == ["aten.reciprocal", "aten.mul.Tensor"]
    assert canonical(lambda x, c: x / c, torch.ones(4, 2).half(), c=c.half()) == ["aten.div.Tensor"]


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, True), (torch.bfloat16, False)])
def test_products_with_constants_are_linear(canonical, dtype, dynamic):
    w, b, x = torch.randn(8, 6).to(dtype), torch.randn(6).to(dtype), X.to(dtype)
    one = ["aten.permute", "aten.linear"]
    assert canonical(lambda x, w: x @ w, x, w=w, dynamic=dynamic) == one
    assert canonical(lambda x, w: x @ w.t(), x, w=w.t().contiguous(), dynamic=dynamic) == ["aten.linear"]
    assert canonical(lambda x, w: torch.mm(x.view(-1, 8), w), x, w=w, dynamic=dynamic) == [*one, "aten.reshape"]
    addmm = canonical(lambda x, w, b: torch.addmm(b, x.view(-1, 8), w).view(-1, 4, 6), x, w=w, b=b, dynamic=dynamic)
    assert addmm == one
    assert canonical(lambda x, w: F.linear(x.reshape(-1, 8), w).view(-1, 4, 6), x, w=w.t(), dynamic=dynamic) == [
        "aten.linear"
    ]


def test_rows_that_are_gathered_keep_their_regrouping_before_the_linear(canonical):
    w = torch.randn(6, 32)
    got = canonical(lambda x, w: F.linear(x.transpose(1, 2).reshape(-1, 32), w), X, w=w)
    assert got == ["aten.permute", "aten.reshape", "aten.linear"]
    heads = torch.randn(3, 5, 4, 8)
    got = canonical(lambda x, w: F.linear(x.reshape(-1, 32), w).view(-1, 5, 6), heads, w=w, dynamic=True)
    assert got == ["aten.reshape", "aten.linear"]


def test_other_products_are_matmul(canonical):
    assert canonical(lambda x: torch.bmm(x, x.transpose(1, 2)), X) == ["aten.permute", "aten.matmul"]
    w = torch.randn(8, 8)
    assert canonical(lambda x, w: w @ x.transpose(1, 2), X, w=w) == ["aten.permute", "aten.matmul"]
    three = torch.randn(3, 8, 2)
    assert canonical(lambda x, w: x @ w, X, w=three) == ["aten.matmul"], "a batch of matrices is no linear map"
    got = canonical(lambda x: torch.baddbmm(x, x, x.mT @ x, beta=2, alpha=0.5), X)
    assert got == [
        "aten.permute",
        "aten.matmul",
        "aten.matmul",
        "aten.mul.Tensor",
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]
    assert canonical(lambda x: F.linear(x[0], x[1]), X)[-2:] == ["aten.permute", "aten.matmul"]


EQUATIONS = {
    "bsd,de->bse": (["batch", "seq", 8], [8, 6]),
    "bqhd,bkhd->bhqk": (["batch", "seq", 2, 4], ["batch", "seq", 2, 4]),
    "bhqk,bkhd->bqhd": (["batch", 2, "seq", "seq"], ["batch", "seq", 2, 4]),
    "btd,dhk->bthk": (["batch", "seq", 8], [8, 2, 4]),
    "bthk,hkd->btd": (["batch", "seq", 2, 4], [2, 4, 8]),
    "...i,...j->...ij": (["batch", "seq", 3], ["batch", "seq", 5]),
    "...i,ij": (["batch", "seq", 3], [3, 5]),
    "i,j->ji": (["batch"], ["seq"]),
    "bi,bi->b": (["batch", 8], ["batch", 8]),
    "bi,bi->": (["batch", 8], ["batch", 8]),
    "bsd->db": (["batch", "seq", 8],),
    "bi,ij,bj->b": (["batch", 4], [4, 5], ["batch", 5]),
    "bij,bjk,bkl->bil": (["batch", "seq", 3], ["batch", 3, 4], ["batch", 4, "seq"]),
    "nc,ncs->ns": (["batch", 4], ["batch", 4, "seq"]),
    "bsk,s->bk": (["batch", "seq", 3], ["seq"]),
}


def test_einstein_sums_are_products(exported, run_pass, targets):
    """All in one program, whose inputs of symbolic sizes are cut from two."""
    generator = torch.Generator().manual_seed(3)
    static = {}

    class Sums(nn.Module):
        def forward(self, x):
            varying = dict(zip(("batch", "seq"), x.shape, strict=True))
            scale = x.sum()
            results = []
            for index, (equation, shapes) in enumerate(EQUATIONS.items()):
                operands = []
                for place, shape in enumerate(shapes):
                    most = [9 if size in varying else size for size in shape]
                    operand = static.setdefault((index, place), torch.randn(most, generator=generator))
                    for axis, size in enumerate(shape):
                        if size in varying:
                            operand = operand.narrow(axis, 0, varying[size])
                    operands.append(operand * scale if place == 0 else operand)
                results.append(torch.einsum(equation, *operands))
            return tuple(results)

    # Less than the tensors have: where all might be taken, the exporter assumes that it is not and has to start anew.
    shapes = {"x": {0: Dim("batch", min=1, max=8), 1: Dim("seq", min=1, max=8)}}
    Sums()(torch.randn(3, 5))
    program = exported(Sums(), torch.randn(3, 5), dynamic_shapes=shapes)
    run_pass(Canonicalize(), program, [torch.randn(1, 7)])
    assert "aten.einsum" not in targets(program)


def test_diagonals_and_stretched_axes_stay_einsum(canonical):
    assert canonical(lambda x: torch.einsum("bii->bi", x), torch.randn(2, 3, 3)) == ["aten.einsum"]
    assert "aten.einsum" in canonical(lambda x: torch.einsum("bi,bi->bi", x, x[:1]), torch.randn(2, 3))


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), ["aten.convolution"]),
        (nn.Conv1d(4, 6, 3), (4, 9), ["aten.unsqueeze", "aten.convolution", "aten.squeeze.dim"]),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 9, 9), ["aten.convolution"]),
        (nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 9, 9), ["aten.constant_pad_nd", "aten.convolution"]),
        (nn.Conv2d(4, 6, 2, padding="valid"), (2, 4, 9, 9), ["aten.convolution"]),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False, padding=(1, 0)), (2, 4, 9, 9), ["aten.convolution"]),
        (nn.Conv3d(4, 2, 2), (1, 4, 3, 4, 5), ["aten.convolution"]),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9), ["aten.convolution"]),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 5), ["aten.convolution"]),
        (nn.ConvTranspose2d(4, 6, 3), (4, 5, 5), ["aten.unsqueeze", "aten.convolution", "aten.squeeze.dim"]),
    ],
)
def test_convolutions(exported, run_pass, targets, layer, shape, expected):
    program = exported(layer, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    run_pass(Canonicalize(), program)
    assert targets(program) == expected
    node = next(node for node in program.graph.nodes if node.target is aten.convolution.default)
    axes = node.args[1].meta["val"].dim() - 2
    assert len(node.args) == 9 and all(len(node.args[index]) == axes for index in (3, 4, 5, 7))


def test_norms_give_their_value_alone(exported, run_pass, targets):
    layers = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([4, 5, 5]))
    program = exported(layers, torch.randn(2, 4, 5, 5))
    run_pass(Canonicalize(), program)
    assert targets(program) == ["aten.batch_norm", "aten.group_norm", "aten.layer_norm"]


@pytest.mark.parametrize("used", [(0,), (0, 1)])
def test_raw_layer_norm_and_pooling(exported, run_pass, targets, used):
    class Raw(nn.Module):
        def forward(self, x):
            norm = torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-5)
            pool = torch.ops.aten.max_pool2d_with_indices(x[None], [2, 2])
            return tuple(norm[index] for index in used) + tuple(pool[index] for index in used)

    program = exported(Raw(), X)
    run_pass(Canonicalize(), program)
    single = "aten.layer_norm" in targets(program) and "aten.max_pool2d" in targets(program)
    assert single == (used == (0,))


def test_filled_tensors_have_one_form(exported, run_pass, targets):
    class Filled(nn.Module):
        def forward(self, x):
            like = torch.zeros_like(x).long(), x.new_full((2, 3), 1.5), torch.ones(x.shape[0], 2, dtype=torch.int32)
            return *like, torch.full_like(x, 2, dtype=torch.float64)

    program = exported(Filled(), torch.randn(3, 4), dynamic_shapes={"x": {0: BATCH}})
    run_pass(Canonicalize(), program)
    assert targets(program) == ["aten.sym_size.int", *["aten.full"] * 4]


def test_sizes_that_vary_are_not_specialised(exported, run_pass, show):
    """The sample's equal sizes of two symbols, and one equal to a constant, decide nothing."""

    class Regroup(nn.Module):
        def forward(self, x, y):
            z = x.transpose(0, 1).reshape(-1, 8) + y.reshape(-1, 1, 8).squeeze(1)
            return z.expand(x.shape[0] * x.shape[1], 8), x.transpose(0, 1).contiguous().view(x.shape[1], -1)

    shapes = {"x": {0: BATCH, 1: SEQ}, "y": {0: BATCH, 1: SEQ}}
    program = exported(Regroup(), torch.randn(8, 8, 8), torch.randn(8, 8, 8), dynamic_shapes=shapes)
    report = run_pass(Canonicalize(), program, [torch.randn(3, 5, 8), torch.randn(3, 5, 8)])
    assert report.changed
    assert "f32[seq, 8*batch]" in show(program)


def test_checks_are_removed(exported, run_pass, targets):
    program = exported(Function(torch.exp), X)
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    with program.graph.inserting_after(node):
        program.graph.call_function(aten._assert_tensor_metadata.default, (node, None, None, torch.float32))
    assert run_pass(Canonicalize(), program).changed
    assert targets(program) == ["aten.exp"]


def test_outputs_that_become_inputs(exported, run_pass, targets):
    class Through(nn.Module):
        def forward(self, x):
            return x + 0, x.clone(), x.clone()

    program = exported(Through(), X)
    run_pass(Canonicalize(), program)
    assert targets(program) == [] and len(program.graph.output_node().args[0]) == 3


def test_expansion_that_gives_the_size_stays(canonical):
    assert canonical(lambda x: x[:1].expand(3, 4, 8), X) == ["aten.slice.Tensor", "aten.expand"]
    assert canonical(lambda x: x[:1].expand(3, 4, 8) * 2, X) == ["aten.slice.Tensor", "aten.expand", "aten.mul.Tensor"]
    got = canonical(lambda x: x[:1].expand(3, 4, 8) * x[0].expand(3, 4, 8), X)
    assert got.count("aten.expand") == 1, "one of the two has to say the size"


def test_names_and_provenance_are_kept(exported, run_pass):
    program = exported(Function(lambda x: 1 - x), X)
    (old,) = [node for node in program.graph.nodes if node.op == "call_function"]
    name, trace = old.name, old.meta["stack_trace"]
    run_pass(Canonicalize(), program)
    new = program.graph.output_node().args[0][0]
    assert new.name == name and new.meta["stack_trace"] == trace and name in new.meta["from"]


def test_a_view_that_a_later_pass_inserts_is_made_canonical_too(exported, run_pass, targets):
    program = exported(Function(torch.exp), X)
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    output = program.graph.output_node()
    view = insert(program.graph, output, aten.view.default, (node, [12, 8]), origins=(node,))
    back = insert(program.graph, output, aten.view.default, (view, [3, 4, 8]), origins=(node,))
    output.args = ((back,),)
    run_pass(Canonicalize(), program)
    assert targets(program) == ["aten.exp"]
