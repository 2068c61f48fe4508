"""The registry: names, errors, laziness, parameter counts, seeds and how activations keep their size."""

import subprocess
import sys

import pytest
import torch

from tilewright import models

SMALL = ["mlp", "digits", "bytelm", "gpt2_tiny", "llama_tiny", "unet", "resnet18", "mobilenet_v3_large"]
LARGE = ["resnet50", "vit_b16", "bert_base", "gpt2"]  # llama_1b is checked on the meta device only


def test_every_model_is_covered():
    assert models.names() == sorted([*SMALL, *LARGE, "llama_1b"])


def test_names_and_get_import_no_torch():
    code = (
        "import sys; from tilewright import models; models.names(); models.get('bert_base');"
        "assert not {'torch', 'safetensors', 'sklearn'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_lists_close_ones():
    with pytest.raises(models.UnknownModel) as error:
        models.get("resnet81")
    assert str(error.value) == "no model is named 'resnet81': did you mean resnet18 or resnet50?"
    with pytest.raises(KeyError, match="there are bert_base, bytelm, digits"):
        models.get("zzz")


@pytest.mark.parametrize("name", models.names())
def test_shapes_name_the_inputs_and_fit_the_example(name):
    spec = models.get(name)
    args, kwargs = spec.example()
    inputs = dict(zip(spec.shapes, args, strict=False)) | kwargs
    assert inputs.keys() == spec.shapes.keys()
    sizes: dict[str, int] = {}
    for key, dims in spec.shapes.items():
        assert len(dims.split(",")) == inputs[key].ndim
        for dim, size in zip(dims.split(","), inputs[key].shape, strict=True):
            symbol, _, bounds = dim.partition(":")
            if symbol.isdigit():
                assert int(symbol) == size
                continue
            if bounds:
                low, high = map(int, bounds.split(".."))
                assert max(low, 2) <= size <= high
            assert sizes.setdefault(symbol, size) == size
    assert len(set(sizes.values())) == len(sizes), "symbols of equal size could be taken for one"


@pytest.mark.parametrize("name", SMALL + LARGE)
def test_builds_and_runs_with_activations_of_order_one(name):
    spec = models.get(name)
    module = spec.build()
    assert not module.training
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) == spec.parameters
    sizes: dict[str, float] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            layer.register_forward_hook(
                lambda _m, _i, out, path=path: sizes.update({path: out.square().mean().sqrt().item()})
            )
    args, kwargs = spec.example()
    with torch.inference_mode():
        outputs = module(*args, **kwargs)
    for output in outputs.values() if isinstance(outputs, dict) else [outputs]:
        assert output.shape[0] == 2
        assert output.isfinite().all()
        assert (output[0] - output[1]).abs().max() > 0.02 * output.abs().max(), (
            "the output does not depend on the input"
        )
    if name != "bytelm":  # trained weights are what they are
        assert min(sizes.values()) > 0.2 and max(sizes.values()) < 10, sizes


@pytest.mark.parametrize("name", ["mlp", "gpt2_tiny", "llama_tiny", "mobilenet_v3_large", "digits", "bytelm"])
def test_same_weights_whatever_the_global_seed(name):
    torch.manual_seed(1)
    first = models.get(name).build().state_dict()
    torch.manual_seed(2)
    torch.rand(7)
    second = models.get(name).build().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_building_and_examples_leave_the_examples_alone():
    for name in ("resnet18", "bert_base"):
        (args, kwargs), (args2, kwargs2) = models.get(name).example(), models.get(name).example()
        assert all(map(torch.equal, [*args, *kwargs.values()], [*args2, *kwargs2.values()]))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "unet"])
def test_batch_norm_is_no_identity(name):
    norms = [m for m in models.get(name).build().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean.abs().max() > 0.05
        assert (norm.running_var - 1).abs().max() > 0.1
        assert norm.bias.abs().max() > 0.05
        assert norm.weight.std() > 0.01


def test_initialize_refuses_what_it_does_not_know():
    from tilewright.models.initialize import initialize

    with pytest.raises(TypeError, match=r"^0 \(PReLU\) owns parameters"):
        initialize(torch.nn.Sequential(torch.nn.PReLU()), 0)
