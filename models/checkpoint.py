"""Save and load the trained weights that are shipped in ``models/checkpoints``."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "checkpoints"


def save(module: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and persistent buffers; floating-point ones are stored as ``dtype``, shared ones once."""
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in _distinct(module).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


@torch.no_grad()
def load(module: nn.Module, path: Path, *, trainer: str) -> nn.Module:
    """Copy stored weights into a module, in the module's own dtype, and return it in eval mode.

    Args:
        module: a module of the architecture that was saved.
        path: the safetensors file.
        trainer: the module that makes this file, named in the error if it is missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file's tensors are not the module's.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}: run python -m {trainer}")
    stored, expected = load_file(path), _distinct(module)
    wrong = sorted(
        name
        for name in stored.keys() | expected.keys()
        if name not in stored or name not in expected or stored[name].shape != expected[name].shape
    )
    if wrong:
        kind = type(module).__name__
        raise ValueError(f"{path.name} does not fit {kind} ({', '.join(wrong)}): run python -m {trainer}")
    for name, tensor in expected.items():
        tensor.copy_(stored[name])
    return module.eval()


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of one tensor."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors
