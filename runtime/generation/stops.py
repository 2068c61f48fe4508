"""Stop strings: found across the borders of tokens, while text that may begin one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Watches a stream of text for the first stop string that is complete.

    Characters are looked at one by one, so what is found does not depend on how the text was cut into pieces. A
    character costs constant time per stop string (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for any of these strings, none of them empty."""
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take in more text.

        Returns:
            The text that can be shown now, and the stop string that was found. If several end at the same character,
            the longest counts. Once one is found nothing more may be pushed.
        """
        if not self._stops:
            return text, None
        start = len(self._held)
        held = self._held + text
        for place in range(start, len(held)):
            found = self._advance(held[place])
            if found is not None:
                self._held = ""
                return held[: place + 1 - len(found)], found
        keep = len(held) - max(self._matched)
        self._held = held[keep:]
        return held[:keep], None

    def finish(self) -> str:
        """The text that is still held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for index, (stop, borders) in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                found = stop if found is None or len(stop) > len(found) else found
                matched = borders[matched - 1]
            self._matched[index] = matched
        return found


def _borders(text: str) -> list[int]:
    """For every prefix, the length of the longest shorter prefix that is also its end."""
    borders = [0] * len(text)
    matched = 0
    for place in range(1, len(text)):
        while matched and text[matched] != text[place]:
            matched = borders[matched - 1]
        if text[matched] == text[place]:
            matched += 1
        borders[place] = matched
    return borders
