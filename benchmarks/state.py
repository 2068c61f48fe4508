"""The state of a benchmark: one JSON file with what was measured, so that a run goes on where one ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


class OtherMachine(Exception):
    """The state was measured on another machine, or with other versions: its numbers cannot be compared."""


@dataclass
class State:
    """What was measured so far.

    Attributes:
        path: of the file, which is replaced after every unit.
        machine: processor or GPU, and versions.
        results: of every unit that was run: its numbers, or ``{"error": text}``.
    """

    path: Path
    machine: dict[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, machine: Mapping[str, Any]) -> State:
        """The state in the file, or a new one.

        Raises:
            OtherMachine: the file is of another machine or format; it is left as it is.
        """
        if not path.exists():
            return State(path, dict(machine))
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT or data["machine"] != dict(machine):
            raise OtherMachine(
                f"{path} holds measurements of {describe(data.get('machine', {}))}; name another --state"
            )
        return State(path, data["machine"], data["results"])

    def has(self, unit: str, *, retry: bool = False) -> bool:
        """Whether a unit is done; one that failed counts unless it is to be tried again."""
        return unit in self.results and not (retry and "error" in self.results[unit])

    def record(self, unit: str, result: Mapping[str, Any]) -> None:
        """Keep a unit's result, also if the process ends right after."""
        self.results[unit] = dict(result)
        text = json.dumps({"format": FORMAT, "machine": self.machine, "results": self.results}, indent=1) + "\n"
        aside = self.path.with_suffix(".tmp")
        aside.write_text(text)
        os.replace(aside, self.path)


def describe(machine: Mapping[str, Any]) -> str:
    """A machine in a few words."""
    return ", ".join(f"{key} {value}" for key, value in machine.items()) or "an unknown machine"
