"""``compile --tune``: which kernel is kept given times, what is remembered and refused; one real measurement."""

import json
import warnings

import pytest
import torch
from click.testing import CliRunner

from tilewright.codegen.c import tuning
from tilewright.codegen.c.toolchain import Compiler, find_compiler
from tilewright.codegen.c.tuning import Candidates, Tuner, fastest, tuned_target
from tilewright.codegen.cache import Cache
from tilewright.codegen.kernel import NAME, KernelCode, Parameter
from tilewright.codegen.regions import Made
from tilewright.codegen.storage import Storage
from tilewright.codegen.targets import parse
from tilewright.compiler.cli import cli
from tilewright.compiler.driver import compile as compile_model
from tilewright.runtime import cpu
from tilewright.runtime.artifact import read_artifact
from tilewright.runtime.errors import UsageError
from tilewright.runtime.model import load

COMPILER = Compiler(("cc",), "gcc", "some compiler")
V3 = parse("cpu:x86-64-v3", ())
ARGUMENTS = (
    "(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end, int32_t *restrict fault)"
)


def code(choice, factor=1):
    """y[i] = factor * x[i], a hundred elements a unit, at dim[0] = n."""
    source = (
        f"#include <stdint.h>\nvoid {NAME}{ARGUMENTS} {{ const float *x = buf[0]; float *y = buf[1]; (void)fault;\n"
        f"for (int64_t i = begin * 100; i < end * 100 && i < dim[0]; i++) y[i] = {factor} * x[i]; }}\n"
    )
    parameters = (Parameter("x", ("n_n",), "float32"), Parameter("y", ("n_n",), "float32", written=True))
    return KernelCode("matmul", "scale", source, ("n_n",), "n_n", 0, 0, parameters, choice=choice)


def made(*choices, factor=1):
    codes = [code(choice, factor) for choice in choices]
    storages = (Storage("constant", ("n_n",), "float32"), Storage("buffer", ("n_n",), "float32"))
    return Made(codes[0], storages, others=tuple(codes[1:]))


