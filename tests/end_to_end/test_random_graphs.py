"""Random programs against eager PyTorch in double precision, at three assignments of their sizes.

A program is made from a seed. A failure prints it; this repeats one seed, or many::

    RANDOM_GRAPHS=17 pytest tests/end_to_end/test_random_graphs.py
    RANDOM_GRAPHS=100-400 pytest tests/end_to_end/test_random_graphs.py

With ``RANDOM_GRAPHS_PASSES=none`` every operator is a kernel of its own. GPU kernels are interpreted; without
``RANDOM_GRAPHS``, for every third seed.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewright
from tilewright.codegen.roles import fusion_roles
from tilewright.compiler.capture import capture
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime.errors import ShapeError, UsageError

SEEDS, GROUP = range(18), 6
B, S = sympy.symbols("b s", integer=True, positive=True)
SIZES = ({"b": 3, "s": 6}, {"b": 1, "s": 1}, {"b": 5, "s": 33})
SHAPES = {"x": "b:1..8,s:1..64,24", "image": "b,20,9,11", "ids": "b,s"}
Dims = tuple[Any, ...]


class Values(list[Any]):
    """The values so far, and the layers that steps may call."""

    def __init__(self, parts: nn.ModuleList, values: Sequence[Tensor]) -> None:
        super().__init__(values)
        self.parts = parts


class Generated(nn.Module):
    """A straight line of steps, each a function of earlier values; the first three values are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.steps: list[Callable[[Values], Tensor]] = []
        self.text: list[str] = []
        self.returned: list[int] = []

    def forward(self, x: Tensor, image: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        values = Values(self.parts, [x, image, ids])
        for step in self.steps:
            values.append(step(values))
        return tuple(values[index] for index in self.returned)


@dataclass
class Maker:
    """Builds one program: the module, and of every value its dimensions and its tensor at the first sizes."""

    rng: random.Random
    module: Generated = field(default_factory=Generated)
    dims: list[Dims] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, text: str, dims: Dims | None, step: Callable[[Values], Tensor]) -> bool:
        """Append a step if what it computes is finite and of moderate size."""
        with torch.no_grad():
            value = step(Values(self.module.parts, self.values))
        if value.is_floating_point() and not bool(value.isfinite().all() and value.abs().max() < 1e3):
            return False
        sizes = {B: SIZES[0]["b"], S: SIZES[0]["s"]}
        known = tuple(value.shape) if dims is None else dims
        assert tuple(int(sympy.sympify(d).subs(sizes)) for d in known) == tuple(value.shape), (text, known, value.shape)
        self.module.steps.append(step)
        self.module.text.append(f"v{len(self.values)} = {text}")
        self.dims.append(tuple(known))
        self.values.append(value)
        return True

    def pick(self, *wanted: Callable[[int], bool]) -> int | None:
        """A value that fulfils all conditions; later ones are likelier."""
        fitting = [i for i in range(len(self.values)) if all(condition(i) for condition in wanted)]
        return (
            self.rng.choices(fitting, [(position + 1) ** 2 for position in range(len(fitting))])[0] if fitting else None
        )

    def floating(self, index: int) -> bool:
        return self.values[index].is_floating_point()

    def rank(self, *ranks: int) -> Callable[[int], bool]:
        return lambda index: len(self.dims[index]) in ranks

    def small(self, index: int) -> bool:
        return self.values[index].numel() < 20_000

    def part(self, module: nn.Module) -> int:
        """Register a layer with random weights and statistics."""
        generator = torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_floating_point():
                    fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
                    tensor.normal_(0, fan**-0.5, generator=generator)
                    if "var" in name or (tensor.ndim == 1 and "weight" in name):
                        tensor.abs_().add_(0.5)
        self.module.parts.append(module.eval())
        return len(self.module.parts) - 1


def _static(dim: Any) -> bool:
    return isinstance(dim, int)


def _unary(m: Maker) -> bool:
    name, function = m.rng.choice(_UNARY)
    i = m.pick(m.floating)
    return m.add(f"{name}(v{i})", m.dims[i], lambda v: function(v[i]))


