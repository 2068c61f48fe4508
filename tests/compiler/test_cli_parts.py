"""The parts of the command line that need no artifact: files of arrays, results, statistics, versions, dimensions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tilewright.compiler.cli.arrays import check_output_file, flatten_results, read_inputs, write_outputs
from tilewright.compiler.cli.machine import satisfies
from tilewright.compiler.cli.measure import latency_of, percentile
from tilewright.compiler.cli.output import emit_json, show_bytes, show_seconds
from tilewright.compiler.cli.verify import compiled_shapes
from tilewright.runtime import sizes
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.plan import Plan, Port, Symbol


def plan(inputs: tuple[Port, ...], symbols: tuple[Symbol, ...] = ()) -> Plan:
    return Plan("main", symbols, inputs, (), {"tuple": []}, (), (), (), (), ())


def test_arrays_of_any_name_survive_an_npz(tmp_path):
    arrays = {"file": np.arange(3), "a b": np.float32(2.5).reshape(()), "empty": np.zeros((0, 4), np.int8)}
    write_outputs(tmp_path / "out.npz", arrays)
    with np.load(tmp_path / "out.npz") as saved:
        assert saved.files == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(saved[name], array)
            assert saved[name].dtype == array.dtype


def test_bfloat16_through_files(tmp_path):
    values = np.array([1.0, -2.5, np.inf, np.nan], bfloat16)
    ports = (Port("x", "bfloat16", (4,)),)
    write_outputs(tmp_path / "y.npy", {"y": values})
    np.save(tmp_path / "raw.npy", values)
    for name in ("y.npy", "raw.npy"):
        read = read_inputs([str(tmp_path / name)], plan(ports))["x"]
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read.view(np.uint16), values.view(np.uint16))
    np.save(tmp_path / "fine.npy", np.array([1.001] * 4, np.float32))
    with pytest.raises(InputError, match="cannot hold"):
        read_inputs([str(tmp_path / "fine.npy")], plan(ports))


def test_a_file_name_with_an_equals_sign(tmp_path):
    path = tmp_path / "lr=3.npy"
    np.save(path, np.ones(4, np.float32))
    ports = (Port("x", "float32", (4,)),)
    assert read_inputs([str(path)], plan(ports))["x"].shape == (4,)
    assert read_inputs([f"x={path}"], plan(ports))["x"].shape == (4,)


def test_one_npy_is_refused_for_several_outputs(tmp_path):
    ports = (Port("a", "float32", ()), Port("b", "float32", ()))
    with pytest.raises(UsageError, match="a, b"):
        check_output_file(tmp_path / "y.npy", ports)
    check_output_file(tmp_path / "y.npz", ports)


def test_results_are_flattened_with_their_places():
    structure = {"dict": {"a": {"output": 1}, "b": {"list": [{"size": "n"}, {"output": 0}, {"constant": None}]}}}
    found = list(flatten_results(structure, {"a": "A", "b": [7, "B", None]}))
    assert found == [
        ("result['a']", 1, "A"),
        ("result['b'][0]", None, 7),
        ("result['b'][1]", 0, "B"),
        ("result['b'][2]", None, None),
    ]


def test_percentiles_are_values_that_occurred():
    ordered = [float(value) for value in range(1, 101)]
    assert [percentile(ordered, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1, 50, 90, 99, 100]
    assert percentile([3.0], 0.99) == 3


def test_latency_counts_the_calls_that_were_asked_for():
    calls = []
    found = latency_of(lambda: calls.append(1), repeat=7)
    assert found.calls == 7 and len(calls) >= 10
    assert found.smallest <= found.p50 <= found.p99


@pytest.mark.parametrize(
    ("version", "bounds", "holds"),
    [
        ("2.13.0+cpu", ">=2.11,<2.16", True), ("2.16.0", "<2.16,>=2.11", False), ("2.9.1", ">=2.11", False),
        ("2.11", ">=2.11.0", True), ("5.0.0rc1", ">=4.57", True), ("13", "", True), ("1.2", "!=1.2", False),
    ],
)  # fmt: skip
def test_versions_against_bounds(version, bounds, holds):
    assert satisfies(version, bounds) is holds


def test_json_has_no_numbers_that_json_lacks(capsys):
    emit_json({"error": float("inf"), "list": [float("nan"), 1.5], 3: (True, None)})
    assert json.loads(capsys.readouterr().out) == {"error": "inf", "list": ["nan", 1.5], "3": [True, None]}


def test_amounts_for_people():
    assert [show_bytes(count) for count in (0, 1023, 1536, 5 << 20, 3 << 30)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.00 GiB",
    ]  # fmt: skip
    assert [show_seconds(value) for value in (2.5, 0.0123, 4.56e-5)] == ["2.50 s", "12.30 ms", "45.6 us"]


def test_dimensions_of_a_plan_in_the_dimension_language():
    symbols = (Symbol("h", 2, 32, 4, 0, 1, 16), Symbol("n", 1, 8, 2, 1, 0))
    ports = (
        Port("image", "float32", (3, sizes.mul("h", 16))),
        Port("rows", "float32", ("n", sizes.mul("h", 16))),
        Port("scalar", "float32", ()),
    )
    assert compiled_shapes(plan(ports, symbols)) == {"image": "3,16*h:2..32", "rows": "n:1..8,16*h"}
    assert compiled_shapes(plan((Port("x", "float32", (4,)),))) == {}
    more = (Port("x", "float32", ("n",)), Port("y", "float32", (sizes.add(sizes.mul("n", 3), 1), sizes.add("n", 2))))
    assert compiled_shapes(plan(more, (Symbol("n", 1, 8, 2, 0, 0),))) == {"x": "n:1..8", "y": "3*n+1,n+2"}
    derived = (Port("x", "float32", ("n",)), Port("y", "float32", (sizes.mul("n", "n"),)))
    with pytest.raises(UsageError, match="--shape"):
        compiled_shapes(plan(derived, (Symbol("n", 1, 8, 2, 0, 0),)))
