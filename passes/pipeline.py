"""THE ordered list of passes, with the reason for each place."""

from __future__ import annotations

from typing import Any

from .base import Pass
from .canonicalize import Canonicalize
from .eliminate_common_subexpressions import EliminateCommonSubexpressions
from .eliminate_dead_code import EliminateDeadCode
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_scales import FoldScales
from .fold_transposes import FoldTransposes
from .recognise_gelu import RecogniseGelu
from .recognise_layer_norm import RecogniseLayerNorm
from .recognise_rms_norm import RecogniseRmsNorm
from .recognise_rotary import RecogniseRotary


def pipeline(roles: Any) -> list[Pass]:
    """The passes from a captured program to one that lowering takes.

    Args:
        roles: what each kernel family can take in, as code generation describes it; for ``FuseOperators``.
    """
    return [
        # Numbers and masks that are computed become constants, which the canonical form then writes as numbers. Large
        # ones wait: weights are still going to change.
        FoldConstants(outline=False),
        # One way to write each thing, so that all passes below look for one form only.
        Canonicalize(),
        # Equal values are one only in canonical form. Before whatever counts users: a repeated value has one user each.
        EliminateCommonSubexpressions(),
        # The leftovers of the above, which would count as users of what they read.
        EliminateDeadCode(),
        # What was written out by hand, small things first: attention may contain rotary embeddings and norms.
        RecogniseRmsNorm(),
        RecogniseLayerNorm(),
        RecogniseGelu(),
        RecogniseRotary(),
        # Batch norms become weights before scales do, since they leave factors and terms behind where they cannot.
        FoldBatchNorm(),
        # After attention has taken its scale, which costs nothing there.
        FoldScales(),
        # Permutations cancel once the norms between them are factors and terms.
        FoldTransposes(),
        # All arithmetic on weights is done: compute small results, make regions of large ones.
        FoldConstants(),
        # What the recognised and folded leave behind.
        EliminateDeadCode(),
    ]
