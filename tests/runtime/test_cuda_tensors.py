"""Tensors of other libraries on a GPU, in and out, with a driver that is faked: protocols, streams, refusals."""

from __future__ import annotations

import ctypes
import gc
import operator
import sys

import numpy as np
import pytest

import tilewright
from tilewright.runtime.cuda.results import DeviceArray
from tilewright.runtime.errors import InputError, ShapeError, UsageError


class Tensor:
    """A tensor of another library's, in the fake machine's memory."""

    def __init__(self, machine, array: np.ndarray, *, offset=0, ordinal=0, strides=None, stream=None) -> None:
        self.machine, self.ordinal, self.strides, self.stream = machine, ordinal, strides, stream
        self.shape, self.dtype = array.shape, array.dtype
        self.base = int(machine._allocate(array.nbytes + offset + 16, "other"))
        self.address = self.base + offset
        ctypes.memmove(self.address, array.tobytes(), array.nbytes)
        self.asked: list[object] = []
        self.read_only = False

    def array(self) -> np.ndarray:
        count = int(np.prod(self.shape)) * self.dtype.itemsize
        data = (ctypes.c_uint8 * count).from_address(self.address)
        return np.frombuffer(bytes(data), self.dtype).reshape(self.shape)

    def free(self) -> None:
        del self.machine.allocated[self.base]


class DLPackTensor(Tensor):
    def __dlpack_device__(self):
        return 2, self.ordinal

    def __dlpack__(self, *, stream=None):
        self.asked.append(stream)
        if self.ordinal == 9:
            raise BufferError("it requires a gradient")
        source = np.empty(self.shape, self.dtype)
        capsule = source.__dlpack__()
        header = _header(capsule)
        header.data, header.device_type, header.device_id = self.address, 2, self.ordinal
        if self.strides:
            for axis, step in enumerate(self.strides):
                header.strides[axis] = step
        return capsule


class InterfaceTensor(Tensor):
    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, self.read_only), "version": 3,
            "strides": self.strides, "stream": self.stream,
        }  # fmt: skip


def _header(capsule):
    from tilewright.runtime import dlpack

    return dlpack.DLTensor.from_address(dlpack.get_pointer(capsule, b"dltensor"))


def content(machine, exported) -> np.ndarray:
    """What a consumer of DLPack sees in an array on the device, in the stream that it asked with."""
    from tilewright.runtime import dlpack

    header = _header(exported)
    assert header.device_type == 2
    shape = tuple(header.shape[: header.ndim])
    dtype = dlpack.dtype_of(header)
    return sys.modules["tilewright_tests_cuda_toy"].view(header.data, dtype, *shape).copy()


@pytest.fixture(params=[DLPackTensor, InterfaceTensor])
def kind(request):
    return request.param


@pytest.fixture
def tensors(machine):
    """Makes tensors, and frees them at the end."""
    made = []

    def make(kind, array, **options):
        made.append(kind(machine, array, **options))
        return made[-1]

    yield make
    machine._drain_all()
    for tensor in made:
        tensor.free()


@pytest.fixture
def model(gpu_toy, machine):
    with tilewright.load(gpu_toy, device="cuda:0") as loaded:
        yield loaded


def inputs(n):
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, 8)).astype(np.float32), rng.integers(0, 10, n)


