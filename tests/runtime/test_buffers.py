"""Calls with buffers in place of arrays: no numpy, the same bits, and clear refusals."""

from __future__ import annotations

import array
import ctypes
import mmap
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tilewright.runtime.arrays import input_array, out_array
from tilewright.runtime.buffers import FORMATS, duplicate, input_view, new_view, view_of
from tilewright.runtime.dtypes import numpy_dtype
from tilewright.runtime.errors import InputError, ShapeError, UsageError
from tilewright.runtime.memory import address
from tilewright.runtime.plan import Port
from tilewright.runtime.plan_check import nbytes

ONES = array.array("f", [1, 1, 1, 1])


def inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, 8), dtype=np.float32), rng.integers(0, 10, n)


def views(n: int) -> tuple[memoryview, memoryview]:
    """The same without numpy's memory: read-only, with a shape."""
    x, idx = inputs(n)
    return memoryview(x.tobytes()).cast("f", (n, 8)), memoryview(idx.tobytes()).cast("q")


def taken(value: Any, dtype: str, *shape: Any) -> memoryview:
    """What a port makes of a buffer."""
    port = Port("x", dtype, shape)
    view = view_of(value, port)
    assert view is not None
    return input_view(view, port)


def test_numpy_is_not_imported(toy):
    script = """
        import array, sys, tilewright
        for name in ("numpy", "ml_dtypes", "torch"):
            sys.modules[name] = None  # importing it fails
        with tilewright.load(sys.argv[1], threads=2) as model:
            x, idx = memoryview(bytes(96)).cast("f", (3, 8)), array.array("q", [0, 1, 2])
            y = model(x, idx)
            print(type(y).__name__, y.format, y.shape, y.tolist()[2])
            half, size = model.entry("half")(array.array("H", [1, 2]))
            print(half.format, half.tolist(), size)
            with model.session() as session:
                for _ in range(2):
                    total = session.entry("count")(array.array("f", [1, 1, 1, 1]))["total"]
            print(total.tolist(), len(model.profile(x, idx)))
            try:
                model(x, array.array("q", [0, 1, 10]))
            except tilewright.TilewrightError as error:
                print(type(error).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(toy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [
        "memoryview f (3, 4) [8.0, 9.0, 10.0, 11.0]",
        "H [1, 2] 2",
        "[12.0, 22.0, 32.0, 42.0] 2",
        "InputError",
        "",
    ]


@pytest.mark.parametrize("n", [1, 5, 64])
def test_the_same_bits_as_with_arrays(toy_model, n):
    expected = toy_model(*inputs(n))
    got = toy_model(*views(n))
    assert type(got) is memoryview and (got.format, got.shape, got.readonly) == ("f", (n, 4), False)
    assert got.tobytes() == expected.tobytes()
    assert toy_model(x=views(n)[0], idx=views(n)[1]).tobytes() == expected.tobytes()


def test_arrays_come_back_where_any_array_came_in(toy_model):
    (x, idx), (x_view, idx_view) = inputs(3), views(3)
    expected = toy_model(x, idx)
    for mixed in ((x, idx_view), (x_view, idx), (x_view, idx.tolist()), (x.tolist(), idx_view)):
        got = toy_model(*mixed)
        assert type(got) is np.ndarray and np.array_equal(got, expected)
    out = np.zeros((3, 4), np.float32)
    assert toy_model(x_view, idx_view, out=out) is out and np.array_equal(out, expected)
    assert type(toy_model(x, idx, out=bytearray(48))) is memoryview  # what was given comes back
    assert type(toy_model(memoryview(x), memoryview(idx))) is memoryview  # who wraps an array asks for views


def test_kinds_of_buffers(toy_model, tmp_path):
    x, idx = inputs(2)
    expected = toy_model(x, idx).tobytes()
    (tmp_path / "x").write_bytes(x.tobytes())
    with open(tmp_path / "x", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        whole = memoryview(mapped)
        view = whole.cast("f", (2, 8))
        assert toy_model(view, array.array("q", idx)).tobytes() == expected
        view.release()
        whole.release()  # or the file could not be closed: no call holds on to it
    rows = ((ctypes.c_float * 8) * 2).from_buffer_copy(x.tobytes())
    assert toy_model(rows, (ctypes.c_longlong * 2)(*idx)).tobytes() == expected
    shifted = bytearray(x.nbytes + 1)
    shifted[1:] = x.tobytes()
    unaligned = memoryview(shifted)[1:].cast("f", (2, 8))
    assert address(unaligned) % 4 and toy_model(unaligned, memoryview(idx)).tobytes() == expected
    assert toy_model(memoryview(x[::-1])[::-1], memoryview(np.repeat(idx, 2))[::2]).tobytes() == expected  # gaps


def test_raw_and_flat_buffers_take_a_shape_that_does_not_vary(toy_model):
    count = toy_model.entry("count")
    for given in (bytes(ONES), bytearray(ONES), ONES, memoryview(ONES).cast("B").cast("c")):
        assert count(given)["total"].tolist() == [11, 21, 31, 41]
    assert taken(bytes(24), "float32", 1, 2, 3).shape == (1, 2, 3)
    assert taken(array.array("f", [0] * 6), "float32", 2, 3).shape == (2, 3)
    assert taken((ctypes.c_float * 6)(*range(6)), "float32", 2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert taken(ctypes.create_string_buffer(b"abcd", 4), "int8", 2, 2).tolist() == [[97, 98], [99, 100]]
    assert taken(bytes(4), "int32").shape == ()
    assert taken(b"", "float32", 0, 3).shape == (0, 3)
    assert taken(b"\x01\x00", "bool", 2).tolist() == [True, False]
    assert taken(bytes(memoryview(bytes(range(16)))[::2]), "int64", 1).tobytes() == bytes(range(0, 16, 2))


@pytest.mark.parametrize(
    ("value", "dtype", "shape", "expected"),
    [
        (bytes(64), "float32", ("n", 8), r"float32\[n, 8\], got 64 bytes without a shape.*cast\('f', shape\)"),
        (bytes(15), "float32", (4,), r"expected float32\[4\], 16 bytes, got 15 bytes"),
        (
            array.array("d", [0] * 4),
            "float32",
            (4,),
            r"float32\[4\], got a buffer of format 'd' and shape \[4\]; .* 'f'",
        ),
        (array.array("i", [0] * 4), "float32", (4,), "format 'i'"),
        (array.array("f", [0] * 4), "int32", (4,), "format must be 'i'"),
        (memoryview(np.zeros(4, ">f4")), "float32", (4,), "format '>f'"),
        (memoryview(bytes(16)).cast("B", (4, 4)), "float32", (4,), r"format 'B' and shape \[4, 4\]"),
        (array.array("h", [0]), "bfloat16", (1,), "format must be 'H'"),
    ],
)
def test_refused_inputs(value, dtype, shape, expected):
    with pytest.raises(ShapeError, match=f"input 'x': .*{expected}"):
        taken(value, dtype, *shape)


def test_refusals_leave_the_model_usable(toy_model):
    x, idx = views(2)
    with pytest.raises(ShapeError, match=r"'x': expected float32\[n, 8\], got shape \[16\]"):
        toy_model(memoryview(bytes(x)).cast("f"), idx)
    with pytest.raises(ShapeError, match="axis 1: expected 8, got 4"):
        toy_model(memoryview(bytes(32)).cast("f", (2, 4)), idx)
    with pytest.raises(InputError, match="lookup"):
        toy_model(x, array.array("q", [0, 10]))
    gone = memoryview(bytes(64)).cast("f", (2, 8))
    gone.release()
    with pytest.raises(ShapeError, match="'x': cannot use this memoryview: .*released"):
        toy_model(gone, idx)
    assert toy_model(x, idx).tobytes() == toy_model(*inputs(2)).tobytes()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0,), (2, 0, 3), (40, 64)])
def test_every_dtype_and_shape(dtype, shape):
    """New views, inputs and outputs of a shape; with numpy over them, they are the arrays that one would make."""
    count = nbytes(dtype, shape)
    made = new_view(shape, dtype, count)
    assert (made.shape, made.nbytes, made.format) == (shape, count, FORMATS[dtype]) and made.c_contiguous
    assert not made.readonly and (count < 4096 or address(made) % 64 == 0)
    port = Port("x", dtype, shape)
    pattern = bytes([0, 1] * (count // 2 + 1))[:count]
    if count:
        made.cast("B")[:] = pattern
    assert address(input_view(memoryview(made), port)) == address(made)  # no copy
    assert taken(pattern, dtype, *shape).tobytes() == pattern
    copied = duplicate(made)
    assert (copied.shape, copied.format, copied.tobytes()) == (shape, made.format, pattern)
    got = input_array(made, port)
    assert got.dtype == numpy_dtype(dtype) and got.shape == shape and got.tobytes() == pattern
    assert out_array(bytearray(count), port, shape).shape == shape
    if dtype != "bfloat16":  # for which numpy has no format
        array_of = np.frombuffer(pattern, dtype).reshape(shape)
        assert taken(memoryview(array_of), dtype, *shape).tobytes() == pattern


def test_out(toy_model):
    x, idx = views(3)
    expected = toy_model(x, idx).tobytes()
    rows, flat = ((ctypes.c_float * 4) * 3)(), (ctypes.c_float * 12)()
    for out in (bytearray(48), memoryview(bytearray(48)).cast("f", (3, 4)), array.array("f", [0] * 12), rows, flat):
        got = toy_model(x, idx, out=out)
        assert got.tobytes() == bytes(out) == expected and got.shape == (3, 4)
    named = bytearray(48)
    toy_model(x, idx, out={"y": named})
    assert named == expected


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (bytes(48), "must be C-contiguous, aligned and writable"),
        (bytearray(44), r"expected float32\[3, 4\], got a buffer of format 'B' and shape \[44\]; a bytearray of 48"),
        (memoryview(bytearray(96)).cast("d", (3, 4)), "format 'd'"),
        (memoryview(bytearray(48)).cast("f", (4, 3)), r"shape \[4, 3\]"),
        (memoryview(bytearray(49))[1:], "aligned"),
        (memoryview(np.zeros((4, 3), np.float32).T), "C-contiguous"),
    ],
)
def test_refused_outputs(toy_model, out, expected):
    with pytest.raises(ShapeError, match=f"out: output 'y': .*{expected}"):
        toy_model(*views(3), out=out)


def test_memory_may_not_be_shared(toy_model):
    count = toy_model.entry("count")
    memory = bytearray(32)
    with pytest.raises(UsageError, match="'total' shares memory"):
        count(memoryview(memory)[:16], out=memoryview(memory)[8:24])
    assert count(memoryview(memory)[:16], out=memoryview(memory)[16:])["total"].tolist() == [10, 20, 30, 40]
    array_of = np.frombuffer(memory, np.float32)
    with pytest.raises(UsageError, match="'total' shares memory"):
        count(array_of[:4], out=memoryview(memory)[12:28])
    again = count(bytes(16))["again"][0]
    total = count(bytes(16))["total"]
    assert type(again) is memoryview and again.tolist() == total.tolist()
    result = count(bytes(16))
    result["again"][0][0] = 7.0  # the copy of an output that is named twice
    assert result["total"].tolist() == [10, 20, 30, 40]


def test_outputs_belong_to_the_caller(toy_model):
    first = toy_model(*views(4))
    before = first.tobytes()
    second = toy_model(memoryview(bytes(128)).cast("f", (4, 8)), array.array("q", [0] * 4))
    assert first.tobytes() == before != second.tobytes()


def test_memory_cannot_move_during_a_call(toy_model):
    """A call holds a view of its own, so that a bytearray cannot be resized under it."""
    x = bytearray(16)

    def look(step, variant, read):
        try:
            x.extend(bytes(1 << 20))
        except BufferError:
            refused.append(step)

    refused: list[int] = []
    toy_model.entry("count").trace(look, x)
    assert refused == [0]
    x.extend(b"free again")


def test_bfloat16_as_bits(toy_model):
    half = toy_model.entry("half")
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    for given in (array.array("H", values.view(np.uint16)), memoryview(values.view(np.uint16))):
        got, _ = half(given)
        assert (got.format, got.shape, got.tobytes()) == ("H", (4,), values.tobytes())
        assert np.array_equal(np.frombuffer(got, ml_dtypes.bfloat16), values)
    assert half(memoryview(b"").cast("H"))[0].shape == (0,)


def test_states_and_traces(toy_model):
    with toy_model.session() as session:
        seen = []
        for _ in range(3):
            result = session.entry("count").trace(lambda step, variant, read: seen.append(step), ONES)
        assert result["total"].tolist() == [13, 23, 33, 43] and seen == [0, 0, 0]
        session.reset()
        assert session.entry("count")(ONES)["total"].tolist() == [11, 21, 31, 41]


def test_several_callers(toy_model):
    expected = [toy_model(*inputs(n)).tobytes() for n in range(1, 9)]

    def work(index: int) -> bool:
        n = index % 8 + 1
        given = views(n) if index % 3 else inputs(n)
        return bool(toy_model(*given).tobytes() == expected[n - 1])

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(work, range(200)))
