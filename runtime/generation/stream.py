"""A completion while it is made: an iterator over its pieces."""

from __future__ import annotations

from .completion import Completion, Piece
from .generator import Generator
from .request import Request


class Stream:
    """The pieces of one request, one per token, to be iterated over.

    Closing it, leaving its ``with`` block, or dropping it cancels the request and frees its blocks. If the request
    fails, its error is raised after the pieces before it.
    """

    def __init__(self, generator: Generator, request: Request, *, own: bool = False) -> None:
        """Watch a request of a generator, whose other requests go on meanwhile; ``own`` closes it with the stream."""
        self.request = request
        self._generator = generator
        self._own = own
        self._released = False

    @property
    def completion(self) -> Completion:
        """All that was generated so far; final once the stream has ended."""
        return self.request.completion()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        if self._released:
            raise StopIteration
        try:
            while not self.request.done:
                for request, piece in self._generator.step():
                    if request is self.request and piece is not None:
                        return piece
        except BaseException:
            self.close()
            raise
        self.close()
        if self.request.error is not None:
            raise self.request.error
        raise StopIteration

    def close(self) -> None:
        """Cancel the request, unless it has ended, and free its blocks."""
        if not self._released:
            self._released = True
            self._generator.cancel(self.request)
            if self._own:
                self._generator.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
