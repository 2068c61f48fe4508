"""One artifact for two GPU architectures and a CPU: what it holds, and that the CPU runs it."""

from __future__ import annotations

import ml_dtypes
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright
from tilewright.models.initialize import initialize
from tilewright.runtime import binaries
from tilewright.runtime.artifact import Artifact, read_artifact, verify_integrity
from tilewright.runtime.errors import UsageError
from tilewright.runtime.weights import read_header

TARGET = "cuda:sm_80,cuda:sm_90,cpu:x86-64-v3"
OLD, NEW = "cuda:sm_80,cpu:x86-64-v3", "cuda:sm_90,cpu:x86-64-v3"


class Rows(nn.Module):
    """Products, a norm and an embedding; the CPU packs the weights of the products."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(30, 24), nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(ids))).relu()


class Image(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(image).relu()).relu().mean((2, 3)))


class Attention(nn.Module):
    """One attention in half precision, which only the GPU computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


CASES = {
    "rows": (Rows, lambda: torch.arange(6).reshape(2, 3), 2e-6, TARGET),
    "image": (Image, lambda: torch.randn(2, 3, 9, 9), 2e-6, OLD),
    "attention": (Attention, lambda: torch.randn(1, 5, 32, dtype=torch.bfloat16), 2e-2, NEW),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A module, its input, the artifact, the tolerance, the targets."""
    make, sample, tolerance, target = CASES[request.param]
    torch.manual_seed(0)
    module, x = initialize(make(), 0).eval(), sample()
    path = tmp_path_factory.mktemp("gpu") / f"{request.param}.tw"
    done = tilewright.compile(module, (x,), output=path, target=target)
    assert {(error.device, error.ok) for error in done.errors} == {("cpu", True), ("cuda", True)}
    return module, x, path, tolerance, target


def test_it_holds_plans_for_both_and_kernels_for_each_target(case):
    _, _, path, _, targets = case
    artifact = verify_integrity(path)
    assert [target.name for target in artifact.manifest.targets] == sorted(targets.split(","))
    assert list(artifact.devices) == ["cpu", "cuda"]
    assert (path / "plan" / "main.json").is_file() and (path / "plan" / "main.cuda.json").is_file()
    assert artifact.plans is artifact.devices["cpu"]
    plan = artifact.devices["cuda"]["main"]
    called = {variant.kernel for step in plan.steps for variant in step.variants}
    assert {file.stem for file in (path / "kernels" / "triton").iterdir()} == {*called, "tw_math"}
    for target in artifact.manifest.targets[1:]:
        table = binaries.parse((path / target.library).read_bytes(), target.library)
        assert set(table.by_name) == called and f"cuda:{table.architecture}" == target.name
        for kernel in table.kernels:
            for binary in kernel.binaries:
                assert (path / target.library).with_name(binary.cubin).read_bytes().startswith(b"\x7fELF")


def test_the_cpu_runs_it(case, same):
    module, x, path, tolerance, _ = case
    array = x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
    with tilewright.load(path, device="cpu") as model, torch.no_grad():
        assert model.target == "cpu:x86-64-v3"
        same(model(array), module(x), tolerance)


def test_a_weight_that_both_want_in_one_form_is_stored_once(case):
    _, x, path, *_ = case
    artifact = read_artifact(path)
    cpu, cuda = (artifact.devices[device]["main"].constants for device in ("cpu", "cuda"))
    shared = {constant.key for constant in cpu} & {constant.key for constant in cuda}
    assert shared or x.dtype == torch.bfloat16  # biases at least; a CPU wants them in float32
    stored = list(_tensors(artifact))
    assert len(set(stored)) == len(stored)
    assert {constant.key for constant in (*cpu, *cuda)} == set(artifact.weights.tensors)


def _tensors(artifact: Artifact):
    """(dtype, shape, content) of all that is in the weight file."""
    content = artifact.weights_path.read_bytes()
    header = read_header(content, len(content), "weights")
    for tensor in header.tensors.values():
        data = content[len(header.header) :][tensor.begin : tensor.end]
        if data.strip(b"\0"):  # all zeros may be several
            yield tensor.dtype, tensor.shape, data


def test_half_precision_stays_half_on_the_gpu(tmp_path):
    module, x = initialize(Attention(), 0).eval(), torch.randn(1, 5, 32, dtype=torch.bfloat16)
    tilewright.compile(module, (x,), output=tmp_path / "half.tw", target="cuda:sm_90")
    artifact = read_artifact(tmp_path / "half.tw")
    (plan,) = artifact.plans.values()
    assert list(artifact.devices) == ["cuda"] and artifact.manifest.info["precision"]["applied"] == "bf16"
    assert {buffer.dtype for buffer in plan.buffers} | {constant.dtype for constant in plan.constants} == {"bfloat16"}
    assert artifact.manifest.info["verification"]["cuda"]["device_run"] in (True, False)


@pytest.mark.parametrize(("precision", "stored"), [("bf16", "bfloat16"), ("fp16", "float16"), ("tf32", "float32")])
def test_a_float32_model_in_a_coarser_precision(precision, stored, tmp_path):
    module, ids = initialize(Rows(), 0).eval(), torch.arange(20).reshape(4, 5)
    done = tilewright.compile(
        module, (ids,), output=tmp_path / "m.tw", target="cuda:sm_80", precision=precision, verify="passes"
    )
    (error,) = done.errors
    assert error.ok and error.tolerance == (4e-2 if precision == "bf16" else 1e-2)
    with tilewright.load(tmp_path / "m.tw", device="interpreter") as model, torch.no_grad():
        assert {constant.dtype for constant in model.entry("main").plan.constants} == {stored}
        want, got = module(ids).numpy(), model(ids.numpy())
        assert got.dtype == "float32" and abs(got - want).max() / abs(want).max() < error.tolerance
    sources = "".join(path.read_text() for path in (tmp_path / "m.tw" / "kernels" / "triton").glob("matmul*.py"))
    assert ('"tf32"' in sources) == (precision == "tf32")


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_precisions_of_gpus_are_refused_where_a_cpu_is_meant_too(precision, tmp_path):
    with pytest.raises(UsageError, match=f"precision '{precision}' is for GPUs"):
        tilewright.compile(Rows().eval(), (torch.zeros(1, 2, dtype=torch.int64),), output=tmp_path / "m.tw",
                           target=TARGET, precision=precision)  # fmt: skip
    assert not list(tmp_path.iterdir())
