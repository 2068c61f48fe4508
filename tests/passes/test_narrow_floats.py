"""Float32 programs are computed in half precision; what that would spoil stays float32."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tilewright.passes.narrow_floats import NarrowFloats
from tilewright.passes.verify import TOLERANCES, error_of

HALVES = (torch.float16, torch.bfloat16)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.project = nn.Linear(16, 48)
        self.output = nn.Linear(16, 16)

    def forward(self, x):
        rows = self.project(self.norm(x)).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.output(mixed), x


@pytest.fixture
def program(exported):
    torch.manual_seed(0)
    return exported(Attention(), torch.randn(2, 5, 16), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=16)}})


def dtypes(program, *names):
    """The dtypes of the operators of these names, in graph order."""
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function" and any(
            f".{name}." in f".{str(node.target).removeprefix('aten.')}." for name in names
        ):
            found.append(node.meta["val"].dtype)
    return found


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_golden(program, run_pass, show, golden, dtype):
    report = run_pass(NarrowFloats(dtype), program, tolerance=TOLERANCES[dtype])
    assert len(report.changes) == 1
    if dtype == torch.float16:
        golden(show(program))


def test_results_keep_their_dtype(program, run_pass):
    run_pass(NarrowFloats(torch.float16), program, tolerance=1e-2)
    assert [value.dtype for value in program.run(program.sample)] == [torch.float32, torch.float32]
    assert set(dtypes(program, "linear", "layer_norm", "scaled_dot_product_attention")) == {torch.float16}


class Rotary(nn.Module):
    """Angles of positions, as they are computed where lengths vary."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, 8).float() / 8))

    def forward(self, x, positions):
        angles = positions[:, :, None].float() @ self.frequencies[None, None, :]
        return x * angles.cos() + x.flip(-1) * angles.sin()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_positions_are_not_lost(exported, run_pass, dtype):
    x, positions = torch.randn(1, 4, 8), torch.tensor([[4001, 4002, 30001, 30002]])
    module = Rotary()
    program = exported(module, x, positions)
    run_pass(NarrowFloats(dtype), program, tolerance=TOLERANCES[dtype])
    assert set(dtypes(program, "matmul", "cos", "sin")) == {torch.float32}
    assert set(dtypes(program, "mul.Tensor", "flip")) == {dtype}
    assert error_of(module(x, positions), program.run((x, positions))[0]) <= TOLERANCES[dtype]


class Masked(nn.Module):
    """A mask of the most negative number: where it hides all keys, they count alike."""

    def forward(self, scores, mask):
        hidden = (1.0 - mask.float()) * torch.finfo(torch.float32).min
        return (scores * 2 + hidden[:, None, :]).softmax(-1) @ scores


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masks_keep_their_meaning(exported, run_pass, dtype):
    scores = torch.randn(2, 6, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    program = exported(Masked(), scores, mask)
    run_pass(NarrowFloats(dtype), program, tolerance=TOLERANCES[dtype])
    assert dtypes(program, "softmax") == [torch.float32]
    assert dtypes(program, "matmul") == [dtype]


def test_an_attention_mask_stays_float32(exported, run_pass):
    class Attend(nn.Module):
        def forward(self, q, mask):
            hidden = (1.0 - mask.float()) * torch.finfo(torch.float32).min
            return functional.scaled_dot_product_attention(q, q, q, attn_mask=hidden[:, None, None, :])

    program = exported(Attend(), torch.randn(2, 2, 5, 8), torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]))
    run_pass(NarrowFloats(torch.float16), program, tolerance=1e-2)
    assert dtypes(program, "scaled_dot_product_attention") == [torch.float16]