_UNARY: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("relu", torch.relu), ("tanh", torch.tanh), ("sigmoid", torch.sigmoid), ("gelu", F.gelu), ("silu", F.silu),
    ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("neg", torch.neg), ("abs", torch.abs),
    ("hardswish", F.hardswish), ("clamp", lambda x: x.clamp(-0.7, 1.3)), ("scale", lambda x: x * 0.3 + 1.5),
    ("exp", lambda x: torch.exp(x.clamp(max=2))), ("log", lambda x: torch.log(x.abs() + 0.5)),
    ("square", lambda x: x**2),
    ("rsqrt", lambda x: torch.rsqrt(x * x + 1)), ("softplus", F.softplus), ("erf", torch.erf), ("elu", F.elu),
    ("leaky_relu", lambda x: F.leaky_relu(x, 0.1)), ("rsub", lambda x: 1 - x), ("sin", torch.sin),
    ("contiguous", lambda x: x.contiguous()),
    ("reciprocal", lambda x: 1 / (x.abs() + 1)), ("where", lambda x: torch.where(x > 0.2, x, 0.2)),
    ("double", lambda x: (x.double() * 2).to(x.dtype)),
    ("hand_gelu", lambda x: 0.5 * x * (1 + torch.erf(x * 0.7071067811865476))), ("mish", F.mish),
    ("sqrt", lambda x: (x.abs() + 0.3).sqrt()),
]  # fmt: skip


def _broadcast(a: Dims, b: Dims) -> Dims | None:
    result = []
    for position in range(1, max(len(a), len(b)) + 1):
        p, q = (dims[-position] if position <= len(dims) else 1 for dims in (a, b))
        if p != q and 1 not in (p, q):
            return None
        result.append(q if p == 1 else p)
    return tuple(reversed(result))


def _binary(m: Maker) -> bool:
    i = m.pick(m.floating, m.small)
    j = m.pick(m.floating, m.small, lambda j: _broadcast(m.dims[i], m.dims[j]) is not None)
    name, function = m.rng.choice(_BINARY)
    return m.add(f"{name}(v{i}, v{j})", _broadcast(m.dims[i], m.dims[j]), lambda v: function(v[i], v[j]))


_BINARY: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("div", lambda a, b: a / (b.abs() + 1)),
    ("maximum", torch.maximum), ("minimum", torch.minimum), ("alpha", lambda a, b: torch.add(a, b, alpha=-0.5)),
    ("where", lambda a, b: torch.where(a > b, a, b)), ("lerp", lambda a, b: a + (b - a) * 0.25),
    ("swiglu", lambda a, b: F.silu(a) * b),
]  # fmt: skip


def _reduction(m: Maker) -> bool:
    i = m.pick(m.floating, m.rank(2, 3, 4, 5))
    dims = m.dims[i]
    axes = sorted(m.rng.sample(range(len(dims)), m.rng.choice((1, 1, 2))))
    keep = m.rng.random() < 0.5
    name, function = m.rng.choice(_REDUCTIONS)
    left = tuple(1 if k in axes else d for k, d in enumerate(dims) if keep or k not in axes)
    return m.add(f"{name}(v{i}, {axes}, {keep})", left, lambda v: function(v[i], axes, keep))


