"""The fake driver against the real bindings: every name, field and value that the runtime or the fake uses is real."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import pytest

import tilewright.runtime.cuda

FOLDER = Path(tilewright.runtime.cuda.__path__[0])


@pytest.fixture(scope="module")
def real():
    return pytest.importorskip("cuda.bindings.driver")


@pytest.fixture(scope="module")
def fake(fake_cuda):
    return fake_cuda.FakeCuda


def used() -> tuple[set[str], set[tuple[str, str]]]:
    """Functions that the runtime calls by name, and members of enumerations that it names."""
    functions, members = set(), set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = str(node.value) if isinstance(node, ast.Constant) else ""
            if text.startswith("cu") and text.isidentifier() and text[2:3].isupper():
                functions.add(text)
            if isinstance(node, ast.Attribute) and node.attr.startswith("CU_"):
                kind = node.value.attr if isinstance(node.value, ast.Attribute) else ""
                members.add((kind, node.attr))
    return functions, members


def test_functions_exist(real, fake):
    functions, _ = used()
    assert len(functions) > 35
    for name in functions:
        assert callable(getattr(real, name)), name
        assert name in vars(fake), name
    for name in vars(fake):
        if name.startswith("cu"):
            assert hasattr(real, name), name
            assert name in functions | {"cuCtxPopCurrent", "cuGetErrorString", "cuuint64_t"}, f"{name} is not used"


def test_functions_take_as_many_arguments(real, fake):
    for name in used()[0]:
        ours = list(inspect.signature(vars(fake)[name]).parameters)[1:]
        signature = getattr(real, name).__doc__.splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        depth, count = 0, bool(inside)
        for letter in inside:
            depth += (letter in "[(") - (letter in ")]")
            count += letter == "," and depth == 0
        assert len(ours) == count, signature


def test_enumerations_have_the_same_values(real, fake, fake_cuda):
    for name, kind in vars(fake_cuda).items():
        if inspect.isclass(kind) and issubclass(kind, IntEnum) and kind is not IntEnum:
            theirs = getattr(real, name)
            for member in kind:
                assert int(getattr(theirs, member.name)) == member.value, member
    for kind, member in used()[1]:
        if kind:
            assert hasattr(getattr(real, kind), member), member
            assert hasattr(getattr(fake, kind), member), member
    assert real.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION == 4
    described = (FOLDER / "context.py").read_text()
    for member in fake_cuda.CUdevice_attribute:
        short = member.name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        assert f'"{short}"' in described or member.name in "".join(path.read_text() for path in FOLDER.glob("*.py"))


def test_error_codes_exist(real):
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and str(node.value).startswith("CUDA_ERROR_"):
                assert hasattr(real.CUresult, node.value), node.value


def test_structures_have_the_same_fields(real, fake_cuda):
    def compare(ours, theirs, path):
        for name, kind in ours.FIELDS.items():
            assert hasattr(theirs, name), f"{path}.{name}"
            if inspect.isclass(kind) and issubclass(kind, fake_cuda.Struct):
                compare(kind, getattr(theirs, name), f"{path}.{name}")

    for name in (
        "CUlaunchConfig", "CUlaunchAttribute", "CUkernelNodeAttrValue", "CUDA_KERNEL_NODE_PARAMS", "CUmemPoolProps",
    ):  # fmt: skip
        compare(getattr(fake_cuda, name), getattr(real, name)(), name)


def test_what_is_assigned_is_accepted(real):
    """The bindings check types when a field is set: the same values that calls.py and results.py give."""
    import ctypes

    from tilewright.runtime.cuda.calls import Arguments

    arguments = Arguments([2**40, 7, 2**64 - 1, -1])
    pointers = (ctypes.c_void_p * 4).from_address(arguments.address)
    assert [ctypes.c_uint64.from_address(one).value for one in pointers] == [2**40, 7, 2**64 - 1, 2**64 - 1]
    node = real.CUDA_KERNEL_NODE_PARAMS()
    node.func = real.CUfunction(5)
    node.gridDimX, node.gridDimY, node.gridDimZ, node.sharedMemBytes = 2**31 - 1, 1, 1, 232448
    node.kernelParams = arguments.address
    assert int(node.kernelParams) == arguments.address and int(node.func) == 5
    config = real.CUlaunchConfig()
    config.hStream = real.CUstream(7)
    config.gridDimX, config.blockDimX, config.sharedMemBytes = 5, 128, 100
    attribute = real.CUlaunchAttribute()
    attribute.id = real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x = 2
    attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
    config.attrs, config.numAttrs = [attribute], 1
    assert config.attrs[0].value.clusterDim.x == 2 and int(config.hStream) == 7
    value = real.CUkernelNodeAttrValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = 2, 1, 1
    properties = real.CUmemPoolProps()
    properties.allocType = real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 3
    assert properties.location.id == 3
    assert int(real.cuuint64_t(2**64 - 1)) == 2**64 - 1


def test_nothing_else_of_the_runtime_imports_the_bindings():
    for path in (FOLDER.parent).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "cuda" for name in names), path


def test_they_are_imported_late_and_nothing_heavy_is(gpu_toy):
    script = f"""
