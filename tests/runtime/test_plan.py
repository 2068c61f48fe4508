"""Reading plans: what is written comes back, and everything that is wrong is refused with file and field."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from tilewright.runtime import sizes
from tilewright.runtime.errors import ArtifactError
from tilewright.runtime.plan import Buffer, from_json, place, to_json


@pytest.fixture
def data(changed_plan) -> dict[str, Any]:
    return json.loads(json.dumps(to_json(changed_plan())))


def refused(data: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        from_json(data, "plan/main.json")
    message = str(caught.value)
    assert message.startswith("plan/main.json: ")
    return message.removeprefix("plan/main.json: ")


def change(data: Any, path: str, value: Any) -> Any:
    """A copy with the value at a path such as ``steps.0.name`` replaced."""
    changed = place_in = copy.deepcopy(data)
    *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parts:
        place_in = place_in[part]
    place_in[last] = value
    return changed


def test_round_trip(changed_plan, data):
    assert from_json(data) == changed_plan()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("entry", "no-identifier", "entry: 'no-identifier' is not an identifier"),
        ("entry", "naïve", "entry: 'naïve' is not an identifier"),
        ("entry", 5, "entry: expected str, got 5"),
        ("symbols.0.minimum", True, "symbols[0].minimum: expected int, got True"),
        ("symbols.0.minimum", 1.0, "symbols[0].minimum: expected int, got 1.0"),
        ("symbols.0.minimum", 65, "symbols[0]: expected 0 <= minimum <= sample <= maximum"),
        ("symbols.0.minimum", -1, "symbols[0]: expected 0 <= minimum"),
        ("symbols.0.maximum", 2**60, "symbols[0]: expected 0 <= minimum"),
        ("symbols.0.sample", 0, "symbols[0]: expected 0 <= minimum <= sample"),
        ("symbols.0.input", 2, "symbols[0].input: there is no input 2"),
        ("symbols.0.axis", 2, "symbols[0].axis: input 0 has no axis 2"),
        ("symbols.0.axis", 1, "symbols[0].axis: the size of that axis is not n"),
        ("symbols.0.factor", 0, "symbols[0].factor: expected a positive factor"),
        ("inputs.0.dtype", "float33", "inputs[0].dtype: unknown dtype 'float33'"),
        ("inputs.0.shape.1", "m", "inputs[0].shape[1]: unknown symbol 'm'"),
        ("inputs.0.shape.1", -8, "inputs[0].shape[1]: negative size -8"),
        ("inputs.0.shape.1", ["pow", 2, 3], "inputs[0].shape[1]: not a size expression"),
        ("inputs.0.shape.1", ["max", 2, 3, 4], "inputs[0].shape[1]: size operation 'max' takes two operands"),
        ("inputs.0.shape.1", "__import__('os')", "inputs[0].shape[1]: not a size expression"),
        ("inputs.1.name", "x", "inputs[1].name: 'x' occurs twice"),
        ("inputs.1.name", "", "inputs[1].name: '' is not a usable name"),
        ("inputs.1.name", "a\x1b[2J", "inputs[1].name"),
        ("inputs", {}, "inputs: expected a list, got {}"),
        ("results", {"output": 1}, "results: there is no output 1"),
        ("results", {"output": True}, "results: there is no output True"),
        ("results", {"tuple": [{"output": 0}, {"list": [{"size": "m"}]}]}, "results.tuple[1].list[0]: unknown symbol"),
        ("results", {"size": ["add", 1]}, "results: not a size expression"),
        ("results", {"constant": [1]}, "results: a constant result is"),
        ("results", {"pickle": "gAS="}, "results: unknown or malformed result 'pickle'"),
        ("results", {}, "results: expected one of"),
        ("results", None, "results: expected one of"),
        ("checks.0.condition", "q", "checks[0].condition: unknown symbol 'q'"),
        ("constants.0.offset", 63, "constants[0].offset: expected a non-negative multiple of 64, got 63"),
        ("constants.0.offset", -64, "constants[0].offset: expected a non-negative multiple of 64"),
        ("constants.0.bytes", 127, "constants[0].bytes: expected 128 for its dtype and shape, got 127"),
        ("constants.0.shape.0", -8, "constants[0].shape: negative size"),
        ("constants.1.name", "w", "constants[1].name: 'w' occurs twice"),
        ("buffers.0.first", 1, "steps[0].variants[0].operands[2]: buffer 0 lives from step 1 to 1 only"),
        ("buffers.0.last", 2, "buffers[0]: expected 0 <= first <= last < 2 steps, got 0, 2"),
        ("buffers.0.below", [0], "buffers[0].below: the order of the buffers has a cycle"),
        ("buffers.0.below", [1], "buffers[0].below: there is no buffer 1"),
        ("buffers.0.bytes", ["add", "n", -2], "buffers[0].bytes: may be negative"),
        ("buffers.0.bytes", ["floordiv", "n", 0], "buffers[0].bytes: may divide by zero"),
        ("buffers.0.bytes", "k", "buffers[0].bytes: unknown symbol 'k'"),
        ("steps.0.variants", [], "steps[0].variants: a step needs a variant"),
        ("steps.0.variants.1.guard", "n", "steps[0].variants[1].guard: the last variant's guard must be 1"),
        ("steps.0.variants.0.guard", "z", "steps[0].variants[0].guard: unknown symbol 'z'"),
        ("steps.0.variants.0.kernel", "rm -rf", "steps[0].variants[0].kernel: 'rm -rf' is not an identifier"),
        ("steps.0.variants.0.sizes.0", "z", "steps[0].variants[0].sizes[0]: unknown symbol 'z'"),
        ("steps.0.variants.0.operands.0.kind", "weight", "steps[0].variants[0].operands[0].kind: expected one of"),
        ("steps.0.variants.0.operands.0.kind", ["input"], "steps[0].variants[0].operands[0].kind: expected one of"),
        ("steps.0.variants.0.operands.0.index", 2, "steps[0].variants[0].operands[0]: there is no input 2"),
        ("steps.0.variants.0.operands.0.index", -1, "steps[0].variants[0].operands[0]: there is no input -1"),
        ("steps.0.writes", [3], "steps[0].writes: variant 0 has no operand 3"),
        ("steps.0.writes", [1], "steps[0].writes: operand 1 is read-only: constant"),
        ("steps.0.origin", None, "steps[0].origin: expected an object, got None"),
        ("steps.0.origin.nodes.0", 1, "IndexError"),
    ],
)
def test_refuses(data, path, value, expected):
    if expected == "IndexError":
        data["steps"][0]["origin"]["nodes"] = [value]
        expected = "steps[0].origin.nodes[0]: expected str, got 1"
        changed = data
    else:
        changed = change(data, path, value)
    assert expected in refused(changed)


def test_refuses_missing_and_unknown_fields(data):
    for name in list(data):
        assert refused({key: value for key, value in data.items() if key != name}) == f"missing field '{name}'"
    assert refused({**data, "comment": 1}) == "unknown field 'comment'"
    del data["steps"][1]["variants"][0]["units"]
    assert refused(data) == "steps[1].variants[0]: missing field 'units'"


@pytest.mark.parametrize("value", [None, [], "plan", 5])
def test_refuses_what_is_no_object(value):
    assert refused(value).startswith("expected an object")


def test_refuses_deep_nesting(data):
    size: Any = "n"
    for _ in range(100_000):
        size = ["add", size, 1]
    data["steps"][0]["variants"][0]["units"] = size
    assert refused(data) == "nested too deeply to be a plan"


def test_every_value_of_another_type_is_refused_or_harmless(data):
    """Whatever a field is replaced with, reading gives a plan or an ArtifactError, never another exception."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)

    def spots(node: Any, path: tuple[Any, ...] = ()):
        yield path
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            yield from spots(child, (*path, key))

    for path in list(spots(data))[1:]:
        for value in rng.sample([None, True, -1, 0, 1, 3, 2**70, 0.5, "", "x", "n", [], [0], ["add"], {}, {"x": 1}], 6):
            changed = copy.deepcopy(data)
            node = changed
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = value
            try:
                from_json(changed)
            except ArtifactError:
                continue


