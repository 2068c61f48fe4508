"""The page of supported operators says what the tables say, on the PyTorch it was made with and on others."""

import re
from pathlib import Path

import pytest

from tilewright.compiler.frontends.onnx_ops.registry import OPERATORS
from tilewright.compiler.operator_docs import NO_KERNEL, documented_roles, exists, names_in, rewritten, text
from tilewright.passes.canonicalize import RULES

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"
COMMAND = "python -m tilewright.compiler.operator_docs > docs/operators.md"


@pytest.fixture(scope="module")
def sections():
    """Role or title of each part of the page → the operators it names."""
    parts = re.split(r"^### .*?(?:\(.* `(\w+)`\)|(Written differently) first)$", PAGE.read_text(), flags=re.M)
    found = {}
    for role, other, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        listing = body.split("## ONNX")[0].strip().split("\n\n")[-1]
        found[role or other] = names_in(listing)
    return found


def test_every_operator_is_listed_under_its_role(sections):
    for role, names in (*documented_roles().items(), ("Written differently", rewritten())):
        known_here = {name for name in sections[role] if exists(name)}
        assert known_here == names, f"{role}: run {COMMAND}"


def test_the_page_is_what_the_command_writes(sections):
    missing = {name for names in sections.values() for name in names if not exists(name)}
    if missing:
        pytest.skip(f"this PyTorch lacks {', '.join(sorted(missing))}")
    assert PAGE.read_text() == text(), f"run {COMMAND}"


def test_every_onnx_operator_is_on_the_page():
    named = set(re.findall(r"`([\w.]+)`", PAGE.read_text().split("## ONNX operators")[1]))
    assert {f"{domain}.{name}" if domain else name for domain, name in OPERATORS} <= named


@pytest.mark.parametrize(("name", "operator"), NO_KERNEL.items())
def test_what_has_no_kernel_still_has_none(name, operator):
    """Where this fails an operator has been added, and the list of what is missing is too long."""
    assert ("", name) in OPERATORS
    packet, _, overload = operator.partition(".")
    targets = {str(target) for target in RULES} | set().union(*documented_roles().values())
    assert f"aten.{packet}.{overload or 'default'}" not in targets
    assert exists(f"aten.{packet}.{overload or 'default'}")