import sys, tilewright
import tilewright.runtime.cuda.device, tilewright.runtime.cuda.tune, tilewright.runtime.cuda.probe
assert not any(name.split(".")[0] in ("cuda", "torch", "triton") for name in sys.modules)
try:
    tilewright.load({str(gpu_toy)!r}, device="cuda")
except tilewright.TilewrightError as error:
    print(error)
assert not {{"torch", "triton"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_arguments_are_converted(real):
    """The bindings take what the runtime gives them: without a driver, that is all that happens before the error."""
    try:
        real.cuInit(0)
    except RuntimeError:
        pass
    else:
        pytest.skip("there is a driver, which would do something with these")
    kinds, config, node = real.CUdevice_attribute, real.CUlaunchConfig(), real.CUDA_KERNEL_NODE_PARAMS()
    stream, event, function, device = real.CUstream(7), real.CUevent(8), real.CUfunction(9), real.CUdevice(0)
    most = real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    keep = real.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    cluster = real.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    ordinal = real.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    arguments = {
        "cuInit": (0,), "cuDeviceGetCount": (), "cuDeviceGet": (0,), "cuDeviceGetName": (256, device),
        "cuDeviceTotalMem": (device,), "cuDeviceGetAttribute": (kinds.CU_DEVICE_ATTRIBUTE_CLOCK_RATE, device),
        "cuDevicePrimaryCtxRetain": (device,), "cuDevicePrimaryCtxRelease": (device,),
        "cuCtxPushCurrent": (real.CUcontext(5),), "cuCtxSynchronize": (), "cuMemGetInfo": (), "cuMemAlloc": (100,),
        "cuMemFree": (2**40,), "cuMemHostAlloc": (100, 0), "cuMemFreeHost": (2**40,),
        "cuMemPoolCreate": (real.CUmemPoolProps(),), "cuMemPoolDestroy": (real.CUmemoryPool(5),),
        "cuMemPoolSetAttribute": (real.CUmemoryPool(5), keep, real.cuuint64_t(2**64 - 1)),
        "cuMemAllocFromPoolAsync": (100, real.CUmemoryPool(5), stream), "cuMemFreeAsync": (2**40, stream),
        "cuMemcpyHtoDAsync": (2**40, 2**40, 5, stream), "cuMemcpyDtoHAsync": (2**40, 2**40, 5, stream),
        "cuMemcpyDtoDAsync": (2**40, 2**40, 5, stream), "cuMemsetD8Async": (2**40, 0, 5, stream),
        "cuPointerGetAttribute": (ordinal, 2**40), "cuStreamCreate": (real.CUstream_flags.CU_STREAM_NON_BLOCKING,),
        "cuStreamDestroy": (stream,), "cuStreamSynchronize": (stream,), "cuStreamWaitEvent": (stream, event, 0),
        "cuEventCreate": (real.CUevent_flags.CU_EVENT_DISABLE_TIMING,), "cuEventDestroy": (event,),
        "cuEventRecord": (event, stream), "cuEventSynchronize": (event,), "cuEventElapsedTime": (event, event),
        "cuModuleLoadData": (b"\x7fELF",), "cuModuleGetFunction": (real.CUmodule(5), b"name"),
        "cuModuleUnload": (real.CUmodule(5),), "cuFuncSetAttribute": (function, most, 100),
        "cuLaunchKernelEx": (config, function, 2**40, 0), "cuGraphCreate": (0,),
        "cuGraphAddKernelNode": (real.CUgraph(5), [real.CUgraphNode(6)], 1, node),
        "cuGraphKernelNodeSetAttribute": (real.CUgraphNode(6), cluster, real.CUkernelNodeAttrValue()),
        "cuGraphInstantiate": (real.CUgraph(5), 0), "cuGraphLaunch": (real.CUgraphExec(5), stream),
        "cuGraphExecKernelNodeSetParams": (real.CUgraphExec(5), real.CUgraphNode(6), node),
        "cuGraphExecDestroy": (real.CUgraphExec(5),), "cuGraphDestroy": (real.CUgraph(5),),
    }  # fmt: skip
    assert used()[0] <= arguments.keys()
    for name, given in arguments.items():
        with pytest.raises(RuntimeError):  # no driver, which comes after the conversion
            getattr(real, name)(*given)
