"""Loading artifacts on a GPU: what is chosen, uploaded, refused, and freed when something fails."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys

import numpy as np
import pytest

import tilewright
from tilewright.codegen.artifact import ConstantData, write_artifact
from tilewright.runtime.cuda import driver, memory
from tilewright.runtime.cuda.context import Context
from tilewright.runtime.errors import ArtifactError, DeviceError, InputError, UsageError


def refused(path, kind, device="cuda", **options) -> str:
    with pytest.raises(kind) as caught:
        tilewright.load(path, device=device, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def build(gpu_parts, tmp_path):
    """Writes the toy with other parts."""
    return lambda **parts: write_artifact(tmp_path / "m.tw", **{**gpu_parts, **parts})


@pytest.fixture
def gpu_target(fake_cuda):
    toy = sys.modules["tilewright_tests_cuda_toy"]
    return lambda *args, **kwargs: toy.target(fake_cuda.image, *args, **kwargs)


def test_no_driver(gpu_toy, machine, monkeypatch):
    machine.devices = 0
    assert "this machine has no GPU that the NVIDIA driver can use" in refused(gpu_toy, UsageError)
    machine.devices = 1
    machine.fail("cuInit", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
    assert "the NVIDIA driver does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in refused(gpu_toy, UsageError)

    def missing(name):
        raise ImportError("No module named 'cuda'")

    with monkeypatch.context() as patch:
        patch.setattr(driver.importlib, "import_module", missing)
        assert "pip install 'tilewright[cuda]'" in refused(gpu_toy, UsageError)

    class NoLibrary:
        def cuInit(self, flags):
            raise RuntimeError("libcuda.so.1 not found")

    monkeypatch.setitem(sys.modules, driver.MODULE, NoLibrary())
    assert "this machine has no NVIDIA driver: libcuda.so.1 not found" in refused(gpu_toy, UsageError)


def test_the_real_bindings_without_a_driver(gpu_toy):
    pytest.importorskip("cuda.bindings.driver")
    driver.forget()
    try:
        driver.open_driver()
    except UsageError:
        assert "NVIDIA driver" in refused(gpu_toy, UsageError)
    finally:
        driver.forget()


def test_no_such_gpu(gpu_toy, machine):
    assert "there is no GPU cuda:3; this machine has cuda:0" in refused(gpu_toy, UsageError, "cuda:3")
    machine.devices = 2
    assert "this machine has cuda:0 to cuda:1" in refused(gpu_toy, UsageError, "cuda:3")


def test_a_gpu_that_reports_no_rates(gpu_toy, machine, toy_reference):
    """One that shares the host's memory."""
    known = machine.cuDeviceGetAttribute
    names = ("CLOCK_RATE", "MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH")
    silent = {getattr(machine.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}") for name in names}
    machine.cuDeviceGetAttribute = lambda kind, device: 0 if kind in silent else known(kind, device)[1]
    x, idx = np.ones((64, 8), np.float32), np.arange(64) % 10
    with tilewright.load(gpu_toy, device="cuda") as model:
        np.testing.assert_allclose(model(x, idx), toy_reference(x, idx), rtol=1e-6)


def test_no_architecture_fits(gpu_toy, machine):
    machine.capability = (8, 6)
    message = refused(gpu_toy, ArtifactError)
    assert "no kernels for Fake GPU (compute capability 8.6): the artifact has cuda:sm_90" in message
    assert "--target cuda:sm_86" in message


@pytest.mark.parametrize(
    ("capability", "chosen", "ptx"),
    [((8, 0), "sm_80", False), ((8, 6), "sm_86", False), ((8, 9), "sm_86", False), ((9, 0), "sm_90", False),
     ((10, 0), "sm_86", True), ((12, 1), "sm_86", True)],
)  # fmt: skip
def test_architectures(build, gpu_target, machine, capability, chosen, ptx):
    names = ("sm_80", "sm_86", "sm_90")
    path = build(targets=[gpu_target(name, ptx=name != "sm_90") for name in names])
    machine.capability = capability
    with tilewright.load(path, device="cuda") as model:
        assert model.target == f"cuda:{chosen}"
        assert model._device.code.ptx is ptx
        assert model.entry("chain")(np.zeros(2, np.float32))[0][0] == 5


def test_auto(build, gpu_parts, toy_parts, gpu_toy, machine):
    both = build(
        plans={"cpu": toy_parts["plans"][:3], "cuda": gpu_parts["plans"]["cuda"][:3]},
        targets=[*toy_parts["targets"], *gpu_parts["targets"]],
    )
    with tilewright.load(both) as model:
        assert model.device == "cuda:0"
    with tilewright.load(both, device="cpu") as model:
        assert model.device == "cpu"
    machine.capability = (8, 0)
    with tilewright.load(both) as model:
        assert model.device == "cpu"
    message = refused(gpu_toy, ArtifactError, "auto")
    assert "holds kernels for cuda:sm_90 only: " in message and "no kernels for Fake GPU" in message
    assert "holds no kernels for a CPU, but cuda:sm_90" in refused(gpu_toy, ArtifactError, "cpu")
    neither = build(
        plans={"cpu": toy_parts["plans"][:3], "cuda": gpu_parts["plans"]["cuda"][:3]},
        targets=[toy_parts["targets"][0], *gpu_parts["targets"]],
    )
    message = refused(neither, ArtifactError, "auto")
    assert "no target fits this processor" in message and "GPUs too, but " in message and "sm_90" in message


@pytest.mark.parametrize("file", ["binaries.json", "increment.b32.cubin", "rows.b128.cubin"])
def test_damaged_code(build, machine, file):
    path = build()
    target = path / "kernels/sm_90" / file
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    assert file in refused(path, ArtifactError)
    assert machine.calls["cuMemAlloc"] == machine.calls["cuModuleLoadData"] == 0
    assert machine.leaks() == {}


def test_code_that_the_driver_refuses(build, gpu_target, machine):
    path = build(targets=[gpu_target(**{"increment.b32.cubin": b"garbage"})])
    with tilewright.load(path, device="cuda") as model:
        with pytest.raises(ArtifactError, match="kernels/sm_90/increment.b32.cubin: the GPU's driver does not take it"):
            model.entry("chain")(np.zeros(4, np.float32))
        model.entry("half")


def test_plans_and_binaries_that_disagree(build, gpu_parts, machine):
    plans = gpu_parts["plans"]["cuda"]
    chain = plans[3]
    (step, *_) = chain.steps
    (variant,) = step.variants

    def changed(**fields):
        first = dataclasses.replace(step, variants=(dataclasses.replace(variant, **fields),))
        return build(plans={"cuda": [dataclasses.replace(chain, steps=(first, *chain.steps[1:]))]})

    assert "step 0 runs other, which cuda:sm_90 does not have" in refused(changed(kernel="other"), ArtifactError)
    assert "step 0 calls increment with other arguments" in refused(changed(sizes=()), ArtifactError)
    tile = dataclasses.replace(variant.tiles[0], name="b7")
    assert "step 0: no binary of increment fits the GPU" in refused(changed(tiles=(tile,)), ArtifactError)
    never = dataclasses.replace(variant.tiles[0], guard=0)
    expected = pytest.raises(ArtifactError, match="kernel increment: no binary of it fits the sizes")
    with tilewright.load(changed(tiles=(never,)), device="cuda") as model, expected:
        model(np.zeros(3, np.float32))


def test_too_little_memory_for_the_weights(gpu_toy, machine):
    machine.memory = 256
    message = refused(gpu_toy, DeviceError)
    assert message.startswith("cuda:0 (Fake GPU) is out of memory: ")
    assert "bytes were needed for the weights, 256 bytes of 256 bytes are free; this model holds nothing yet" in message
    assert machine.leaks() == {}


def test_too_little_memory_for_a_call(gpu_toy, machine):
    with tilewright.load(gpu_toy, device="cuda") as model:
        chain = model.entry("chain")
        chain(np.zeros(10, np.float32))
        machine.memory = 3 << 20
        for _ in range(2):
            with pytest.raises(DeviceError, match=r"3.8 MiB were needed for the arena, .* of 3.0 MiB are free; this m"):
                chain(np.zeros(10**6, np.float32))
            chain(np.zeros(20, np.float32))
        with pytest.raises(DeviceError, match=r"needed for inputs and outputs.*2.0 MiB for the arena"):
            chain(np.zeros(1 << 19, np.float32))
        np.testing.assert_array_equal(chain(np.zeros(20, np.float32))[0], [5] * 20)


def counted(gpu_toy, machine) -> dict[str, int]:
    """How often each function is called by loading, calling twice and closing."""
    run(gpu_toy)
    return dict(machine.calls)


def run(path) -> None:
    with tilewright.load(path, device="cuda") as model:
        x = np.zeros((3, 8), np.float32)
        for _ in range(2):
            model(x, np.zeros(3, np.int64))
            model.entry("count")(np.zeros(4, np.float32))


ALLOCATING = (
    "cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuMemPoolCreate", "cuMemPoolSetAttribute",
    "cuModuleLoadData", "cuModuleGetFunction", "cuMemcpyHtoDAsync", "cuMemsetD8Async", "cuMemcpyDtoDAsync",
    "cuGraphCreate", "cuGraphAddKernelNode", "cuGraphInstantiate", "cuLaunchKernelEx", "cuGraphLaunch",
    "cuEventRecord", "cuDevicePrimaryCtxRetain",
)  # fmt: skip


@pytest.mark.parametrize("function", ALLOCATING)
def test_nothing_is_left_whatever_fails(gpu_toy, machine, function):
    """Every call of every function that takes something, failing once."""
    times = counted(gpu_toy, machine).get(function, 0)
    assert times
    assert machine.leaks() == {}
    for after in range(times):
        machine.fail(function, "CUDA_ERROR_OUT_OF_MEMORY", after)
        with pytest.raises(DeviceError):
            run(gpu_toy)
        assert machine.leaks() == {}, after
    run(gpu_toy)


def test_constants_are_uploaded_in_pieces(gpu_parts, machine, tmp_path, monkeypatch):
    """Through small buffers, only what the plans use; and what lies where."""
    rng = np.random.default_rng(5)
    large = rng.integers(0, 256, 5000, np.uint8)
    constants = (ConstantData("unused", "uint8", (5000,), lambda: large), *gpu_parts["constants"])
    toy = sys.modules["tilewright_tests_cuda_toy"]
    conftest = toy.main_plan(gpu_parts["plans"]["cuda"][0])
    from tilewright.codegen.artifact import layout_constants

    places = layout_constants(constants)
    moved = [
        dataclasses.replace(
            plan,
            constants=tuple(dataclasses.replace(one, offset=places[one.key][0]) for one in plan.constants),
        )
        for plan in gpu_parts["plans"]["cuda"]
    ]
    del conftest
    path = write_artifact(tmp_path / "m.tw", **{**gpu_parts, "plans": {"cuda": moved}, "constants": constants})
    monkeypatch.setattr(memory.upload, "__defaults__", (96,))
    with tilewright.load(path, device="cuda") as model:
        loaded = model._device._loaded
        assert loaded.weights.bytes < 1000
        assert machine.calls["cuMemcpyHtoDAsync"] >= 4
        x = rng.standard_normal((7, 8)).astype(np.float32)
        for constant in moved[0].constants:
            address = loaded.weights.at(constant.offset)
            stored = toy.view(address, np.float32, *constant.shape)
            np.testing.assert_array_equal(stored, next(one for one in constants if one.key == constant.key).load())
        model(x, np.zeros(7, np.int64))


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 1000])
def test_upload(machine, count):
    data = np.random.default_rng(count).integers(0, 256, count, np.uint8)
    context = Context(0)
    held = memory.Memory(context)
    block = held.allocate(2 * count, "a test")
    memory.upload(context, [(block.address, data), (block.address + count, data[::-1].copy())], chunk=100)
    if count:
        toy = sys.modules["tilewright_tests_cuda_toy"]
        np.testing.assert_array_equal(toy.view(block.address, np.uint8, 2 * count), np.concatenate([data, data[::-1]]))
    block.free()
    block.free()
    context.close()


