"""An artifact of format 1, written once (``golden/make_format1.py``): newer runtimes must read and run it as it is.

A failure here means that artifacts which users have would no longer load. Do not write the golden files anew: teach the
reader the old format, or raise the format version and keep reading this one.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tilewright.runtime import cpu
from tilewright.runtime.artifact import read_artifact, verify_integrity
from tilewright.runtime.errors import ShapeError
from tilewright.runtime.plan import FORMAT_VERSION, to_json
from tilewright.runtime.sizes import Op

GOLDEN = Path(__file__).parent / "golden" / "format1"


@pytest.fixture(scope="module")
def artifact():
    return read_artifact(GOLDEN)


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN.with_suffix(".npz")) as stored:
        return dict(stored)


@pytest.fixture
def model(artifact):
    (target,) = artifact.manifest.targets
    if not cpu.features().issuperset(target.features):
        pytest.skip(f"this processor does not run {target.name}")
    with tilewright.load(GOLDEN, threads=2) as loaded:
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


def test_every_field_is_read(artifact):
    assert artifact.manifest.format == 1 <= FORMAT_VERSION
    assert list(artifact.plans) == ["main", "encode"]
    for name, plan in artifact.plans.items():
        stored = json.loads((GOLDEN / "plan" / f"{name}.json").read_text())
        assert_kept(stored, to_json(plan), name)
    plan = artifact.plans["main"]
    assert [(symbol.name, symbol.maximum, symbol.factor) for symbol in plan.symbols] == [
        ("batch", 32, 1),
        ("blocks", 8000, 8),
    ]
    assert [len(step.variants) for step in plan.steps] == [1, 1, 1, 1, 1, 2, 1]
    assert isinstance(plan.checks[0].condition, Op)
    assert plan.states[0].initial == "total"
    verify_integrity(GOLDEN)


def test_it_runs(model, arrays):
    result = call(model, arrays)
    assert list(result) == ["scores", "more", "total"]
    hidden, soft, rows = result["more"]
    assert rows == 2
    found = {"scores": result["scores"], "total": result["total"], "hidden": hidden, "soft": soft}
    found["encoded"] = model.entry("encode")(arrays["x"])
    for name, got in found.items():
        np.testing.assert_allclose(got, arrays[name], rtol=1e-5, atol=1e-6, err_msg=name)


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
