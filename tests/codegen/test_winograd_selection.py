"""Which convolutions are computed by Winograd's algorithm, within which size, and whole models with them."""

import numpy as np
import pytest
import torch
from torch import nn

from tilewright.codegen.c.winograd_selection import GROWTH, _weights, select_winograd, show
from tilewright.codegen.generate import generate
from tilewright.codegen.roles import fusion_roles
from tilewright.compiler.capture import capture
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime.cpu import features

NEEDS_AVX512 = pytest.mark.skipif("avx512vl" not in features(), reason="this processor lacks AVX-512")


class Net(nn.Module):
    """A stem, two 3x3 convolutions with a residual connection, and some more that have to be computed directly."""

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 40, 3, padding=(0, 2))
        self.wide = nn.Conv2d(40, channels, 5, padding=2)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.head = nn.Linear(channels, 9000)  # makes room

    def forward(self, image):
        x = self.stem(image).relu()
        x = (self.first(x) + x).relu()
        x = self.grouped(self.wide(self.second(x)))
        return self.head(x.mean((2, 3)))


def programs(module, *args, shapes=None, names=("main",)):
    made = [capture(name, module.eval(), args, {}, shapes) for name in names]
    for program in made:
        PassManager(pipeline(fusion_roles())).run(program)
    return made


def reasons(decisions):
    return {item.module: item.reason for item in decisions}


def test_what_is_chosen_and_what_is_refused():
    decisions = select_winograd(programs(Net(), torch.randn(1, 3, 64, 64)))
    chosen = {item.module: item.choice.tile for item in decisions if item.choice}
    assert chosen == {"first": 4, "second": 4}
    found = reasons(decisions)
    assert found["first"].startswith("tiles of 4x4: about 2.")
    assert found["stem"] == "it has a stride or a dilation, or is transposed"
    assert found["wide"] == "its windows are 5x5, not 3x3"
    assert found["grouped"] == "it has 32 groups"
    assert show(decisions).splitlines()[1].startswith("main: first: winograd 4x4: tiles of 4x4: about 2.")


def test_gives_room_to_what_saves_most_per_byte():
    """Without the large matrix at the end, tiles of 4x4 no longer fit; without that of the 5x5 windows, none does."""
    net = Net()
    net.head = nn.Linear(32, 4)
    decisions = select_winograd(programs(net, torch.randn(1, 3, 64, 64)))
    assert {item.module: item.choice.tile for item in decisions if item.choice} == {"first": 2}
    assert reasons(decisions)["second"] == "its transformed weights do not fit into 1.3 times the model's weights"


def test_a_small_image_is_no_gain():
    decisions = select_winograd(programs(Net(), torch.randn(1, 3, 6, 6)))
    assert reasons(decisions)["first"] == "the direct kernel is as fast at the sample's sizes"


@pytest.mark.parametrize(
    ("channels", "size", "fastest"), [(64, 56, 4), (128, 28, 4), (256, 14, 2), (512, 7, 0)], ids=str
)
def test_few_tiles_make_too_little_use_of_many_weights(channels, size, fastest):
    """The 3x3 layers of a ResNet for one image of 224 x 224: the last ones read 16 MiB for 16 tiles."""
    layers = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)))
    weights = _weights(programs(layers, torch.randn(1, channels, size, size)))
    tiles = [weight.worthwhile() for weight in weights.values() if weight.uses and not weight.shared]
    assert tiles and all(found[-1:] == [fastest][: bool(fastest)] for found in tiles)


def test_more_images_make_more_use_of_the_same_weights():
    image = torch.randn(8, 512, 7, 7)
    weights = _weights(programs(nn.Sequential(*(nn.Conv2d(512, 512, 3, padding=1) for _ in range(2))), image))
    assert any(weight.worthwhile() for weight in weights.values() if weight.uses)


@pytest.mark.parametrize("rows", [4, 9000])
def test_constants_stay_within_the_bound(rows):
    net = Net()
    net.head = nn.Linear(32, rows)
    made = programs(net, torch.randn(1, 3, 64, 64))
    generated = generate({"cpu": made})
    stored = sum(int(np.prod(item.shape)) * 4 for item in generated.constants)
    panels = sum(item.shape[0] * 4 * 31 for item in net.parameters() if item.dim() > 1)  # filled up
    assert stored <= GROWTH * sum(item.numel() * 4 for item in net.parameters()) + panels
    keys = [item.key for item in generated.constants]
    assert len({key for key in keys if "first.weight" in key}) == 1  # in one form
    assert any("winograd" in item.name for item in generated.devices["cpu"].kernels)


def test_entry_points_share_one_transformed_weight():
    made = programs(Net(), torch.randn(1, 3, 64, 64), names=("one", "two"))
    decisions = select_winograd(made)
    assert [item.entry for item in decisions if item.module == "first"] == ["one", "two"]
    generated = generate({"cpu": made})
    assert sum(".winograd4" in item.key for item in generated.constants) == 2


@pytest.mark.parametrize("target", ["cpu:x86-64-v3", pytest.param("cpu:x86-64-v4", marks=NEEDS_AVX512)])
def test_a_model_whose_sizes_vary(compiled, target):
    torch.manual_seed(0)
    net = Net().eval()
    shapes = {"image": "batch:1..4,3,height:8..96,width:8..96"}
    model = compiled(net, (torch.randn(2, 3, 48, 44),), shapes, target=target)
    exact = Net().eval().double()
    exact.load_state_dict(net.state_dict())
    for shape in ((2, 3, 48, 44), (1, 3, 8, 9), (4, 3, 31, 96)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = exact(image.double()).numpy()
        got = model(image.numpy())
        assert np.abs(got - expected).max() < 3e-6 * np.abs(expected).max()
        np.testing.assert_array_equal(model(image[:1].numpy()), got[:1])