def test_lookups_give_half_precision(exported, run_pass):
    """Rows of a table are in half precision; those at fixed places are a constant, which is rounded once."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.places = nn.Embedding(50, 8), nn.Embedding(16, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, ids):
            return self.norm(self.table(ids) + self.places(torch.arange(ids.shape[1])))

    program = exported(Fixed(), torch.tensor([[3, 1, 4, 1, 5]]))
    run_pass(NarrowFloats(torch.float16), program, tolerance=1e-2)
    assert dtypes(program, "embedding")[0] == torch.float16


def test_statistics_of_batch_norms_stay_float32(exported, run_pass):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    module[1].running_var.fill_(1e6)
    program = exported(module, torch.randn(1, 3, 8, 8))
    run_pass(NarrowFloats(torch.float16), program, tolerance=1e-2)


def test_what_a_model_converts_itself_stays_float32(exported, run_pass):
    class Islands(nn.Module):
        def forward(self, x):
            return (x.float() * 1.5 + 1).to(torch.bfloat16) + x

    program = exported(Islands(), torch.randn(3, 5).bfloat16())
    assert not run_pass(NarrowFloats(torch.bfloat16), program).changed
    run_pass(NarrowFloats(torch.float16), program, tolerance=4e-2)
    assert dtypes(program, "mul.Tensor") == [torch.float32]


def test_integers_and_float64_are_left_alone(exported, run_pass):
    class Mixed(nn.Module):
        def forward(self, x, i):
            return (x.double() * 3).sum(-1), i * 2, (x * 2 > 1), x.argmax(-1), torch.arange(5) + i

    x = torch.tensor([[1.0, -2.0, 0.5, 4.0, 3.0]])
    program = exported(Mixed(), x, torch.arange(5))
    before = program.run(program.sample)
    run_pass(NarrowFloats(torch.float16), program)
    after = program.run(program.sample)
    assert [value.dtype for value in after] == [value.dtype for value in before]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_model_without_float32_stays_as_it_is(exported, run_pass):
    program = exported(nn.Linear(4, 4).half(), torch.randn(2, 4).half())
    assert not run_pass(NarrowFloats(torch.float16), program).changed


def test_takes_half_types_only():
    with pytest.raises(ValueError, match="no half precision"):
        NarrowFloats(torch.float32)


class Lookup(nn.Module):
    """Floats that come of integers alone: rows of tables, at the words given and at their places."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 16), nn.Embedding(8, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, ids):
        rows = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(rows)).relu()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_model_of_integers_is_narrowed(exported, run_pass, dtype):
    program = exported(Lookup(), torch.tensor([[1, 5, 2]]), dynamic_shapes={"ids": {1: torch.export.Dim("n", max=8)}})
    run_pass(NarrowFloats(dtype), program, tolerance=TOLERANCES[dtype])
    assert set(dtypes(program, "embedding", "linear", "relu")) == {dtype}
    assert set(dtypes(program, "add", "layer_norm")) == {torch.float32}


class Layers(nn.Module):
    """Two layers of a transformer without the attention: norms before the products, or after the sums."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.last = nn.RMSNorm(32)
        self.products = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, 4)

    def forward(self, x, places):
        x = (x + places).view(-1, 32)
        for norm, product in zip(self.norms, self.products, strict=True):
            x = x + product(norm(x)).relu() if self.first else norm(x + product(x).relu())
        return self.head(self.last(x)), x.softmax(-1)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_residual_stream_stays_float32(exported, run_pass, dtype, first):
    program = exported(Layers(first), torch.randn(2, 5, 32), torch.randn(5, 32))
    run_pass(NarrowFloats(dtype), program, tolerance=TOLERANCES[dtype])
    assert dtypes(program, "add", "layer_norm") == [torch.float32] * 5
    assert dtypes(program, "rms_norm") == [torch.float32 if first else dtype], "it reads a sum, or another norm"
    assert set(dtypes(program, "linear", "relu", "softmax")) == {dtype}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_residuals_of_convolutional_networks_are_narrowed(exported, run_pass, dtype):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

        def forward(self, x):
            return self.conv(self.norm(x + self.conv(x)))

    program = exported(Block(), torch.randn(1, 4, 6, 6))
    run_pass(NarrowFloats(dtype), program, tolerance=TOLERANCES[dtype])
    assert set(dtypes(program, "add", "group_norm", "conv2d")) == {dtype}


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)
def test_caches_keep_their_type(exported, run_pass, cached_step, cache):
    module, inputs = cached_step(torch.float32, cache)
    program = exported(module, *inputs)
    run_pass(NarrowFloats(torch.bfloat16), program, tolerance=TOLERANCES[torch.bfloat16])
    assert dtypes(program, "tilewright.paged_attention") == [torch.bfloat16]
    appended = [node for node in program.graph.nodes if "cache_append" in str(node.target)]
    assert [node.meta["val"].dtype for node in appended] == [cache, cache]
    assert all(node.args[0].op == "placeholder" for node in appended)
