"""Attention in the spellings of models and exporters; what it must not be taken for; masks; repeated heads."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tilewright.passes.recognise_attention import RecogniseAttention

INF = float("-inf")
LOWEST = torch.finfo(torch.float32).min


class Written(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("tril", torch.ones(32, 32, dtype=torch.bool).tril().view(1, 1, 32, 32))
        self.register_buffer("wide", torch.ones(40, 40, dtype=torch.bool).tril())
        self.register_buffer("root", torch.tensor(8.0).sqrt())
        self.register_buffer("bias", torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(0)))

    def forward(self, *args):
        return self.function(self, *args)


def tensors(heads=4, heads_kv=4, rows=7, columns=7, width=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, heads, rows, width), (3, heads_kv, columns, width), (3, heads_kv, columns, width))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def shapes(extra=(), same=True):
    batch, rows = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("rows", min=1, max=32)
    columns = rows if same else torch.export.Dim("columns", min=1, max=32)
    kinds = {"padding": {0: batch, 1: columns}, "square": {2: rows, 3: columns}}
    operands = ({0: batch, 2: rows}, {0: batch, 2: columns}, {0: batch, 2: columns})
    return ((*operands, *(kinds[one] for one in extra)),)


def attentions(program):
    return [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]


def every(functions):
    """A module that computes all of some functions: they are exported together, which is most of a test's time."""
    return Written(lambda m, *args: tuple(function(m, *args) for function in functions.values()))


def all_recognised(run_pass, program, names, **options):
    """Runs the pass; returns name → the operator that replaced that function."""
    report = run_pass(RecogniseAttention(), program, **options)
    assert not report.refusals and len(report.changes) == len(names), report
    return dict(zip(names, attentions(program), strict=True))


def recognised(run_pass, program, **options):
    """Runs the pass; returns the operator's (mask, is_causal, scale, enable_gqa)."""
    report = run_pass(RecogniseAttention(), program, **options)
    assert len(report.changes) == 1 and not report.refusals, report
    (node,) = attentions(program)
    assert not [other for other in program.graph.nodes if "softmax" in str(other.target)]
    mask, causal = (*node.args[3:], None, False)[0:3:2] if len(node.args) < 6 else (node.args[3], node.args[5])
    return mask, causal, node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)


SCALED = {
    "after": lambda m, q, k, v: F.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), -1) @ v,
    "on_q": lambda m, q, k, v: F.softmax((q * 8**-0.5) @ k.permute(0, 1, 3, 2), -1) @ v,
    "on_both": lambda m, q, k, v: torch.matmul(F.softmax((q / 8**0.25) @ (k * 8**-0.25).mT, dim=3), v),
    "on_transposed_k": lambda m, q, k, v: F.softmax(q @ (k.transpose(2, 3) / m.root), -1).clone() @ v,
    "by_a_constant": lambda m, q, k, v: F.dropout(F.softmax(q @ k.mT * (1 / m.root), -1), 0.1, False) @ v,
    "flattened": lambda m, q, k, v: (
        F.softmax((q.flatten(0, 1) / m.root) @ k.flatten(0, 1).mT, -1).bmm(v.flatten(0, 1)).view(q.shape)
    ),
    "flattened_result": lambda m, q, k, v: (
        F.softmax((q.flatten(0, 1) / m.root).bmm(k.flatten(0, 1).mT), -1).bmm(v.flatten(0, 1)).sum(-1)
    ),
    "flattened_transposed": lambda m, q, k, v: (
        F.softmax(q.flatten(0, 1).bmm(k.transpose(2, 3).flatten(0, 1)) / m.root, -1).bmm(v.flatten(0, 1)).view(q.shape)
    ),
    "baddbmm": lambda m, q, k, v: (
        F.softmax(
            torch.baddbmm(
                q.new_zeros(1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=8**-0.5
            ),
            -1,
        )
        .bmm(v.flatten(0, 1))
        .view(q.shape)
    ),
}  # fmt: skip


