"""docs/operators.md says what the tables say."""

from pathlib import Path

from tilewright.codegen.registry import all_lowerings
from tilewright.compiler.operator_docs import text


def test_the_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "operators.md"
    listed = set(page.read_text().split("`"))
    missing = [name for name in set(text().split("`")) - listed if name.isidentifier() or "." in name.strip()]
    remedy = "run python -m tilewright.compiler.operator_docs > docs/operators.md"
    assert not [name for name in missing if " " not in name], remedy


def test_it_lists_every_lowering():
    page = text()
    assert all(str(target).removesuffix(".default") in page for target in all_lowerings())
