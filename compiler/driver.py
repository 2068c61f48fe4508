"""The driver: the four stages in order, on one screen.

source --capture--> programs --passes--> regions --generate--> plans, kernels, constants --write--> artifact
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..codegen.artifact import check_output, plan_name, write_artifact
from ..codegen.c.toolchain import Compiler, find_compiler
from ..codegen.c.tuning import Tuner, tuned_target
from ..codegen.c.winograd_selection import show as show_decisions
from ..codegen.cache import user_cache
from ..codegen.generate import Generated, build_gpu_kernels, build_kernels, generate, triton_sources
from ..codegen.memory import measure
from ..codegen.roles import fusion_roles
from ..codegen.triton.pool import find_triton
from ..passes.graph.program import Program
from ..passes.graph.quantization import Ledger
from ..passes.manager import PassManager, PassRecord
from ..passes.pipeline import pipeline
from ..runtime.cpu import features
from ..runtime.model import load
from ..runtime.plan import Plan
from .copies import reference_of
from .frontends import Loaded
from .mapped import release
from .options import CompileOptions, Entry, Task
from .precision import applied, cache_type, precision_on
from .quantization import Watch, describe
from .samples import sample_sizes
from .sources import load_source, open_source
from .support import Unsupported, find_unsupported, require_supported
from .targets import Targets, device_kinds, parse_targets
from .verification import (
    A_PASS,
    Expected,
    OutputError,
    expect,
    require_equal,
    require_right,
    why_not_here,
)

# Bytes of weights beyond which an artifact gives back what it has read of them after every step of its verification.
LARGE = 1 << 30

Progress = Callable[[str, str], None]  # (phase, what it is at)
Rewritten = dict[str, list[Program]]  # kind of device -> its programs after the passes, one per entry point


@dataclass
class Artifact:
    """A finished artifact and how it came about.

    Attributes:
        path: the directory.
        seconds: time per phase.
        passes: what every pass did, by the name of the plan (:func:`plan_name`).
        errors: outputs against eager PyTorch.
    """

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, list[PassRecord]] = field(default_factory=dict)
    errors: list[OutputError] = field(default_factory=list)


def compile(  # noqa: A001 - the verb that users know
    source: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    target: str | Iterable[str] = "cpu",
    dynamic_shapes: Any = None,
    entries: Mapping[str, Entry] | None = None,
    precision: str = "auto",
    quantize: str | None = None,
    activations: str = "auto",
    verify: str = "final",
    dump_dir: str | Path | None = None,
    disable_passes: Iterable[str] = (),
    stop_after: str | None = None,
    inputs: str | Path | None = None,
    task: Task | str = "auto",
    ptx: bool = False,
    tune: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model into an artifact directory.

    Args:
        source: an ``nn.Module`` in evaluation mode, an ``ExportedProgram``, or a path or name: a ``.pt2`` or
        ``.onnx`` file, a
            checkpoint folder, ``file.py:factory``, a name of the model registry.
        args: sample positional inputs, where the source has none of its own.
        kwargs: sample keyword inputs.
        output: the directory to write; an artifact that is there is replaced, anything else is refused.
        target: one target or several, such as ``"cpu:x86-64-v3,cuda:sm_90"``; ``"cpu"`` is this machine.
        dynamic_shapes: which sizes vary (``compiler/shapes.py``).
        entries: several entry points over one set of weights and state.
        precision: ``"auto"``, ``"fp32"``, ``"bf16"``, and for GPUs ``"tf32"`` or ``"fp16"`` (``compiler/options.py``).
        quantize: how weights are stored: ``"int8"``, ``"int4-g32"``, ``"int4-g64"``, ``"int4-g128"``, or a JSON file
            (``passes/graph/quantization.py``).
        activations: what products with quantized weights are computed with: ``"auto"``, ``"int8"`` or ``"float"``.
        verify: ``"final"`` compares the outputs with eager PyTorch, ``"passes"`` every intermediate graph too,
            ``"off"`` nothing.
        dump_dir: where to write what every pass did.
        disable_passes: exact names of passes to leave out.
        stop_after: name of the last pass to run; then no artifact is written.
        inputs: an ``.npz`` file with sample inputs by name.
        task: ``"generate"`` compiles the step of a decoder language model over a paged cache, ``"forward"`` the model's
            forward, ``"auto"`` the step of checkpoints of known families, else the forward; a ``Task`` has the limits
            of generation, too (``compiler/options.py``).
        ptx: also store PTX, which GPUs newer than the targets compile when they load it.
        tune: measure ways of computing CPU kernels on this machine, and keep the fastest. What comes out depends on the
            machine; later compilations find the measurements in the kernel cache.
        progress: called with (phase, detail) as the work goes on.

    Raises:
        TilewrightError: what is wrong and what to do; nothing that looks finished is left behind.
    """
    options = CompileOptions(
        target=tuple(target.split(",") if isinstance(target, str) else target),
        precision=precision,
        quantize=quantize,
        activations=activations,
        verify=verify,  # type: ignore[arg-type]
        dump_dir=Path(dump_dir) if dump_dir is not None else None,
        disable_passes=frozenset(disable_passes),
        stop_after=stop_after,
        ptx=ptx,
        tune=tune,
        task=task if isinstance(task, Task) else Task(task),
    )
    return Compilation(options, progress).run(source, args, kwargs, Path(output), dynamic_shapes, entries, inputs)


