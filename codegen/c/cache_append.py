"""The family of appends to paged caches of keys and values, through ``cache_append.c.jinja``.

Rows are read through their views and computed on the way: a slice of a fused projection, rotated. The result is the
cache itself, in the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ...passes.graph.cache_ops import CACHE_APPEND
from ...passes.graph.query import arguments
from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.sizes import Size
from ..anchors import find_anchor
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from .anchors import Anchored, c_size
from .row_pieces import row_pieces

TARGETS = frozenset((CACHE_APPEND,))
TILE = 16  # tokens of a unit
LINE = 64  # bytes of a cache line


def cache_append_family(task: Task) -> Sequence[Made]:
    """A row more in the cache for every token.

    Raises:
        CompileError: the result does not lie in the cache's memory, or sizes vary that a kernel has to know.
    """
    anchor = find_anchor(task, TARGETS)
    cache = anchor.args[0]
    assert isinstance(cache, fx.Node)
    if cache.op != "placeholder" or len(task.results) != 1 or task.storage_of(cache) is not task.results[0]:
        raise CompileError(f"{anchor}: a cache is appended to in place, so it must be a state of the model")
    frame = Frame(task, skip=[cache])
    return [Made(_build(Anchored(task, anchor, frame)), frame.storages)]


def _build(work: Anchored) -> KernelCode:
    given = arguments(work.anchor)
    (cache,) = work.frame.results()
    blocks, heads, *inner = cache.shape
    length = inner[0] if given["transposed"] else inner[1]
    rows, table = work.operand(given["rows"]), work.operand(given["table"])
    assert rows is not None and table is not None
    if not isinstance(length, int) or not isinstance(heads, int):
        raise CompileError(f"{work.anchor}: the number of key and value heads and their size must be fixed numbers")
    tokens = rows.shape[0]
    work.kernel.variable("t", tokens)
    work.kernel.variable("h", heads)
    return work.code(
        "cache_append.c.jinja",
        family="cache_append",
        units=sizes.mul(heads, sizes.ceildiv(tokens, TILE)),
        flops=0,
        bytes=sizes.mul(heads, length, _bytes_per_column(tokens, table.shape[0], cache.dtype, given["transposed"])),
        HEADS=heads,
        TOKENS=c_size(tokens),
        SEQUENCES=c_size(table.shape[0]),
        WIDTH=c_size(table.shape[1]),
        BLOCKS=c_size(blocks),
        D=length,
        tile=TILE,
        bf16=cache.dtype == "bfloat16",
        transposed=given["transposed"],
        cache=cache.name,
        rows=row_pieces(work, rows, ("t", "h")),
        **work.pointers("positions", "starts", "table"),
    )


def _bytes_per_column(tokens: Size, sequences: Size, dtype: str, transposed: object) -> Size:
    """Bytes that move for one column of one head, of all tokens.

    Where rows are transposed a token writes to a line of its own for every column, which is read before and written
    back: a step of single tokens is worth two threads from the first one on. Tokens of a prompt share lines.
    """
    item = 2 if dtype == "bfloat16" else 4
    if not transposed:
        return sizes.mul(tokens, 4 + item)
    beside = LINE // item  # tokens of a sequence in one line
    lines = sizes.minimum(tokens, sizes.add(sizes.floordiv(tokens, beside), sizes.mul(sequences, 2)))
    return sizes.add(sizes.mul(tokens, 4), sizes.mul(lines, 2 * LINE))
