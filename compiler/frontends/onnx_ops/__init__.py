"""ONNX operators in torch: one file per family, registered in a table that the interpreter looks them up in."""

from . import (
    activations,
    attention,
    control,
    convolution,
    creation,
    elementwise,
    host_ops,
    indexing,
    linear,
    normalization,
    pooling,
    quantization,
    recurrent,
    reductions,
    resize,
    shapes,
)

__all__ = [
    "activations",
    "attention",
    "control",
    "convolution",
    "creation",
    "elementwise",
    "host_ops",
    "indexing",
    "linear",
    "normalization",
    "pooling",
    "quantization",
    "recurrent",
    "reductions",
    "resize",
    "shapes",
]