def test_device_in_device_out(model, machine, tensors, kind, toy_reference):
    for run in range(4):
        x, idx = inputs(5 + run // 2)
        first, second = tensors(kind, x), tensors(kind, idx)
        copies = machine.calls["cuMemcpyHtoDAsync"]
        y = model(first, second)
        assert machine.calls["cuMemcpyHtoDAsync"] == copies
        assert isinstance(y, DeviceArray) and (y.shape, y.dtype.name, y.nbytes) == (
            x.shape[:1] + (4,),
            "float32",
            16 * len(x),
        )
        assert repr(y) == f"<float32[{len(x)}, 4] on cuda:0>"
        rows, lookup = machine.launched[-2:]
        assert (rows.arguments[0], lookup.arguments[2], lookup.arguments[3]) == (
            first.address,
            second.address,
            y.address,
        )
        np.testing.assert_allclose(y.numpy(), toy_reference(x, idx), rtol=1e-6)
        np.testing.assert_allclose(np.asarray(y), toy_reference(x, idx), rtol=1e-6)
        np.testing.assert_allclose(content(machine, y.__dlpack__()), toy_reference(x, idx), rtol=1e-6)


def test_mixed_inputs(model, machine, tensors, kind, toy_reference):
    x, idx = inputs(5)
    y = model(x, tensors(kind, idx))
    assert isinstance(y, DeviceArray)
    np.testing.assert_allclose(y.numpy(), toy_reference(x, idx), rtol=1e-6)


def test_out_on_the_device(model, machine, tensors, kind, toy_reference):
    for n in (5, 5, 5, 1):
        x, idx = inputs(n)
        y = tensors(kind, np.zeros((n, 4), np.float32))
        assert model(x, idx, out=y) is y
        np.testing.assert_allclose(y.array(), toy_reference(x, idx), rtol=1e-6)
        host = np.empty((n, 4), np.float32)
        assert model(tensors(kind, x), idx, out=[host]) is host
        np.testing.assert_allclose(host, toy_reference(x, idx), rtol=1e-6)


def test_results_given_twice(model, machine, tensors):
    x = tensors(DLPackTensor, np.zeros(5, np.float32))
    first, second = model.entry("chain")(x)
    assert first.address != second.address
    np.testing.assert_array_equal(first.numpy(), second.numpy())
    np.testing.assert_array_equal(second.numpy(), [5] * 5)


def test_torch_takes_results(model, machine, tensors):
    """The capsule as a real consumer sees it; on the CPU, as far as that goes."""
    torch = pytest.importorskip("torch")
    x = tensors(DLPackTensor, np.zeros(5, np.float32))
    y = model.entry("chain")(x)[0]
    machine.streams[7] = machine.streams[0].__class__()  # that torch works in
    capsule = y.__dlpack__(stream=7)
    header = _header(capsule)
    header.device_type = 1  # as if it were host memory, which in the fake it is
    del y
    tensor = torch.utils.dlpack.from_dlpack(capsule)
    del capsule
    gc.collect()
    machine._drain_all()
    held = len(machine.allocated)
    assert tensor.tolist() == [5] * 5
    del tensor
    gc.collect()
    machine._drain_all()
    assert len(machine.allocated) == held - 1
    del machine.streams[7]


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16", "bool", "uint8", "int8", "int64"])
def test_every_dtype_is_exported(model, machine, tensors, name, shape):
    from tilewright.runtime import dlpack

    other = model.entry("chain")(tensors(DLPackTensor, np.zeros(5, np.float32)))[0]
    y = DeviceArray(other._pool, other._stream, name, shape)
    capsule = y.__dlpack__()
    header = _header(capsule)
    assert dlpack.dtype_of(header) == y.dtype
    assert (header.data or 0, header.device_type, header.device_id) == (y.address, 2, 0)
    assert tuple(header.shape[axis] for axis in range(header.ndim)) == shape
    assert (header.bits, header.lanes, header.byte_offset) == (8 * y.dtype.itemsize, 1, 0)


def test_a_consumer_that_refuses_raises_its_own_error(model, machine, tensors):
    """The capsule then ends while an error is being raised."""
    y = model.entry("chain")(tensors(DLPackTensor, np.zeros(5, np.float32)))[0]
    address = y.address
    for _ in range(2):
        with pytest.raises(TypeError, match="PyCapsule"):
            operator.index(y.__dlpack__())
    assert address in machine.allocated
    del y
    gc.collect()
    machine._drain_all()
    assert address not in machine.allocated


def test_the_pool_can_be_missing(gpu_toy, machine, tensors):
    machine.pools_supported = False
    with tilewright.load(gpu_toy, device="cuda") as model:
        y = model.entry("chain")(tensors(DLPackTensor, np.zeros(5, np.float32)))[0]
        np.testing.assert_array_equal(y.numpy(), [5] * 5)
        del y
    assert machine.calls["cuMemPoolCreate"] == 0


def test_results_outlive_the_model(gpu_toy, machine, tensors):
    with tilewright.load(gpu_toy, device="cuda") as model:
        y = model.entry("chain")(tensors(DLPackTensor, np.zeros(5, np.float32)))[0]
        capsule = y.__dlpack__()
        interface = y.__cuda_array_interface__
    del model
    gc.collect()
    assert machine.retained == 1
    np.testing.assert_array_equal(y.numpy(), [5] * 5)
    assert (interface["shape"], interface["typestr"], interface["data"]) == ((5,), "<f4", (y.address, False))
    address = y.address
    del y
    gc.collect()
    assert address in machine.allocated  # the capsule holds it
    del capsule
    gc.collect()
    machine._drain_all()
    assert machine.retained == 0 and address not in machine.allocated


def test_exports_that_cannot_be(model, machine, tensors):
    half = tensors(DLPackTensor, np.zeros(4, np.uint16))
    y = model.entry("chain")(tensors(DLPackTensor, np.zeros(5, np.float32)))[0]
    with pytest.raises(BufferError):
        y.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        y.__dlpack__(dl_device=(1, 0))
    with pytest.raises(ValueError, match="without a copy"):
        np.array(y, copy=False)
    with pytest.raises(ShapeError, match=r"input 'x': expected bfloat16\[h\*2\], got uint16\[4\]"):
        model.entry("half")(half)


def test_refusals(model, machine, tensors, kind, toy_reference):
    """One clear error each; the model stays usable."""
    x, idx = inputs(5)
    name = kind.__name__

    def refused(first, error=ShapeError, **options):
        with pytest.raises(error) as caught:
            model(first, idx, **options)
        return str(caught.value)

    machine.ordinal_of_pointers = 1
    assert refused(tensors(kind, x, ordinal=1)) == (
        f"input 'x': cannot use this {name}: it is on cuda:1, the model on cuda:0"
    )
    machine.ordinal_of_pointers = 0
    assert f"the {name} begins at an address that is no multiple of 16" in refused(tensors(kind, x, offset=8))
    steps = (1, 5) if kind is DLPackTensor else (4, 20)
    assert f"input 'x': the {name} does not lie contiguously (shape [5, 8]" in refused(tensors(kind, x, strides=steps))
    assert "expected float32[n, 8], got float64[5, 8]" in refused(tensors(kind, x.astype(np.float64)))
    assert "axis 1: expected 8, got 7" in refused(tensors(kind, x[:, :7].copy()))
    assert "out: output 'y': expected shape [5, 4], got [5, 3]" in refused(x, out=tensors(kind, x[:, :3].copy()))
    y = tensors(kind, np.zeros((5, 4), np.float32), offset=4)
    assert f"out: output 'y': the {name} begins at an address" in refused(x, out=y)
    both = tensors(kind, np.zeros(8, np.float32))
    with pytest.raises(UsageError, match="shares memory with an input"):
        model.entry("chain")(both, out=both)
    np.testing.assert_allclose(model(tensors(kind, x), idx).numpy(), toy_reference(x, idx), rtol=1e-6)


def test_what_only_one_protocol_refuses(model, machine, tensors):
    x, idx = inputs(5)
    with pytest.raises(ShapeError, match="cannot use this DLPackTensor: it is on cuda:9"):
        model(tensors(DLPackTensor, x, ordinal=9), idx)
    y = tensors(InterfaceTensor, np.zeros((5, 4), np.float32))
    y.read_only = True
    with pytest.raises(ShapeError, match="cannot use this InterfaceTensor: it is read-only"):
        model(x, idx, out=y)


def test_strides_of_single_elements_mean_nothing(model, tensors):
    x = np.ones((1, 8), np.float32)
    tensor = tensors(DLPackTensor, x, strides=(77, 1))
    assert model(tensor, np.zeros(1, np.int64)).shape == (1, 4)


def test_owners_are_asked_for_our_stream(model, machine, tensors):
    x, idx = inputs(5)
    tensor = tensors(DLPackTensor, x)
    model(tensor, idx)
    assert tensor.asked == [machine.launched[0].stream]
    machine.streams[0x66] = machine.streams[0].__class__()
    late = tensors(InterfaceTensor, np.zeros_like(x), stream=0x66)
    machine._give(0x66, lambda: ctypes.memmove(late.address, x.tobytes(), x.nbytes))  # written late, in their stream
    np.testing.assert_allclose(model(late, idx).numpy(), model(x, idx))
    del machine.streams[0x66]


# -- a stream of the caller's ------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(gpu_toy, machine):
    machine.streams[0x50] = machine.streams[0].__class__()
    with tilewright.load(gpu_toy, device="cuda", stream=0x50) as loaded:
        yield loaded
    machine._drain_all()
    del machine.streams[0x50]
    machine.streams.pop(0x51, None)


def test_calls_in_a_stream_return_before_they_are_done(streamed, machine, tensors, kind, toy_reference):
    x, idx = inputs(5)
    y = tensors(kind, np.zeros((5, 4), np.float32))
    first, second = tensors(kind, x), tensors(kind, idx)
    for _ in range(3):
        ctypes.memset(y.address, 0, 80)
        streamed(first, second, out=y)
        assert machine.launched[-1].stream == 0x50
        assert not y.array().any()
        machine._drain(0x50)
        np.testing.assert_allclose(y.array(), toy_reference(x, idx), rtol=1e-6)
    assert machine.launched[-1].graph
    assert streamed._pool.limit == 1
    result = streamed(first, second)
    np.testing.assert_allclose(content(machine, _after(machine, result)), toy_reference(x, idx), rtol=1e-6)
    np.testing.assert_allclose(streamed(x, idx), toy_reference(x, idx), rtol=1e-6)  # for the host: it waits


def _after(machine, result):
    """Export for a stream that then is waited for."""
    machine.streams[0x51] = machine.streams[0].__class__()
    capsule = result.__dlpack__(stream=0x51)
    machine._drain(0x51)
    return capsule


def test_faults_in_a_stream_come_later(streamed, machine, tensors, toy_reference):
    x, idx = inputs(5)
    bad = tensors(DLPackTensor, np.full(5, 99))
    good = tensors(DLPackTensor, idx)
    streamed(x, bad)
    with pytest.raises(InputError, match="step 1"):
        streamed.synchronize()
    streamed.synchronize()
    for _ in range(3):
        streamed(x, bad)
        machine._drain(0x50)
        with pytest.raises(InputError, match="step 1"):
            streamed(x, good)
        np.testing.assert_allclose(streamed(x, good).numpy(), toy_reference(x, idx), rtol=1e-6)
    streamed(x, bad)
    with pytest.raises(InputError, match="step 1"):
        streamed(x, idx)
    streamed.synchronize()


def test_the_default_stream(gpu_toy, machine, tensors, toy_reference):
    x, idx = inputs(4)
    tensor = tensors(DLPackTensor, x)
    with tilewright.load(gpu_toy, device="cuda", stream=0) as model:
        y = model(tensor, idx)
        assert tensor.asked == [1] and machine.launched[-1].stream == 0
        assert y.__cuda_array_interface__["stream"] == 1
        np.testing.assert_allclose(y.numpy(), toy_reference(x, idx), rtol=1e-6)
        del y


def test_page_locked_inputs_are_read_when_a_call_in_a_stream_returns(streamed, machine, tensors, toy_reference):
    """Copies from them are asynchronous, and the caller may write into them next."""
    x, idx = inputs(5)
    y, second = tensors(DLPackTensor, np.zeros((5, 4), np.float32)), tensors(DLPackTensor, idx)
    address = int(machine._allocate(x.nbytes, "host"))
    locked = np.frombuffer((ctypes.c_uint8 * x.nbytes).from_address(address), np.float32).reshape(x.shape)
    for _ in range(3):
        locked[...] = x
        streamed(locked, second, out=y)
        locked[...] = 0
        machine._drain(0x50)
        np.testing.assert_allclose(y.array(), toy_reference(x, idx), rtol=1e-6)
    del machine.allocated[address]


def test_results_are_freed_when_a_reader_is_gone(model, machine, tensors):
    y = model.entry("chain")(tensors(DLPackTensor, np.zeros(5, np.float32)))[0]
    address, others = y.address, machine.calls["cuCtxSynchronize"]
    machine.streams[0x77] = machine.streams[0].__class__()
    capsule = y.__dlpack__(stream=0x77)
    del machine.streams[0x77], capsule
    del y
    gc.collect()
    machine._drain_all()
    assert address not in machine.allocated
    assert machine.calls["cuCtxSynchronize"] == others + 1  # instead of waiting for the stream
