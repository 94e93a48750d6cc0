"""Curves equal those of a slow reference, and tell a map of the evidence from the mask alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import toy
from helpers_crossed import crossed
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import nn

from seg3dcam import WindowPlan
from seg3dcam.errors import ConfigError, EmptyRegionError, EvaluationError, InputError
from seg3dcam.evaluate import context_deletion, deletion, insertion, supervoxels

SHAPE = (12, 20, 14)
PLANS = {"one window": None, "windows": WindowPlan((8, 18, 8), overlap=0.25)}
BASELINES = ("mean", "noise", "blur", "neighbours", 0.3)


class RemoteCue(nn.Module):
    """Class 1 is where channel 0 is bright, if channel 1 is bright 8 voxels before."""

    def forward(self, x):
        cue = nn.functional.pad(x[:, 1:], (0, 0, 8, 0, 0, 0))[..., :-8, :]
        return torch.cat([torch.zeros_like(cue), x[:, :1] + cue - 1.5], 1)


def scene(noisy: float = 0.05) -> torch.Tensor:
    """A bright block at (4:8, 12:16, 4:8) and its cue at (4:8, 4:8, 4:8)."""
    x = noisy * toy.random_input(1, 2, *SHAPE, seed=3)
    x[0, 0, 4:8, 12:16, 4:8] += 1
    x[0, 1, 4:8, 4:8, 4:8] += 1
    return x


def map_of(*boxes) -> torch.Tensor:
    values = torch.zeros(SHAPE)
    for box in boxes:
        values[tuple(slice(start, start + 4) for start in box)] = 1
    return values


MASK, CUE = map_of((4, 12, 4)), map_of((4, 4, 4))


# ------------------------------------------------------------------------------- a slow reference


def reference(kind, values, x, network, margin, block, steps, baseline, plan, seed):
    """The definition, block by block, with a full prediction at every step, in float64."""

    def masked(image):
        if plan is None:
            logits = network(image)
        else:
            logits = sliding_window_inference(
                image, plan.roi_size, 1, network, overlap=plan.overlap, mode=plan.mode
            )
        return (logits[0, 1] > logits[0, 0]).numpy()

    x, values = x.double(), np.asarray(values, dtype=np.float64)
    first = masked(x)
    near = np.zeros_like(first)
    for voxel in np.argwhere(first) if kind == "context" else ():
        near[tuple(slice(max(0, v - margin), v + margin + 1) for v in voxel)] = True
    blocks = []
    for start in itertools.product(*(range(0, n, block) for n in SHAPE)):
        place = tuple(slice(s, s + block) for s in start)
        if not near[place].any():
            blocks.append(place)
    drawn = np.random.default_rng(seed).permutation(len(blocks))
    means = [values[place].mean() for place in blocks]
    order = sorted(drawn, key=lambda number: -means[number])
    found = []
    for step in range(steps + 1):
        count = round(step * len(blocks) / steps)
        chosen = order[count:] if kind == "insertion" else order[:count]
        gone = np.zeros(SHAPE, dtype=bool)
        for number in chosen:
            gone[blocks[number]] = True
        image = x.clone()
        image[..., torch.from_numpy(gone)] = replaced(x, gone, baseline, seed)[
            ..., torch.from_numpy(gone)
        ]
        now = masked(image)
        dice = 2 * (now & first).sum() / (now.sum() + first.sum())
        found.append((count / len(blocks), dice))
    fractions, dice = np.array(found).T
    steps_between = np.diff(fractions)
    return fractions, dice, float((steps_between * (dice[1:] + dice[:-1]) / 2).sum())


def replaced(x, gone, baseline, seed):
    image = torch.empty_like(x)
    for channel, given in zip(image[0], x[0].numpy(), strict=True):
        if baseline == "mean":
            channel[:] = given.mean()
        elif baseline == "blur":
            channel[:] = torch.from_numpy(ndimage.gaussian_filter(given, 8, mode="nearest"))
        elif baseline == "neighbours":
            channel[:] = torch.from_numpy(around(given, ~gone))
        elif baseline != "noise":
            channel[:] = baseline
    if baseline == "noise":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for channel, given, drawn in zip(image[0], x[0], noise[0], strict=True):
            channel[:] = given.mean() + drawn * given.std(correction=0)
    return image


def around(given, kept):
    if not kept.any():
        return np.full_like(given, given.mean())
    filled = given.copy()
    for voxel in np.argwhere(~kept):
        half = 4
        while True:
            box = tuple(slice(max(0, v - half), v + half + 1) for v in voxel)
            if kept[box].any():
                filled[tuple(voxel)] = given[box][kept[box]].mean()
                break
            half = 2 * half + 1
    return filled


CURVES = {"deletion": deletion, "insertion": insertion, "context": context_deletion}


@pytest.mark.parametrize(
    ("kind", "plan", "baseline", "settings"),
    crossed(
        CURVES,
        PLANS,
        BASELINES,
        [(2, 4, 25, 0), (0, 2, 7, 1), (1, 3, 10, 5), (3, 4, 60, 2)],
        rows=3,
        pairs=True,
    ),
)
def test_curves_are_those_of_the_definition(kind, plan, baseline, settings):
    margin, block, steps, seed = settings
    x = scene().double()
    values = toy.random_input(1, 1, *SHAPE, seed=seed)[0, 0] + 2 * CUE
    more = {"margin": margin} if kind == "context" else {}
    curve = CURVES[kind](
        values,
        x,
        RemoteCue(),
        1,
        block=block,
        steps=steps,
        baseline=baseline,
        sliding_window=PLANS[plan],
        seed=seed,
        **more,
    )
    fractions, dice, auc = reference(
        kind, values, x, RemoteCue(), margin, block, steps, baseline, PLANS[plan], seed
    )
    assert curve.fractions.shape == curve.dice.shape == curve.drop.shape == (steps + 1,)
    np.testing.assert_allclose(curve.fractions, fractions, atol=1e-12)
    np.testing.assert_allclose(curve.dice, dice, atol=1e-9)
    assert curve.auc == pytest.approx(auc, abs=1e-9)


# ------------------------------------------------------------------------------------ what it says


def test_only_context_deletion_tells_the_cue_from_the_mask():
    x, network = scene(), RemoteCue()
    aucs = {
        (kind, name): CURVES[kind](values, x, network, 1, block=2).auc
        for kind in CURVES
        for name, values in {"mask": MASK, "cue": CUE, "both": MASK + CUE}.items()
    }
    assert aucs["deletion", "mask"] < 0.05
    assert aucs["deletion", "both"] < 0.05
    assert aucs["insertion", "both"] > 0.95 > 0.7 > aucs["insertion", "mask"]
    assert aucs["context", "cue"] < 0.05
    assert aucs["context", "both"] < 0.05
    assert 0.3 < aucs["context", "mask"] < 0.8


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", CURVES)
def test_a_degraded_map_is_never_better(kind):
    """The more of a good map is noise, the worse it gets, for the mean over some draws."""
    x, network, areas = scene(), RemoteCue(), []
    for part in (0, 0.5, 0.8, 1):
        noises = [toy.random_input(1, 1, *SHAPE, seed=seed)[0, 0].abs() for seed in range(4)]
        maps = [(1 - part) * (MASK + CUE) + part * noise for noise in noises]
        areas.append(np.mean([CURVES[kind](one, x, network, 1, block=2).auc for one in maps]))
    worse = -1 if kind == "insertion" else 1
    assert all(np.diff(areas) * worse > -1e-6)
    assert abs(areas[-1] - areas[0]) > 0.15


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("baseline", ["noise", "mean"])
def test_the_same_seed_gives_the_same_numbers(kind, baseline):
    """A constant map deletes at random, as the seed says."""

    def curve(seed):
        return CURVES[kind](
            torch.ones(SHAPE), scene(), RemoteCue(), 1, block=2, baseline=baseline, seed=seed
        )

    assert np.array_equal(curve(3).dice, curve(3).dice)
    assert not np.array_equal(curve(3).dice, curve(4).dice)


def test_the_score_drops_with_the_dice():
    curve = context_deletion(CUE, scene(), RemoteCue(), 1, block=2)
    assert curve.drop[0] == 0
    assert curve.drop[-1] > 0.9
    assert curve.blocks > 100


def test_supervoxels_in_place_of_blocks():
    x = scene()
    segments = supervoxels(x, 200)
    assert segments.shape == SHAPE
    assert 50 < segments.max() < 400
    curve = context_deletion(CUE, x, RemoteCue(), 1, segments=segments)
    assert curve.auc < 0.2 < context_deletion(MASK, x, RemoteCue(), 1, segments=segments).auc


def test_sigmoid_and_a_single_channel():
    class Alone(RemoteCue):
        def forward(self, x):
            return super().forward(x)[:, 1:]

    two = context_deletion(CUE, scene(), RemoteCue(), 1, block=2)
    for network, index in ((RemoteCue(), 1), (Alone(), 0)):
        found = context_deletion(CUE, scene(), network, index, block=2, activation="sigmoid")
        assert np.array_equal(found.dice, two.dice)


# --------------------------------------------------------------------------------------- bad input


def test_what_has_no_curve_says_why():
    x = scene()

    def curve(values=CUE, image=x, network=None, class_index=1, **more):
        return context_deletion(values, image, network or RemoteCue(), class_index, **more)

    with pytest.raises(EmptyRegionError, match="class 1"):
        curve(image=x * 0)
    clean = torch.where(MASK > 0, scene(noisy=0), 0.0)
    with pytest.raises(EvaluationError, match="baseline 0 is equal to the input"):
        curve(image=clean, network=Bright(), baseline=0, block=2)
    with pytest.raises(EvaluationError, match=r"outside of the grown mask.*smaller blocks"):
        curve(margin=9)
    with pytest.raises(EvaluationError, match="needs 20 or more"):
        deletion(CUE, x, RemoteCue(), 1, block=7)
    with pytest.raises(InputError, match="grid of the input"):
        curve(CUE[:-1])
    with pytest.raises(InputError, match="NaN"):
        curve(CUE * torch.nan)
    with pytest.raises(InputError, match="segments are whole numbers"):
        curve(segments=np.zeros((2, 2)))
    for setting in ({"block": 0}, {"steps": 0}, {"margin": -1}, {"baseline": "mena"}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            curve(**setting)


class Bright(nn.Module):
    def forward(self, x):
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :1] - 0.5], 1)
