import itertools

import pytest

from tilewright.codegen.architectures import architecture, for_capability
from tilewright.codegen.targets import BASES, best, known, known_gpus, parse, parse_cpu, parse_list
from tilewright.runtime.cuda import probe
from tilewright.runtime.cuda.driver import DriverError
from tilewright.runtime.errors import UsageError
from tilewright.runtime.gpus import ARCHITECTURES, Gpu

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
        "sm_90",
        "cuda:",
        "cuda:sm_75",
        "cuda:sm_90a",
        "cuda:90",
    ],
)
def test_unknown_targets_list_the_known_ones(text):
    with pytest.raises(UsageError) as error:
        parse(text, V4)
    assert all(target.name in str(error.value) for target in (*known(), *known_gpus()))


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


# ---- GPUs ----


def test_gpu_names_parse_back():
    names = [target.name for target in known_gpus()]
    assert names == [f"cuda:sm_{number}" for number in (80, 86, 89, 90, 100, 120)]
    assert [parse(f" {name}", ()) for name in names] == list(known_gpus())
    assert {target.device for target in known_gpus()} == {"cuda"} and {target.device for target in known()} == {"cpu"}


def test_list_of_both_kinds():
    found = parse_list("cuda:sm_90,cpu,cuda:sm_80,cuda:sm_90", V3)
    assert [target.name for target in found] == ["cuda:sm_90", "cpu:x86-64-v3", "cuda:sm_80"]
    with pytest.raises(UsageError, match="unknown target 'cuda:sm_90'"):
        parse_cpu("cuda:sm_90", V3)


def test_architectures_are_plausible():
    assert architecture("sm_90").capability == 90 and architecture("sm_120").capability == 120
    with pytest.raises(UsageError, match="unknown GPU architecture 'sm_70'; there are sm_80, .*sm_120"):
        architecture("sm_70")
    for name, one in ARCHITECTURES.items():
        assert name == one.name == f"sm_{one.capability}"
        assert one.shared_limit == one.shared - 1024  # the driver keeps 1 KiB per program
        assert one.warps >= one.programs and one.registers // (32 * one.warps) >= 32
        assert one.exact == (one.major >= 9)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90")],
)
def test_the_best_for_a_capability(capability, name):
    assert for_capability(*capability).name == name


@pytest.mark.parametrize("capability", [(7, 5), (9, 1), (10, 3), (12, 1), (13, 0)])
def test_capabilities_that_nothing_fits(capability):
    with pytest.raises(UsageError, match="compute capability {}.{}, for which there is no".format(*capability)):
        for_capability(*capability)


def gpu(major, minor):
    return Gpu("a GPU", major, minor, 100, 1e9, 1e12, 1 << 34, 99 << 10, 1 << 25)


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with some GPUs, or one where asking for them fails."""

    def run(*present, problem=None):
        def answer():
            if problem is not None:
                raise problem
            return list(present)

        monkeypatch.setattr(probe, "gpus_present", answer)

    return run


def test_cuda_is_the_gpu_of_this_machine(machine):
    machine(gpu(9, 0), gpu(8, 0))
    assert parse("cuda", ()).name == "cuda:sm_90"
    machine(gpu(8, 7))
    assert parse("cuda", ()).name == "cuda:sm_86"


@pytest.mark.parametrize(
    ("present", "problem", "words"),
    [
        ((), None, "there is none to ask: this machine has no GPU.\n"),
        (
            (),
            UsageError("this machine has no NVIDIA driver."),
            "there is none to ask: this machine has no NVIDIA driver",
        ),
        ((), DriverError("cuInit", "CUDA_ERROR_UNKNOWN", "unknown"), "answered cuInit with CUDA_ERROR_UNKNOWN"),
        ((gpu(7, 5),), None, "compute capability 7.5"),
    ],
)
def test_cuda_without_a_gpu(machine, present, problem, words):
    machine(*present, problem=problem)
    with pytest.raises(UsageError) as error:
        parse("cuda", ())
    assert words in str(error.value) and "cuda:sm_90" in str(error.value)


def test_no_driver_is_asked_for_an_architecture_that_is_named(machine):
    machine(problem=AssertionError("asked"))
    assert parse("cuda:sm_80", ()).name == "cuda:sm_80"
