import pytest
import torch
from torch import nn

from tilewright.passes.graph.columns import columns
from tilewright.passes.recognise_rotary import RecogniseRotary


class Written(nn.Module):
    def __init__(self, function, table="whole"):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        angles = torch.outer(torch.arange(32.0), 1 / 10 ** torch.arange(4.0))
        angles = {
            "whole": torch.cat((angles, angles), -1),
            "half": angles,
            "pairs": angles.repeat_interleave(2, -1),
        }[table]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        seq = x.shape[2]
        return self.function(x, self.cos[:seq].to(x.dtype), self.sin[:seq].to(x.dtype))


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def llama(x, cos, sin):
    cos, sin = cos.unsqueeze(0).unsqueeze(0), sin.unsqueeze(0).unsqueeze(0)
    return x * cos + rotate_half(x) * sin


def chunked(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return cos * x + sin * torch.cat((second * -1, first), dim=-1)


def gpt_oss(x, cos, sin):
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def halves_of_whole_tables(x, cos, sin):
    first, second = x[..., :4], x[..., 4:]
    return torch.cat((first * cos[:, :4] - second * sin[:, :4], sin[:, 4:] * first + cos[:, 4:] * second), dim=-1)


def gpt_fast(x, cos, sin):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(3)


def unbound(x, cos, sin):
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    joined = torch.cat(((a * cos - b * sin).unsqueeze(-1), (b * cos + a * sin).unsqueeze(-1)), -1)
    return joined.reshape(x.shape)


def partial(x, cos, sin):
    turning, rest = x[..., :8], x[..., 8:]
    return torch.cat((turning * cos + rotate_half(turning) * sin, rest), -1)


def partial_halves(x, cos, sin):
    first, second, rest = x.split([4, 4, 4], -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), -1)


CASES = {
    "llama": (llama, "whole", 8, False),
    "chunked": (chunked, "whole", 8, False),
    "gpt_oss": (gpt_oss, "half", 8, False),
    "halves_of_whole_tables": (halves_of_whole_tables, "whole", 8, False),
    "partial": (partial, "whole", 12, False),
    "partial_halves": (partial_halves, "half", 12, False),
    "gpt_j": (lambda x, cos, sin: x * cos + rotate_pairs(x) * sin, "pairs", 8, True),
    "gpt_fast": (gpt_fast, "half", 8, True),
    "unbound": (unbound, "half", 8, True),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), ("llama", torch.bfloat16), ("gpt_fast", torch.float16)],
)
def test_every_spelling(name, dtype, exported, run_pass, targets):
    function, table, width, interleaved = CASES[name]
    batch, seq = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("seq", min=1, max=32)
    x = torch.randn(3, 2, 7, width).to(dtype)
    program = exported(Written(function, table), x, dynamic_shapes=({0: batch, 2: seq},))
    report = run_pass(RecogniseRotary(), program, inputs=(torch.randn(1, 2, 5, width).to(dtype),))
    assert len(report.changes) == 1 and not report.refusals
    (rotary,) = (node for node in program.graph.nodes if "rotary_embedding" in str(node.target))
    assert (len(rotary.args) == 4) == interleaved
    left = set(targets(program)) - {"aten.sym_size.int", "aten.slice.Tensor", "aten.unsqueeze", "aten._to_copy"}
    left -= {"aten._assert_tensor_metadata", "aten.split_with_sizes", "<built-in function getitem>"}
    assert left == {"tilewright.rotary_embedding"} | ({"aten.cat"} if "partial" in name else set())


def test_golden(exported, run_pass, show, golden):
    program = exported(Written(llama), torch.randn(3, 2, 7, 8))
    run_pass(RecogniseRotary(), program)
    golden(show(program))


NOT_ROTARY = {
    "no_sign": lambda x, cos, sin: x * cos + torch.cat((x[..., 4:], x[..., :4]), -1) * sin,
    "wrong_sign": lambda x, cos, sin: x * cos + torch.cat((x[..., 4:], -x[..., :4]), -1) * sin,
    "uneven": lambda x, cos, sin: x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin,
    "another_x": lambda x, cos, sin: (x + 1) * cos + rotate_half(x) * sin,
    "difference": lambda x, cos, sin: x * cos - rotate_half(x) * sin,
    "other_axis": lambda x, cos, sin: x * cos + torch.cat((-x[:, :, :, :], x), 2)[:, :, :7] * sin,
    "halves_swapped": lambda x, cos, sin: torch.cat(
        (x[..., :4] * cos[:, :4] - x[..., 4:] * sin[:, :4], x[..., :4] * cos[:, :4] + x[..., 4:] * sin[:, :4]), -1
    ),
    "tables_swapped": lambda x, cos, sin: torch.cat(
        (x[..., :4] * cos[:, :4] - x[..., 4:] * sin[:, :4], x[..., 4:] * cos[:, 1:5] + x[..., :4] * sin[:, 1:5]), -1
    ),
}


def test_refuses_what_is_something_else(exported, refusals):
    every = Written(lambda x, cos, sin: tuple(function(x, cos, sin) for function in NOT_ROTARY.values()))
    refusals(RecogniseRotary(), exported(every, torch.randn(3, 2, 7, 8)))


def test_says_why(exported, refusals):
    def broadcast(x, cos, sin):
        return x[:, :1] * cos.expand(3, 2, 7, 8) + rotate_half(x[:, :1]) * sin.expand(3, 2, 7, 8)

    def narrow(x, cos, sin):
        return x * cos[:, :1] + rotate_half(x) * sin[:, :1]

    def reason(function):
        (text,) = refusals(RecogniseRotary(), exported(Written(function), torch.randn(3, 2, 7, 8)))
        return text

    assert reason(broadcast).startswith("the cosine or the sine broadcasts slice")
    assert "has neither one column for each of the 8 that rotate" in reason(narrow)


def test_columns_are_the_same_however_they_were_taken(exported):
    class Takes(nn.Module):
        def forward(self, x):
            pairs = x.reshape(3, 6, 2)
            return (
                x[..., 2:8:2][..., 1:], x.chunk(4, -1)[3], x.split(5, -1)[2], x.split([1, 4, 7], -1)[1],
                pairs[..., 1], pairs.unbind(-1)[0], x.reshape(3, 2, 6)[:, 1], x.reshape(3, 2, 6).select(1, -2),
            )  # fmt: skip

    program = exported(Takes(), torch.randn(3, 12))
    results = next(iter(reversed(program.graph.nodes))).args[0]
    found = [columns(node) for node in results]
    assert {root.name for root, _ in found} == {"x"}
    assert [list(chosen) for _, chosen in found] == [
        [4, 6], [9, 10, 11], [10, 11], [1, 2, 3, 4], [1, 3, 5, 7, 9, 11], [0, 2, 4, 6, 8, 10],
        [6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