_REDUCTIONS: list[tuple[str, Callable[[Tensor, list[int], bool], Tensor]]] = [
    ("sum", lambda x, axes, keep: x.sum(axes, keepdim=keep) * 0.1),
    ("mean", lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    ("amax", lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    ("amin", lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    ("var", lambda x, axes, keep: x.var(axes, correction=0, keepdim=keep)),
    ("norm", lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    ("logsumexp", lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    ("max", lambda x, axes, keep: x.max(axes[0], True)[0].amax(axes, keepdim=keep)),
]  # fmt: skip


def _normalise(m: Maker) -> bool:
    i = m.pick(m.floating, m.rank(2, 3, 4), lambda i: _static(m.dims[i][-1]) and m.dims[i][-1] > 3)
    if i is None:
        return False
    width, axis = m.dims[i][-1], m.rng.randrange(-len(m.dims[i]), len(m.dims[i]))
    kind = m.rng.choice(
        ("softmax", "log_softmax", "layer_norm", "rms_norm", "hand_norm", "hand_rms", "cumsum", "normalize")
    )
    if kind in ("layer_norm", "rms_norm"):
        p = m.part(nn.LayerNorm(width, eps=0.05) if kind == "layer_norm" else nn.RMSNorm(width, eps=1e-5))
        return m.add(f"{kind}(v{i})", m.dims[i], lambda v: v.parts[p](v[i]))
    functions = {
        "softmax": lambda x: x.softmax(axis), "log_softmax": lambda x: x.log_softmax(axis),
        "normalize": lambda x: F.normalize(x, dim=-1, eps=0.1),
        "hand_norm": lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 0.1),
        "hand_rms": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01),
        "cumsum": lambda x: x.cumsum(axis) * 0.2,
    }  # fmt: skip
    return m.add(f"{kind}(v{i}, {axis})", m.dims[i], lambda v: functions[kind](v[i]))


def _linear(m: Maker) -> bool:
    i = m.pick(m.floating, m.small, m.rank(2, 3, 4), lambda i: _static(m.dims[i][-1]))
    if i is None:
        return False
    width = m.rng.choice((1, 8, 17, 24, 40))
    p = m.part(nn.Linear(m.dims[i][-1], width, bias=m.rng.random() < 0.7))
    return m.add(f"linear(v{i}, {width})", (*m.dims[i][:-1], width), lambda v: v.parts[p](v[i]))


def _matmul(m: Maker) -> bool:
    i = m.pick(m.floating, m.small, m.rank(2, 3, 4))
    own = m.dims[i]
    j = m.pick(
        m.floating,
        m.small,
        lambda j: len(m.dims[j]) == len(own) and m.dims[j][:-2] == own[:-2] and m.dims[j][-1] == own[-1],
    )
    if m.rng.random() < 0.5:
        return m.add(
            f"v{i} @ v{j}.mT",
            (*own[:-1], m.dims[j][-2]),
            lambda v: v[i] @ v[j].transpose(-1, -2) / v[i].shape[-1] ** 0.5,
        )
    return m.add(
        f"softmax(v{i} @ v{j}.mT) @ v{j}", own[:-1] + m.dims[j][-1:],
        lambda v: (v[i] @ v[j].transpose(-1, -2) * 0.3).softmax(-1) @ v[j],
    )  # fmt: skip


def _attention(m: Maker) -> bool:
    i = m.pick(
        m.floating, m.rank(3), lambda i: m.dims[i][:2] == (B, S) and _static(m.dims[i][2]) and m.dims[i][2] % 8 == 0
    )
    if i is None:
        return False
    width, causal, masked = m.dims[i][2], m.rng.random() < 0.5, m.rng.random() < 0.3
    q, k, v_, o = (m.part(nn.Linear(width, width, bias=m.rng.random() < 0.5)) for _ in range(4))
    heads = width // 8

    def step(v: Values) -> Tensor:
        x = v[i]
        parts = [v.parts[p](x).view(x.shape[0], x.shape[1], heads, 8).transpose(1, 2) for p in (q, k, v_)]
        mask = (v[2] % 5 != 0)[:, None, None, :] | (v[2] == v[2][:, :1])[:, None, None, :] if masked else None
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal and not masked)
        return v.parts[o](mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], width))

    return m.add(f"attention(v{i}, causal={causal}, masked={masked})", m.dims[i], step)


def _image(m: Maker) -> Callable[[int], bool]:
    return lambda i: len(m.dims[i]) == 4 and all(map(_static, m.dims[i][1:])) and min(m.dims[i][2:]) >= 3


