"""Weights as the C kernels stream through them, and the number of work units that each kernel template counts.

All x86 targets of an artifact read the same layouts, so a weight is packed and stored once. Columns (output channels)
come in panels of :data:`PANEL`, or, in matrices of bfloat16 and int8, of :data:`NARROW_PANEL` where no target has wider
vectors (:func:`panel_of`); those beyond the last one are zeros. Image channels come in blocks of :data:`CHANNELS`. All
packing functions keep the dtype and return a new C-contiguous array.

The unit formulas repeat what the templates of the same name compute (``templates/c/*.jinja``); sizes may be symbolic.
"""

from __future__ import annotations

import numpy as np

from ...runtime.sizes import Size, add, ceildiv, floordiv, maximum, minimum, mul

PANEL = 32
"""Output columns that lie side by side in packed weights."""
NARROW_PANEL = 16
"""The same for words of several elements where all targets have vectors of 256 bits: what their register tile is wide.

Of wider panels it would take every other line at a time, which uses half of the sets of the first-level cache. Tiles of
float32 take all of a wide panel at once."""
CHANNELS = 16
"""Channels that lie side by side in a channels-blocked image."""
WORD = 4
"""Bytes that kernels read at once along the reduction axis: one float32, two bfloat16 or four int8."""
ROWS = 96
"""Most rows (of a matrix) or pixels (of an image) in one work unit."""

_GATHER_SCRATCH = 20480
_DEPTHWISE_SCRATCH = 1280
_DEPTHWISE_LINES = 320
_DEPTHWISE_ROWS = 8
_DEPTHWISE_COLUMNS = 64


def panel_of(vector_bits: int) -> int:
    """Columns of a panel of bfloat16 or int8 for targets of which the widest has vectors of so many bits."""
    return PANEL if vector_bits > 256 else NARROW_PANEL