def test_scale_and_products(exported, run_pass):
    program = exported(every(SCALED), *tensors(), dynamic_shapes=shapes())
    inputs = tuple(tensor[:1, :, :5] for tensor in tensors(seed=1))
    for name, node in all_recognised(run_pass, program, SCALED, inputs=inputs).items():
        assert node.args[3:] == (None, 0.0, False), name
        assert node.kwargs == {"scale": pytest.approx(8**-0.5)}, name
        assert [operand.op for operand in node.args[:3]] == ["placeholder"] * 3, name


def test_einsum(exported, run_pass):
    def function(m, q, k, v):
        return torch.einsum("bhqk,bhkd->bqhd", F.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / m.root, -1), v)

    program = exported(Written(function), *tensors())  # torch.export asks whether its batch axes are 1
    assert recognised(run_pass, program)[2] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("rank", [2, 3])
def test_fewer_axes(rank, exported, run_pass):
    q, k, v = (tensor.flatten(0, 1) if rank == 3 else tensor[0, 0] for tensor in tensors(columns=5))

    def function(m, q, k, v, bias):
        return F.softmax(q @ k.mT * 0.3 + bias, -1) @ v

    bias = torch.randn((12, 7, 5)[3 - rank :])
    program = exported(Written(function), q, k, v, bias)
    mask, *_ = recognised(run_pass, program)
    assert len(attentions(program)[0].args[0].meta["val"].shape) == 4


HALF = {
    "softmax_wide": lambda m, q, k, v: F.softmax(q @ k.mT * 0.3, -1, dtype=torch.float32).to(q.dtype) @ v,
    "scores_wide": lambda m, q, k, v: F.softmax((q @ k.mT).float() * 0.3, -1).to(q.dtype) @ v,
    "product_wide": lambda m, q, k, v: F.softmax(q.float() @ (k.float() * 0.3).mT, -1).to(q.dtype) @ v,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype, exported, run_pass):
    program = exported(every(HALF), *tensors(dtype=dtype), dynamic_shapes=shapes())
    for name, node in all_recognised(run_pass, program, HALF, tolerance=2e-2).items():
        assert node.kwargs["scale"] == pytest.approx(0.3), name
        assert [operand.op for operand in node.args[:3]] == ["placeholder"] * 3, name


def scores(m, q, k):
    return q @ k.mT / m.root


def positions(q):
    index = torch.arange(q.shape[2])
    return index[None, :] <= index[:, None]


CAUSAL = {
    "constant": lambda m, q, k: torch.where(m.tril[:, :, : q.shape[2], : k.shape[2]], scores(m, q, k), LOWEST),
    "filled": lambda m, q, k: scores(m, q, k).masked_fill(~m.tril[0, 0, : q.shape[2], : k.shape[2]], INF),
    "equal_zero": lambda m, q, k: scores(m, q, k).masked_fill(torch.tril(torch.ones(q.shape[2], k.shape[2])) == 0, INF),
    "added_triu": lambda m, q, k: scores(m, q, k) + torch.full((q.shape[2], k.shape[2]), INF).triu(1),
    "added_product": lambda m, q, k: (
        scores(m, q, k) + (1 - torch.ones(q.shape[2], k.shape[2]).tril())[None, None] * -1e9
    ),
    "compared": lambda m, q, k: scores(m, q, k) + torch.where(positions(q), 0.0, LOWEST)[None, None],
    "several": lambda m, q, k: scores(m, q, k).masked_fill(
        ~(positions(q) & (torch.arange(q.shape[2])[:, None] >= 0)).expand(q.shape[0], 1, -1, -1), -1e9
    ),
}


def weighted(masks):
    """Attention with each of some masks."""
    return {
        name: lambda m, q, k, v, *rest, mask=mask: F.softmax(mask(m, q, k, *rest), -1) @ v
        for name, mask in masks.items()
    }


def test_causal_masks(exported, run_pass):
    program = exported(every(weighted(CAUSAL)), *tensors(), dynamic_shapes=shapes())
    inputs = tuple(tensor[:1, :, :5] for tensor in tensors(seed=1))
    for name, node in all_recognised(run_pass, program, CAUSAL, inputs=inputs).items():
        assert node.args[3] is None and node.args[5], name


