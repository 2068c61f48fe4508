"""What is computed in which precision: what ``auto`` comes to, what is recorded, and how far it is from PyTorch."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tilewright
from tilewright.codegen.targets import parse
from tilewright.compiler.capture import capture
from tilewright.compiler.cli import cli
from tilewright.compiler.driver import Compilation
from tilewright.compiler.kernel_verification import verify_kernels
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.precision import cache_type, precision_on
from tilewright.runtime import cpu

NATIVE, BASE = "cpu:x86-64-v4+bf16", "cpu:x86-64-v3"


class Mixed(nn.Module):
    """A norm, a product, an activation and an index that follows from them."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.product = nn.LayerNorm(24, dtype=dtype), nn.Linear(24, 40, dtype=dtype)

    def forward(self, x):
        y = self.product(self.norm(x)).relu()
        return y, y.float().softmax(-1), y.argmax(-1)


def example(dtype):
    torch.manual_seed(1)
    return Mixed(dtype).eval(), (torch.randn(3, 24, dtype=dtype),)


def chosen(dtype, *targets, requested="auto", device="cpu"):
    module, inputs = example(dtype)
    found = [parse(target, ()) for target in targets]
    return precision_on(device, requested, [capture("main", module, inputs)], found)


def test_what_auto_comes_to():
    assert chosen(torch.bfloat16, NATIVE) == "own"
    assert chosen(torch.bfloat16, NATIVE, "cpu:x86-64-v4+vnni+bf16") == "own"
    assert chosen(torch.bfloat16, NATIVE, BASE) == "fp32", "one of the targets has no instructions for it"
    assert chosen(torch.float16, NATIVE) == "fp32", "no CPU has products of float16"
    assert chosen(torch.float32, NATIVE) == "fp32"
    assert chosen(torch.float16, device="cuda") == "own"
    assert chosen(torch.float32, BASE, requested="bf16") == "bf16"


def stored(path):
    """The dtypes of the buffers between kernels and of the weights."""
    artifact = tilewright.load(path)
    plan = artifact.entry("main").plan
    found = {item.dtype for item in plan.constants} | {item.dtype for item in plan.buffers}
    artifact.close()
    return found


def compiled(tmp_path, dtype, target, **options):
    module, inputs = example(dtype)
    path = tmp_path / "m.tw"
    done = tilewright.compile(module, inputs, output=path, target=target, dynamic_shapes={"x": "n:1..64,24"}, **options)
    return done, json.loads((path / "manifest.json").read_text())["info"]["precision"], path


