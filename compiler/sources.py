"""Whatever the user gave as a model → programs: the frontends behind one function."""

from __future__ import annotations

import difflib
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from ..passes.graph.program import Program
from ..runtime.errors import SourceError, UsageError
from .capture import capture
from .frontends import Loaded
from .importer import from_exported, input_names_of, made_up
from .options import Entry, Task
from .shapes import is_dimension_language, parse_shapes
from .states import share_states
from .structure import bind

Source = nn.Module | ExportedProgram | Loaded | str | Path

_ACCEPTED = (
    "accepted are a PyTorch module, an .onnx or .pt2 file, a checkpoint folder (config.json and safetensors), "
    "path/to/file.py:factory and a name of the model registry"
)
_LARGEST_DIM = 1024  # upper bound of an ONNX dimension that has a name but no range


def load_source(source: Source, task: Task, cache: Callable[[torch.dtype], torch.dtype]) -> Loaded | ExportedProgram:
    """Read a source, without capturing anything: the frontends behind one function.

    Args:
        source: as for :func:`open_source`.
        task: what to make of it.
        cache: for generation, the type of the weights → that of cached keys and values.

    Raises:
        SourceError: nothing that can be read as a model.
        ArtifactError: a weight file that is damaged or incomplete.
        UsageError: a source that cannot do the task.
    """
    generate, name = task.name == "generate", str(source) if isinstance(source, str | Path) else "the source"
    if isinstance(source, str | Path):
        folder = Path(source)
        if task.name != "forward" and (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            from .frontends import decoder

            if generate or decoder.is_decoder(folder):
                return decoder.open_checkpoint(folder, task, cache)
            source = _from_text(str(source))
            decoder.warn_of_other_decoder(folder)
        else:
            source = _from_text(str(source))
    elif not isinstance(source, ExportedProgram | Loaded):
        source = _from_module(source)
    if isinstance(source, Loaded) and source.entries:
        return source
    if not generate:
        if task != Task(task.name):
            raise UsageError(
                f"--context, --chunk, --sequences and --cache are limits of generation, and {name} is compiled for its "
                f"forward: leave them out, or add --task generate"
            )
        return source
    if isinstance(source, ExportedProgram):
        raise UsageError("an exported program computes what it was exported for; --task generate needs a decoder")
    from .frontends import decoder

    return decoder.open_module(source.module, name, task, cache)


def open_source(
    source: Source,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    shapes: Any = None,
    entries: Mapping[str, Entry] | None = None,
    sample_inputs: Path | str | None = None,
) -> list[Program]:
    """Capture a source: one program per entry point, sharing weights and states by name.

    Args:
        source: a module, an exported program, a path (.onnx, .pt2, a checkpoint folder), ``file.py:factory``, the name
            of a registered model (these are taken for their forward), or what :func:`load_source` made of one.
        args: example positional arguments; a source that brings its own needs none.
        kwargs: example keyword arguments.
        shapes: input name → dimension language, over the source's own defaults; or dimensions as ``torch.export``
            takes.
        entries: entry point's name → what to capture; by default one entry point, ``main``.
        sample_inputs: an .npz file with example arrays by input name.

    Raises:
        SourceError: nothing that can be read as a model.
        ArtifactError: a weight file that is damaged or incomplete.
        UnsupportedOperator: the model cannot be compiled.
        UsageError: inputs, shapes or entries that do not fit the model.
    """
    loaded = load_source(source, Task("forward"), lambda dtype: dtype)
    if isinstance(loaded, ExportedProgram):
        return [_open_exported(loaded, args, kwargs, shapes, entries, sample_inputs)]
    if loaded.entries:
        if args or kwargs or shapes is not None or entries or sample_inputs is not None:
            raise UsageError(
                "the entry points of generation have inputs and shapes of their own, which --context, --chunk and "
                "--sequences change; --task forward compiles the model's forward for inputs and shapes that are given"
            )
        entries = loaded.entries
    if args or kwargs:
        loaded = replace(loaded, args=args, kwargs=kwargs or {}, made_up=False)
    if sample_inputs is not None:
        loaded = _with_samples(loaded, read_samples(Path(sample_inputs)))
    if entries:
        if shapes is not None:
            raise UsageError("with entries=, give each Entry its own dynamic_shapes")
        programs = [_capture_entry(name, loaded, entry) for name, entry in entries.items()]
        share_states(programs)
        return programs
    return [_capture(loaded, shapes)]


def read_samples(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file by name.

    Raises:
        UsageError: no such file, or not plain arrays.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; sample inputs are an .npz made by numpy.savez(path, name=array, ...)")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is no .npz file of plain arrays: {str(error).splitlines()[0]}") from error


def _from_module(source: Any) -> Loaded:
    if isinstance(source, nn.Module):
        return Loaded(source, made_up=False)
    raise SourceError(f"a {type(source).__name__} is no model; {_ACCEPTED}")


def _from_text(text: str) -> Loaded | ExportedProgram:
    """Frontends import what only they need, so each is imported when its kind of source is met."""
    from .frontends import exported, huggingface, module, registry

    path = Path(text)
    if module.is_factory(text):
        return module.load_factory(text)
    if path.is_dir():
        if huggingface.is_checkpoint(path):
            return huggingface.load_checkpoint(path)
        if (path / "manifest.json").is_file():
            raise SourceError(f"{text} is a compiled artifact already; run it with tilewright.load or 'tilewright run'")
        raise SourceError(f"{text} is a folder without config.json; {_ACCEPTED}")
    if path.suffix == ".onnx":
        return _open_onnx(path)
    if path.suffix in (".pt2", ".ep"):
        return exported.load_exported(path)
    if path.is_file():
        hint = ""
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            hint = "; a pickle of weights alone names no model: build it in file.py:factory and load the weights there"
        elif path.suffix == ".py":
            hint = f"; name the function that builds the model, as in {text}:build"
        elif path.suffix == ".safetensors":
            hint = "; give its folder, with the config.json beside it"
        raise SourceError(f"{text} is no model file that is known{hint}. {_ACCEPTED.capitalize()}")
    names = registry.names()
    if text in names:
        return registry.load_named(text)
    close = difflib.get_close_matches(text, names, n=3, cutoff=0.5)
    hint = f"; did you mean the registered model {' or '.join(close)}?" if close else ""
    raise SourceError(f"{text!r} is neither a file nor a registered model{hint} ({_ACCEPTED}: {', '.join(names)})")


def _open_onnx(path: Path) -> Loaded:
    """An ONNX file with made-up sample inputs; its named sizes are dynamic."""
    from .frontends.onnx import load_onnx

    module = load_onnx(path)
    shapes: dict[str, str] = {}
    symbols: dict[str, str] = {}
    args = []
    for index, name in enumerate(module.input_names):
        dtype, dims = module.input_specs[name]
        for dim in dims:
            if isinstance(dim, str):
                symbols.setdefault(dim, _symbol(dim, symbols.values()))
        axes = [str(dim) if isinstance(dim, int) else f"{symbols[dim]}:1..{_LARGEST_DIM}" for dim in dims]
        if any(isinstance(dim, str) for dim in dims):
            shapes[name] = ",".join(axes)
        order = list(symbols)
        sizes = [
            dim if isinstance(dim, int) else _sample_size(symbols[dim], order.index(dim), len(dims)) for dim in dims
        ]
        args.append(made_up(torch.empty(sizes, dtype=dtype, device="meta"), seed=index))
    return Loaded(module, tuple(args), {}, shapes or None, input_names=tuple(module.input_names))


def _symbol(dim: str, taken: Any) -> str:
    """An ONNX dimension's name as a symbol that no other dimension has."""
    name = re.sub(r"\W+", "_", dim, flags=re.ASCII).strip("_") or "dim"
    if not name.isidentifier() or re.fullmatch(r"_*[suz]\d+", name):
        name = f"dim_{name}"
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate


def _sample_size(symbol: str, index: int, rank: int) -> int:
    """A size to trace with: different per symbol, so that no two are taken for equal; large for an image's sides."""
    if index == 0 or "batch" in symbol.lower():
        return 2
    return (64 if rank >= 4 else 8) + 3 * index


def _capture(loaded: Loaded, shapes: Any) -> Program:
    return capture(
        "main",
        loaded.module,
        loaded.args,
        loaded.kwargs,
        _merged(loaded, shapes),
        made_up=loaded.made_up,
        input_names=loaded.input_names,
    )


def _capture_entry(name: str, loaded: Loaded, entry: Entry) -> Program:
    if not name.isidentifier():
        raise UsageError(f"{name!r} is no name for an entry point: use letters, digits and _")
    if entry.args or entry.kwargs:
        own = (entry.args, entry.kwargs, entry.dynamic_shapes)
        return capture(name, loaded.module, *own, function=entry.function, make=entry.make, states=entry.states)
    return capture(
        name,
        loaded.module,
        loaded.args,
        loaded.kwargs,
        _merged(loaded, entry.dynamic_shapes),
        function=entry.function,
        made_up=loaded.made_up,
        input_names=loaded.input_names,
        states=entry.states,
    )


def _merged(loaded: Loaded, shapes: Any) -> Any:
    """The user's shapes over the source's own."""
    if shapes is None:
        shapes = {}
    if loaded.shapes is not None and not is_dimension_language(loaded.shapes):
        return shapes or loaded.shapes
    if not is_dimension_language(shapes):
        return shapes
    given = next((shapes[name] for name in loaded.alike if name in shapes), None)
    if given is not None:
        shapes = {**{name: given for name in loaded.alike}, **shapes}
    return parse_shapes(shapes, parse_shapes(loaded.shapes) if loaded.shapes else None)


def _with_samples(loaded: Loaded, samples: Mapping[str, torch.Tensor]) -> Loaded:
    """The source with tensors of an .npz in place of its own example tensors, by input name."""
    if not loaded.args and not loaded.kwargs:
        return replace(loaded, kwargs=dict(samples), made_up=False)
    call = bind(loaded.module.forward, loaded.args, loaded.kwargs)
    names = list(loaded.input_names or call.tensors)
    _check_names(samples, names)
    tensors = [samples.get(name, tensor) for name, tensor in zip(names, call.tensors.values(), strict=True)]
    args, kwargs = call.rebuild(tensors)
    return replace(loaded, args=args, kwargs=kwargs, made_up=loaded.made_up and len(samples) < len(names))


def _check_names(samples: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in samples:
        if name not in names:
            raise UsageError(f"the sample inputs hold {name!r}, but the model's inputs are: {', '.join(names)}")


def _open_exported(
    exported: ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    shapes: Any,
    entries: Mapping[str, Entry] | None,
    sample_inputs: Path | str | None,
) -> Program:
    if entries:
        raise UsageError("an exported program has one entry point; give the module itself to declare several")
    if shapes is not None and not is_dimension_language(shapes):
        raise UsageError("the axes of an exported program are fixed; name them as in shapes={'x': 'batch:1..64,3'}")
    names = input_names_of(exported)
    spec = parse_shapes(shapes) if shapes else None
    for name in spec.inputs if spec else ():
        if name not in names:
            raise UsageError(f"no input is called {name!r}; the program's inputs are: {', '.join(names)}")
    sample: dict[str, torch.Tensor] | None = None
    if args or kwargs:
        flat = [tensor for tensor in torch.utils._pytree.tree_leaves((tuple(args), dict(kwargs or {})))]
        tensors = [tensor for tensor in flat if isinstance(tensor, torch.Tensor)]
        if len(tensors) != len(names):
            raise UsageError(
                f"the program takes {len(names)} tensors ({', '.join(names)}), the sample has {len(tensors)}"
            )
        sample = dict(zip(names, tensors, strict=True))
    if sample_inputs is not None:
        samples = read_samples(Path(sample_inputs))
        _check_names(samples, names)
        if missing := [name for name in names if name not in samples]:
            raise UsageError(f"the sample inputs lack {', '.join(missing)}")
        sample = {name: samples[name] for name in names}
    return from_exported("main", exported, shapes=spec, sample=None if sample is None else tuple(sample.values()))