def test_causal_mask_of_a_wide_product(exported, run_pass):
    """Aligned at the top left, as the operator's own: row i sees columns up to i."""

    def function(m, q, k, v):
        return F.softmax(scores(m, q, k).masked_fill(~m.tril[..., : q.shape[2], : k.shape[2]], INF), -1) @ v

    program = exported(Written(function), *tensors(rows=5, columns=9), dynamic_shapes=shapes(same=False))
    mask, causal, _, _ = recognised(run_pass, program, inputs=tensors(rows=9, columns=5, seed=1))
    assert mask is None and causal


NOT_CAUSAL = {
    "shifted": lambda m, q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1),
    "later_rows": lambda m, q, k: m.wide[2 : 2 + q.shape[2], : k.shape[2]],
    "window": lambda m, q, k: positions(q) & ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(-3),
    "reversed": lambda m, q, k: ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(-1),
}


def test_other_triangles_stay_masks(exported, run_pass):
    hidden = {
        name: lambda m, q, k, shown=shown: scores(m, q, k).masked_fill(~shown(m, q, k), INF)
        for name, shown in NOT_CAUSAL.items()
    }
    program = exported(every(weighted(hidden)), *tensors(), dynamic_shapes=shapes())
    for name, node in all_recognised(run_pass, program, hidden).items():
        assert node.args[3].meta["val"].dtype == torch.bool and not node.args[5], name
        assert not any("masked_fill" in str(user.target) for user in node.users), f"{name}: no row can be hidden"


PADDED = {
    "added": lambda m, s, padding: s + (1.0 - padding[:, None, None, :].float()) * LOWEST,
    "added_where": lambda m, s, padding: s + torch.where(padding[:, None, None].bool(), 0.0, LOWEST),
    "filled_lowest": lambda m, s, padding: s.masked_fill(padding[:, None, None] == 0, LOWEST),
    "filled_1e9": lambda m, s, padding: torch.where(padding[:, None, None] != 0, s, -1e9),
    "filled_inf": lambda m, s, padding: s.masked_fill(padding[:, None, None] == 0, INF),
    "added_inf": lambda m, s, padding: (
        s + torch.zeros(s.shape[0], 1, 1, s.shape[3]).masked_fill(~padding[:, None, None].bool(), INF)
    ),
    "filled_twice": lambda m, s, padding: s.masked_fill(padding[:, None, None] == 0, INF).masked_fill(
        ~m.tril[..., : s.shape[2], : s.shape[3]], INF
    ),
    "filled_and_added": lambda m, s, padding: (s + m.bias).masked_fill(padding[:, None, None] == 0, INF),
}


def partly_hidden():
    padding = torch.ones(3, 7, dtype=torch.int64)
    padding[1, 4:] = padding[2, :] = 0
    return padding


def test_padding_masks_and_hidden_rows(exported, run_pass):
    """The numbers must agree also where a row of the batch is hidden completely: nan, or a mean over everything."""
    masks = {
        name: lambda m, q, k, padding, mask=mask: mask(m, scores(m, q, k), padding) for name, mask in PADDED.items()
    }
    program = exported(every(weighted(masks)), *tensors(), partly_hidden(), dynamic_shapes=shapes(("padding",)))
    for name, node in all_recognised(run_pass, program, PADDED).items():
        assert node.args[3] is not None and not node.args[5], name
        restored = any("masked_fill" in str(user.target) for user in node.users)
        assert restored == ("inf" in name or name in ("filled_twice", "filled_and_added")), name


SAFE = {
    "isnan_where": lambda s: torch.where(torch.isnan(p := F.softmax(s, -1)), 0.0, p),
    "isnan_filled": lambda s: (p := F.softmax(s, -1)).masked_fill(torch.isnan(p), 0.0),
    "not_equal_itself": lambda s: (p := F.softmax(s, -1)).masked_fill(p != p, 0.0),
    "nan_to_num": lambda s: torch.nan_to_num(F.softmax(s, -1)),
    "all_hidden": lambda s: torch.where((s == INF).all(-1, keepdim=True), 0.0, F.softmax(s, -1)),
    "any_shown": lambda s: torch.where((s != INF).any(-1, keepdim=True), F.softmax(s, -1), torch.zeros_like(s)),
    "not_any_shown": lambda s: F.softmax(s, -1).masked_fill(~(~(s == INF)).any(-1, keepdim=True), 0.0),
    "safe_softmax": lambda s: torch._safe_softmax(s, -1),
}


