"""A traced program in functional ATen form, with its composite operators as they are.

That is ``ExportedProgram.run_decompositions({})``, which traces the program again, twice, and before prepares every
composite operator that PyTorch knows, about a thousand, to be kept: most of the time that capturing a model takes.
Most programs need no tracing (``functional_form.py``), and of others only the operators that a program holds need the
preparation. PyTorch has no public way to say so; where the parts that are used here are not as they were, its public
function does the same, slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch.export import ExportedProgram

from .functional_form import NeedsTracing, rewritten

try:
    from torch._export.utils import _is_preservable_cia_op, _special_op_to_preserve_cia
    from torch.export.exported_program import _decompose_exported_program
except ImportError:  # another version of PyTorch
    _KNOWN = False
else:
    _KNOWN = list(inspect.signature(_decompose_exported_program).parameters) == [
        "ep", "cia_to_decomp", "python_decomp_table", "joint_loss_index", "decompose_custom_triton_ops",
    ]  # fmt: skip


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program with operators that neither mutate nor alias; composite ones that do neither are kept."""
    if not _KNOWN:
        return exported.run_decompositions({})
    with suppress(NeedsTracing):
        return rewritten(exported, _is_preservable_cia_op)
    kept = {operator for operator in _operators(exported) if _is_preservable_cia_op(operator)}
    return _decompose_exported_program(
        exported,
        cia_to_decomp=dict.fromkeys(kept, _special_op_to_preserve_cia),
        python_decomp_table={},
        joint_loss_index=None,
        decompose_custom_triton_ops=False,
    )


def _operators(exported: ExportedProgram) -> Iterator[torch._ops.OpOverload]:
    """The operators of a program and of the graphs within it, such as those of a context without gradients."""
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    yield node.target