def scratch(first: int, last: int, below: tuple[int, ...] = (), count: sizes.Size = 10) -> Buffer:
    return Buffer(f"b{first}_{last}_{below}", "int8", (count,), "rows", count, first, last, below)


def with_buffers(changed_plan, buffers: list[Buffer]) -> Any:
    steps = changed_plan().steps
    last = max(buffer.last for buffer in buffers)
    steps = [{**to_json(steps[1]), "variants": []} for _ in range(last + 1)]
    for step in steps:
        step["writes"] = []
        step["variants"] = [{**to_json(changed_plan().steps[1].variants[0]), "operands": []}]
    return {**to_json(changed_plan()), "buffers": to_json(buffers), "steps": steps}


def test_arena_order_may_be_indirect(changed_plan):
    from_json(with_buffers(changed_plan, [scratch(0, 1), scratch(0, 1, (0,)), scratch(1, 2, (1,))]))


def test_arena_order_must_cover_every_pair(changed_plan):
    plan = with_buffers(changed_plan, [scratch(0, 1), scratch(0, 1, (0,)), scratch(1, 2, (0,))])
    assert refused(plan) == "buffers[2].below: lives while buffer 1 does and is not ordered with it"
    from_json(with_buffers(changed_plan, [scratch(0, 1), scratch(2, 2)]))


def test_arena_order_cycle(changed_plan):
    plan = with_buffers(changed_plan, [scratch(0, 0, (2,)), scratch(0, 0, (0,)), scratch(0, 0, (1,))])
    assert "cycle" in refused(plan)


def test_place():
    buffers = (scratch(0, 2, (), "n"), scratch(0, 1, (0,), 65), scratch(1, 2, (1, 0), sizes.mul("n", 64)))
    assert place(buffers, {"n": 1}) == ([0, 64, 192], 256)
    assert place(buffers, {"n": 65}) == ([0, 128, 256], 256 + 65 * 64)
    assert place((), {}) == ([], 0)


def test_long_chains_are_no_problem(changed_plan):
    """A deep model's arena order is as long as the model: neither recursion nor quadratic work."""
    count = 6000
    buffers = [scratch(index, index + 1, (index - 1,) if index else ()) for index in range(count)]
    plan = from_json(with_buffers(changed_plan, buffers))
    offsets, total = place(plan.buffers, {"n": 2})
    assert offsets[-1] == (count - 1) * 64
    assert total == count * 64