def pack_matmul(weight: np.ndarray, panel: int = PANEL) -> np.ndarray:
    """``[..., K, N]`` as panels ``[..., ceil(N/panel), K, panel]``."""
    *batch, k, n = weight.shape
    panels = -(-n // panel)
    padded = np.zeros((*batch, k, panels * panel), weight.dtype)
    padded[..., :n] = weight
    return np.ascontiguousarray(np.moveaxis(padded.reshape(*batch, k, panels, panel), -2, -3))


def pack_words(weight: np.ndarray, panel: int = PANEL) -> np.ndarray:
    """``[..., K, N]`` of 2 or 1 bytes an element as panels of words ``[..., ceil(N/panel), ceil(K/e), panel, e]``.

    The e = 2 or 4 elements of a word are neighbours along K; beyond K there are zeros.
    """
    *batch, k, n = weight.shape
    per = WORD // weight.itemsize
    words = np.zeros((*batch, -(-k // per) * per, n), weight.dtype)
    words[..., :k, :] = weight
    panels = pack_matmul(words, panel)  # [..., panels, K, panel]
    return np.ascontiguousarray(np.swapaxes(panels.reshape(*panels.shape[:-2], -1, per, panel), -1, -2))


def pack_bytes(weight: np.ndarray, panel: int = PANEL) -> np.ndarray:
    """int8 ``[..., K, N]`` as panels of words and one more row: ``[..., ceil(N/panel), ceil(K/4) + 1, panel, 4]``.

    That row holds, as little-endian int32, 128 times the sums of the columns modulo 2^32: what the kernel's left
    operand, offset by 128 to be unsigned, gives too much.
    """
    words = pack_words(weight, panel)
    offsets = (words.sum((-3, -1), np.int64) * 128).astype("<u4")  # [..., panels, panel]
    row = offsets[..., None, :, None].view(np.int8)
    return np.concatenate([words, row], axis=-3)


def pack_convolution(weight: np.ndarray) -> np.ndarray:
    """``[OC, IC/groups, KH, KW]`` for ``convolution.c.jinja``: ``[ceil(OC/32), IC/groups * KH * KW, 32]``.

    The middle axis runs over blocks of 16 input channels, then KH, KW and the channels in the block; the last block
    has only the channels that exist. Of 2-byte elements, whose channels are even: ``[ceil(OC/32), IC/groups/2 * KH *
    KW, 32, 2]``.
    """
    channels = weight.shape[1]
    blocks = [weight[:, first : first + CHANNELS] for first in range(0, channels, CHANNELS)]
    rows = np.concatenate([block.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]) for block in blocks])
    return pack_matmul(rows) if rows.itemsize == WORD else pack_words(rows)


def pack_convolution_gathered(weight: np.ndarray, groups: int = 1) -> np.ndarray:
    """``[OC, IC/groups, KH, KW]`` for ``convolution_gathered.c.jinja``.

    Gives ``[groups, ceil(OC/groups/32), IC/groups * KH * KW, 32]``. Of 2-byte elements, a word holds two rows of taps
    that follow one another, those of one channel and then those of the next: ``[..., ceil(IC/groups * KH / 2) * KW, 32,
    2]``.
    """
    outputs, width = weight.shape[0] // groups, weight.shape[-1]
    rows = weight.reshape(groups, outputs, -1).transpose(0, 2, 1)
    if weight.itemsize == WORD:
        return pack_matmul(rows)
    segments = rows.shape[1] // width
    paired = np.zeros((groups, -(-segments // 2) * 2, width, outputs), weight.dtype)
    paired[:, :segments] = rows.reshape(groups, segments, width, outputs)
    paired = paired.reshape(groups, -1, 2, width, outputs).swapaxes(2, 3)
    return pack_words(paired.reshape(groups, -1, outputs))


def pack_depthwise(weight: np.ndarray) -> np.ndarray:
    """``[C, 1, KH, KW]`` for ``depthwise.c.jinja``: ``[ceil(C/16), KH, KW, 16]``, zeros beyond C."""
    return np.ascontiguousarray(block_channels(weight.transpose(1, 0, 2, 3))[0])


def block_channels(image: np.ndarray) -> np.ndarray:
    """``[N, C, H, W]`` as ``[N, ceil(C/16), H, W, 16]``, zeros beyond C."""
    n, c, h, w = image.shape
    blocks = -(-c // CHANNELS)
    padded = np.zeros((n, blocks * CHANNELS, h, w), image.dtype)
    padded[:, :c] = image
    return np.ascontiguousarray(padded.reshape(n, blocks, CHANNELS, h, w).transpose(0, 1, 3, 4, 2))


def unblock_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Inverse of :func:`block_channels`."""
    n, blocks, h, w, _ = image.shape
    return np.ascontiguousarray(image.transpose(0, 1, 4, 2, 3).reshape(n, blocks * CHANNELS, h, w)[:, :channels])


def matmul_units(batch: Size, m: Size, n: Size, block: int = ROWS, panel: int = PANEL) -> Size:
    """Work units of ``matmul.c.jinja``: a panel of a block of at most ``block`` rows each."""
    return mul(batch, ceildiv(m, block), ceildiv(n, panel))


def can_convolve_blocked(channels: int, outputs: int, groups: int, kernel: tuple[int, int]) -> bool:
    """Whether ``convolution.c.jinja`` takes this convolution of a channels-blocked image.

    Args:
        channels: input channels of all groups.
        outputs: output channels of all groups.
        groups: groups of channels.
        kernel: its height and width.
    """
    whole = groups == 1 or (channels // groups % CHANNELS == 0 and outputs // groups % PANEL == 0)
    return whole and max(kernel) <= 64


def convolution_units(batch: Size, oh: Size, ow: Size, outputs: int) -> Size:
    """Work units of ``convolution.c.jinja``: a panel of a block of pixels each."""
    return mul(batch, ceildiv(mul(oh, ow), ROWS), ceildiv(outputs, PANEL))


def tile_rows(pixels: int, most: int) -> int:
    """Which numbers of rows the tiles of ``convolution.c.jinja`` have, as bits.

    Args:
        pixels: of an image.
        most: rows of a tile.
    """
    used, blocks = 0, -(-pixels // ROWS)
    for count in {pixels * (block + 1) // blocks - pixels * block // blocks for block in range(blocks)}:
        tiles = -(-count // most)
        for tile in range(tiles):
            used |= 1 << (count * (tile + 1) // tiles - count * tile // tiles)
    return used


def can_gather(kernel: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether the window of one pixel fits the scratch of ``convolution_gathered.c.jinja``."""
    return kernel[0] * _reach(kernel[1], dilation[1]) <= _GATHER_SCRATCH


def convolution_gathered_units(
    batch: Size,
    oh: Size,
    ow: Size,
    outputs: int,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> Size:
    """Work units of ``convolution_gathered.c.jinja``: a panel of a band of a slice of columns each."""
    reach = _reach(kernel[1], dilation[1])
    slices, width = _slices(ow, min(ROWS, (_GATHER_SCRATCH // kernel[0] - reach) // stride[1] + 1), stride[1], reach)
    columns = maximum(1, ceildiv(ow, slices))
    most_rows = maximum(1, minimum(floordiv(ROWS, columns), floordiv(_GATHER_SCRATCH, mul(width, kernel[0]))))
    panels = groups * -(-(outputs // groups) // PANEL)
    return mul(batch, ceildiv(oh, most_rows), slices, panels) if ow != 0 else 0


def can_convolve_depthwise(kernel: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether the window of one pixel fits the scratch of ``depthwise.c.jinja``."""
    return kernel[0] * _reach(kernel[1], dilation[1]) <= _DEPTHWISE_SCRATCH


def depthwise_units(
    batch: Size,
    channels: int,
    oh: Size,
    ow: Size,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> Size:
    """Work units of ``depthwise.c.jinja``: a band of a slice of columns of a block of channels each."""
    reach = _reach(kernel[1], dilation[1])
    fitting = (_DEPTHWISE_LINES // kernel[0] - reach) // stride[1] + 1
    slices, _ = _slices(ow, max(1, min(_DEPTHWISE_COLUMNS, fitting)), stride[1], reach)
    most_rows = _DEPTHWISE_ROWS if dilation[0] == 1 else 1
    return mul(batch, -(-channels // CHANNELS), ceildiv(oh, most_rows), slices) if ow != 0 else 0


def _reach(taps: int, dilation: int) -> int:
    """Input columns from the first to the last tap."""
    return (taps - 1) * dilation + 1


def _slices(ow: Size, most: int, stride: int, reach: int) -> tuple[Size, Size]:
    """Slices of at most ``most`` of ``ow`` output columns, and how many input columns the widest reads."""
    slices = maximum(1, ceildiv(ow, most))
    columns = maximum(1, ceildiv(ow, slices))
    return slices, add(mul(columns, stride), reach - stride)