def child(call) -> None:
    try:
        call()
    except UsageError as error:
        os._exit(7 if "fork" in str(error) else 8)
    os._exit(9)


def test_a_forked_child_is_told(gpu_toy, machine):
    with tilewright.load(gpu_toy, device="cuda") as model, model.session() as session:
        x, idx = np.zeros((2, 8), np.float32), np.zeros(2, np.int64)
        model(x, idx)
        calls = (
            lambda: model(x, idx),
            lambda: session(x, idx),
            lambda: tilewright.load(gpu_toy, device="cuda"),
            lambda: tilewright.load(gpu_toy, device="auto"),
        )
        for call in calls[:3]:
            process = multiprocessing.get_context("fork").Process(target=child, args=(call,))
            process.start()
            process.join(30)
            assert process.exitcode == 7
        model(x, idx)


def test_streams_of_callers(gpu_toy, machine):
    class TorchLike:
        cuda_stream = 0x77

    class CupyLike:
        ptr = 0x88

    class Protocol:
        def __cuda_stream__(self):
            return 0, 0x99

    from tilewright.runtime.cuda.streams import stream_handle

    assert [stream_handle(one) for one in (TorchLike(), CupyLike(), Protocol(), 0, 5)] == [0x77, 0x88, 0x99, 0, 5]
    for wrong in ("0", 1.5, -1, True, object()):
        assert "stream: expected a handle" in refused(gpu_toy, UsageError, stream=wrong)
        assert machine.leaks() == {}


def test_faults_of_several_entry_points_do_not_mix(build, gpu_parts, machine):
    main = gpu_parts["plans"]["cuda"][0]
    again = dataclasses.replace(main, entry="again")
    with tilewright.load(build(plans={"cuda": [main, again]}), device="cuda", stream=1) as model:
        with pytest.raises(InputError, match="step 1"):
            model.entry("again")(np.zeros((1, 8), np.float32), np.array([77]))
        model(np.zeros((1, 8), np.float32), np.array([7]))