@pytest.mark.parametrize("target", [BASE, "cpu:x86-64-v4", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_model_in_bfloat16(dtype, target, tmp_path):
    if not set(parse(target, cpu.features()).features) <= set(cpu.features()):
        pytest.skip(f"this processor cannot run {target}")
    done, recorded, path = compiled(tmp_path, dtype, target, precision="bf16", verify="passes")
    assert recorded == {"requested": "bf16", "applied": "bf16"} and "bfloat16" in stored(path)
    assert {item.output for item in done.errors} == {"output0", "output1"}, "a unit in the last place decides an index"
    assert all(item.ok and item.tolerance == 4e-2 for item in done.errors)
    with tilewright.load(path) as model:
        y, _, _ = model(example(dtype)[1][0])
    assert y.dtype.name == str(dtype).removeprefix("torch."), "results keep their types"


def test_a_bfloat16_model_is_widened_where_a_target_lacks_it(tmp_path):
    done, recorded, path = compiled(tmp_path, torch.bfloat16, BASE)
    assert recorded == {"requested": "auto", "applied": "fp32"} and "float32" in stored(path)
    limits = {item.output: item.tolerance for item in done.errors}
    assert limits["output2"] == 0, "in float32 indices agree"
    assert limits["output1"] == 1e-4 and max(item.error for item in done.errors if item.output == "output1") < 1e-5
    assert limits["output0"] == 1e-4 + torch.finfo(torch.bfloat16).eps, "it is rounded at the end"


@pytest.mark.parametrize(
    ("cache", "requested", "dtype", "devices", "targets", "expected"),
    [
        ("auto", "auto", torch.float32, ("cpu",), "cpu:x86-64-v4+bf16", torch.float32),
        ("auto", "auto", torch.bfloat16, ("cpu",), "cpu:x86-64-v3", torch.float32),
        ("auto", "auto", torch.bfloat16, ("cpu",), "cpu:x86-64-v4+bf16", torch.bfloat16),
        ("auto", "auto", torch.bfloat16, ("cuda",), "", torch.bfloat16),
        ("auto", "auto", torch.float16, ("cuda",), "", torch.float32),
        ("auto", "fp32", torch.bfloat16, ("cuda",), "", torch.float32),
        ("auto", "bf16", torch.float32, ("cpu",), "cpu:x86-64-v3", torch.bfloat16),
        ("fp32", "bf16", torch.float32, ("cpu",), "cpu:x86-64-v3", torch.float32),
        ("bf16", "auto", torch.float32, ("cpu", "cuda"), "cpu:x86-64-v3", torch.bfloat16),
    ],
)
def test_the_type_of_caches(cache, requested, dtype, devices, targets, expected):
    found = (parse(targets, ()),) if targets else ()
    assert cache_type(cache, requested, dtype, devices, found) == expected


@pytest.mark.skipif("avx512_bf16" not in cpu.features(), reason="this processor has no bfloat16")
def test_a_bfloat16_model_is_computed_in_it_where_every_target_has_it(tmp_path):
    _, recorded, path = compiled(tmp_path, torch.bfloat16, NATIVE)
    assert recorded == {"requested": "auto", "applied": "fp32 and bf16"}, "the softmax is the model's own float32"
    assert "bfloat16" in stored(path)


def test_kernels_are_verified_one_by_one(tmp_path):
    """Each within the tolerance of the coarsest type that it computes in."""
    _, _, path = compiled(tmp_path, torch.float32, "cpu", precision="bf16", verify="off")
    compilation = Compilation(CompileOptions(target=("cpu",), precision="bf16"))
    module, inputs = example(torch.float32)
    programs = compilation.capture(module, inputs, shapes={"x": "n:1..64,24"})
    lowered = compilation.rewrite(programs)[0]["cpu"][0]
    with tilewright.load(path) as model:
        found = verify_kernels(model.entry("main"), lowered, compilation.precision["cpu"])
    assert found and all(item.ok for item in found)
    assert max(item.tolerance for item in found) == 4e-2


def test_both_kinds_of_device_in_the_same_words(tmp_path):
    options = CompileOptions(target=("cuda:sm_90", NATIVE, BASE))
    compilation = Compilation(options)
    module, inputs = example(torch.bfloat16)
    compilation.rewrite(compilation.capture(module, inputs))
    assert compilation.precision == {"cpu": "fp32", "cuda": "own"}
    both = Compilation(CompileOptions(target=("cuda:sm_90", BASE), precision="bf16"))
    both.capture(module, inputs)
    assert both.precision == {"cpu": "bf16", "cuda": "bf16"}


def call(*args):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.skipif("avx512_bf16" not in cpu.features(), reason="this processor has no bfloat16")
def test_a_bfloat16_checkpoint_folder(tmp_path):
    """It is computed as it lies, and verified from what the artifact has recorded."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, max_position_embeddings=64,
    )  # fmt: skip
    folder, path = tmp_path / "llama", tmp_path / "m.tw"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    forward = ("--task", "forward", "--target", NATIVE, "-q", "--verify", "off")
    text = call("compile", folder, "-o", path, *forward).stdout
    assert "computes in fp32 and bf16 (--precision auto)" in text, "angles are the model's own float32"
    assert "bfloat16" in stored(path)
    checked = json.loads(call("verify", path, folder, "--kernels", "--json", "-q").stdout)
    assert checked["outputs"] and checked["kernels"]