def test_rows_that_exporters_guard(exported, run_pass):
    guarded = {
        name: lambda m, q, k, v, padding, weights=weights: (
            weights(scores(m, q, k) + torch.where(padding[:, None, None].bool(), 0.0, INF)) @ v
        )
        for name, weights in SAFE.items()
    }
    program = exported(every(guarded), *tensors(), partly_hidden(), dynamic_shapes=shapes(("padding",)))
    for name, node in all_recognised(run_pass, program, SAFE).items():
        assert not any("masked_fill" in str(user.target) for user in node.users), name


def test_torch_onnx_attention(exported, run_pass):
    """What torch.onnx emits for the operator: the root of the scale on both sides, and the isnan form."""

    def function(m, q, k, v, mask):
        root = torch.sqrt(1 / torch.sqrt(torch.tensor(8.0)))
        s = torch.matmul(q * root, k.transpose(2, 3) * root)
        p = F.softmax(s + torch.where(mask, torch.tensor(0.0), torch.tensor(INF)), -1)
        return torch.matmul(torch.where(torch.isnan(p), torch.tensor(0.0), p), v)

    mask = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[..., 2, :] = False
    program = exported(Written(function), *tensors(), mask, dynamic_shapes=shapes(("square",)))
    _, _, scale, _ = recognised(run_pass, program)
    assert scale == pytest.approx(8**-0.5)


def test_masks_on_flattened_heads(exported, run_pass, refusals):
    def four(m, q, k, v, bias):
        s = q.flatten(0, 1).bmm(k.flatten(0, 1).mT).view(*q.shape[:3], k.shape[2]) + bias
        return F.softmax(s.flatten(0, 1), -1).bmm(v.flatten(0, 1)).view(q.shape)

    def three(m, q, k, v, bias):
        return F.softmax(torch.baddbmm(bias[0], q[:, 0], k[:, 0].mT, beta=0.5, alpha=0.3), -1).bmm(v[:, 0])

    bias = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    program = exported(Written(four), *tensors(), bias, dynamic_shapes=shapes(("square",)))
    mask, *_ = recognised(run_pass, program)
    assert mask.op == "placeholder"
    recognised(run_pass, exported(Written(three), *tensors(), bias[:, :3]))


def repeat_kv(x, times):
    batch, heads, rows, width = x.shape
    return x[:, :, None].expand(batch, heads, times, rows, width).reshape(batch, heads * times, rows, width)


def onnx_repeated(m, q, k, v):
    """As torch.onnx transposes k: heads and batch flattened in between."""
    batch, heads, rows, width = k.shape
    wide = k.unsqueeze(2).expand(batch, heads, 2, rows, width).reshape(-1, rows, width)
    return q, wide.transpose(1, 2).reshape(batch, heads * 2, width, rows).mT, repeat_kv(v, 2)


GROUPED = {
    "onnx": onnx_repeated,
    "expanded": lambda m, q, k, v: (q, repeat_kv(k, 2), repeat_kv(v, 2)),
    "interleaved": lambda m, q, k, v: (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1)),
    "before_transposing": lambda m, q, k, v: (
        q, *(x.transpose(1, 2).repeat_interleave(2, 2).transpose(1, 2) for x in (k, v)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("written", [True, False])
def test_repeated_heads(written, exported, run_pass):
    def attention(m, q, k, v):
        return scores(m, q, k).softmax(-1) @ v if written else F.scaled_dot_product_attention(q, k, v)

    functions = {
        name: lambda m, q, k, v, repeat=repeat: attention(m, *repeat(m, q, k, v)) for name, repeat in GROUPED.items()
    }
    program = exported(every(functions), *tensors(heads_kv=2), dynamic_shapes=shapes())
    for name, node in all_recognised(run_pass, program, GROUPED).items():
        assert node.kwargs["enable_gqa"] and node.args[1].meta["val"].shape[1] == 2, name


def test_one_head_for_all(exported, run_pass):
    program = exported(Written(SCALED["after"]), *tensors(heads_kv=1), dynamic_shapes=shapes())
    assert recognised(run_pass, program)[3]


def test_differently_repeated_heads_stay(exported, run_pass):
    def function(m, q, k, v):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), v.repeat(1, 2, 1, 1))

    program = exported(Written(function), *tensors(heads_kv=2))
    assert not run_pass(RecogniseAttention(), program).changed


