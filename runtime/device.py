"""What a kind of device is to the rest of the runtime: where an artifact's plans run.

A model has one device. The device chooses the target that fits it, holds what all calls share (code, weights), makes
workspaces (what one call at a time needs: arena, states) and entry points, whose calls take a workspace each. Models,
sessions and the pool of workspaces are the same for all devices and know nothing else of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from .entry import Entry, Source
from .plan import Plan


class AnyWorkspace(Protocol):
    """The working memory of one call at a time."""

    def reset(self, entry: str) -> None:
        """Set the states of an entry point to their initial values."""

    def close(self) -> None:
        """Let go of the memory; twice does nothing."""


W = TypeVar("W", bound=AnyWorkspace)


class Device(ABC, Generic[W]):
    """A device with the code and the weights of one artifact.

    Making one validates first and allocates then; when it fails, nothing is left allocated. It must hold no reference
    to the model, so that the last reference to a model frees all of it.

    Attributes:
        name: as ``load(device=...)`` takes it, such as ``"cpu"``, ``"cuda:0"``, ``"interpreter"``.
        target: of the artifact, such as ``"cuda:sm_90"``.
        plans: those that run here, by entry point in order.
        limit: calls that may run at once; each takes a workspace.
        threads: processor threads that a call may use.
    """

    name: str
    target: str
    plans: Mapping[str, Plan]
    limit: int
    threads: int = 1

    @abstractmethod
    def workspace(self, sizes: Mapping[str, int]) -> W:
        """New working memory, with all states as they are initially.

        Args:
            sizes: of the states, a value for each that varies (``state_sizes.py``).
        """

    @abstractmethod
    def entry(self, name: str, source: Source[W]) -> Entry[W]:
        """An entry point of :attr:`plans` whose calls run on workspaces of a source.

        A call takes a workspace, resets the entry point's states if the source is ``fresh``, runs and gives it back.
        """

    def synchronize(self) -> None:
        """Wait for calls that returned before they were done, and raise what they met; here, there are none."""
        return

    @abstractmethod
    def close(self) -> None:
        """Free everything, workspaces that still exist included; no call is running, and none starts after."""

    @abstractmethod
    def __str__(self) -> str:
        """The target and what else tells devices apart, as a model's representation shows them."""
