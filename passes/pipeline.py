"""THE ordered list of passes, with the reason for each place."""

from __future__ import annotations

import torch

from .align_layouts import AlignLayouts
from .annotate_quantization import AnnotateQuantization
from .base import Pass
from .canonicalize import Canonicalize
from .convert_quantized import ConvertQuantized
from .eliminate_common_subexpressions import EliminateCommonSubexpressions
from .eliminate_dead_code import EliminateDeadCode
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fold_scales import FoldScales
from .fold_transposes import FoldTransposes
from .fuse_operators import FuseOperators
from .fuse_projections import FuseProjections
from .graph.quantization import Ledger, Recipe
from .graph.roles import Roles
from .narrow_floats import NarrowFloats
from .recognise_attention import RecogniseAttention
from .recognise_gelu import RecogniseGelu
from .recognise_layer_norm import RecogniseLayerNorm
from .recognise_rms_norm import RecogniseRmsNorm
from .recognise_rotary import RecogniseRotary
from .split_transposed_convolution import SplitTransposedConvolution
from .widen_floats import WidenFloats
from .write_out_attention import WriteOutAttention


def pipeline(
    roles: Roles,
    device: str = "cpu",
    precision: str = "auto",
    recipe: Recipe | None = None,
    ledger: Ledger | None = None,
) -> list[Pass]:
    """The passes from a captured program to one that lowering takes.

    Args:
        roles: what each kernel family can take in, as code generation describes it; for ``FuseOperators``.
        device: the kind of device that the program is for, ``"cpu"`` or ``"cuda"``.
        precision: what to compute in (``--precision``), or ``"own"``: in the model's types. ``"auto"`` is that on a
            GPU, and float32 on a CPU.
        recipe: which weights are quantized, and how.
        ledger: gets what was done of the recipe.
    """
    wide = precision == "fp32" or (precision == "auto" and device == "cpu")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return [
        # Before anything looks at dtypes: not every CPU computes in half precision, and float32 loses nothing.
        *([WidenFloats()] if wide else []),
        # Numbers and masks that are computed become constants, which the canonical form then writes as numbers. Large
        # ones wait: weights are still going to change.
        FoldConstants(outline=False),
        # One way to write each thing, so that all passes below look for one form only.
        Canonicalize(),
        # Equal values are one only in canonical form. Before whatever counts users: a repeated value has one user each.
        EliminateCommonSubexpressions(),
        # The leftovers of the above, which would count as users of what they read.
        EliminateDeadCode(),
        # What was written out by hand, from the inside out: norms, then rotary embeddings of what may be normalised,
        # then the attention around them.
        RecogniseRmsNorm(),
        RecogniseLayerNorm(),
        RecogniseGelu(),
        RecogniseRotary(),
        RecogniseAttention(),
        # What no kernel takes becomes products and a softmax again, which the passes below see as such.
        WriteOutAttention(),
        # Batch norms before scales: where they cannot go into a product they leave factors and terms behind.
        FoldBatchNorm(),
        # After attention has taken its scale, which costs nothing there, and before weights are joined.
        FoldScales(),
        # Once batch norms and scales are in the weights that it rearranges.
        SplitTransposedConvolution(),
        # Permutations cancel once the norms between them are factors and terms.
        FoldTransposes(),
        # Weights have their final values. Each knows its name now; joined ones have several.
        *([AnnotateQuantization(recipe, ledger)] if recipe is not None else []),
        # Nothing after this looks at single projections.
        FuseProjections(),
        # After joining, which keeps apart what is quantized differently.
        *([ConvertQuantized(ledger)] if recipe is not None else []),
        # Recognising and joining leave views of views, and the same mask or slice once per layer.
        Canonicalize(),
        EliminateCommonSubexpressions(),
        # Weights are rounded once, after all that changes them and before they are outlined.
        *([NarrowFloats(half)] if half is not None else []),
        # All arithmetic on weights is written: compute small results, make regions of large ones.
        FoldConstants(),
        EliminateDeadCode(),
        # Everything is in its final form: group it into kernels.
        FuseOperators(roles),
        # Values between kernels exist only now.
        AlignLayouts(roles),
    ]