MASKS = {
    "causal": (lambda m, q: m.tril[..., : q.shape[2], : q.shape[2]], "is causal"),
    "causal_added": (lambda m, q: torch.full((q.shape[2], q.shape[2]), INF).triu(1), "is causal"),
    "ones": (lambda m, q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool), "hides nothing"),
    "zeros": (lambda m, q: torch.zeros(1, 1, q.shape[2], q.shape[2]), "hides nothing"),
}


def test_masks_of_the_operator(exported, run_pass):
    functions = {
        name: lambda m, q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask(m, q))
        for name, (mask, _) in MASKS.items()
    }
    program = exported(every(functions), *tensors(), dynamic_shapes=shapes())
    report = run_pass(RecogniseAttention(), program)
    assert len(report.changes) == len(MASKS)
    for (name, (_, text)), change, node in zip(MASKS.items(), report.changes, attentions(program), strict=True):
        assert text in change.text, name
        assert node.args[3] is None and node.args[5] == ("causal" in name), name


def test_golden(exported, run_pass, show, golden):
    def function(m, q, k, v, padding):
        s = scores(m, q, repeat_kv(k, 2)).masked_fill(padding[:, None, None] == 0, INF)
        return F.softmax(s, -1) @ repeat_kv(v, 2)

    program = exported(
        Written(function),
        *tensors(heads_kv=2),
        torch.ones(3, 7, dtype=torch.int64),
        dynamic_shapes=shapes(("padding",)),
    )
    run_pass(RecogniseAttention(), program)
    golden(show(program))


NOT_ATTENTION = {
    "another_axis": lambda m, q, k, v: F.softmax(q @ k.mT, -2) @ v,
    "values_first": lambda m, q, k, v: v @ F.softmax(q.mT @ k, -1),
    "soft_cap": lambda m, q, k, v: F.softmax(torch.tanh(q @ k.mT), -1) @ v,
    "no_product": lambda m, q, k, v: F.softmax(m.bias + q[..., :7], -1) @ v,
    "scaled_by_a_tensor": lambda m, q, k, v: F.softmax(q @ k.mT * m.bias, -1) @ v,
}


def test_leaves_what_is_something_else(exported, refusals):
    assert refusals(RecogniseAttention(), exported(every(NOT_ATTENTION), *tensors())) == []


REFUSED = {
    "weights": (
        lambda m, q, k, v: (w := F.softmax(q @ k.mT, -1), w @ v),
        ", a step of it, is used elsewhere too",
    ),
    "scores": (
        lambda m, q, k, v: (s := q @ k.mT, F.softmax(s * 2, -1) @ v),
        ", a step of it, is used elsewhere too",
    ),
    "weak_mask": (
        lambda m, q, k, v: F.softmax((q @ k.mT).masked_fill(q[..., :7] > 0, -100.0), -1) @ v,
        "positions are hidden with -100, which is not low enough to leave them no weight",
    ),
    "broadcast": (lambda m, q, k, v: F.softmax(q[:1] @ k.mT, -1) @ v, "is broadcast over batch axes"),
}


def test_says_why(exported, refusals):
    program = exported(every({name: function for name, (function, _) in REFUSED.items()}), *tensors())
    reasons = refusals(RecogniseAttention(), program)
    assert len(reasons) == len(REFUSED)
    for reason, (_, words) in zip(reasons, REFUSED.values(), strict=True):
        assert words in reason


def test_views_between_the_weights(exported, run_pass):
    def function(m, q, k, v):
        return F.softmax((q @ k.mT).view(3, 2, 2, 7, 7), -1).view(3, 4, 7, 7) @ v

    recognised(run_pass, exported(Written(function), *tensors()))
