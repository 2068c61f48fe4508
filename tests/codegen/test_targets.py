import itertools

import pytest

from tilewright.codegen.targets import BASES, best, known, parse, parse_list
from tilewright.runtime.errors import UsageError

V3 = set(BASES[0].features)
V4 = set(BASES[1].features)


def test_names_are_canonical_and_parse_back():
    names = [target.name for target in known()]
    assert names == [
        "cpu:x86-64-v3",
        "cpu:x86-64-v4",
        "cpu:x86-64-v4+vnni",
        "cpu:x86-64-v4+bf16",
        "cpu:x86-64-v4+vnni+bf16",
    ]
    assert [parse(name, ()) for name in names] == list(known())


def test_extension_order_and_repetition_do_not_matter():
    spellings = ("cpu:x86-64-v4+bf16+vnni", "cpu:x86-64-v4+vnni+bf16+vnni")
    assert {parse(text, ()).name for text in spellings} == {"cpu:x86-64-v4+vnni+bf16"}


@pytest.mark.parametrize(
    "text",
    [
        "gpu",
        "cpu:",
        "cpu:x86-64-v2",
        "cpu:x86-64-v4+",
        "cpu:x86-64-v4+amx",
        "cpu:x86-64-v3+vnni",
        "cpu:aarch64",
        "",
        "v4",
    ],
)
def test_unknown_targets_list_the_known_ones(text):
    with pytest.raises(UsageError) as error:
        parse(text, V4)
    assert all(target.name in str(error.value) for target in known())


def test_cpu_is_the_best_of_this_machine():
    assert parse("cpu", V3).name == "cpu:x86-64-v3"
    assert parse("cpu", V4 | {"avx512_bf16"}).name == "cpu:x86-64-v4+bf16"
    assert parse("cpu", V4 | {"avx512_bf16", "avx512_vnni", "sse"}).name == "cpu:x86-64-v4+vnni+bf16"
    assert parse("cpu", V4 - {"avx512dq"}).name == "cpu:x86-64-v3"
    with pytest.raises(UsageError, match="lacks avx2, fma"):
        best(V3 - {"avx2", "fma"})


def test_a_stronger_target_needs_more():
    for weaker, stronger in itertools.pairwise(BASES):
        assert set(weaker.features) < set(stronger.features)


def test_list():
    assert [t.name for t in parse_list("cpu:x86-64-v4, cpu,cpu:x86-64-v3", V3)] == ["cpu:x86-64-v4", "cpu:x86-64-v3"]
    with pytest.raises(UsageError):
        parse_list(" , ", V3)