class Compilation:
    """One run of the compiler: its options, its clock, and the stages."""

    def __init__(self, options: CompileOptions, progress: Progress | None = None) -> None:
        self.options = options
        self.seconds: dict[str, float] = {}
        self.source_info: dict[str, Any] = {}  # what the manifest says of the source, once it has been read
        self.copies: dict[str, Path] = {}  # path in the artifact -> file that comes there, likewise
        self.mapped: tuple[Path, ...] = ()  # files that the source's weights are mapped from, likewise
        self.precision: dict[str, str] = {}  # by kind of device, once the source has been captured
        self.ledger = Ledger()
        self.watch = Watch(keep=options.verify != "off")
        self.annotated: dict[str, list[Program]] = {}  # by kind of device: programs before weights are quantized
        self.deviations: dict[str, dict[str, float]] = {}  # how far quantization moves outputs, by entry point
        self._progress = progress or (lambda phase, detail: None)

    @cached_property
    def targets(self) -> Targets:
        """The machines to compile for."""
        return parse_targets(self.options.target)

    def run(
        self, source: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, output: Path, shapes: Any = None,
        entries: Mapping[str, Entry] | None = None, inputs: str | Path | None = None,
    ) -> Artifact:  # fmt: skip
        """All stages, from the source to a verified artifact."""
        check_output(output)
        chosen = self.targets
        compiler = find_compiler() if chosen.cpu else None
        if chosen.cuda:
            find_triton()
        self.watch.folder = output.absolute().parent
        captured = self.capture(source, args, kwargs, shapes, entries, inputs)
        references = [reference_of(program) for program in captured] if self.options.verify != "off" else []
        programs, records = self.rewrite(captured)
        if self.options.stop_after is not None:
            return Artifact(output, self.seconds, records)
        for device, rewritten in programs.items():
            require_supported(rewritten, device)
        with self._phase("tune" if self.options.tune else "lower") as detail:
            generated = generate(programs, self.options.products, self._tuner(compiler, detail), self._vector_bits)
        if self.options.dump_dir is not None and generated.convolutions:
            (self.options.dump_dir / "convolutions.txt").write_text(show_decisions(generated.convolutions))
        binaries = []
        with self._phase("kernels") as detail:
            if compiler is not None:
                binaries += build_kernels(generated, chosen.cpu, compiler, user_cache(), detail)
            if chosen.cuda:
                binaries += build_gpu_kernels(generated, chosen.cuda, user_cache(), detail, self.options.ptx)
        errors: list[OutputError] = []
        with self._phase("write") as detail:
            info = self._info(source, programs, generated, records)
            path = write_artifact(
                output, plans={device: code.plans for device, code in generated.devices.items()},
                constants=generated.constants, targets=binaries, sources=triton_sources(generated), info=info,
                copies=self.copies,
                progress=lambda done, total: detail(f"{done >> 20} of {total >> 20} MiB"),
                check=lambda folder: self._check(folder, references, programs, errors),
            )  # fmt: skip
        return Artifact(path, self.seconds, records, errors)

    def capture(
        self, source: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, shapes: Any = None,
        entries: Mapping[str, Entry] | None = None, inputs: str | Path | None = None,
    ) -> list[Program]:  # fmt: skip
        """Stage one: the source as one program per entry point."""
        chosen = self.targets  # refuse unknown ones before the source is read
        if self.options.tune:
            tuned_target(chosen.cpu, features())
        self.options.check(device_kinds(self.options.target))
        with self._phase("capture"):
            opened = load_source(source, self.options.task, self._cache_type)
            if isinstance(opened, Loaded):
                self.source_info, self.copies = dict(opened.info), dict(opened.files)
                self.mapped = opened.mapped
            programs = open_source(opened, args, kwargs, shapes, entries, inputs)
        self.precision = {
            device: precision_on(device, self.options.precision, programs, self.targets.cpu)
            for device in device_kinds(self.options.target)
        }
        return programs

    def rewrite(self, captured: Sequence[Program]) -> tuple[Rewritten, dict[str, list[PassRecord]]]:
        """Stage two: all passes over a copy of every program for each kind of device; what they did by plan name."""
        programs: Rewritten = {}
        records = {}
        devices = device_kinds(self.options.target)
        with self._phase("passes") as detail:
            for device in devices:
                programs[device] = [reference_of(program) for program in captured]
                for program in programs[device]:
                    folder = self.options.dump_dir
                    if folder is not None:
                        folder = folder / device if len(devices) > 1 else folder
                        folder = folder / program.name if len(captured) > 1 else folder
                    recipe, precision = self.options.recipe(device), self.precision[device]
                    manager = PassManager(
                        pipeline(fusion_roles(device), device, precision, recipe, self.ledger), dump_dir=folder,
                        verify=self.options.verify == "passes", disabled=self.options.disable_passes,
                        stop_after=self.options.stop_after, precision=precision, progress=detail,
                        before_approximate=partial(self._keep, device=device),
                    )  # fmt: skip
                    records[plan_name(program.name, device)] = manager.run(program)
                self.watch.follow(programs[device])
        return programs, records

    def _keep(self, program: Program, device: str) -> None:
        """Keep what passes and kernels are verified against where weights are quantized."""
        if self.options.verify != "off":
            self.annotated.setdefault(device, []).append(reference_of(program))

    def check(self, programs: Rewritten) -> list[Unsupported]:
        """What of rewritten programs cannot be compiled; lowers them to find what operators alone do not tell."""
        found = [item for device, each in programs.items() for item in find_unsupported(each, device)]
        if not found:
            generate(programs, self.options.products, vector_bits=self._vector_bits)
        return found

    def _cache_type(self, dtype: torch.dtype) -> torch.dtype:
        """The type of cached keys and values for weights of a type."""
        options, devices = self.options, device_kinds(self.options.target)
        return cache_type(options.task.cache, options.precision, dtype, devices, self.targets.cpu)

    @property
    def _vector_bits(self) -> int:
        """Of the CPU target with the widest vectors."""
        return max((target.vector_bits for target in self.targets.cpu), default=0)

    def _tuner(self, compiler: Compiler | None, detail: Callable[[str], None]) -> Tuner | None:
        """Who measures kernels, where that was asked for."""
        if not self.options.tune or compiler is None:
            return None
        return Tuner(tuned_target(self.targets.cpu, features()), compiler, user_cache(), detail)

    def _check(
        self, path: Path, references: Sequence[Program], lowered: Rewritten, errors: list[OutputError]
    ) -> dict[str, Any]:
        """Verify the finished artifact; how that was done goes into its manifest where a GPU may not have been here."""
        found: dict[str, Any] = {}
        if references:
            here = {device: not why_not_here(path, device) for device in lowered}
            errors += self.verify(path, references, lowered, here)
            if "cuda" in lowered:
                found["verification"] = {"cuda": {"device_run": here["cuda"]}}
        recipe = self.options.recipe(next(iter(lowered)))
        if recipe is not None:
            found["quantization"] = {
                "asked": recipe.text, "activations": self.options.activations,
                "layers": describe([self.ledger], self.watch.errors), "deviation": self.deviations,
            }  # fmt: skip
        return found

    def verify(
        self, path: Path, references: Sequence[Program], lowered: Rewritten, here: Mapping[str, bool]
    ) -> list[OutputError]:
        """The artifact against eager PyTorch, before it takes its place.

        Args:
            path: the complete artifact.
            references: the programs before all passes.
            lowered: the programs after them, by kind of device.
            here: the kinds of device whose code can be run here. Of the others the program after the passes is run, in
                eager PyTorch.

        Raises:
            NumericsError: lists the outputs beyond their tolerance, and what goes wrong first.
        """
        errors: list[OutputError] = []
        with self._phase("verify") as detail:
            expected = {
                device: self.expect(device, references, programs, here[device], detail)
                for device, programs in lowered.items()
            }
            for each in expected.values():
                for one in each:
                    require_equal(one.passes, A_PASS)
            # The source's weights have served; the artifact's come into memory now.
            self.release()
            for device, each in expected.items():
                if not here[device]:
                    errors += [error for one in each for error in one.passes]
                    continue
                with load(path, device=device) as model:
                    weights = model.artifact.weights_path
                    large = device == "cpu" and weights.stat().st_size > LARGE
                    between = partial(release, [weights]) if large else None
                    for one in each:
                        detail(plan_name(one.lowered.name, device))
                        errors += require_right(model.entry(one.lowered.name), one, between)
        return errors

    def expect(
        self, device: str, references: Sequence[Program], lowered: Sequence[Program], runs: bool = True,
        detail: Callable[[str], None] = lambda name: None,
    ) -> list[Expected]:  # fmt: skip
        """What the entry points of an artifact are to compute on a kind of device, by eager PyTorch.

        Args:
            device: the kind of device.
            references: the programs before all passes.
            lowered: the programs after them.
            runs: whether the device is here.
            detail: called with the plan that is at work.
        """
        found = []
        annotated = self.annotated.get(device, [])
        for number, (reference, program) in enumerate(zip(references, lowered, strict=True)):
            detail(f"{plan_name(reference.name, device)} in PyTorch")
            self.watch.quantize(program)
            before = annotated[number] if annotated else None
            precision = self.precision[device]
            found.append(expect(reference, program, device, precision, before, self.watch, runs, self.release))
            if before is not None:
                self.deviations.setdefault(reference.name, found[-1].deviation)
        return found

    def release(self) -> None:
        """Give back the memory of weights that are mapped from files."""
        release(self.mapped)
        self.watch.release()

    def _info(
        self, source: Any, programs: Rewritten, generated: Generated, records: Mapping[str, list[PassRecord]]
    ) -> dict[str, Any]:
        """What ``inspect`` shows beside the plan; but for ``--tune`` nothing that differs between machines or runs."""
        pairs = [
            (plan_name(plan.entry, device), plan, program)
            for device, code in generated.devices.items()
            for plan, program in zip(code.plans, programs[device], strict=True)
        ]
        tuned = {"tuned": generated.tuned.describe()} if generated.tuned is not None else {}
        more = tuned | self.source_info
        return more | {
            "source": _source_name(source),
            "torch": torch.__version__.split("+")[0],
            "precision": {"requested": self.options.precision, "applied": applied(programs, self.precision)},
            "disabled_passes": sorted(self.options.disable_passes),
            "passes": {
                name: [
                    {
                        "pass": record.label,
                        "rewrites": len(record.report.changes),
                        "refusals": len(record.report.refusals),
                    }
                    for record in entry
                ]
                for name, entry in records.items()
            },
            "memory": {name: _memory(plan, sample_sizes(program)) for name, plan, program in pairs},
        }

    @contextmanager
    def _phase(self, name: str) -> Any:
        """Time of a phase, without that of the phases inside it."""
        self._progress(name, "")
        self.seconds.setdefault(name, 0.0)
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield lambda detail: self._progress(name, str(detail))
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[name] += time.perf_counter() - start - inside


def _source_name(source: Any) -> str:
    """The source in words that are the same on every machine."""
    if isinstance(source, str | Path):
        return Path(source).name if Path(source).exists() else str(source)
    return type(source).__name__


def _memory(plan: Plan, sample: Mapping[str, int]) -> dict[str, Any]:
    """Scratch memory at the smallest, the sample's and the largest sizes."""
    table = {
        "smallest": {symbol.name: symbol.minimum for symbol in plan.symbols},
        "sample": dict(sample),
        "largest": {symbol.name: symbol.maximum for symbol in plan.symbols},
    }
    return {
        name: {"sizes": sizes, **vars(measure(plan.buffers, sizes))}
        for name, sizes in table.items()
        if sizes or name == "sample"
    }
