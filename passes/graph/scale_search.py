"""Choosing scales, zero points and codes of a weight's groups: by rounding, or by a search for the least squared error.

Rounding takes the scale with which the largest number of a group just fits. The search tries other scales, from such
that cut the largest numbers off to such that leave codes unused; for the codes that a candidate gives, the best scale
is a quotient, ``sum(w * q) / sum(q * q)``, and the squared error with it follows from the same two sums. Where there
are no zero points there is one code more on the negative side: the search lets the scale be negative where the largest
number is positive, so that it has it. The best candidate is rounded and refined; what is not better than plain rounding
is not taken.

Everything works on groups in columns, ``[members, groups]``: sums of short groups then run over the outer axis, whole
vectors at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantized_rows import LIMITS

# Of the scale with which the largest number just fits: candidates by the number of bits.
_SHRINK: dict[int, tuple[float, ...]] = {
    4: (1.12, 1.04, 0.98, 0.93, 0.88, 0.83, 0.78, 0.72, 0.66, 0.58),
    8: (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.74, 0.66, 0.56, 0.45),
}
_REFINEMENTS = 2
_LARGEST_FLOAT16 = 65504.0


class CannotQuantize(ValueError):
    """A weight has numbers for which its format has none."""


def quantize_groups(weight: Tensor, bits: int, symmetric: bool, search: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of groups.

    Args:
        weight: float32 ``[members, groups]``.
        bits: 4 or 8.
        symmetric: whether there are no zero points.
        search: look for the scale with the least squared error; else take the one that fits the largest number.

    Returns:
        Codes, ``[members, groups]``, int8 for 8 bits, uint8 for 4 bits; scales, float32 ``[groups]``; zero points in
        the dtype of the codes, ``[groups]``, or None.

    Raises:
        CannotQuantize: a number is not finite, or too large for its scale to be a float16.
    """
    low, high = (weight.amin(0), weight.amax(0)) if len(weight) else (weight.new_zeros(weight.shape[1]),) * 2
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CannotQuantize("it has numbers that are not finite")
    low, high = low.clamp_max(0), high.clamp_min(0)
    fit = _fit_symmetric(low, high, bits) if symmetric else _fit(low, high, bits)
    if bits == 4 and bool((fit > _LARGEST_FLOAT16).any()):
        largest = float(torch.maximum(-low, high).max())
        raise CannotQuantize(f"it has numbers up to {largest:.3g}, too large for a scale of 4 bits, which is a float16")
    scale, zero = _representable(fit, bits), None
    if not symmetric:
        zero = _zero(low, scale, bits)
    codes, product = torch.empty_like(weight), torch.empty_like(weight)
    error = _round(weight, scale, zero, bits, codes, product)
    if search:
        scale, zero = _search(weight, low, high, bits, (scale, zero, codes, error), product)
    offset = 8 if bits == 4 and symmetric else 0
    dtype = torch.uint8 if bits == 4 else torch.int8
    if zero is None:
        return codes.add_(offset).to(dtype), scale, None
    return codes.add_(zero).to(dtype), scale, zero.to(dtype)


def _fit_symmetric(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return torch.maximum(-low, high) / (7 if bits == 4 else 127)


def _fit(low: Tensor, high: Tensor, bits: int) -> Tensor:
    first, last = LIMITS[bits]
    return (high - low) / (last - first)


def _representable(scale: Tensor, bits: int) -> Tensor:
    """The scale as it is stored, or the largest that can be."""
    return scale.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).half().float() if bits == 4 else scale


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is no number: those groups become zeros."""
    inverse = scale.reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _zero(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    first, last = LIMITS[bits]
    return (first - low * _inverse(scale)).round_().clamp_(first, last)


def _bounds(zero: Tensor | None, bits: int) -> tuple[Tensor | int, Tensor | int]:
    """The smallest and the largest code, counted from the zero point."""
    first, last = LIMITS[bits]
    if zero is not None:
        return first - zero, last - zero
    return (-8, 7) if bits == 4 else (first, last)


def _nearest(weight: Tensor, inverse: Tensor, bounds: tuple[Tensor | int, Tensor | int], out: Tensor) -> Tensor:
    torch.mul(weight, inverse, out=out)
    return out.round_().clamp_(*bounds)  # type: ignore[arg-type]


def _round(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, codes: Tensor, product: Tensor) -> Tensor:
    """Codes counted from the zero point, which ``codes`` gets, and the squared error of each group.

    New memory for every product would take longer than the arithmetic: ``product`` is overwritten.
    """
    _nearest(weight, _inverse(scale), _bounds(zero, bits), codes)
    torch.mul(codes, scale, out=product)
    return torch.sub(weight, product, out=product).square_().sum(0)


def _search(
    weight: Tensor, low: Tensor, high: Tensor, bits: int, plain: tuple[Tensor, Tensor | None, Tensor, Tensor],
    product: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What is better than plain rounding, group by group: scales and zero points; the codes become theirs."""
    scale, zero, codes, error = plain
    found = torch.empty_like(weight)
    tried_scale, tried_zero = _best_candidate(weight, low, high, bits, zero is not None, found, product)
    for step in range(_REFINEMENTS + 1):
        tried = _representable(tried_scale, bits)
        off = _round(weight, tried, tried_zero, bits, found, product)
        better = off < error
        error, scale = torch.where(better, off, error), torch.where(better, tried, scale)
        torch.where(better, found, codes, out=codes)
        if zero is not None:
            zero = torch.where(better, tried_zero, zero)  # type: ignore[arg-type]
        if step < _REFINEMENTS:
            along, square = torch.mul(weight, found, out=product).sum(0), torch.mul(found, found, out=product).sum(0)
            tried_scale = torch.where(square > 0, along / square, tried)
    return scale, zero


def _best_candidate(
    weight: Tensor, low: Tensor, high: Tensor, bits: int, with_zero: bool, numbers: Tensor, product: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero point) of each group with which the codes of one of the candidates explain it best.

    ``numbers`` and ``product`` are overwritten.
    """
    shrink = weight.new_tensor(_SHRINK[bits])[:, None]
    if with_zero:
        scales = _fit(low, high, bits) * shrink
        zeros = _zero(low * shrink, scales, bits)
        bounds = list(zip(*_bounds(zeros, bits), strict=True))  # type: ignore[arg-type]
    else:
        # The largest number gets the negative side, which has a code more.
        scales = _fit_symmetric(low, high, bits) * torch.where(high > -low, -1.0, 1.0) * shrink
        zeros = None
        bounds = [_bounds(None, bits)] * len(shrink)
    inverses = _inverse(scales)
    scale, explained = torch.zeros_like(low), torch.full_like(low, -1.0)
    zero = None if zeros is None else zeros[0]
    for index, bound in enumerate(bounds):
        _nearest(weight, inverses[index], bound, numbers)
        along = torch.mul(weight, numbers, out=product).sum(0)
        square = torch.mul(numbers, numbers, out=product).sum(0)
        # Of sum(w * w), the scale along / square leaves all but along * along / square.
        tried = (along / square).nan_to_num_(0.0)
        less = (along * along / square).nan_to_num_(0.0)
        better = less > explained
        explained, scale = torch.where(better, less, explained), torch.where(better, tried, scale)
        if zeros is not None:
            zero = torch.where(better, zeros[index], zero)  # type: ignore[arg-type]
    return scale, zero
