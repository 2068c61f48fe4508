"""torch.export takes the models with the dimensions they declare, at sizes other than the example's.

The compiler's functional form of an export computes the same, too.
"""

import pytest
import torch

from tilewright import models
from tilewright.compiler.decompositions import functional


def dynamic_shapes(shapes) -> dict[str, dict[int, torch.export.Dim]]:
    symbols: dict[str, torch.export.Dim] = {}
    result: dict[str, dict[int, torch.export.Dim]] = {}
    for name, dims in shapes.items():
        result[name] = {}
        for axis, dim in enumerate(dims.split(",")):
            symbol, _, bounds = dim.partition(":")
            if bounds:
                low, high = map(int, bounds.split(".."))
                symbols[symbol] = torch.export.Dim(symbol, min=low, max=high)
            if symbol in symbols:
                result[name][axis] = symbols[symbol]
    return result


def resized(inputs: dict[str, torch.Tensor], shapes, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Inputs with each symbol's axes cut or tiled to a size."""
    result = {}
    for name, tensor in inputs.items():
        for axis, dim in enumerate(shapes[name].split(",")):
            symbol = dim.partition(":")[0]
            if symbol in sizes:
                index = torch.arange(sizes[symbol]) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
        result[name] = tensor
    return result


@pytest.mark.parametrize(
    "name",
    ["mlp", "digits", "gpt2_tiny", "llama_tiny", "bytelm", "resnet18", "mobilenet_v3_large", "unet", "bert_base"],
)
@torch.no_grad()
def test_exports_with_declared_dimensions(name):
    spec = models.get(name)
    module = spec.build()
    args, kwargs = spec.example()
    program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes(spec.shapes))
    exported = functional(program).module()
    inputs = dict(zip(spec.shapes, args, strict=False)) | kwargs
    for sizes in ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 31}):
        call = resized(inputs, spec.shapes, sizes)
        expected, got = module(**call), exported(*([] if kwargs else call.values()), **(call if kwargs else {}))
        for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(got), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
