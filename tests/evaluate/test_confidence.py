"""Average drop and increase equal their definition, and a map of the evidence keeps the class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from helpers_crossed import crossed
from monai.inferers import sliding_window_inference
from test_faithfulness import CUE, MASK, PLANS, SHAPE, RemoteCue, replaced, scene
from torch import nn

from seg3dcam import Ensemble
from seg3dcam.errors import ConfigError, EmptyRegionError, EvaluationError, InputError
from seg3dcam.evaluate import Confidence, average_drop, kept_confidence

NOISY = toy.random_input(1, 1, *SHAPE, seed=9)[0, 0]


class Soft(RemoteCue):
    """The same network, with probabilities that are neither 0 nor 1."""

    def forward(self, x):
        return 3 * super().forward(x)


def reference(values, x, network, baseline, plan, activation, seed):
    """The definition of the paper, voxel by voxel of the map, in float64."""

    def logits_of(image):
        if plan is None:
            return network(image)[0]
        return sliding_window_inference(
            image, plan.roi_size, 1, network, overlap=plan.overlap, mode=plan.mode
        )[0]

    def probabilities(image):
        logits = logits_of(image).numpy()
        if activation == "sigmoid":
            return 1 / (1 + np.exp(-logits[1])), logits[1] > 0
        return np.exp(logits[1]) / np.exp(logits).sum(0), logits[1] > logits[0]

    highest = max(float(value) for value in values.flatten())
    weights = np.array([max(0.0, float(value)) / highest for value in values.flatten()])
    kept = torch.from_numpy(weights.reshape(SHAPE))
    other = replaced(x, np.ones(SHAPE, dtype=bool), baseline, seed)
    before, mask = probabilities(x)
    after, _ = probabilities(x * kept + other * (1 - kept))
    return before[mask].mean(), after[mask].mean()


@pytest.mark.parametrize(
    ("plan", "baseline", "activation", "seed"),
    crossed(PLANS, ("mean", "noise", "blur", 0.3), ["softmax", "sigmoid"], [0, 1], rows=5),
)
def test_it_is_the_definition(plan, baseline, activation, seed):
    x = scene().double()
    values = NOISY + 2 * CUE + 3 * MASK
    settings = {"baseline": baseline, "activation": activation, "seed": seed}
    found = kept_confidence(values, x, Soft(), 1, sliding_window=PLANS[plan], **settings)
    before, after = reference(values, x, Soft(), baseline, PLANS[plan], activation, seed)
    assert found.before == pytest.approx(before, abs=1e-9)
    assert found.after == pytest.approx(after, abs=1e-9)
    assert found.drop == pytest.approx(max(0, before - after) / before, abs=1e-9)
    assert found.increase == (after > before)


def test_a_map_of_all_evidence_keeps_the_class_and_the_mask_alone_does_not():
    drops = {
        name: kept_confidence(values, scene(), Soft(), 1, baseline=0.0).drop
        for name, values in {"both": MASK + CUE, "mask": MASK, "none": NOISY}.items()
    }
    assert drops["both"] < 0.05
    assert drops["mask"] > 0.5
    assert drops["none"] > 0.5


def test_without_noise_the_class_may_become_more_probable():
    class Disturbed(nn.Module):
        def forward(self, x):
            around = nn.functional.avg_pool3d(x[:, 1:].abs(), 5, 1, 2)
            return torch.cat([0 * around, x[:, :1] - 0.5 - around], 1)

    found = kept_confidence(MASK, scene(noisy=0.05), Disturbed(), 1, baseline=0.0)
    assert found.increase
    assert found.drop == 0


def test_the_sign_and_the_scale_of_a_map():
    """What is evidence against is not kept, and only the map's shape counts."""
    x, values = scene(), NOISY + 2 * MASK
    one = kept_confidence(values, x, Soft(), 1)
    assert kept_confidence(values.clamp(min=0), x, Soft(), 1) == one
    assert kept_confidence(4 * values, x, Soft(), 1).after == pytest.approx(one.after, abs=1e-7)


def test_an_ensemble_and_maps_of_any_kind():
    x, network = scene().double(), Soft()
    values = (NOISY + 2 * MASK).double()
    one = kept_confidence(values, x, network, 1)
    both = kept_confidence(values, x, Ensemble([network, network]), 1)
    assert both.after == pytest.approx(one.after, abs=1e-12)
    turned = np.ascontiguousarray(values.numpy().T).T  # Fortran's order
    assert kept_confidence(turned, x, network, 1) == one
    assert kept_confidence(values.requires_grad_(), x.requires_grad_(), network, 1) == one


def test_averages_are_those_of_the_items():
    items = [Confidence(0.8, 0.6), Confidence(0.5, 0.9), Confidence(1.0, 0.0)]
    found = average_drop(iter(items))
    assert found.drop == pytest.approx(100 * (0.25 + 0 + 1) / 3)
    assert found.increase == pytest.approx(100 / 3)
    assert found.items == 3


def test_what_would_mean_nothing_is_refused():
    x = scene()

    def kept(values=CUE, image=x, class_index=1, **more):
        return kept_confidence(values, image, Soft(), class_index, **more)

    with pytest.raises(EmptyRegionError, match="class 1"):
        kept(image=0 * x)
    with pytest.raises(EvaluationError, match="2 everywhere"):
        kept(0 * CUE + 2)
    with pytest.raises(EvaluationError, match="no positive value"):
        kept(-CUE)
    clean = torch.where(CUE > 0, scene(noisy=0), 0.0) + torch.where(MASK > 0, scene(noisy=0), 0.0)
    with pytest.raises(EvaluationError, match="baseline 0 is equal to the input"):
        kept(CUE + MASK, image=clean, baseline=0)
    with pytest.raises(ConfigError, match="fades by degrees"):
        kept(baseline="neighbours")
    with pytest.raises(ConfigError, match="blurr"):
        kept(baseline="blurr")
    with pytest.raises(InputError, match="grid of the input"):
        kept(CUE[1:])
    with pytest.raises(InputError, match="NaN"):
        kept(CUE / 0)
    with pytest.raises(EvaluationError, match="no item"):
        average_drop([])
