"""Artifacts of each format, written once (``golden/make_format*.py``): newer runtimes must read and run them.

A failure here means that artifacts which users have would no longer load. Do not write the golden files anew: teach the
reader the old format, or raise the format version and keep reading this one.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tilewright.runtime import binaries, cpu
from tilewright.runtime.artifact import read_artifact, verify_integrity
from tilewright.runtime.errors import InputError, ShapeError
from tilewright.runtime.plan import FORMAT_VERSION, to_json
from tilewright.runtime.sizes import Op

GOLDEN = Path(__file__).parent / "golden"
FORMATS = (1, 2, 3)


@pytest.fixture(scope="module", params=FORMATS)
def folder(request):
    return GOLDEN / f"format{request.param}"


@pytest.fixture(scope="module")
def artifact(folder):
    return read_artifact(folder)


@pytest.fixture(scope="module")
def arrays(folder):
    with np.load(folder.with_suffix(".npz")) as stored:
        return dict(stored)


@pytest.fixture
def model(artifact, folder):
    target = artifact.manifest.targets[0]
    if not cpu.features().issuperset(target.features):
        pytest.skip(f"this processor does not run {target.name}")
    with tilewright.load(folder, threads=2, device="cpu") as loaded:
        yield loaded


def call(model, arrays, **changes):
    return model(**{name: arrays[name] for name in ("x", "word", "row")} | changes)


def assert_kept(stored, read, path):
    """All that is stored was read; fields that were added since have their defaults beside it."""
    if isinstance(stored, dict) and isinstance(read, dict):
        assert stored.keys() <= read.keys(), path
        for key in stored:
            assert_kept(stored[key], read[key], f"{path}.{key}")
    elif isinstance(stored, list) and isinstance(read, list):
        assert len(stored) == len(read), path
        for index, (one, other) in enumerate(zip(stored, read, strict=True)):
            assert_kept(one, other, f"{path}[{index}]")
    else:
        assert stored == read, path


def test_every_field_is_read(artifact, folder):
    assert f"format{artifact.manifest.format}" == folder.name
    assert artifact.manifest.format <= FORMAT_VERSION == FORMATS[-1]
    assert list(artifact.devices) == ["cpu", "cuda"][: artifact.manifest.format]
    for device, plans in artifact.devices.items():
        assert list(plans) == ["main", "encode", "append"][: 2 if artifact.manifest.format < 3 else 3]
        for name, plan in plans.items():
            file = name if device == "cpu" else f"{name}.{device}"
            stored = json.loads((folder / "plan" / f"{file}.json").read_text())
            assert_kept(stored, to_json(plan), name)
        plan = plans["main"]
        assert [(symbol.name, symbol.maximum, symbol.factor) for symbol in plan.symbols] == [
            ("batch", 32, 1),
            ("blocks", 8000, 8),
        ]
        assert isinstance(plan.checks[0].condition, Op)
        assert plan.states[0].initial == "total"
    assert [len(step.variants) for step in artifact.plans["main"].steps] == [1, 1, 1, 1, 1, 2, 1]
    verify_integrity(folder)


@pytest.mark.parametrize("number", FORMATS[1:])
def test_gpu_plans_and_binaries_are_read(number):
    artifact = read_artifact(GOLDEN / f"format{number}")
    plan = artifact.devices["cuda"]["main"]
    target = artifact.manifest.targets[1]
    table = binaries.parse(artifact.content(target.library), target.library)
    stored = json.loads((artifact.path / target.library).read_text())
    assert_kept(stored, to_json(table), target.library)
    assert (target.name, table.architecture) == ("cuda:sm_90", "sm_90")
    kinds = set()
    for step in plan.steps:
        for variant in step.variants:
            assert variant.tiles[0].name in table.by_name[variant.kernel].tiles
            assert (artifact.path / "kernels" / "triton" / f"{variant.kernel}.py").exists()
            kinds |= {ref.kind for ref in variant.operands}
    assert {"input", "output", "constant", "buffer", "state", "fault"} <= kinds


def test_gpu_plans_run_interpreted():
    pytest.importorskip("triton")
    with np.load(GOLDEN / "format2.npz") as stored:
        arrays = dict(stored)
    with tilewright.load(GOLDEN / "format2", device="interpreter") as model:
        check(model, arrays)


def test_gpu_plans_are_launched(machine, fake_cuda, monkeypatch):
    """What the fake device is given: every kernel with as many arguments as it takes, in pointers that are aligned."""
    folder = GOLDEN / "format2"
    table = binaries.parse((folder / "kernels/sm_90/binaries.json").read_bytes(), "binaries.json")
    known = {one.cubin.encode(): (kernel, one) for kernel in table.kernels for one in kernel.binaries}

    def load(self, content):
        kernel, one = known[content]
        return self.__class__.real_load(self, fake_cuda.image(one.function, len(kernel.parameters) + 2))

    monkeypatch.setattr(fake_cuda.FakeCuda, "real_load", fake_cuda.FakeCuda.cuModuleLoadData, raising=False)
    monkeypatch.setattr(fake_cuda.FakeCuda, "cuModuleLoadData", load)
    with np.load(GOLDEN / "format2.npz") as stored, tilewright.load(folder, device="auto") as model:
        assert model.target == "cuda:sm_90"
        for _ in range(2):
            call(model, dict(stored))
    plan = read_artifact(folder).devices["cuda"]["main"]
    half = len(machine.launched) // 2
    assert half == len(plan.steps)
    for step, direct, replayed in zip(plan.steps, machine.launched[:half], machine.launched[half:], strict=True):
        count = len(step.variants[0].operands)
        assert (direct.arguments, direct.grid, direct.threads) == (replayed.arguments, replayed.grid, replayed.threads)
        assert all(address and address % 4 == 0 for address in direct.arguments[:count])


def test_states_of_a_chosen_size(device_of_format3):
    with np.load(GOLDEN / "format3.npz") as stored:
        arrays = dict(stored)
    inputs = {name: arrays[name] for name in ("rows", "positions", "starts", "table")}
    with tilewright.load(GOLDEN / "format3", device=device_of_format3, entry="append") as model:
        np.testing.assert_allclose(model(**inputs), arrays["sums"], rtol=1e-5)
        assert model.state_bytes({"blocks": 7}) == 7 * 32 * 4 * 4 + 64  # "total" is a state too
        session = model.session({"blocks": 7})
        assert model.state_bytes() < model.state_bytes(session.sizes)
        np.testing.assert_allclose(session(**inputs), arrays["sums"], rtol=1e-5)
        moved = inputs | {"table": np.array([[6], [5]], np.int32)}
        np.testing.assert_allclose(session(**moved), 2 * arrays["sums"], rtol=1e-5)
        with pytest.raises(InputError, match="out of range"):
            session(**inputs | {"table": np.array([[7], [5]], np.int32)})
        with pytest.raises(ShapeError, match="'starts', axis 0: expected 3, got 2"):
            session(**inputs | {"starts": inputs["starts"][1:]})


@pytest.fixture(params=["cpu", "interpreter"])
def device_of_format3(request):
    if request.param == "interpreter":
        pytest.importorskip("triton")
    elif not cpu.features().issuperset(read_artifact(GOLDEN / "format3").manifest.targets[0].features):
        pytest.skip("this processor does not run the artifact's code")
    return request.param


def check(model, arrays):
    result = call(model, arrays)
    assert list(result) == ["scores", "more", "total"]
    hidden, soft, rows = result["more"]
    assert rows == 2
    found = {"scores": result["scores"], "total": result["total"], "hidden": hidden, "soft": soft}
    found["encoded"] = model.entry("encode")(arrays["x"])
    for name, got in found.items():
        np.testing.assert_allclose(got, arrays[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_it_runs(model, arrays):
    check(model, arrays)


def test_guards_checks_and_factors_hold(model, arrays):
    row = np.linspace(-1, 1, 2 * 64000, dtype=np.float32).reshape(2, 64000)
    soft = call(model, arrays, row=row)["more"][1]  # past the guard of the first variant
    wanted = np.exp(row.astype(np.float64))
    np.testing.assert_allclose(soft, wanted / wanted.sum(-1, keepdims=True), rtol=1e-5)
    with pytest.raises(ShapeError, match="batch != 13"):
        call(model, arrays, x=np.zeros((13, 6), np.float32), word=np.zeros(13, np.int64))
    with pytest.raises(ShapeError, match="row"):
        call(model, arrays, row=row[:, :10])


def test_state_starts_as_stored_and_lasts_in_a_session(model, arrays):
    once = call(model, arrays)["total"]
    np.testing.assert_array_equal(call(model, arrays)["total"], once)
    session = model.session()
    first, second = (call(session, arrays)["total"] for _ in range(2))
    np.testing.assert_array_equal(first, once)
    added = arrays["scores"].sum(0)
    np.testing.assert_allclose(second, [1, 2, 3] + 2 * added, rtol=1e-5)
