"""Branches without a gradient are found out, said, and never drawn as if the map were whole."""

from __future__ import annotations

import warnings

import pytest
import torch
from monai.networks import nets
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.attributions import ATTRIBUTIONS
from seg3dcam.cams import CAMS
from seg3dcam.errors import Seg3dcamWarning

VOLUME = targets.ClassLogit(1, "volume")


class TwoWays(nn.Module):
    """A layer that is read directly and through a branch of which the gradient may be lost."""

    def __init__(self, branch, weight=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        self.mix = nn.Conv3d(4, 4, 1)
        self.head = nn.Conv3d(4, 2, 1)
        self.branch, self.weight = branch, weight

    def forward(self, x):
        a = torch.relu(self.conv(x))
        return self.head(a + self.weight * self.branch(self.mix(a)))


class Halved(torch.autograd.Function):
    """A function whose backward pass is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def without_gradients(z):
    with torch.no_grad():
        return z * 1.5


BROKEN = {
    "detach": lambda z: z.detach(),
    "no_grad": without_gradients,
    "argmax": lambda z: F.one_hot(z.argmax(1), 4).movedim(-1, 1).float(),
    "whole numbers": lambda z: (20 * z).to(torch.int8).float() / 20,
    "rounding": lambda z: (20 * z).round() / 20,
    "hard gate": lambda z: z * (z > 0.05).float() + (z > 0.05).float(),
    "function of one's own": Halved.apply,
    "data": lambda z: z.data,
}

WHOLE = {
    "nothing": lambda z: z,
    "relu": torch.relu,
    "clamp": lambda z: z.clamp(-0.1, 0.1),
    "pooling": lambda z: F.interpolate(F.max_pool3d(z, 2), scale_factor=2),
    "squared": lambda z: z * z,
    "norm": lambda z: F.instance_norm(z),
    "softmax": lambda z: z.softmax(1),
    "argument of a constant": lambda z: z + z.new_ones(()).detach(),
}


def explained(net, size=16, cam=HiResCAM, layer="conv", plan=None):
    x = torch.rand(1, 1, size, size, size, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Seg3dcamWarning)
        result = cam(net, layer, sliding_window=plan)(x, VOLUME)
    return result, [str(w.message) for w in caught]


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("plan", [None, WindowPlan(8, overlap=0.5)])
def test_a_branch_without_a_gradient_is_said_and_not_drawn(name, plan):
    result, said = explained(TwoWays(BROKEN[name]), plan=plan)
    assert result.status["conv"] == "incomplete"
    assert any("misses" in text and "conv" in text for text in said)
    assert not result.volume().any()
    assert result.maps["conv"].any()  # for whoever wants to look at it all the same


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_gradient_is_believed(name):
    result, said = explained(TwoWays(WHOLE[name]))
    assert result.status["conv"] == "ok"
    assert not said


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_part_that_is_missed_is_measured(share):
    """The branch alone carries what the gradient does not: of a + share * a that is share."""
    net = TwoWays(lambda z: z.detach(), share)
    with torch.no_grad():
        net.mix.weight.copy_(torch.eye(4).view(4, 4, 1, 1, 1))
    result, _ = explained(net)
    assert result.layers["conv"].missing == pytest.approx(share / (1 + share), rel=0.15)


def test_only_layers_before_the_break_are_incomplete():
    net = TwoWays(lambda z: z.detach())
    result, _ = explained(net, layer=["conv", "head"])
    assert result.status == {"conv": "incomplete", "head": "ok"}
    net = nn.Sequential(TwoWays(lambda z: z.detach()), nn.ReLU(), nn.Conv3d(2, 2, 1))
    result, _ = explained(net, layer=["0.conv", "0.head"])
    missing = {name: layer.missing for name, layer in result.layers.items()}
    assert missing["0.conv"] > 0.2
    assert missing["0.head"] == 0


@pytest.mark.parametrize("key", sorted(CAMS))
def test_methods_without_a_gradient_see_all(key):
    """Every method whose map is made of gradients says so; the others need not."""
    free = {"eigen_cam", "kpca_cam", "fem", "score_cam", "ablation_cam", "random"}
    layer = () if key == "full_grad" else ("conv",)
    cam = CAMS[key](TwoWays(lambda z: z.detach()), *layer)
    x = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)
        (layer_map,) = cam(x, VOLUME).layers.values()
    assert (layer_map.missing > 0.2) == (key not in free)


@pytest.mark.parametrize("key", sorted(ATTRIBUTIONS))
def test_gradients_of_the_input_miss_it_too(key):
    cam = ATTRIBUTIONS[key](TwoWays(lambda z: z.detach()))
    x = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)
        (layer_map,) = cam(x, VOLUME).layers.values()
    assert (layer_map.missing > 0.1) == (key != "occlusion")


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_quantised_branches():
    net = TwoWays(lambda z: z)
    net.mix = nn.Linear(4, 4)

    def forward(x):
        a = torch.relu(net.conv(x))
        return net.head(a + net.mix(a.movedim(1, -1)).movedim(-1, 1))

    net.forward = forward
    whole, _ = explained(net)
    net.mix = torch.ao.quantization.quantize_dynamic(nn.Sequential(net.mix), {nn.Linear})[0]
    broken, said = explained(net)
    assert whole.status["conv"] == "ok"
    assert broken.status["conv"] == "incomplete"
    assert any("quantised weights" in text for text in said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_is_no_missing_branch(dtype):
    torch.manual_seed(0)
    net = nets.UNet(3, 1, 3, channels=(4, 8, 16), strides=(2, 2), norm=None).to(dtype)
    x = torch.rand(1, 1, 32, 32, 32)
    result = GradCAM(net, ["model.1.submodule.1.submodule", "model.1"])(x, VOLUME)
    assert [layer.missing for layer in result.layers.values()] == [0, 0]


def test_it_is_found_out_once_for_each_layer():
    net, calls = TwoWays(lambda z: z.detach()), []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    explained(net)
    first = len(calls)
    result, _ = explained(net, cam=GradCAM)
    assert len(calls) == first + 1
    assert result.status["conv"] == "incomplete"
