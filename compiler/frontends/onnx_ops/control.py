"""Control flow that is decided while the model is read: constant conditions and trip counts are unrolled."""

from __future__ import annotations

from typing import Any

import torch

from .host import SYMBOLIC, DataDependent, Host
from .registry import Node, as_tensor, operator

MAX_TRIPS = 4096


def _decided(value: Any, what: str) -> Any:
    number = (value if isinstance(value, Host) else Host.read(value)).item()
    if isinstance(number, SYMBOLIC) and not isinstance(number, torch.SymBool):
        raise DataDependent(f"{what} is a symbolic size; give that dimension as a plain number in --shape")
    return number


@operator("If", raw=True, scoped=True)
def if_(node: Node, scope: dict[str, Any], condition: Any) -> tuple[Any, ...]:
    """The branch that the condition chooses; a relation between symbolic sizes leaves a guard."""
    chosen = "then_branch" if bool(_decided(condition, "the condition")) else "else_branch"
    return tuple(node.get(chosen).run(scope, ()))


@operator("Loop", raw=True, scoped=True)
def loop(node: Node, scope: dict[str, Any], trips: Any, condition: Any, *carried: Any) -> tuple[Any, ...]:
    """The body as often as the trip count and its own condition say."""
    body = node.get("body")
    count = None if trips is None else _decided(trips, "the trip count")
    live = condition is None or bool(_decided(condition, "the condition"))
    state = list(carried)
    collected: list[list[torch.Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    trip = 0
    while live and (count is None or trip < count):
        if trip >= MAX_TRIPS:
            raise DataDependent(f"it runs more than {MAX_TRIPS} times")
        results = body.run(scope, (Host.of([trip], torch.int64, ()), Host.of([True], torch.bool, ()), *state))
        live = bool(_decided(results[0], "the condition"))
        state = list(results[1 : 1 + len(carried)])
        for part, value in zip(collected, results[1 + len(carried) :], strict=True):
            part.append(as_tensor(value))
        trip += 1
    if collected and not trip:
        raise ValueError("the loop never runs, so the shape of what it collects is unknown")
    return *state, *(torch.stack(part) for part in collected)


@operator("Scan", since=9, raw=True, scoped=True)
def scan(node: Node, scope: dict[str, Any], *values: Any) -> tuple[Any, ...]:
    """The body once per slice of the scanned inputs, which must have a fixed length."""
    body, count = node.get("body"), node.get("num_scan_inputs")
    state, scanned = list(values[: len(values) - count]), [as_tensor(v) for v in values[len(values) - count :]]
    outputs = len(body.outputs) - len(state)
    in_axes, in_back = node.get("scan_input_axes", [0] * count), node.get("scan_input_directions", [0] * count)
    out_axes, out_back = node.get("scan_output_axes", [0] * outputs), node.get("scan_output_directions", [0] * outputs)
    length = scanned[0].shape[in_axes[0]]
    if not isinstance(length, int):
        raise DataDependent("the length it scans is a symbolic size; give that dimension as a plain number in --shape")
    collected: list[list[torch.Tensor]] = [[] for _ in range(outputs)]
    for step in range(length):
        slices = [
            x.select(a, length - 1 - step if b else step) for x, a, b in zip(scanned, in_axes, in_back, strict=True)
        ]
        results = body.run(scope, (*state, *slices))
        state = list(results[: len(state)])
        for part, value in zip(collected, results[len(state) :], strict=True):
            part.append(as_tensor(value))
    stacked = [torch.stack(p[::-1] if b else p, a) for p, a, b in zip(collected, out_axes, out_back, strict=True)]
    return *state, *stacked
