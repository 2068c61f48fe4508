"""Where Tilewright loses time: its kernels beside what the processor's limits would allow them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_KERNELS = 6


@dataclass(frozen=True)
class Loss:
    """A kernel or a family of kernels in one call: milliseconds taken, and at the limits; ``calls`` steps run it."""

    name: str
    family: str
    calls: int
    ms: float
    bound_ms: float
    module: str = ""

    @property
    def lost_ms(self) -> float:
        """Above the limits. What comes from caches can be faster than the memory's limit; then nothing is lost."""
        return max(0.0, self.ms - self.bound_ms)


def kernel_losses(kernels: Sequence[Mapping[str, Any]], limits: Mapping[str, float], dtype: str) -> list[Loss]:
    """Every kernel beside its roofline, the largest loss first.

    Args:
        kernels: of a profile: name, family, seconds, flops and bytes per call of the model.
        limits: operations per second by dtype, and bytes per second as ``read``.
        dtype: whose limit matrix products have.
    """
    rate = limits.get(dtype, limits["float32"])
    found = [
        Loss(
            item["kernel"],
            item["family"],
            item["calls"],
            item["seconds"] * 1e3,
            max(item["flops"] / rate, item["bytes"] / limits["read"]) * 1e3,
            item["modules"][0].removeprefix("inner.") if item["modules"] else "",
        )
        for item in kernels
    ]
    return sorted(found, key=lambda loss: -loss.lost_ms)


def family_losses(kernels: Sequence[Loss]) -> list[Loss]:
    """The same by family."""
    found: dict[str, Loss] = {}
    for loss in kernels:
        sofar = found.get(loss.family, Loss(loss.family, loss.family, 0, 0.0, 0.0))
        bound = sofar.bound_ms + min(loss.bound_ms, loss.ms)
        found[loss.family] = Loss(loss.family, loss.family, sofar.calls + loss.calls, sofar.ms + loss.ms, bound)
    return sorted(found.values(), key=lambda loss: -loss.lost_ms)


def describe_losses(
    kernels: Sequence[Mapping[str, Any]], limits: Mapping[str, float], dtype: str, ms: float, gap_ms: float
) -> Iterator[str]:
    """The families, and the kernels that lose the most until their losses make up for twice the gap.

    Args:
        kernels: as for :func:`kernel_losses`.
        limits: as for :func:`kernel_losses`.
        dtype: as for :func:`kernel_losses`.
        ms: the median call.
        gap_ms: how much slower than the fastest peer it is.
    """
    losses = kernel_losses(kernels, limits, dtype)
    if not losses:
        yield "  its kernels were not profiled"
        return
    for loss in family_losses(losses):
        yield f"  {loss.family:20}{_figures(loss)}"
    yield f"  {'between the kernels':20}{'':>4}   {ms - sum(loss.ms for loss in losses):9.3f} ms"
    explained = 0.0
    for loss in losses[:MOST_KERNELS]:
        yield f"    {loss.name}: {_figures(loss).strip()}" + (f"  ({loss.module})" if loss.module else "")
        explained += loss.lost_ms
        if explained > 2 * gap_ms:
            break


def _figures(loss: Loss) -> str:
    share = min(1.0, loss.bound_ms / loss.ms) if loss.ms else 1.0
    return f"{loss.calls:4} x {loss.ms:9.3f} ms, {share:4.0%} of the limit, loses {loss.lost_ms:8.3f} ms"