def _convolution(m: Maker) -> bool:
    i = m.pick(m.floating, _image(m))
    channels = m.dims[i][1]
    kind = m.rng.choice(("plain", "plain", "1x1", "depthwise", "grouped", "transposed"))
    outputs, groups, kernel = m.rng.choice((3, 16, 20)), 1, m.rng.choice(((3, 3), (1, 3), (2, 2)))
    stride, padding = m.rng.choice((1, 1, 2)), m.rng.choice((0, 1))
    if kind == "1x1":
        kernel, padding = (1, 1), 0
    elif kind == "depthwise":
        outputs = groups = channels
    elif kind == "grouped" and channels % 4 == 0:
        outputs, groups = 20, 4
    bias = m.rng.random() < 0.5
    layers: list[nn.Module] = []
    if kind == "transposed":
        layers.append(nn.ConvTranspose2d(channels, outputs, 2, 2, bias=bias))
    else:
        layers.append(nn.Conv2d(channels, outputs, kernel, stride, padding, groups=groups, bias=bias))
    if m.rng.random() < 0.5:
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    p = m.part(nn.Sequential(*layers))
    shape = m.module.parts[p](m.values[i]).shape[1:]
    return m.add(
        f"{kind}_convolution(v{i}, {kernel}, {stride}, {padding}, {len(layers)})",
        (m.dims[i][0], *shape),
        lambda v: v.parts[p](v[i]),
    )


def _convolution1d(m: Maker) -> bool:
    i = m.pick(m.floating, m.rank(3), lambda i: m.dims[i][:2] == (B, S) and _static(m.dims[i][2]))
    if i is None:
        return False
    p = m.part(nn.Conv1d(m.dims[i][2], 12, 3, padding=1))
    return m.add(f"conv1d(v{i})", (B, 12, S), lambda v: v.parts[p](v[i].transpose(1, 2)))


def _pool(m: Maker) -> bool:
    i = m.pick(m.floating, _image(m))
    name, function = m.rng.choice(_POOLS)
    return m.add(f"{name}(v{i})", (m.dims[i][0], *function(m.values[i]).shape[1:]), lambda v: function(v[i]))


