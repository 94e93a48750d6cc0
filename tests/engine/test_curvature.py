"""ShapleyCAM: its Hessian-vector product against the whole Hessian, written out by autograd.

All activations of an item, in all windows, are one vector. The score of the stitched logits is a
function of it, and its Hessian couples the windows where the score does.
"""

from __future__ import annotations

import pytest
import torch
import toy
from helpers_engine import (
    EXACT,
    Part,
    box_of,
    importance_of,
    parts_of,
    predicted,
    signed_maps,
    slow_unless,
)
from torch import nn
from torch.autograd.function import once_differentiable
from toy import deviation

from seg3dcam import GradCAM, ShapleyCAM, WindowPlan, targets
from seg3dcam.errors import ModelError


def smooth(ndim: int) -> nn.Sequential:
    """Return a tiny network, curved behind layers "1" and "3", which has half the voxels."""
    conv = toy.CONV[ndim]
    layers = [
        conv(1, 2, 3, padding=1),
        nn.Softplus(),
        conv(2, 3, 3, stride=2, padding=1),
        nn.GELU(),
        toy.UP[ndim](3, 2, 2, stride=2),
    ]
    return toy.seeded(nn.Sequential(*layers), seed=2)


STRIDES = {"1": 1, "3": 2}

#: name -> plan and volume
PLANS = {
    "one window, 2D": (None, (4, 6)),
    "one window, 3D": (None, (4, 2, 4)),
    "side by side": (WindowPlan((4, 4), overlap=0, mode="constant"), (8, 4)),
    "overlapping": (WindowPlan((4, 4), overlap=0.5), (6, 8)),
    "batches of windows": (WindowPlan((4, 4), overlap=0.5, sw_batch_size=2), (4, 8)),
}


