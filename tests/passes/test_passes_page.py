"""docs/passes.md has a section for every pass, in the order of the pipeline, with the equation of its docstring."""

import inspect
import re
from pathlib import Path

import pytest

from tilewright.passes import canonicalize
from tilewright.passes.graph.quantization import read_recipe
from tilewright.passes.graph.roles import Roles
from tilewright.passes.pipeline import pipeline

PAGE = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()


def merged():
    """Each pass of any pipeline once, where it runs first; what only some have comes after its predecessor there."""
    found = {one.name: one for one in pipeline(Roles())}
    recipe = read_recipe("int8")
    for device, precision in (("cuda", "auto"), ("cuda", "bf16")):
        names = list(found)
        before = None
        for one in pipeline(Roles(), device, precision, recipe):
            if one.name not in found:
                names.insert(names.index(before) + 1 if before else 0, one.name)
                found[one.name] = one
            before = one.name if before is None or names.index(one.name) > names.index(before) else before
        found = {name: found[name] for name in names}
    return found


PASSES = merged()


def test_sections_follow_the_pipeline():
    assert re.findall(r"^## (\w+)$", PAGE, flags=re.M) == list(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_equations_are_those_of_the_docstrings(name):
    modules = [inspect.getmodule(type(PASSES[name]))]
    if name == "canonicalize":
        tables = ("VIEWS", "FACTORIES", "ARITHMETIC", "EINSUM", "PRODUCTS")
        rules = [rule for table in tables for found in getattr(canonicalize, table).values() for rule in found]
        modules += {inspect.getmodule(rule): None for rule in rules}
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for module in modules:
        equations = [part for part in inspect.getdoc(module).split("\n\n") if part.startswith("Before:")]
        assert equations, module
        for line in "\n".join(equations).splitlines():
            assert f"    {line}\n" in section, f"{module.__name__}: {line!r} is not in docs/passes.md"
