"""Inputs from ``.npy`` and ``.npz`` files, made-up inputs, and outputs back into such files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime import sizes
from ...runtime.dtypes import numpy_dtype
from ...runtime.entry import Entry
from ...runtime.errors import CompileError, InputError, UsageError
from ...runtime.plan import Plan, Port

FORMS = "give them as NAME=FILE.npy, or all together as FILE.npz"


def read_inputs(texts: Sequence[str], plan: Plan) -> dict[str, np.ndarray]:
    """The inputs that a command line names, by input name.

    Args:
        texts: ``NAME=FILE.npy``, ``FILE.npz`` with arrays by input name, or ``FILE.npy`` for a model of one input.
        plan: of the entry point.

    Raises:
        UsageError: a file that cannot be read, an unknown name, an input given twice or not at all.
    """
    ports = {port.name: port for port in plan.inputs}
    found: dict[str, np.ndarray] = {}
    for text in texts:
        for name, array in _read(text, list(ports)):
            if name not in ports:
                raise UsageError(f"{text}: there is no input {name!r}; entry {plan.entry!r} takes {_listing(plan)}")
            if name in found:
                raise UsageError(f"{text}: input {name!r} was given twice")
            found[name] = _as_bfloat16(array, name) if ports[name].dtype == "bfloat16" else array
    if missing := [name for name in ports if name not in found]:
        raise UsageError(
            f"no data for input {', '.join(missing)}; entry {plan.entry!r} takes {_listing(plan)}; {FORMS}"
        )
    return found


def made_up_inputs(entry: Entry, values: Mapping[str, int]) -> tuple[dict[str, np.ndarray], str]:
    """Inputs of the given sizes to time a model with, and in words what they hold.

    Floating-point inputs are normal random numbers. Integers are usually indices or masks: all are 1, which keeps
    everything unmasked and is legal in every table of two rows; where a table has only one, as few inputs as possible
    are 0.

    Raises:
        InputError: the model takes neither 0 nor 1 somewhere.
    """
    generator = np.random.default_rng(0)
    arrays = {}
    for port in entry.plan.inputs:
        shape = [sizes.evaluate(size, values) for size in port.shape]
        dtype = numpy_dtype(port.dtype)
        integer = dtype.kind in "biu"
        arrays[port.name] = np.ones(shape, dtype) if integer else generator.standard_normal(shape).astype(dtype)
    integers = [name for name, array in arrays.items() if array.dtype.kind in "biu"]
    for count in range(len(integers) + 1):
        for zeros in combinations(integers, count):
            trial = arrays | {name: np.zeros_like(arrays[name]) for name in zeros}
            try:
                entry(**trial)
            except InputError:
                continue
            return trial, _describe(trial, zeros)
    raise InputError("no made-up indices fit this model's tables; give inputs with --inputs FILE.npz")


def flatten_results(structure: Any, value: Any, path: str = "result") -> Iterator[tuple[str, int | None, Any]]:
    """The leaves of what a model returned: (where, number of the output or None for a plain value, value).

    Args:
        structure: the plan's ``results``.
        value: what the call returned.
        path: where it lies, for the plain values.
    """
    (kind, inner), *_ = structure.items()
    if kind == "output":
        yield path, inner, value
    elif kind in ("tuple", "list"):
        for index, (part, item) in enumerate(zip(inner, value, strict=True)):
            yield from flatten_results(part, item, f"{path}[{index}]")
    elif kind == "dict":
        for key, part in inner.items():
            yield from flatten_results(part, value[key], f"{path}[{key!r}]")
    else:
        yield path, None, value


def check_output_file(path: Path, ports: Sequence[Port]) -> None:
    """Refuse a file that :func:`write_outputs` could not write, before any work is done.

    Raises:
        UsageError: another suffix than .npz or .npy, several outputs for one .npy, or no such folder.
    """
    if path.suffix not in (".npz", ".npy"):
        raise UsageError(f"{path}: outputs are written as .npz, or as .npy where there is only one")
    if path.suffix == ".npy" and len(ports) != 1:
        names = ", ".join(port.name for port in ports)
        raise UsageError(
            f"{path}: an .npy file holds one array, but there are {len(ports)} outputs ({names}); use .npz"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path}: {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}")


def write_outputs(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name; bfloat16, which these formats lack, as float32 (no value changes).

    Raises:
        CompileError: the file cannot be written.
    """
    stored = {name: array.astype(np.float32) if _is_bfloat16(array) else array for name, array in arrays.items()}
    try:
        if path.suffix == ".npy":
            np.save(path, next(iter(stored.values())), allow_pickle=False)
            return
        # numpy.savez takes names as keyword arguments, and so not every name
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in stored.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    except OSError as error:
        raise CompileError(f"{path} cannot be written: {error.strerror or error}") from error


def _read(text: str, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    name, equals, file = text.partition("=")
    named = bool(equals) and (name in names or not Path(text).exists())
    path = Path(file if named else text)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; {FORMS}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            if not named and len(names) != 1:
                raise UsageError(f"{path} is one array, and the inputs are {', '.join(names)}; {FORMS}")
            yield (name if named else names[0]), loaded
            return
        with loaded as arrays:
            if named:
                raise UsageError(f"{path} holds several arrays by name; give it without '{name}='")
            yield from [(key, arrays[key]) for key in arrays.files]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise UsageError(
            f"{path} is no .npy or .npz file of plain arrays: {str(error).partition(chr(10))[0]}"
        ) from None


def _as_bfloat16(array: np.ndarray, name: str) -> np.ndarray:
    """An array from a file, where bfloat16 is two bytes without a meaning, or float32 of the same values."""
    dtype = numpy_dtype("bfloat16")
    if array.dtype == np.dtype("V2"):
        return array.view(dtype)
    if array.dtype == np.float32:
        converted = array.astype(dtype)
        if not np.array_equal(converted.astype(np.float32), array, equal_nan=True):
            raise InputError(f"input {name!r} is bfloat16, and the file has float32 values that bfloat16 cannot hold")
        return converted
    return array


def _is_bfloat16(array: np.ndarray) -> bool:
    return array.dtype.name == "bfloat16"


def _describe(arrays: Mapping[str, np.ndarray], zeros: Sequence[str]) -> str:
    words = []
    if normal := [name for name, array in arrays.items() if array.dtype.kind not in "biu"]:
        words.append(f"normal random numbers for {', '.join(normal)}")
    if ones := [name for name, array in arrays.items() if array.dtype.kind in "biu" and name not in zeros]:
        words.append(f"1 for {', '.join(ones)}")
    if zeros:
        words.append(f"0 for {', '.join(zeros)}")
    return "; ".join(words) or "none"


def _listing(plan: Plan) -> str:
    described = (f"{port.name}: {port.dtype}[{', '.join(map(sizes.show, port.shape))}]" for port in plan.inputs)
    return ", ".join(described) or "no inputs"
