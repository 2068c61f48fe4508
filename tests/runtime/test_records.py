"""What the runtime has instead of the standard library's slower parts: frozen records, digests, huge pages."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import subprocess
import sys

import pytest

from tilewright.runtime import digests, memory, sizes
from tilewright.runtime.records import field, frozen


@frozen
class Point:
    """A record."""

    x: int
    y: int = 2
    tags: tuple[str, ...] = field(default_factory=tuple)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The same, as the standard library makes it."""

    x: int
    y: int = 2
    tags: tuple[str, ...] = dataclasses.field(default_factory=tuple)


@pytest.mark.parametrize("kind", (Point, Reference))
def test_a_record_is_a_frozen_dataclass(kind):
    point = kind(1, tags=("a",))
    assert point == kind(1, 2, ("a",)) == kind(tags=("a",), y=2, x=1) and point != kind(1)
    assert hash(point) == hash(kind(1, 2, ("a",))) and len({point, kind(1), kind(1)}) == 2
    assert repr(point) == f"{kind.__name__}(x=1, y=2, tags=('a',))"
    assert dataclasses.replace(point, y=5) == kind(1, 5, ("a",)) and dataclasses.asdict(point)["tags"] == ("a",)
    assert copy.deepcopy(point) == point and [field.name for field in dataclasses.fields(kind)] == ["x", "y", "tags"]
    match point:
        case kind(x, y):
            assert (x, y) == (1, 2)
    for wrong in ((), (1, 2, (), 4)):
        with pytest.raises(TypeError):
            kind(*wrong)
    for wrong in ({"z": 1}, {"x": 2}):
        with pytest.raises(TypeError):
            kind(1, **wrong)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.x
    assert point.__eq__((1, 2, ("a",))) is NotImplemented


def test_size_expressions_are_values():
    one, two = sizes.Op("add", ("n", 1)), sizes.Op("add", ("n", 1))
    assert one == two and hash(one) == hash(two) and one != sizes.Op("add", ("n", 2)) and one != ("add", ("n", 1))
    assert copy.deepcopy(one) == one and repr(one) == "Op(op='add', args=('n', 1))"
    with pytest.raises(AttributeError):
        one.op = "mul"


@pytest.mark.parametrize("count", (0, 1, 1000, digests._MUCH + 1))
def test_digests_are_those_of_hashlib(count):
    content = bytes(range(256)) * (count // 256) + bytes(count % 256)
    assert digests.hexadecimal(content) == hashlib.sha256(content).hexdigest()
    assert digests._own(content).hexdigest() == hashlib.sha256(content).hexdigest()


def test_little_is_hashed_without_openssl():
    script = (
        "import sys; from tilewright.runtime import digests; digests.hexadecimal(b'x' * {}); print({!r} in sys.modules)"
    )
    for count, loaded in ((1000, "False"), (2 << 20, "True")):
        done = subprocess.run(
            [sys.executable, "-c", script.format(count, "_hashlib")], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == loaded


@pytest.mark.parametrize("count", (0, 100, (1 << 20) - 1, 1 << 20, (2 << 20) + 64, 5_000_000))
def test_scratch_memory_is_aligned_and_all_there(count):
    for made in (memory.scratch_bytes(count), memory.aligned_bytes(count), memory.Zeros(count).view):
        assert made.nbytes == count and not made.readonly and memory.address(made) % 64 == 0
        made[:] = b"7" * count
        assert bytes(made[-100:]) == b"7" * min(count, 100)


@pytest.mark.parametrize("count", (1, 1000, 2 << 20))
def test_zeros_are_zeros_again(count):
    zeros = memory.Zeros(count)
    for _ in range(2):
        assert bytes(zeros.view) == bytes(count)
        zeros.view[:] = b"7" * count
        zeros.clear()
