"""Operators one by one against ONNX Runtime: eager, and exported with every axis of the first input dynamic."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tilewright.compiler.frontends.onnx import load_onnx

SEED = 7


def floats(*shape, seed=SEED):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape):
    return np.abs(floats(*shape)) + np.float32(0.1)


def ints(*values, dtype=np.int64):
    return np.array(values, dtype=dtype)


@dataclass
class Case:
    """One node. ``inputs`` are fed; arrays in ``constants`` (by position) become initializers, None an absent input."""

    op: str
    inputs: list
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: dict[int, np.ndarray | None] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1
    tolerance: float = 1e-5
    fixed: bool = False  # the exported form keeps the sizes
    traced: bool = True  # whether it is exported too

    def __str__(self):
        text = ",".join(f"{key}={value}" for key, value in self.attributes.items())
        return f"{self.op}-{self.opset}({text})"

    def model(self):
        names, initializers, feeds, given = [], [], [], list(self.inputs)
        for position in range(len(given) + len(self.constants)):
            if position in self.constants:
                value = self.constants[position]
                names.append("" if value is None else f"c{position}")
                if value is not None:
                    initializers.append(numpy_helper.from_array(value, f"c{position}"))
            else:
                value = given.pop(0)
                names.append(f"x{position}")
                shape = [f"x{position}_{axis}" for axis in range(value.ndim)]
                feeds.append(
                    helper.make_tensor_value_info(f"x{position}", helper.np_dtype_to_tensor_dtype(value.dtype), shape)
                )
        results = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, results, name="the_node", **self.attributes)
        outs = [onnx.ValueInfoProto(name=name) for name in results]
        graph = helper.make_graph([node], "g", feeds, outs, initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)


X4 = floats(2, 4, 7, 9)
IMAGE = floats(1, 2, 5, 6)
ROIS = ints(0, 0, 5, 4, 1, 1, 4, 4).reshape(2, 4).astype(np.float32)

ELEMENTWISE = [
    *(
        Case(op, [floats(3, 4)], traced=False)
        for op in ("Abs", "Neg", "Exp", "Erf", "Sign", "Floor", "Ceil", "Round", "Sin", "Cos")
    ),
    *(
        Case(op, [floats(3, 4)], traced=False)
        for op in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish", "Selu")
    ),
    *(Case(op, [positive(3, 4)], traced=False) for op in ("Sqrt", "Log", "Reciprocal")),
    *(Case(op, [floats(3, 4), floats(4)]) for op in ("Add", "Sub", "Mul", "Div", "Less", "Greater", "PRelu")),
    *(
        Case(op, [floats(3, 4)], constants={1: np.array(0.75, np.float32)})
        for op in ("Add", "Sub", "Mul", "Div", "Pow", "Max")
    ),
    *(
        Case(op, [floats(3, 4)], constants={0: np.float32(2.5).reshape(1)})
        for op in ("Sub", "Div", "Greater", "Equal", "Min")
    ),
    Case("Add", [floats(4)], constants={1: np.ones((1, 1), np.float32)}),  # the constant adds an axis
    Case("Div", [ints(-7, 7, -8, 8, 9)], constants={1: ints(3)}),
    Case("Div", [ints(-7, 7, -8, 8, 9, dtype=np.int32), ints(2, -2, 3, -3, 4, dtype=np.int32)]),
    Case("Mod", [ints(-7, 7, -8, 8), ints(3, -3, 5, 5)]),
    Case("Mod", [floats(3, 4), floats(3, 4, seed=1)], {"fmod": 1}),
    Case("Pow", [floats(3, 4)], constants={1: ints(2)}),
    Case("Pow", [ints(1, 2, 3)], constants={1: np.array(2, np.float32)}),
    Case("BitShift", [ints(1, 200, 255, dtype=np.uint8), ints(1, 2, 3, dtype=np.uint8)], {"direction": "LEFT"}),
    Case("BitShift", [ints(1, 200, 255, dtype=np.uint8), ints(1, 2, 3, dtype=np.uint8)], {"direction": "RIGHT"}),
    Case("Where", [floats(3, 4) > 0, floats(3, 4), floats(4, seed=1)]),
    Case("Where", [floats(3, 4) > 0, floats(3, 4)], constants={2: np.array(-3.0e38, np.float32)}),
    Case("Max", [floats(3, 4), floats(4, seed=1), floats(1, seed=2)]),
    Case("Mean", [floats(3, 4), floats(4, seed=1), floats(1, seed=2)]),
    Case("Clip", [floats(3, 4)], {"min": -0.5, "max": 0.5}, opset=9),
    Case("Clip", [floats(3, 4)], constants={1: np.array(-0.5, np.float32), 2: np.array(0.5, np.float32)}),
    Case("Clip", [floats(3, 4)], constants={1: None, 2: np.array(0.5, np.float32)}),
    Case("Clip", [floats(3, 4), np.array(0.2, np.float32), np.array(-0.2, np.float32)]),  # the upper bound wins
    Case("IsInf", [np.array([np.inf, -np.inf, np.nan, 1], np.float32)], {"detect_negative": 0}),
    Case("HardSigmoid", [floats(3, 4)], {"alpha": 0.3, "beta": 0.4}),
    Case("HardSigmoid", [floats(3, 4)], {"alpha": 1 / 6}),
    Case("LeakyRelu", [floats(3, 4)], {"alpha": 0.3}),
    Case("Elu", [floats(3, 4)], {"alpha": 0.7}),
    Case("Celu", [floats(3, 4)], {"alpha": 0.7}),
    Case("ThresholdedRelu", [floats(3, 4)], {"alpha": 0.3}),
    Case("Shrink", [floats(3, 4)], {"lambd": 0.4, "bias": 0.1}),
    Case("Gelu", [floats(3, 4)], opset=20),
    Case("Gelu", [floats(3, 4)], {"approximate": "tanh"}, opset=20),
    Case("CumSum", [floats(3, 4)], {"reverse": 1, "exclusive": 1}, {1: ints(1).reshape(())}),
    Case("Cast", [np.array([-1.7, 1.7, 0.2], np.float32)], {"to": TensorProto.INT64}),
    Case("Cast", [np.array([-1.7, 0, 0.2], np.float32)], {"to": TensorProto.BOOL}),
    Case("Cast", [floats(5)], {"to": TensorProto.FLOAT16}),
    Case("Dropout", [floats(3, 4)], outputs=2),
]
SOFTMAXES = [
    *(
        Case(op, [floats(2, 3, 4)], {"axis": axis}, opset=opset)
        for op in ("Softmax", "LogSoftmax", "Hardmax")
        for axis, opset in ((0, 13), (-1, 13), (0, 11), (1, 11), (2, 11))
    ),
    Case("Softmax", [floats(2, 3, 4)], opset=11),
    Case("Softmax", [floats(2, 3, 4)]),
]
REDUCTIONS = [
    *(
        Case(f"Reduce{kind}", [positive(2, 3, 4)], {"axes": [1, -1], "keepdims": 0}, opset=11)
        for kind in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    ),
    *(
        Case(f"Reduce{kind}", [positive(2, 3, 4)], {}, {1: ints(0, 2)}, opset=18)
        for kind in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    ),
    Case("ReduceSum", [floats(2, 3, 4)], {"keepdims": 0}),
    Case("ReduceSum", [floats(2, 3, 4)], {"noop_with_empty_axes": 1}, {1: np.zeros(0, np.int64)}),
    Case("ReduceMean", [ints(3, -4, 2, 0).reshape(2, 2).astype(np.int32)], {"axes": [1]}, opset=13),
    Case("ArgMax", [np.array([[1, 3, 3], [2, 2, 0]], np.float32)], {"axis": 1, "select_last_index": 1}),
    Case("ArgMax", [np.array([[1, 3, 3], [2, 2, 0]], np.float32)], {"axis": 1}),
    Case("ArgMin", [floats(3, 4)], {"axis": 0, "keepdims": 0}),
    Case("TopK", [floats(3, 6)], {"axis": 1}, {1: ints(2)}, outputs=2, fixed=True),
    Case("TopK", [ints(3, 1, 3, 1, 2).reshape(1, 5)], {"largest": 0}, {1: ints(3)}, outputs=2, fixed=True),
]
SHAPES = [
    Case("Reshape", [floats(2, 3, 4)], constants={1: ints(0, -1)}),
    Case("Reshape", [floats(0, 3)], {"allowzero": 1}, {1: ints(3, 0)}, fixed=True),
    Case("Flatten", [floats(2, 3, 4)], {"axis": 2}),
    Case("Flatten", [floats(2, 3, 4)], {"axis": 0}),
    Case("Squeeze", [floats(1, 3, 1)], fixed=True),
    Case("Squeeze", [floats(1, 3, 1)], {"axes": [0, -1]}, opset=11, fixed=True),
    Case("Squeeze", [floats(3, 1)], constants={1: ints(-1)}, fixed=True),
    Case("Unsqueeze", [floats(3, 4)], {"axes": [0, -1]}, opset=11),
    Case("Unsqueeze", [floats(3, 4)], constants={1: ints(3, 1)}),
    Case("Transpose", [floats(2, 3, 4)]),
    Case("Transpose", [floats(2, 3, 4)], {"perm": [1, 0, 2]}),
    Case("Expand", [floats(3, 1)], constants={1: ints(2, 1, 4)}, fixed=True),
    Case("Expand", [floats(3, 4)], constants={1: ints(1, 1)}),
    Case("Tile", [floats(2, 3)], constants={1: ints(2, 3)}),
    Case("Concat", [floats(2, 3), floats(2, 4)], {"axis": -1}),
    Case("Split", [floats(6, 4)], {"axis": 0, "split": [1, 5]}, opset=11, outputs=2, fixed=True),
    Case("Split", [floats(4, 7)], {"axis": 1}, {1: ints(3, 4)}, outputs=2),
    Case("Split", [floats(4, 6)], {"axis": 1}, outputs=3),
    Case("Split", [floats(4, 7)], {"axis": 1, "num_outputs": 3}, opset=18, outputs=3, fixed=True),
    Case("Shape", [floats(2, 3, 4)]),
    Case("Shape", [floats(2, 3, 4)], {"start": -2, "end": 9}),
    Case("Size", [floats(2, 3, 4)]),
    Case("DepthToSpace", [floats(2, 8, 3, 2)], {"blocksize": 2}),
    Case("DepthToSpace", [floats(2, 8, 3, 2)], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [floats(2, 3, 4, 6)], {"blocksize": 2}, fixed=True),
]
INDEXING = [
    Case("Gather", [floats(5, 3), ints(0, -1, 2).reshape(1, 3)]),
    Case("Gather", [floats(4, 5, 3)], {"axis": 1}, {1: ints(-2).reshape(())}),
    Case("Gather", [floats(4, 5, 3)], {"axis": 1}, {1: ints(3)}),
    Case("Gather", [floats(4, 5, 3)], {"axis": -1}, {1: ints(2, 0, dtype=np.int32)}),
    Case("GatherElements", [floats(3, 4), ints(0, -1, 2, 1).reshape(1, 4)], {"axis": 0}),
    Case("GatherND", [floats(3, 4, 5), ints(0, 1, 2, -1).reshape(2, 2)]),
    Case("GatherND", [floats(2, 4, 5), ints(1, 0).reshape(2, 1)], {"batch_dims": 1}),
    Case("ScatterElements", [floats(3, 4), ints(0, -1, 2, 1).reshape(1, 4), floats(1, 4, seed=1)]),
    Case(
        "ScatterElements",
        [floats(3, 4), ints(0, 0).reshape(2, 1), floats(2, 1)],
        {"axis": 1, "reduction": "add"},
        opset=16,
    ),
    Case("ScatterND", [floats(4, 5), ints(0, 2).reshape(2, 1), floats(2, 5, seed=1)]),
    Case(
        "ScatterND", [floats(4, 5), ints(1, 1, 1, 1).reshape(2, 2), floats(2, seed=1)], {"reduction": "add"}, opset=16
    ),
    Case("ScatterND", [floats(4, 5), ints(1, 3).reshape(2, 1), floats(2, 5, seed=1)], {"reduction": "max"}, opset=18),
    Case("Slice", [floats(5, 6)], {"starts": [1, -3], "ends": [4, 99], "axes": [0, 1]}, opset=9),
    Case("Slice", [floats(5, 6)], constants={1: ints(-1), 2: ints(-(2**63)), 3: ints(1), 4: ints(-2)}),
    Case("Slice", [floats(5, 6)], constants={1: ints(4, 0), 2: ints(1, 6), 3: ints(0, 1), 4: ints(-1, 4)}),
    Case("Slice", [floats(5, 6)], constants={1: ints(2), 2: ints(-1), 3: ints(-1)}),
    Case("Slice", [floats(5, 6)], constants={1: ints(9), 2: ints(12), 3: ints(0)}, fixed=True),
    Case("Pad", [floats(3, 4)], {"pads": [0, 1, 2, 0], "value": 1.5}, opset=10),
    Case("Pad", [floats(3, 4)], constants={1: ints(0, 1, 2, -1), 2: np.array(-1, np.float32)}),
    *(Case("Pad", [floats(3, 4)], {"mode": mode}, {1: ints(2, 1, 1, 2)}) for mode in ("reflect", "edge")),
    Case("Pad", [floats(3, 4)], {"mode": "wrap"}, {1: ints(2, 1, 1, 2)}, opset=19),
    Case("Pad", [floats(3, 4)], constants={1: ints(1, 2), 2: None, 3: ints(-1)}, opset=18),
    Case("Trilu", [floats(4, 5)], {"upper": 0}, {1: ints(1).reshape(())}),
    Case("Trilu", [floats(2, 4, 5)]),
    Case("OneHot", [ints(0, -1, 2), np.array([-1, 4], np.float32)], {"axis": 0}, {1: ints(3)}),
    Case("EyeLike", [floats(3, 4)], {"k": 1, "dtype": TensorProto.INT64}),
    Case("ReverseSequence", [floats(4, 2, 3), ints(3, 1)]),
    Case("ConstantOfShape", [], {"value": helper.make_tensor("v", TensorProto.FLOAT, [1], [2.5])}, {0: ints(2, 3)}),
    Case("Range", [], {}, {0: ints(2).reshape(()), 1: ints(11).reshape(()), 2: ints(3).reshape(())}),
]
PRODUCTS = [
    Case("MatMul", [floats(2, 3, 4), floats(4, 5)]),
    Case("MatMul", [floats(4), floats(2, 4, 5)]),
    *(
        Case(
            "Gemm",
            [floats(4, 3) if a else floats(3, 4), floats(5, 4) if b else floats(4, 5), c],
            {"transA": a, "transB": b, "alpha": alpha, "beta": beta},
        )
        for a, b, alpha, beta, c in (
            (0, 1, 1.0, 1.0, floats(5)),
            (0, 0, 1.0, 1.0, floats(5)),
            (1, 1, 0.5, 2.0, floats(3, 1)),
            (1, 0, 1.0, 0.5, floats(5)),
        )
    ),
    Case("Gemm", [floats(3, 4), floats(5, 4)], {"transB": 1}),
    Case("Gemm", [floats(3, 4)], {"transB": 1}, {1: floats(1, 4), 2: floats(1)}),
    Case("Einsum", [floats(2, 3, 4), floats(2, 4, 5)], {"equation": "b i j, b j k -> b i k"}),
]
CONVOLUTIONS = [
    Case("Conv", [floats(2, 4, 9)], {"pads": [1, 2]}, {1: floats(3, 4, 3), 2: floats(3)}),
    Case("Conv", [X4], {"strides": [2, 2], "pads": [1, 1, 1, 1], "group": 2}, {1: floats(6, 2, 3, 3)}),
    Case("Conv", [X4], {"strides": [2, 1], "auto_pad": "SAME_UPPER"}, {1: floats(3, 4, 3, 2)}),
    Case("Conv", [X4], {"strides": [2, 3], "auto_pad": "SAME_LOWER"}, {1: floats(3, 4, 3, 2)}),
    Case("Conv", [X4], {"auto_pad": "VALID"}, {1: floats(3, 4, 3, 3)}),
    Case("Conv", [floats(1, 2, 4, 5, 6)], {"pads": [0, 1, 0, 1, 1, 0]}, {1: floats(3, 2, 2, 2, 2)}),
    Case("ConvTranspose", [X4], {"strides": [2, 2]}, {1: floats(4, 3, 2, 2), 2: floats(3)}),
    Case(
        "ConvTranspose",
        [X4],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {1: floats(4, 3, 3, 3)},
    ),
    Case(
        "ConvTranspose",
        [X4],
        {"strides": [2, 1], "pads": [0, 1, 1, 0], "group": 2},
        {1: floats(4, 3, 3, 2), 2: floats(6)},
    ),
    Case("ConvTranspose", [X4], {"strides": [3, 2], "auto_pad": "SAME_UPPER"}, {1: floats(4, 3, 3, 3)}),
    Case("ConvTranspose", [floats(1, 2, 5)], {"strides": [2], "dilations": [2]}, {1: floats(2, 3, 3)}),
]
POOLS = [
    Case("MaxPool", [X4], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", [X4], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    Case("MaxPool", [X4], {"kernel_shape": [2, 2], "dilations": [2, 3]}),
    Case("MaxPool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("MaxPool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0]}, outputs=2, fixed=True),
    Case("MaxPool", [floats(2, 3, 9)], {"kernel_shape": [3]}),
    Case("AveragePool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case(
        "AveragePool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}
    ),
    Case("AveragePool", [X4], {"kernel_shape": [3, 2], "pads": [1, 0, 0, 1]}),
    Case("AveragePool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, opset=19),
    Case("AveragePool", [X4], {"kernel_shape": [2, 2], "dilations": [2, 2]}, opset=19),
    Case("AveragePool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("LpPool", [X4], {"kernel_shape": [3, 3], "strides": [2, 2], "p": 3}, opset=18),
    Case("GlobalAveragePool", [X4]),
    Case("GlobalMaxPool", [X4]),
]
NORMS = [
    Case("BatchNormalization", [X4], {"epsilon": 1e-3}, {1: floats(4), 2: floats(4), 3: floats(4), 4: positive(4)}),
    Case("InstanceNormalization", [X4], {"epsilon": 1e-3}, {1: floats(4), 2: floats(4, seed=1)}),
    Case("GroupNormalization", [X4], {"num_groups": 2}, {1: floats(4), 2: floats(4, seed=1)}, opset=21),
    Case("LayerNormalization", [X4], {"axis": -1}, {1: floats(9), 2: floats(9, seed=1)}),
    Case("LayerNormalization", [floats(2, 3, 4)], {"axis": 1}, {1: floats(3, 4)}, outputs=3, fixed=True),
    Case("RMSNormalization", [X4], {"epsilon": 1e-3}, {1: floats(9)}, opset=23),
    Case("LpNormalization", [floats(3, 4)], {"axis": 0, "p": 1}),
    Case("LpNormalization", [floats(3, 4)]),
    Case("MeanVarianceNormalization", [X4]),
    *(Case("LRN", [X4], {"size": size, "alpha": 0.1, "beta": 0.5, "bias": 2.0}) for size in (3, 5)),
]
RESIZES = [
    *(
        Case(
            "Resize",
            [IMAGE],
            {"coordinate_transformation_mode": mode, "nearest_mode": nearest},
            {1: None, 2: np.array([1, 1, *scales], np.float32)},
            traced=False,
        )
        for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for nearest in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        for scales in ((2, 3), (0.6, 1.7))
    ),
    *(
        Case(
            "Resize",
            [IMAGE],
            {"mode": kind, "coordinate_transformation_mode": mode},
            {1: None, 2: np.array([1, 1, *scales], np.float32)},
            fixed=True,
        )
        for kind in ("linear", "cubic")
        for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for scales in ((2, 2), (0.6, 1.7))
    ),
    Case("Resize", [IMAGE], {"mode": "linear"}, {1: None, 2: None, 3: ints(1, 2, 8, 3)}, fixed=True),
    Case(
        "Resize",
        [IMAGE],
        {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
        {1: None, 2: None, 3: ints(1, 2, 8, 9)},
        fixed=True,
    ),
    Case(
        "Resize",
        [IMAGE],
        {"mode": "linear", "antialias": 1, "exclude_outside": 1},
        {1: None, 2: np.array([1, 1, 0.5, 0.5], np.float32)},
        opset=18,
        fixed=True,
    ),
    Case(
        "Resize",
        [IMAGE],
        {"axes": [3, 2], "mode": "linear"},
        {1: None, 2: np.array([2, 3], np.float32)},
        opset=18,
        fixed=True,
    ),
    Case("Resize", [IMAGE], {}, {1: np.array([1, 1, 2, 2], np.float32)}, opset=10),
    Case("Upsample", [IMAGE], {"mode": "linear"}, {1: np.array([1, 1, 2, 2], np.float32)}, opset=9, fixed=True),
    Case(
        "Resize",
        [IMAGE],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {1: None, 2: np.array([1, 1, 2, 2], np.float32)},
    ),  # dynamic height and width
    *(
        Case(
            "GridSample",
            [IMAGE, np.tanh(floats(1, 3, 4, 2))],
            {"mode": mode, "padding_mode": padding, "align_corners": corners},
        )
        for mode, padding, corners in (("bilinear", "zeros", 0), ("nearest", "border", 1), ("bicubic", "reflection", 0))
    ),
    Case(
        "RoiAlign",
        [floats(2, 3, 8, 8), ROIS, ints(0, 1)],
        {"output_height": 2, "output_width": 3, "sampling_ratio": 2, "spatial_scale": 0.9},
        fixed=True,
    ),
]
QUANTIZED = [
    Case("QuantizeLinear", [floats(3, 4)], {}, {1: np.array(0.02, np.float32), 2: np.array(120, np.uint8)}),
    Case("QuantizeLinear", [floats(3, 4)], {"axis": 0}, {1: positive(3), 2: ints(1, 0, -3, dtype=np.int8)}, fixed=True),
    Case(
        "DequantizeLinear",
        [ints(0, 100, 255, dtype=np.uint8)],
        {},
        {1: np.array(0.02, np.float32), 2: np.array(120, np.uint8)},
    ),
    Case("DequantizeLinear", [ints(-128, 0, 127, 5, dtype=np.int8).reshape(2, 2)], {"axis": 1}, {1: positive(2)}),
    Case("DynamicQuantizeLinear", [floats(3, 4)], outputs=3),
    Case(
        "MatMulInteger",
        [ints(1, 255, 3, 4, dtype=np.uint8).reshape(2, 2)],
        {},
        {1: ints(5, 6, 7, 8, dtype=np.uint8).reshape(2, 2), 2: np.array(12, np.uint8)},
    ),
]


def _recurrent(op, gates, biases, direction, **attributes):
    count = 2 if direction == "bidirectional" else 1
    weights = [floats(count, gates * 3, 4), floats(count, gates * 3, 3, seed=1), floats(count, biases * 3, seed=2)]
    outputs = 3 if op == "LSTM" else 2
    attributes |= {"hidden_size": 3, "direction": direction}
    return Case(op, [floats(5, 2, 4)], attributes, dict(enumerate(weights, 1)), outputs=outputs, fixed=True)


RECURRENT = [
    *(_recurrent("LSTM", 4, 8, direction) for direction in ("forward", "reverse", "bidirectional")),
    _recurrent("GRU", 3, 6, "bidirectional"),
    _recurrent("GRU", 3, 6, "forward", linear_before_reset=1),
    _recurrent("RNN", 1, 2, "forward", activations=["Relu"]),
]
ATTENTION = [
    Case("Attention", [floats(2, 4, 3, 8), floats(2, 4, 5, 8), floats(2, 4, 5, 8, seed=1)], opset=23),
    Case(
        "Attention",
        [floats(2, 3, 32), floats(2, 3, 16), floats(2, 3, 16, seed=1)],
        {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1},
        opset=23,
    ),
    Case(
        "Attention", [floats(2, 4, 3, 8), floats(2, 4, 5, 8), floats(2, 4, 5, 8, seed=1), floats(3, 5) > -1], opset=23
    ),
    Case(
        "RotaryEmbedding",
        [floats(2, 4, 3, 8), floats(10, 4), floats(10, 4, seed=1), ints(0, 1, 2, 3, 4, 5).reshape(2, 3)],
        opset=23,
    ),
    Case(
        "RotaryEmbedding",
        [floats(2, 3, 32), floats(10, 4), floats(10, 4, seed=1), ints(0, 1, 2, 3, 4, 5).reshape(2, 3)],
        {"num_heads": 4, "interleaved": 1},
        opset=23,
    ),
]
CASES = [*ELEMENTWISE, *SOFTMAXES, *REDUCTIONS, *SHAPES, *INDEXING, *PRODUCTS, *CONVOLUTIONS, *POOLS, *NORMS, *RESIZES]
CASES += [*QUANTIZED, *RECURRENT, *ATTENTION]

_alike = set()
for _case in CASES:  # of cases that differ in numbers only, one is exported
    _key = (_case.op, _case.opset, *sorted(_case.attributes), *_case.constants)
    _case.traced = _case.traced and _key not in _alike
    _alike.add(_key)


def check(reference, output, case):
    assert output.shape == reference.shape, f"{output.shape} instead of {reference.shape}"
    assert output.dtype == reference.dtype, f"{output.dtype} instead of {reference.dtype}"
    if reference.dtype.kind in "fc":
        scale = max(1.0, np.abs(reference[np.isfinite(reference)]).max(initial=0.0))
        np.testing.assert_allclose(output, reference, rtol=0, atol=case.tolerance * scale)
    else:
        np.testing.assert_array_equal(output, reference)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_onnxruntime(case, tmp_path):
    print(f"seed {SEED}")
    path = tmp_path / "m.onnx"
    onnx.save(case.model(), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    module = load_onnx(path)
    references = session.run(None, dict(zip(module.input_names, case.inputs, strict=True)))
    inputs = tuple(torch.from_numpy(array.copy()) for array in case.inputs)
    with torch.no_grad():
        outputs = module(*inputs)
        for reference, output in zip(references, outputs.values(), strict=True):
            check(reference, output.numpy(), case)
        if not inputs or not case.traced:
            return
        dims = [None] * len(inputs)
        if not case.fixed:
            dims[0] = dict.fromkeys(range(inputs[0].dim()), torch.export.Dim.AUTO)
        exported = torch.export.export(module, inputs, dynamic_shapes=(tuple(dims),), strict=False).module()
        for reference, output in zip(references, exported(*inputs).values(), strict=True):
            check(reference, output.numpy(), case)