class Times:
    """Stands for the machine: seconds by choice; counts what it was asked."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, candidates: Candidates):
        self.asked.append(candidates)
        return [self.seconds[one.choice] for one in candidates.codes]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"a": 2.0, "b": 1.0, "c": 1.5}, "b"),
        ({"a": 1.0, "b": 1.0}, "a"),
        ({"a": 1.01, "b": 1.0}, "a"),  # less than the noise
        ({"a": 1.03, "b": 1.0, "c": 1.0}, "b"),
    ],
)
def test_keeps_the_models_choice_unless_another_is_clearly_faster(seconds, best):
    assert fastest(seconds) == best
    tuner = Tuner(V3, COMPILER, None, measure=Times(**seconds))
    kept = tuner.choose(made(*seconds), {"n_n": 700})
    assert (kept.code.choice, kept.others) == (best, ())
    assert (tuner.tuned[0].chosen, tuner.tuned[0].best, tuner.tuned[0].seconds) == ("a", best, seconds)


def test_measures_a_kernel_once_for_each_size():
    times = Times(a=2.0, b=1.0)
    tuner = Tuner(V3, COMPILER, None, measure=times)
    for rows in (8, 8, 9):
        for unused in (1, 2):
            tuner.choose(made("a", "b"), {"n_n": rows, "n_other": unused})
    assert [asked.values for asked in times.asked] == [{"n_n": 8}, {"n_n": 9}]
    assert times.asked[0].constant == (True, False)
    alone = made("a")
    assert tuner.choose(alone, {"n_n": 8}) is alone and len(tuner.tuned) == 2


def test_remembers_by_content(tmp_path, monkeypatch):
    def measured(target=V3, compiler=COMPILER, **kwargs):
        times = Times(a=2.0, b=1.0)
        tuner = Tuner(target, compiler, Cache(tmp_path), measure=times)
        assert tuner.choose(made("a", "b", **kwargs), {"n_n": 8}).code.choice == "b"
        assert len(tuner.tuned) == 1
        return len(times.asked)

    assert [measured(), measured()] == [1, 0]
    assert measured(factor=2) == 1, "another source"
    assert measured(target=parse("cpu:x86-64-v4", ())) == 1, "another target"
    assert measured(compiler=Compiler(("cc",), "gcc", "another")) == 1
    monkeypatch.setattr(tuning, "processor_name", lambda: "another processor")
    assert [measured(), measured()] == [1, 0]


def test_a_cache_that_cannot_be_used_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    tuner = Tuner(V3, COMPILER, Cache(tmp_path / "file"), measure=Times(a=2.0, b=1.0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert tuner.choose(made("a", "b"), {"n_n": 8}).code.choice == "b"
    assert any("cache" in str(item.message) for item in seen)


def test_measures_what_this_machine_would_run():
    v3, v4 = parse("cpu:x86-64-v3", ()), parse("cpu:x86-64-v4", ())
    assert tuned_target([v4, v3], frozenset(v4.features)) == v4
    assert tuned_target([v4, v3], frozenset(v3.features)) == v3
    with pytest.raises(UsageError, match=r"runs none of the targets \(cpu:x86-64-v4 needs .*avx512f"):
        tuned_target([v4], frozenset(v3.features))
    with pytest.raises(UsageError, match="no target is a CPU"):
        tuned_target([], frozenset(v3.features))


def test_runs_candidates():
    """Real kernels on a real pool: the times are positive, and in the order of the candidates."""
    target = parse("cpu:x86-64-v3", ())
    if not cpu.features() >= set(target.features):
        pytest.skip("this processor cannot run v3")
    bench = tuning.Bench(target, find_compiler(), None, 2)
    slow = code("slow").source.replace("for (", "for (volatile int64_t r = 0; r < 3000000; r++) {} for (")
    codes = (KernelCode(**{**vars(code("slow")), "source": slow}), code("fast"))
    found = bench(Candidates(codes, (True, False), {"n_n": 1000}))
    assert found[0] > found[1] > 0


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 130), torch.nn.ReLU(), torch.nn.Linear(130, 9)).eval()


def test_compiles_with_the_fastest(tmp_path, monkeypatch):
    """Of every kernel the last way offered is the fastest here; it is stored, shown, and computes the same bits."""

    class Last:
        def __init__(self, *_):
            pass

        def __call__(self, candidates):
            return [1.0 / (1 + number) for number in range(len(candidates.codes))]

    monkeypatch.setattr(tuning, "Bench", Last)
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    x, outputs = torch.randn(70, 40), []
    for name, tune in (("plain", False), ("tuned", True)):
        done = compile_model(
            network(), (x,), output=tmp_path / name, dynamic_shapes={"input": "n:1..90,40"}, tune=tune, verify="off"
        )
        assert ("tune" in done.seconds) == tune
        with load(tmp_path / name) as model:
            outputs.append(torch.as_tensor(model(x.numpy())))
    assert torch.equal(*outputs)
    assert "tuned" not in read_artifact(tmp_path / "plain").manifest.info
    tuned = read_artifact(tmp_path / "tuned").manifest.info["tuned"]
    assert [item["values"] for item in tuned["measured"]] == [{"n": 70}, {"n": 70}]
    for item in tuned["measured"]:
        assert item["best"] == list(item["nanoseconds"])[-1] != item["chosen"]
        source = (
            tmp_path / "tuned" / "kernels" / tuned["target"].partition(":")[2] / f"{item['kernel']}.c"
        ).read_text()
        assert f"TW_BLOCK = {item['best'].partition(' ')[0]}," in source
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "tuned"), "kernels"])
    assert "chosen by the model" in shown.stdout and tuned["measured"][0]["best"] in shown.stdout
    answer = json.loads(CliRunner().invoke(cli, ["inspect", str(tmp_path / "tuned"), "kernels", "--json"]).stdout)
    assert answer["tuned"] == tuned


def test_refuses_before_reading_the_source(tmp_path):
    with pytest.raises(UsageError, match="--tune measures CPU kernels"):
        compile_model("no such source", output=tmp_path / "a", target="cuda:sm_90", tune=True)