def product(logits: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(1)[:, 1] * logits[:, 0].tanh()).flatten(1).sum(1)


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-odds of class 1 against a constant one, over a box."""
    z = logits[:, :, 1:3, 0:3]
    return (z[:, 1] - torch.logaddexp(z[:, 0], torch.ones_like(z[:, 0]))).flatten(1).sum(1)


def soft_dice(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(1)[:, 1]
    mask = mask_of(logits).to(p)
    return 2 * (p * mask).flatten(1).sum(1) / (p.flatten(1).sum(1) + mask.sum())


def mask_of(logits: torch.Tensor) -> torch.Tensor:
    shape = logits.shape[2:]
    return (torch.arange(shape.numel()) % 3 == 0).reshape(shape)


def logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 1].flatten(1).sum(1)


#: name -> score, and the target that it is of the library, given logits of the same shape
SCORES = {
    "a function": (product, None),
    "log-odds over a box": (log_odds, None),
    "soft Dice": (soft_dice, lambda z: targets.SoftDice(1, mask_of(z))),
    "a class's logit": (logit, lambda z: targets.ClassLogit(1, "volume")),
}


def curvature(case: toy.Case, parts: list[Part], plan: WindowPlan, score, item: int):
    """Return HA of every window, H being the Hessian with respect to all activations at once."""
    own = [part for part in parts if part.item == item]
    size = own[0].a.shape
    x = case.x[item : item + 1]

    def score_of(flat: torch.Tensor) -> torch.Tensor:
        windows = iter(flat.reshape(len(own), *size))

        def back(batch: torch.Tensor) -> torch.Tensor:
            return case.back(torch.stack([next(windows) for _ in batch]))

        return score(predicted(back, x, plan))[0]

    a = torch.stack([part.a for part in own]).flatten()
    hessian = torch.autograd.functional.hessian(score_of, a)
    return (hessian @ a).reshape(len(own), *size)


def shapley(case: toy.Case, plan: WindowPlan, score, stride: int) -> torch.Tensor:
    """Return the map (B, *S): weights are means over the volume, maps are blended."""
    parts, found = parts_of(case, plan, score), []
    for item in range(len(case.x)):
        own = [part for part in parts if part.item == item]
        boxes = [box_of(part.start, part.a.shape[1:], stride) for part in own]
        shape = [max(box[axis].stop for box in boxes) for axis in range(len(boxes[0]))]
        corrected = torch.stack([p.g for p in own]) - curvature(case, parts, plan, score, item) / 2
        weights = corrected.transpose(0, 1).flatten(1).sum(1) / torch.Size(shape).numel()
        roi = [n * stride for n in own[0].a.shape[1:]]
        importance = importance_of(plan, roi, stride)
        total, norm = torch.zeros(shape).double(), torch.zeros(shape).double()
        for part, box in zip(own, boxes, strict=True):
            total[box] += torch.einsum("c,c...->...", weights, part.a) * importance
            norm[box] += importance
        found.append(total / norm)
    return torch.stack(found)


@pytest.mark.few(6)
@signed_maps
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", [slow_unless(name != "overlapping", name) for name in PLANS])
def test_curvature_is_that_of_the_whole_hessian(name, score):
    given, shape = PLANS[name]
    if len(shape) == 3 and score == "log-odds over a box":
        pytest.skip("the box is drawn in 2D")
    network = toy.shared(smooth, len(shape))
    x = toy.random_input(2, 1, *shape, seed=4)
    value, of_library = SCORES[score]
    target = of_library(network(x)) if of_library else value
    result = ShapleyCAM(network, list(STRIDES), sliding_window=given)(x, target)
    plain = GradCAM(network, list(STRIDES), sliding_window=given)(x, target)
    for layer, stride in STRIDES.items():
        plan = given or WindowPlan(shape)
        expected = shapley(toy.cut(network, int(layer), x), plan, value, stride)
        assert deviation(result.layers[layer].values, expected) < EXACT
        if not (score == "a class's logit" and layer == "3"):  # there all is linear
            assert deviation(plain.layers[layer].values, expected) > 1e-3


@signed_maps
@pytest.mark.parametrize("plan", [None, WindowPlan((4, 4), overlap=0.5)], ids=["one", "many"])
def test_several_targets_and_layers_at_once(plan):
    network, x = toy.shared(smooth, 2), toy.random_input(2, 1, 4, 6)
    asked = [targets.ClassLogit(1, "volume"), product, targets.SoftDice(0, mask_of(x))]
    together = ShapleyCAM(network, ["1", "3"], sliding_window=plan).each(x, asked)
    for target, result in zip(asked, together, strict=True):
        for layer in ("1", "3"):
            alone = ShapleyCAM(network, layer, sliding_window=plan)(x, target)
            assert deviation(result.maps[layer], alone.maps[layer]) < EXACT


@signed_maps
def test_a_score_whose_own_weights_want_a_gradient_is_linear_all_the_same():
    network, x = toy.shared(smooth, 2), toy.random_input(2, 1, 4, 6)
    weights = toy.random_input(1, 2, 4, 6, seed=3)
    learnt = nn.Parameter(weights.clone())
    found, expected = (
        ShapleyCAM(network, ["1", "3"])(x, lambda z, w=w: (z * w).flatten(1).sum(1)).maps
        for w in (learnt, weights)
    )
    for layer, map_ in expected.items():
        assert deviation(found[layer], map_) < EXACT


class OnceOnly(torch.autograd.Function):
    """A square whose gradient has none, as kernels written by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Squared(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OnceOnly.apply(x)


@signed_maps
@pytest.mark.parametrize("plan", [None, WindowPlan((4, 4), overlap=0.5)], ids=["one", "many"])
def test_a_network_that_has_no_second_derivative_is_refused(plan):
    network = toy.seeded(nn.Sequential(nn.Conv2d(1, 2, 1), Squared(), nn.Conv2d(2, 2, 1)))
    x = toy.random_input(1, 1, 4, 6)
    assert GradCAM(network, "0", sliding_window=plan)(x, product).status["0"] in ("ok", "zero")
    with pytest.raises(ModelError, match=r"cannot be differentiated twice, as shapley_cam needs"):
        ShapleyCAM(network, "0", sliding_window=plan)(x, product)
