"""Tables that are weights as well: an embedding reads their rows from the panels that a product streams through.

Output layers are often tied to the embedding: one matrix, of which one kernel looks up rows and another multiplies by
all of it. It is stored once, in the product's panels. A row then lies scattered, a cache line for every few elements,
which costs little: few rows are read, and the product reads everything anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ...passes.graph.program import Program
from ...passes.graph.regions import body, is_region
from ..products import LINEAR
from ..registry import overloads
from ..storage import Packing, is_constant
from ..values import dtype_name
from .matmul import panel_packing
from .packing import PANEL

_LOOKUPS = frozenset(overloads("embedding"))
_DTYPES = ("float32", "bfloat16")


def tied_tables(program: Program, panel: int) -> Mapping[fx.Node, Packing]:
    """The constants that embeddings look up and linear layers multiply by, with the packing of the latter.

    Args:
        program: of regions.
        panel: columns of the panels of bfloat16.
    """
    found = {}
    for table in program.graph.nodes:
        if not is_constant(table) or len(table.meta["val"].shape) != 2:
            continue
        dtype = dtype_name(table.meta["val"].dtype)
        roles = {_role(user, table, dtype) for user in table.users}
        if dtype in _DTYPES and roles == {"lookup", "product"}:
            n, k = map(int, table.meta["val"].shape)
            width = PANEL if dtype == "float32" else panel
            found[table] = panel_packing(n, k, transposed=True, kind=dtype, panel=width)
    return found


def _role(region: fx.Node, table: fx.Node, dtype: str) -> str:
    """What a region does with a table: ``"lookup"``, ``"product"`` (with operands of the same dtype) or ``"other"``."""
    if not is_region(region, "kernel"):
        return "other"
    inner = [node for node in body(region).graph.nodes if node.op == "placeholder"]
    readers = [user for at, node in enumerate(inner) if region.args[at] is table for user in node.users]
    if all(user.target in _LOOKUPS for user in readers):
        return "lookup"
    places = [user.args[:2] for user in readers if user.target in LINEAR]
    alone = len(readers) == 1 and region.meta["region"].family == "matmul"
    if alone and places and dtype_name(places[0][0].meta["val"].dtype) == dtype and places[0][1] in inner:
        return "product"
    return "other"