_POOLS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("max_pool", lambda x: F.max_pool2d(x, 2)), ("max_pool_padded", lambda x: F.max_pool2d(x, 3, 2, 1)),
    ("avg_pool", lambda x: F.avg_pool2d(x, 2)),
    ("avg_pool_padded", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ("adaptive", lambda x: F.adaptive_avg_pool2d(x, 1)), ("adaptive_23", lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    ("nearest", lambda x: F.interpolate(x, scale_factor=2)),
    ("bilinear", lambda x: F.interpolate(x, size=(7, 10), mode="bilinear")),
    ("squeeze_excite", lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()),
    ("group_norm", lambda x: F.group_norm(x, 1, eps=0.1)),
    ("reflect", lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect")),
]  # fmt: skip


def _cat(m: Maker) -> bool:
    i = m.pick(m.small)
    dims, axis = m.dims[i], m.rng.randrange(len(m.dims[i]))

    def fits(j: int) -> bool:
        other = m.dims[j]
        same = len(other) == len(dims) and other[:axis] + other[axis + 1 :] == dims[:axis] + dims[axis + 1 :]
        return same and m.values[j].dtype == m.values[i].dtype

    others = [m.pick(m.small, fits) for _ in range(m.rng.choice((1, 1, 2)))]
    if m.rng.random() < 0.2:
        return m.add(
            f"stack([v{i}, v{i}], {axis})", (*dims[:axis], 2, *dims[axis:]), lambda v: torch.stack([v[i], v[i]], axis)
        )
    indices = [i, *others]
    total = sum(m.dims[j][axis] for j in indices)
    return m.add(
        f"cat({indices}, {axis})",
        (*dims[:axis], total, *dims[axis + 1 :]),
        lambda v: torch.cat([v[j] for j in indices], axis),
    )


def _slice(m: Maker) -> bool:
    i = m.pick(m.rank(1, 2, 3, 4))
    dims = m.dims[i]
    axis = m.rng.randrange(len(dims))
    rest = lambda size: (*dims[:axis], *size, *dims[axis + 1 :])  # noqa: E731
    if not _static(dims[axis]) or m.rng.random() < 0.3:
        place = m.rng.choice((0, -1))
        if m.rng.random() < 0.5:
            return m.add(f"select(v{i}, {axis}, {place})", rest(()), lambda v: v[i].select(axis, place))
        if dims[axis] != S or m.rng.random() < 0.4:
            return m.add(f"flip(v{i}, {axis})", dims, lambda v: v[i].flip(axis))
        return m.add(f"slice(v{i}, {axis}, 1)", rest((S - 1,)), lambda v: v[i].narrow(axis, 1, v[i].shape[axis] - 1))
    size = dims[axis]
    if size < 1:
        return False
    start, step = m.rng.randrange(size), m.rng.choice((1, 1, 2))
    end = m.rng.randrange(start, size) + 1
    index = (*(slice(None) for _ in range(axis)), slice(start, end, step))
    return m.add(
        f"slice(v{i}, {axis}, {start}:{end}:{step})", rest((len(range(start, end, step)),)), lambda v: v[i][index]
    )


def _view(m: Maker) -> bool:
    i = m.pick(m.rank(2, 3, 4))
    dims = m.dims[i]
    kind = m.rng.choice(
        ("permute", "permute", "merge", "split", "unsqueeze", "expand", "repeat", "pad", "roll", "tril")
    )
    axis = m.rng.randrange(len(dims))
    if kind == "permute":
        order = m.rng.sample(range(len(dims)), len(dims))
        return m.add(f"permute(v{i}, {order})", tuple(dims[k] for k in order), lambda v: v[i].permute(order))
    if kind == "merge":
        axis = m.rng.randrange(len(dims) - 1)
        return m.add(
            f"flatten(v{i}, {axis})",
            (*dims[:axis], dims[axis] * dims[axis + 1], *dims[axis + 2 :]),
            lambda v: v[i].flatten(axis, axis + 1),
        )
    if kind == "split" and _static(dims[axis]) and len(dims) < 5:
        factors = [k for k in range(2, dims[axis]) if dims[axis] % k == 0]
        if factors:
            factor = m.rng.choice(factors)
            return m.add(
                f"unflatten(v{i}, {axis}, {factor})",
                (*dims[:axis], factor, dims[axis] // factor, *dims[axis + 1 :]),
                lambda v: v[i].unflatten(axis, (factor, -1)),
            )
    if kind in ("unsqueeze", "expand") and len(dims) < 4:
        count = 1 if kind == "unsqueeze" else 3
        return m.add(
            f"expand(v{i}, {axis}, {count})",
            (*dims[:axis], count, *dims[axis:]),
            lambda v: v[i].unsqueeze(axis).expand(*v[i].shape[:axis], count, *v[i].shape[axis:]),
        )
    if kind == "repeat" and m.small(i):
        times = [2 if k == axis else 1 for k in range(len(dims))]
        return m.add(
            f"repeat(v{i}, {times})",
            tuple(d * t for d, t in zip(dims, times, strict=True)),
            lambda v: v[i].repeat(times),
        )
    if kind == "pad" and m.floating(i):
        return m.add(
            f"pad(v{i})", (*dims[:-2], dims[-2] + 1, dims[-1] + 3), lambda v: F.pad(v[i], (2, 1, 0, 1), value=0.5)
        )
    if kind == "roll":
        return m.add(f"roll(v{i}, {axis})", dims, lambda v: v[i].roll(1, axis))
    if kind == "tril" and m.floating(i):
        return m.add(f"tril(v{i})", dims, lambda v: v[i].tril(-1))
    return False


def _lookup(m: Maker) -> bool:
    i = m.pick(m.floating, m.rank(2, 3, 4))
    dims = m.dims[i]
    axis = m.rng.choice([k for k, d in enumerate(dims)])
    kind = m.rng.choice(("embedding", "index_select", "gather", "index", "masked"))
    if kind == "embedding":
        p = m.part(nn.Embedding(50, m.rng.choice((8, 24))))
        return m.add("embedding(v2)", (B, S, m.module.parts[p].embedding_dim), lambda v: v.parts[p](v[2]))
    if kind == "index_select":
        return m.add(
            f"index_select(v{i}, {axis})",
            (*dims[:axis], S, *dims[axis + 1 :]),
            lambda v: v[i].index_select(axis, v[2][0] % v[i].shape[axis]),
        )
    if kind == "gather" and dims[:2] == (B, S) and len(dims) == 3:
        return m.add(f"gather(v{i})", (B, S, 1), lambda v: v[i].gather(2, (v[2] % v[i].shape[2]).unsqueeze(2)))
    if kind == "index" and len(dims) >= 2:
        return m.add(f"v{i}[:, ids[0] - 3]", (dims[0], S, *dims[2:]), lambda v: v[i][:, v[2][0] % v[i].shape[1] - 1])
    if kind == "masked" and dims[:2] == (B, S) and len(dims) == 3:
        return m.add(f"masked_fill(v{i})", dims, lambda v: v[i].masked_fill((v[2] % 3 == 0).unsqueeze(-1), -0.5))
    return False


def _integers(m: Maker) -> bool:
    i = m.pick(lambda i: not m.floating(i), m.small)
    name, function = m.rng.choice(_INTEGERS)
    return m.add(f"{name}(v{i})", m.dims[i], lambda v: function(v[i]))


_INTEGERS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("add", lambda i: i * 3 - 20), ("floordiv", lambda i: i // 7), ("remainder", lambda i: (i - 30) % 11),
    ("float", lambda i: i * 0.05),
    ("compare", lambda i: (i > 20).long()), ("clamp", lambda i: i.clamp(3, 30)), ("sum", lambda i: i + i.sum()),
    ("cumsum", lambda i: i.cumsum(0)),
]  # fmt: skip

CHOICES = [
    (_unary, 8), (_binary, 8), (_reduction, 4), (_normalise, 4), (_linear, 4), (_matmul, 2), (_attention, 2),
    (_convolution, 4), (_convolution1d, 1),
    (_pool, 3), (_cat, 3), (_slice, 4), (_view, 7), (_lookup, 3), (_integers, 1),
]  # fmt: skip


def make_inputs(sizes: dict[str, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [b, s, 24], image [b, 20, 9, 11], ids [b, s] below 50."""
    generator = torch.Generator().manual_seed(seed)
    b, s = sizes["b"], sizes["s"]
    return (
        torch.randn(b, s, 24, generator=generator),
        torch.randn(b, 20, 9, 11, generator=generator),
        torch.randint(0, 50, (b, s), generator=generator),
    )


def make_program(seed: int) -> Generated:
    """A program of up to 16 steps that returns what nothing else uses, and a few values besides."""
    rng = random.Random(seed)
    maker = Maker(rng)
    for value, dims in zip(make_inputs(SIZES[0], seed), ((B, S, 24), (B, 20, 9, 11), (B, S)), strict=True):
        maker.values.append(value)
        maker.dims.append(dims)
    makers, weights = zip(*CHOICES, strict=True)
    wanted = rng.randrange(3, 17)
    while len(maker.module.steps) < wanted:
        rng.choices(makers, weights)[0](maker)
    count = len(maker.values)
    maker.module.returned = sorted({count - 1, *rng.sample(range(3, count), min(2, count - 3))})
    return maker.module.eval()


def check(model: Any, module: Generated, seed: int, sizes: dict[str, int]) -> str | None:
    """What is wrong with the model's outputs at some sizes.

    They may be off by a few roundings of numbers of order one, or by as much as eager PyTorch in single precision.
    """
    inputs = make_inputs(sizes, seed + 1)
    with torch.no_grad():
        single = module(*inputs)
        torch.set_default_dtype(torch.float64)
        exact = copy.deepcopy(module).double()(inputs[0].double(), inputs[1].double(), inputs[2])
        torch.set_default_dtype(torch.float32)
    try:
        outputs = model(*[tensor.numpy() for tensor in inputs])
    except ShapeError as error:
        if "traced assuming" in str(error) and sizes is not SIZES[0]:
            return None  # the exporter excludes sizes at which what is left of an axis is 1
        raise
    for position, (want, near, got) in enumerate(zip(exact, single, outputs, strict=True)):
        where = f"v{module.returned[position]} at {sizes}"
        if tuple(want.shape) != got.shape or near.numpy().dtype != got.dtype:
            return f"{where} is {got.dtype}{got.shape}, not {near.dtype}{tuple(want.shape)}"
        if not want.numel():
            continue
        error = float(np.abs(got.astype(np.float64) - want.numpy()).max())
        own = float((near.double() - want.double()).abs().max())
        limit = 1e-5 * max(1.0, float(want.abs().max())) + 8 * own if near.is_floating_point() else 0.0
        if not error <= limit:
            return f"{where} is off by {error:.2e}; eager PyTorch by {own:.2e}"
    return None


def seed_groups() -> list[list[int]]:
    """The seeds to run, in groups that are compiled into one artifact."""
    text = os.environ.get("RANDOM_GRAPHS", "")
    seeds = list(SEEDS)
    if text:
        first, _, last = text.partition("-")
        seeds = list(range(int(first), int(last or first) + 1))
    return [seeds[start : start + GROUP] for start in range(0, len(seeds), GROUP)]


@pytest.mark.parametrize("seeds", seed_groups(), ids=lambda seeds: f"seeds{seeds[0]}-{seeds[-1]}")
def test_random_graphs(seeds, build, isolate):
    modules = {seed: make_program(seed) for seed in seeds}
    programs, failures = [], []
    for seed, module in modules.items():
        try:
            program = capture(f"graph{seed}", module, make_inputs(SIZES[0], seed), {}, SHAPES)
            if os.environ.get("RANDOM_GRAPHS_PASSES") == "none":
                program = isolate(program)
            else:
                PassManager(pipeline(fusion_roles())).run(program)
            programs.append(program)
        except UsageError:
            continue  # the exporter does not take all declared sizes, and the error says so
        except Exception as error:  # noqa: BLE001 - every seed has its turn
            failures.append(report(seed, module, f"{type(error).__name__}: {error}"))
    assert len(programs) + len(failures) > len(seeds) // 2 or len(seeds) == 1
    try:
        model = build(programs)
    except Exception as error:
        if len(seeds) == 1:
            raise
        raise AssertionError(f"one of {seeds} does not build; run them one by one: {error}") from error
    for program in programs:
        seed = int(program.name.removeprefix("graph"))
        for sizes in SIZES:
            if wrong := check(model.entry(program.name), modules[seed], seed, sizes):
                failures.append(report(seed, modules[seed], wrong))
                break
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("seed", sum(seed_groups(), [])[:: 1 if os.environ.get("RANDOM_GRAPHS") else 3])
def test_random_graphs_as_interpreted_gpu_kernels(seed, gpu_artifact):
    module = make_program(seed)
    passes = os.environ.get("RANDOM_GRAPHS_PASSES") != "none"
    try:
        path = gpu_artifact(module, make_inputs(SIZES[0], seed), SHAPES, passes=passes)
    except UsageError:
        pytest.skip("the exporter does not take all declared sizes")
    with tilewright.load(path, device="interpreter") as model:
        for sizes in SIZES:
            wrong = check(model.entry("main"), module, seed, sizes)
            assert not wrong, report(seed, module, wrong)


def report(seed: int, module: Generated, what: str) -> str:
    """The failure, the program, and the command that repeats it."""
    program = "\n".join(f"    {line}" for line in module.text)
    again = f"RANDOM_GRAPHS={seed} pytest {os.path.relpath(__file__)}"
    return f"seed {seed}: {what}\n{program}\n    return {module.returned}\nrepeat with: {again}"
