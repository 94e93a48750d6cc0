"""Two widely used tools give the same raw maps where they are right.

pytorch-grad-cam keeps a layer's output without a copy, so both are compared on networks without
in-place activations; ours on the in-place twin has to agree with them all the same.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import toy
from captum.attr import LayerGradCam, LayerGradientXActivation
from reference import recipe

from seg3dcam import CamResult, GradCAM, HiResCAM, targets

EXACT = 1e-9

#: Several shapes of network and layer, all without in-place operations.
NETWORKS = {
    "plain, first": (toy.plain, "1"),
    "plain, last": (toy.plain, "3"),
    "normed, convolution": (lambda ndim, seed: toy.normed(ndim, inplace=False, seed=seed), "3"),
    "normed, activation": (lambda ndim, seed: toy.normed(ndim, inplace=False, seed=seed), "2"),
}
SHAPES = {2: (9, 8), 3: (5, 4, 7)}
# A class of a random network may have no positive evidence; the raw maps are compared all the same.
signed_maps = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")


def build(name: str, ndim: int) -> tuple[torch.nn.Module, str, torch.Tensor]:
    make, layer = NETWORKS[name]
    return make(ndim, seed=3), layer, toy.random_input(2, 1, *SHAPES[ndim], seed=ndim)


def assert_same(found: torch.Tensor, expected: torch.Tensor | np.ndarray) -> None:
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    # Relative to the map, or to the rounding of a map that is zero: InstanceNorm cancels gradients.
    assert (found - expected).abs().max() < EXACT * max(float(expected.abs().max()), 1e-3)


def explain(cam, network, layer: str, x: torch.Tensor) -> CamResult:
    return cam(network, layer)(x, targets.ClassLogit(1, "volume"))


def score(logits: torch.Tensor) -> torch.Tensor:
    """Return the same target, as captum wants it: (B,)."""
    return logits[:, 1].flatten(1).sum(1)


@pytest.mark.few(3)
@signed_maps
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_captum_gives_the_same_grad_cam_and_hires_cam(name, ndim):
    network, layer, x = build(name, ndim)
    module = network.get_submodule(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return score(network(x))

    expected = LayerGradCam(forward, module).attribute(
        x, attr_dim_summation=True, relu_attributions=False
    )
    assert_same(explain(GradCAM, network, layer, x).native[layer], expected[:, 0].detach())

    # Its gradient times activation, summed over channels, is HiResCAM.
    products = LayerGradientXActivation(forward, module).attribute(x)
    assert_same(explain(HiResCAM, network, layer, x).native[layer], products.sum(1).detach())


@pytest.fixture
def others(pytorch_grad_cam):
    """Return pytorch-grad-cam's class and ours, under our method's name."""
    return {
        "grad_cam": (pytorch_grad_cam.GradCAM, GradCAM),
        "hires_cam": (pytorch_grad_cam.HiResCAM, HiResCAM),
    }


def their_maps(cam_class, network, layer: str, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return pytorch-grad-cam's raw maps (B, *S), and what it draws of them, in [0, 1]."""
    with cam_class(network, [network.get_submodule(layer)]) as cam:
        drawn = cam(x, [lambda logits: logits[1].sum()] * len(x))
        seen = cam.activations_and_grads
        raw = cam.get_cam_image(
            x, layer, None, seen.activations[0].numpy(), seen.gradients[0].numpy(), False
        )
    return raw, drawn


@signed_maps
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_pytorch_grad_cam_gives_the_same_raw_map(name, method, others):
    network, layer, x = build(name, 2)
    theirs, ours = others[method]
    expected, _ = their_maps(theirs, network, layer, x)
    assert_same(explain(ours, network, layer, x).native[layer], expected)


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_pytorch_grad_cam_draws_the_same_picture(method, others):
    """It cuts, scales by minimum and maximum with 1e-7 added, in float32: our `minmax` view."""
    network, layer, x = build("plain, last", 2)
    theirs, ours = others[method]
    raw, drawn = their_maps(theirs, network, layer, x)
    found = explain(ours, network, layer, x).volume(scale="minmax")
    assert np.allclose(found, recipe.scaled(np.maximum(raw, 0), epsilon=0), atol=EXACT)
    assert np.allclose(found, drawn, atol=1e-5)


@signed_maps
@pytest.mark.parametrize("layer", ["1", "4"])
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_with_in_place_activations_ours_is_theirs_without(method, layer, others):
    """In place, what they stored of the layer is overwritten, or its gradient never seen."""
    x = toy.random_input(2, 1, *SHAPES[2], seed=2)
    theirs, ours = others[method]
    expected, _ = their_maps(theirs, toy.normed(2, inplace=False, seed=3), layer, x)
    found = explain(ours, toy.normed(2, inplace=True, seed=3), layer, x).native[layer]
    assert_same(found, expected)


def test_the_fixture_leaves_no_stand_in_behind(pytorch_grad_cam):
    """Whatever asks for torchvision afterwards gets the real one or the real error."""
    module = sys.modules.get("torchvision")
    assert module is None or hasattr(module, "__version__")
    assert pytorch_grad_cam.GradCAM.__module__ == "pytorch_grad_cam.grad_cam"
