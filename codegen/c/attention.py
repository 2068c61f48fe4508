"""The attention family: scaled dot-product attention through ``attention.c.jinja``.

Queries, keys and values are read in place through their views (a head of a fused projection is a run of contiguous
elements), or gathered where a view takes a row apart; the mask is computed in the kernel. The result may be stored
permuted, which is how the heads are merged again without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.sizes import Size
from ..anchors import affine_rows, find_anchor
from ..heads import TARGETS, Heads, heads_of
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from ..templating import Hole
from ..values import Value
from .anchors import Anchored, c_size
from .attention_blocks import attention_units, blocks
from .dialect import literal
from .dialect import size as c_text

__all__ = ["TARGETS", "attention_family"]


def attention_family(task: Task) -> Sequence[Made]:
    """``softmax(scale * q k^T + mask) v``, then perhaps a permutation."""
    frame = Frame(task)
    return [Made(_build(Anchored(task, find_anchor(task, TARGETS), frame)), frame.storages)]


def _build(work: Anchored) -> KernelCode:
    kernel, found = work.kernel, heads_of(work)
    for name, extent in (
        ("b", found.batch), ("h", found.heads), ("hk", found.key_heads), ("i", found.queries), ("j", found.keys),
        ("d", max(found.d, found.dv)),
    ):  # fmt: skip
        kernel.variable(name, extent)
    key_row = (*found.key_outer, "j")
    bf16 = all(value.dtype == "bfloat16" for value in (found.query, found.key, found.value))
    sizing = blocks(found.d, found.dv, bf16=bf16)
    # The last row of one head and the first of the next see very different keys under a causal mask.
    together = 1 if found.causal else found.group
    return work.code(
        "attention.c.jinja",
        family="attention",
        units=attention_units(found.batch, found.heads, found.queries, sizing, together),
        flops=sizes.mul(found.batch, found.heads, found.queries, found.keys, 2 * (found.d + found.dv)),
        B=c_size(found.batch),
        HEADS=c_size(found.heads),
        GROUP=c_size(found.group),
        TOGETHER=c_size(together),
        SQ=c_size(found.queries),
        SK=c_size(found.keys),
        D=found.d,
        DV=found.dv,
        rows=sizing.rows,
        keys=sizing.keys,
        bf16=bf16,
        scale=literal(found.scale, "float32"),
        scaled=found.mask is not None or found.scale <= 0,
        causal=found.causal,
        q=_rows(work, found.query, (*found.outer, "i"), "h", bf16=bf16),
        k=_rows(work, found.key, key_row, "hk", bf16=bf16),
        v=_rows(work, found.value, key_row, "hk", bf16=bf16, pairs=False),
        mask=None if found.mask is None else _mask(work, found),
        store=_store(work, found),
    )


@dataclass(frozen=True)
class Rows:
    """How the template gets a row of queries, keys or values: its address, or a hole that defines ``element``."""

    address: str = ""
    gather: Hole | None = None


def _rows(work: Anchored, value: Value, index: tuple[Size, ...], head: str, *, bf16: bool, pairs: bool = True) -> Rows:
    """Rows in place where the head dimension lies contiguous in memory, else gathered through the index function.

    With ``bf16`` they are rows of bfloat16; ``pairs``: read as words of two, so that their number must be even.
    """
    row, length = str(index[-1]), value.shape[-1]
    found = affine_rows(value.at((*index, "d")), row, "d")
    fits = found is not None and work.kernel.storage[found[0]] == ("bfloat16" if bf16 else "float32")
    if found is None or not fits or (bf16 and pairs and isinstance(length, int) and length % 2):
        return Rows(gather=work.read(value, (*index, "d"), ("b", head, row), "d", "element"))
    buffer, start, stride = found
    return Rows(f"{buffer} + {c_text(sizes.add(start, sizes.mul(row, stride)))}")


def _mask(work: Anchored, found: Heads) -> Hole:
    """What changes ``score``."""
    outside, inside = work.scopes(("b", "h", "i"), "j")
    inside.variables |= {"score"}
    inside.lines.append(f"score = {inside.value(found.masked('i', 'j'))};")
    return Hole("\n".join(outside.lines), "\n".join(inside.lines))


def _store(work: Anchored, found: Heads) -> Hole:
    """The store of an element, where the views after the anchor put it."""
    outside, inside = work.scopes(("b", "h", "i"), "d")
    name, offset = found.result_offset("d")
    inside.store(name, offset, work.kernel.builder.scalar("acc", "float32"))
    return Hole("\n".join(outside.lines), "\n".join(inside.lines))
