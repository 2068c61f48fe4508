"""Memory planning: which scratch buffers may share memory, for every size at once.

Buffers are stacked greedily at a reference size. What is recorded is not an offset but, for each buffer, which others
lie ``below`` it: its offset is the maximum of their ends, evaluated per call. Any two buffers that are alive together
are ordered by that relation, so the plan is right for all sizes, and as tight as the greedy stacking at sizes that
keep the buffers' proportions.

Several orders of placement are tried at the smallest, the sample's and the largest sizes; the one whose worst ratio
to the lower bound (the largest live set) is best wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..runtime import sizes
from ..runtime.plan import Buffer, place
from ..runtime.sizes import Size

ALIGNMENT = 64


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of scratch at one assignment of the symbols: the plan's peak, the sum of all buffers, the lower bound."""

    peak: int
    total: int
    bound: int


def plan_memory(buffers: Sequence[Buffer], assignments: Sequence[Mapping[str, int]]) -> tuple[Buffer, ...]:
    """Fill in ``below``.

    Args:
        buffers: with ``bytes``, ``first`` and ``last`` set.
        assignments: the sizes to be good at: smallest, sample's, largest.
    """
    best: tuple[float, tuple[Buffer, ...]] | None = None
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for assignment in assignments:
        extents = [_aligned(buffer.bytes, assignment) for buffer in buffers]
        for key in _ORDERS:
            order = sorted(range(len(buffers)), key=lambda index: (*key(buffers[index], extents[index]), index))
            below = _stack(buffers, extents, order)
            if below in seen:
                continue
            seen.add(below)
            planned = tuple(replace(buffer, below=under) for buffer, under in zip(buffers, below, strict=True))
            worst = max((_ratio(measure(planned, other)) for other in assignments), default=1.0)
            if best is None or worst < best[0]:
                best = (worst, planned)
            if worst <= 1.0:
                return planned
    return best[1] if best else ()


def measure(buffers: tuple[Buffer, ...], assignment: Mapping[str, int]) -> MemoryReport:
    """What a planned arena needs at one assignment of the symbols."""
    extents = [_aligned(buffer.bytes, assignment) for buffer in buffers]
    _, peak = place(buffers, dict(assignment))
    changes: dict[int, int] = {}
    for buffer, extent in zip(buffers, extents, strict=True):
        changes[buffer.first] = changes.get(buffer.first, 0) + extent
        changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - extent
    live = bound = 0
    for step in sorted(changes):
        live += changes[step]
        bound = max(bound, live)
    return MemoryReport(peak, sum(extents), bound)


_ORDERS: tuple[Callable[[Buffer, int], tuple[int, ...]], ...] = (
    lambda buffer, extent: (-extent, buffer.first),
    lambda buffer, extent: (-extent * (buffer.last - buffer.first + 1), buffer.first),
    lambda buffer, extent: (-(buffer.last - buffer.first), -extent),
    lambda buffer, extent: (buffer.first, -extent),
    lambda buffer, extent: (-buffer.last, -extent),
)


def _aligned(size: Size, assignment: Mapping[str, int]) -> int:
    return (sizes.evaluate(size, assignment) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _ratio(report: MemoryReport) -> float:
    return report.peak / report.bound if report.bound else 1.0


def _stack(buffers: Sequence[Buffer], extents: Sequence[int], order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Place buffers in order, each at the lowest gap that is free for its whole life; return who lies below whom."""
    offsets: dict[int, int] = {}
    rank: dict[int, int] = {}
    for index in order:
        mine = buffers[index]
        others = sorted(
            (other for other in offsets if buffers[other].first <= mine.last and mine.first <= buffers[other].last),
            key=lambda other: (offsets[other], rank[other]),
        )
        offset = 0
        for other in others:
            if offset + extents[index] <= offsets[other]:
                break
            offset = max(offset, offsets[other] + extents[other])
        offsets[index] = offset
        rank[index] = len(rank)
    # Ordered by (offset, end, placement): a strict total order, so the relation has no cycle even with empty buffers.
    level = {index: (offsets[index], offsets[index] + extents[index], rank[index]) for index in order}
    stacked = sorted(order, key=lambda index: level[index])
    below: dict[int, list[int]] = {}
    for position, index in enumerate(stacked):
        mine = buffers[index]
        under = [
            other
            for other in stacked[:position]
            if buffers[other].first <= mine.last and mine.first <= buffers[other].last
        ]
        below[index] = _without_implied(under, below)
    return tuple(tuple(sorted(below[index])) for index in range(len(buffers)))


def _without_implied(under: list[int], below: dict[int, list[int]]) -> list[int]:
    """Drop those that already lie below another one of the list."""
    implied: set[int] = set()
    kept: list[int] = []
    for other in reversed(under):
        if other in implied:
            continue
        kept.append(other)
        stack = list(below[other])
        while stack:
            lower = stack.pop()
            if lower not in implied:
                implied.add(lower)
                stack.extend(below[lower])
    return kept
