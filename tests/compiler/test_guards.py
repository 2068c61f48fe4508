"""Relations between sizes: read from the text that PyTorch gives, and kept where they exclude something."""

import pytest
import sympy

from tilewright.compiler.guards import essential, holds, parse_guard
from tilewright.runtime.errors import SourceError


def test_guard_text_is_parsed_without_eval():
    n, m = sympy.symbols("n m", integer=True, positive=True)
    sizes = {("L['x']", 0): n, ("L['d']['a'][0]", 1): m}
    parse = lambda code: parse_guard(code, lambda path, axis: sizes[path, axis])  # noqa: E731
    (relation,) = parse("((3*L['x'].size()[0]) % 24) == 0")
    assert holds(relation, {n: 8}) and not holds(relation, {n: 9})
    low, high = parse("2 <= L['x'].size()[0] and L['x'].size()[0] <= torch.sym_max(1, L['d']['a'][0].size()[1] // 2)")
    assert holds(low, {n: 2}) and holds(high, {n: 4, m: 8}) and not holds(high, {n: 5, m: 8})
    for code in (
        "__import__('os')",
        "L['x'].size()[0] == open('f')",
        "L['x'].stride()[0] == 1",
        "L['y'].size()[0] == 1",
    ):
        with pytest.raises(SourceError, match="cannot be checked"):
            parse(code)


def test_only_guards_that_exclude_something_are_kept():
    n, m = sympy.symbols("n m", integer=True, positive=True)
    ranges = {n: (1, 16), m: (1, 16)}
    assert essential([sympy.Le(n, 16), sympy.Ne(n, 1), sympy.Ne(n, 0), sympy.true], ranges) == ()
    assert essential([sympy.Le(n, 8), sympy.Le(n, 9)], ranges) == (sympy.Le(n, 8),)
    assert essential([sympy.Ne(n, 3), sympy.Eq(n, m)], ranges) == (sympy.Eq(n, m), sympy.Ne(n, 3))
    with pytest.raises(SourceError, match="no size in the declared ranges"):
        essential([sympy.Gt(n, 16)], ranges)
