"""Stop strings across the borders of pieces."""

from __future__ import annotations

import random

import pytest

from tilewright.runtime.generation.stops import StopFinder


def pushed(stops, pieces):
    """Text shown per piece, the stop that was found, and what was held at the end."""
    finder = StopFinder(stops)
    shown = []
    for piece in pieces:
        text, found = finder.push(piece)
        shown.append(text)
        if found is not None:
            return shown, found, finder.finish()
    return shown, None, finder.finish()


def test_text_that_may_begin_a_stop_is_held_back():
    assert pushed(["END"], ["aE", "N", "x"]) == (["a", "", "ENx"], None, "")
    assert pushed(["END"], ["aE", "N", "Dx"]) == (["a", "", ""], "END", "")
    assert pushed(["END"], ["aE", "N"]) == (["a", ""], None, "EN")
    assert pushed(["\n\n"], ["a\n", "b\n", "\nc"]) == (["a", "\nb", ""], "\n\n", "")


def test_a_stop_inside_one_piece():
    assert pushed(["b", "abc"], ["xabcd"]) == (["xa"], "b", "")
    assert pushed(["bc", "abc"], ["xabcd"]) == (["x"], "abc", "")


def test_without_stops_nothing_is_held():
    assert pushed([], ["a", "b"]) == (["a", "b"], None, "")


def reference(stops, text):
    """The text before the stop that ends first, and the stop; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("seed", range(10))
def test_pieces_do_not_matter(seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(200):
        stops = ["".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(chance.randint(1, 3))]
        stops = [stop + chance.choice(["", "c"]) for stop in stops]
        text = "".join(chance.choices("abc", k=chance.randint(0, 25)))
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        shown, found, held = pushed(stops, pieces)
        assert ("".join(shown) + held, found) == reference(stops, text), (stops, pieces)
        for place in range(len(shown)):  # what was shown was never more than could be known
            known = "".join(pieces[: place + 1])
            assert reference(stops, known)[0].startswith("".join(shown[: place + 1]))
