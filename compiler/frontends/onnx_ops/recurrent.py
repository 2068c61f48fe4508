"""Recurrent layers, unrolled over a sequence of fixed length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .registry import Node, operator

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
Activation = Callable[[torch.Tensor], torch.Tensor]
Parametric = Callable[[torch.Tensor, float, float], torch.Tensor]

# name: (function of x, alpha, beta; default alpha; default beta)
_ACTIVATIONS: dict[str, tuple[Parametric, float, float]] = {
    "relu": (lambda x, a, b: F.relu(x), 0, 0),
    "tanh": (lambda x, a, b: torch.tanh(x), 0, 0),
    "sigmoid": (lambda x, a, b: torch.sigmoid(x), 0, 0),
    "softsign": (lambda x, a, b: F.softsign(x), 0, 0),
    "softplus": (lambda x, a, b: F.softplus(x), 0, 0),
    "affine": (lambda x, a, b: a * x + b, 1, 0),
    "leakyrelu": (lambda x, a, b: F.leaky_relu(x, a), 0.01, 0),
    "thresholdedrelu": (lambda x, a, b: torch.where(x >= a, x, torch.zeros_like(x)), 1, 0),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1, 1),
    "hardsigmoid": (lambda x, a, b: (a * x + b).clamp(0, 1), 0.2, 0.5),
    "elu": (lambda x, a, b: F.elu(x, a), 1, 0),
}


def _activations(node: Node, directions: int) -> list[Activation]:
    names = [name.lower() for name in node.get("activations", _DEFAULTS[node.op_type] * directions)]
    alphas, betas = list(node.get("activation_alpha", [])), list(node.get("activation_beta", []))
    made: list[Activation] = []
    for name in names:
        function, alpha, beta = _ACTIVATIONS[name]
        takes_alpha = name in ("affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu")
        takes_beta = name in ("affine", "scaledtanh", "hardsigmoid")
        alpha = alphas.pop(0) if takes_alpha and alphas else alpha
        beta = betas.pop(0) if takes_beta and betas else beta
        made.append(partial(_activate, function, alpha, beta))
    return made


def _activate(function: Parametric, alpha: float, beta: float, x: torch.Tensor) -> torch.Tensor:
    return function(x, alpha, beta)


def _unknown(node: Node) -> str | None:
    names = [name for name in node.get("activations", []) if name.lower() not in _ACTIVATIONS]
    return f"activation {names[0]}" if names else None


@operator("RNN", "GRU", "LSTM", since=7, refuse=_unknown)
def recurrent(
    node: Node,
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    initial_h: torch.Tensor | None = None,
    initial_c: torch.Tensor | None = None,
    peepholes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Outputs of all steps (steps, directions, batch, hidden) and the last states, per direction."""
    batch_first = bool(node.get("layout", 0))
    if batch_first:
        x = x.transpose(0, 1)
        initial_h, initial_c = (None if s is None else s.transpose(0, 1) for s in (initial_h, initial_c))
    if not isinstance(x.shape[0], int):
        raise ValueError("the sequence's length must be fixed: give it as a plain number in --shape")
    directions, hidden = r.shape[0], r.shape[2]
    activations = _activations(node, directions)
    per_direction = len(_DEFAULTS[node.op_type])
    zeros = torch.zeros(x.shape[1], hidden, dtype=x.dtype)
    outputs, last = [], []
    for d in range(directions):
        cell = _Cell(
            node,
            activations[d * per_direction : (d + 1) * per_direction],
            w[d],
            r[d],
            None if b is None else b[d],
            None if peepholes is None else peepholes[d],
        )
        state = [
            zeros if s is None else s[d] for s in ((initial_h, initial_c) if node.op_type == "LSTM" else (initial_h,))
        ]
        backwards = node.get("direction", "forward") == "reverse" or d == 1
        steps: list[Any] = [None] * x.shape[0]
        for t in reversed(range(x.shape[0])) if backwards else range(x.shape[0]):
            new = cell(x[t], *state)
            if lengths is not None:  # past its end a sequence keeps its state and gives zeros
                live = (lengths > t)[:, None]
                steps[t] = torch.where(live, new[0], torch.zeros_like(new[0]))
                new = [torch.where(live, a, b) for a, b in zip(new, state, strict=True)]
            else:
                steps[t] = new[0]
            state = new
        outputs.append(torch.stack(steps))
        last.append(state)
    y = torch.stack(outputs, 1)
    finals = [torch.stack([state[i] for state in last]) for i in range(len(last[0]))]
    if batch_first:
        return y.permute(2, 0, 1, 3), *(final.transpose(0, 1) for final in finals)
    return y, *finals


class _Cell:
    """One step of one direction."""

    def __init__(
        self,
        node: Node,
        activations: list[Activation],
        w: torch.Tensor,
        r: torch.Tensor,
        b: torch.Tensor | None,
        peepholes: torch.Tensor | None,
    ) -> None:
        self._kind, self._functions = node.op_type, activations
        self._w, self._r, self._hidden = w, r, r.shape[1]
        gates = _GATES[node.op_type] * self._hidden
        self._wb = None if b is None else b[:gates]
        self._rb = None if b is None else b[gates:]
        self._p = None if peepholes is None else torch.split(peepholes, self._hidden)
        self._clip, self._coupled = node.get("clip"), bool(node.get("input_forget", 0))
        self._reset_after = bool(node.get("linear_before_reset", 0))

    def _clipped(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._clip is None else x.clamp(-self._clip, self._clip)

    def __call__(self, x: torch.Tensor, *state: torch.Tensor) -> list[torch.Tensor]:
        given = F.linear(x, self._w, self._wb)
        if self._kind == "LSTM":
            return self._lstm(given, *state)
        return self._gru(given, *state) if self._kind == "GRU" else self._rnn(given, *state)

    def _rnn(self, given: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        return [self._functions[0](self._clipped(given + F.linear(h, self._r, self._rb)))]

    def _gru(self, given: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        f, g = self._functions
        size = self._hidden
        rb = self._rb
        gates = given[:, : 2 * size] + F.linear(h, self._r[: 2 * size], None if rb is None else rb[: 2 * size])
        z, reset = (f(self._clipped(part)) for part in torch.split(gates, size, 1))
        r_h, b_h = self._r[2 * size :], None if rb is None else rb[2 * size :]
        back = reset * F.linear(h, r_h, b_h) if self._reset_after else F.linear(reset * h, r_h, b_h)
        candidate = g(self._clipped(given[:, 2 * size :] + back))
        return [(1 - z) * candidate + z * h]

    def _lstm(self, given: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        f, g, out = self._functions
        i, o, forget, cell = torch.split(given + F.linear(h, self._r, self._rb), self._hidden, 1)
        if self._p is not None:
            i, forget = i + self._p[0] * c, forget + self._p[2] * c
        i = f(self._clipped(i))
        forget = 1 - i if self._coupled else f(self._clipped(forget))
        c = forget * c + i * g(self._clipped(cell))
        o = f(self._clipped(o if self._p is None else o + self._p[1] * c))
        return [o * out(c), c]
