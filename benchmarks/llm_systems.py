"""How each system of the benchmark of language models runs steps: ``open_decoder(contender, ...)``.

All have the same processors and threads. Each imports its own system only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .llm_units import PROMPT, ROOM, Contender, Dimensions, tokens

POSITIONS = PROMPT + ROOM
"""A sequence has room for so many."""


class Decoder(Protocol):
    """A loaded model with a cache for several sequences."""

    def append(self, new: Sequence[Sequence[int]], at: int) -> np.ndarray:
        """Run one step in which sequence s gets the tokens ``new[s]``, which go to its positions ``at`` and following.

        Gives the logits float32 [sequences, vocabulary] of every sequence's last token.
        """
        ...

    def rewind(self, sequences: int, positions: int) -> None:
        """Forget all but the first positions of the first sequences; new ones get those of sequence 0."""
        ...

    def facts(self) -> dict[str, Any]:
        """``weight_bytes`` that a step reads, ``cache_bytes`` of one position and ``cache_total`` that is held."""
        ...


def open_decoder(contender: Contender, dimensions: Dimensions, folder: Path, threads: int, sequences: int) -> Decoder:
    """Load a contender's artifact from a folder, with a cache for so many sequences."""
    return SYSTEMS[contender.system](contender.format, dimensions, folder, threads, sequences)


class LlamaCpp:
    """llama.cpp through the low-level functions of llama-cpp-python; the cache is float16, as by default."""

    def __init__(self, format: str, dimensions: Dimensions, folder: Path, threads: int, sequences: int) -> None:
        import ctypes
        import logging
        import os

        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self.path, self.api, self.dimensions = folder / f"model.{format}.gguf", llama_cpp, dimensions
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {self.path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = POSITIONS * sequences
        params.n_batch = params.n_ubatch = max(512, sequences)
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no memory for {sequences} sequences of {self.path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self.logits = ctypes.POINTER(ctypes.c_float)

    def append(self, new: Sequence[Sequence[int]], at: int) -> np.ndarray:
        """One call of ``llama_decode``."""
        batch, count = self.batch, 0
        last = []
        for sequence, given in enumerate(new):
            for place, token in enumerate(given):
                batch.token[count], batch.pos[count] = token, at + place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = place == len(given) - 1
                count += 1
            last.append(count - 1)
        batch.n_tokens = count
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        rows = [self.api.llama_get_logits_ith(self.context, index) for index in last]  # waits for the result
        return np.stack([np.ctypeslib.as_array(row, (self.dimensions.vocabulary,)) for row in rows])

    def rewind(self, sequences: int, positions: int) -> None:
        """Copy sequence 0 where another has less, and cut all."""
        api, memory = self.api, self.memory
        api.llama_memory_seq_rm(memory, 0, positions, -1)
        for sequence in range(1, sequences):
            if api.llama_memory_seq_pos_max(memory, sequence) < positions - 1:
                api.llama_memory_seq_rm(memory, sequence, -1, -1)
                api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
            api.llama_memory_seq_rm(memory, sequence, positions, -1)

    def facts(self) -> dict[str, Any]:
        """From the file, and llama.cpp's own words on what it was built for."""
        from .llm_gguf import weight_bytes

        system = self.api.llama_print_system_info().decode()
        width = 2  # bytes of a float16
        return {
            "weight_bytes": weight_bytes(self.path),
            "cache_bytes": width * self.dimensions.cache_values(1),
            "cache_total": width * self.dimensions.cache_values(self.api.llama_n_ctx(self.context)),
            "built_for": " ".join(system.split()),
        }


class Tilewright:
    """A session of an artifact's step; blocks of the cache belong to sequences in order."""

    def __init__(self, format: str, dimensions: Dimensions, folder: Path, threads: int, sequences: int) -> None:
        import tilewright
        from tilewright.runtime.generation.description import describe

        self.dimensions = dimensions
        self.model = tilewright.load(folder / f"model.{format}.tw", threads=threads)
        self.generation = describe(self.model.artifact)
        self.block = self.generation.block
        self.width = -(-POSITIONS // self.block)
        self.blocks = self.width * sequences
        self.session = self.model.session(sizes={"blocks": self.blocks})
        self.step = self.session.entry(self.generation.entry)
        self.table = np.arange(self.blocks, dtype=np.int32).reshape(sequences, self.width)
        self.filled = 1

    def inputs(self, new: Sequence[Sequence[int]], at: int) -> dict[str, np.ndarray]:
        """What the step is given."""
        lengths = [len(given) for given in new]
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        contexts = np.array([at + length for length in lengths], np.int32)
        width = -(-int(contexts.max()) // self.block)
        return {
            "tokens": np.concatenate([np.asarray(given, np.int32) for given in new]),
            "positions": np.concatenate([np.arange(at, at + length, dtype=np.int32) for length in lengths]),
            "starts": ends,
            "contexts": contexts,
            "table": np.ascontiguousarray(self.table[: len(new), :width]),
            "rows": ends[1:] - 1,
        }

    def append(self, new: Sequence[Sequence[int]], at: int) -> np.ndarray:
        """One call of the step."""
        result = self.step(**self.inputs(new, at))
        logits: np.ndarray = result["logits"] if isinstance(result, dict) else result
        return logits

    def profile(self, new: Sequence[Sequence[int]], at: int, calls: int) -> list[dict[str, Any]]:
        """The kernels of a step that :meth:`append` would run, as ``tilewright bench`` has them."""
        from dataclasses import asdict

        from tilewright.compiler.cli.measure import profile_kernels

        given = self.inputs(new, at)
        sequences, width = given["table"].shape
        sizes = {"tokens": len(given["tokens"]), "sequences": sequences, "width": width, "rows": sequences}
        return [asdict(item) for item in profile_kernels(self.step, given, sizes | {"blocks": self.blocks}, calls)]

    def rewind(self, sequences: int, positions: int) -> None:
        """Nothing to forget: contexts say what is seen. Sequences that were never filled get their own prompt."""
        for sequence in range(self.filled, sequences):
            self._fill(sequence, positions)
        self.filled = max(self.filled, sequences)

    def _fill(self, sequence: int, positions: int) -> None:
        given = tokens(self.dimensions, positions)
        at = np.arange(positions, dtype=np.int32)
        starts, contexts = np.array([0, positions], np.int32), np.array([positions], np.int32)
        table = np.ascontiguousarray(self.table[sequence : sequence + 1])
        self.step(given, at, starts, contexts, table, np.array([positions - 1], np.int32))

    def facts(self) -> dict[str, Any]:
        """From manifest and plan; every weight but the table of embeddings is read by every step."""
        constants = self.step.plan.constants
        table = [item for item in constants if item.sources and all(map(is_table, item.sources))]
        if not table:
            raise RuntimeError(f"none of the weights is the table of embeddings: {[item.name for item in constants]}")
        return {
            "weight_bytes": sum(item.bytes for item in constants) - sum(item.bytes for item in table),
            "cache_bytes": self.generation.block_bytes // self.block,
            "cache_total": self.generation.block_bytes * self.blocks,
        }


def is_table(source: str) -> bool:
    """Whether a parameter is the table of embeddings."""
    return source.endswith(("embedding.weight", "embed_tokens.weight"))


SYSTEMS: dict[str, Any] = {"tilewright": Tilewright, "llama.cpp": LlamaCpp}
