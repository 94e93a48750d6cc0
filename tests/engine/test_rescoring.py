"""Score-CAM and Ablation-CAM against brute force: one prediction of the volume for every channel.

Every prediction is MONAI's, through all windows; the score means the voxels that it meant for the
untouched network.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import toy
from helpers_engine import (
    EXACT,
    Part,
    box_of,
    counting_levels,
    curved,
    importance_of,
    parts_of,
    predicted,
    signed_maps,
    slow_unless,
    two_levels,
)
from reference import methods as slow
from torch import nn
from toy import deviation

from seg3dcam import AblationCAM, ScoreCAM, WindowPlan, targets
from seg3dcam.targets import fixed, region_of

STRIDES = {"1": 1, "3": 2}


def in_place() -> nn.Sequential:
    """Return `two_levels` with activations in place."""
    network = two_levels()
    network[1].inplace = network[3].inplace = True
    return network


#: name -> plan and volume, in which windows start on every layer's grid
PLANS = {
    "one window": (None, (6, 4, 8)),
    "side by side": (WindowPlan((4, 4, 8), overlap=0, mode="constant"), (8, 4, 8)),
    "overlapping": (WindowPlan((4, 4, 8), overlap=0.5, sw_batch_size=2), (6, 6, 8)),
    "larger than the volume": (WindowPlan((8, 4, 8), overlap=0.5), (4, 6, 8)),
}

BOX = targets.Box((1, 0, 2), (3, 2, 5))
#: name -> a target for the network's logits
TARGETS = {
    "predicted mask": lambda z: targets.ClassLogOdds(1),
    "box": lambda z: targets.ClassProbability(2, BOX),
    "the volume": lambda z: targets.ClassLogit(0, "volume"),
    "soft Dice": lambda z: targets.SoftDice(1, z[0].argmax(0) == 1),
    "a sum": lambda z: targets.WeightedSum(
        [(1.0, targets.ClassLogit(0)), (-2.0, targets.ClassLogit(1, BOX))]
    ),
    "a function": lambda z: curved,
}


class Brute:
    """One item, its windows, and what the network says when it sees less."""

    def __init__(self, network, layer, x, plan, target) -> None:
        self.network, self.x, self.plan, self.layer = network, x, plan, layer
        stride = STRIDES[layer]
        logits = predicted(lambda batch: network(batch.clone()), x, plan).detach()
        self.target = fixed(target, logits)
        self.score = self.target(logits)
        region = region_of(self.target, logits)
        # Of a sum over a region the mean is taken, of any other score the score itself.
        is_sum = region is not None and not isinstance(self.target, targets.SoftDice)
        self.voxels = int(region.sum()) if is_sum else 1

        case = toy.cut(copy.deepcopy(network), int(layer), x)
        parts = parts_of(case, plan, lambda logits: logits.sum((1, 2, 3, 4)))
        roi = [n * stride for n in parts[0].a.shape[1:]]
        self.stride, self.importance = stride, importance_of(plan, roi, stride)
        self.padding = [max(0, n - s) // 2 for n, s in zip(roi, x.shape[2:], strict=True)]
        self.activations = self._blended(parts)[None]  # of the padded volume

    def _blended(self, parts: list[Part]) -> torch.Tensor:
        boxes = [box_of(part.start, part.a.shape[1:], self.stride) for part in parts]
        shape = [max(box[axis].stop for box in boxes) for axis in range(3)]
        total, norm = torch.zeros(len(parts[0].a), *shape).double(), torch.zeros(shape).double()
        for part, box in zip(parts, boxes, strict=True):
            total[(slice(None), *box)] += part.a * self.importance
            norm[box] += self.importance
        return total / norm

    def on_voxels(self, values: torch.Tensor) -> torch.Tensor:
        """Interpolate (..., *s) linearly to the volume's voxels, without the padding."""
        for axis, (length, before) in enumerate(zip(self.x.shape[2:], self.padding, strict=True)):
            places = (np.arange(length) + before) / self.stride
            axis += values.ndim - 3
            values = np.apply_along_axis(
                lambda line, places=places: np.interp(places, np.arange(len(line)), line),
                axis,
                np.asarray(values),
            )
        return torch.as_tensor(values)

    def score_of(self, x: torch.Tensor) -> float:
        with torch.no_grad():
            logits = predicted(lambda batch: self.network(batch.clone()), x, self.plan)
            return self.target(logits).item()

    def through_channel(self, k: int) -> float:
        return self.score_of(self.x * slow.masks(self.on_voxels(self.activations))[:, k : k + 1])

    def without_channel(self, k: int) -> float:
        def silence(module, args, output):
            output = output.clone()
            output[:, k] = 0
            return output

        hook = self.network[int(self.layer)].register_forward_hook(silence)
        score = self.score_of(self.x)
        hook.remove()
        return score

    def score_cam(self) -> torch.Tensor:
        count = self.activations.shape[1]
        table = np.array([[self.through_channel(k) for k in range(count)]]) / self.voxels
        return self.on_voxels(torch.as_tensor(slow.score_cam(self.activations, table)))

    def ablation_cam(self) -> torch.Tensor:
        count = self.activations.shape[1]
        table = np.array([[self.without_channel(k) for k in range(count)]])
        whole = self.score.detach().numpy()
        return self.on_voxels(torch.as_tensor(slow.ablation_cam(self.activations, table, whole)))


METHODS = {"score_cam": ScoreCAM, "ablation_cam": AblationCAM}


@pytest.mark.few(6)
@signed_maps
@pytest.mark.parametrize(
    "target", [slow_unless(name in ("predicted mask", "a sum"), name) for name in TARGETS]
)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("key", METHODS)
def test_map_is_that_of_brute_force(key, name, target):
    given, shape = PLANS[name]
    network = toy.shared(in_place)
    x = toy.random_input(1, 1, *shape, seed=8)
    plan = given or WindowPlan(shape)
    asked = TARGETS[target](predicted(lambda batch: network(batch.clone()), x, plan).detach())
    result = METHODS[key](network, list(STRIDES), sliding_window=given)(x, asked)
    for layer in STRIDES:
        brute = Brute(network, layer, x, plan, asked)
        assert math.isclose(result.score.item(), brute.score.item(), rel_tol=EXACT)
        assert deviation(result.maps[layer], getattr(brute, key)()) < EXACT


@pytest.mark.few(3)
@signed_maps
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("key", METHODS)
def test_how_many_channels_go_at_once_does_not_matter(key, name):
    plan, shape = PLANS[name]
    x, target = toy.random_input(2, 1, *shape, seed=8), targets.ClassLogOdds(1)
    counting = toy.shared(counting_levels)
    layer, maps, runs = "network.3", [], []
    for memory_gb in (1e-9, 1e-4, 2.0):
        cam = METHODS[key](counting, layer, sliding_window=plan, memory_gb=memory_gb)
        cam(x, target)
        counting.reset()
        maps.append(cam(x, target).maps[layer])
        runs.append(counting.runs)
    assert runs[0] > runs[1] > runs[2]
    assert deviation(maps[0], maps[2]) < EXACT
    assert deviation(maps[1], maps[2]) < EXACT


@signed_maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("key", METHODS)
def test_what_goes_through_the_network_at_once_fits_the_memory_that_it_may_take(key, dtype):
    """All that the network's modules give is counted; not much less than what fits is used."""
    network, x = two_levels().to(dtype), toy.random_input(1, 1, 6, 4, 8).to(dtype)
    network[2] = toy.seeded(nn.Conv3d(4, 64, 3, stride=2, padding=1)).to(dtype)
    network[4] = toy.seeded(nn.ConvTranspose3d(64, 3, 2, stride=2)).to(dtype)
    taken = []
    for module in network:
        module.register_forward_hook(lambda m, args, output: taken.append(output.nbytes))
    network(x)
    bytes_of_one = sum(taken)
    sizes = []

    def note(module, args):
        if args[0].shape[2:] == x.shape[2:]:  # the places of voxels are measured in other inputs
            sizes.append(len(args[0]))

    network.register_forward_pre_hook(note)
    cam = METHODS[key](network, "3", memory_gb=10 * bytes_of_one / 1e9)
    cam(x, targets.ClassLogit(1, "volume"))
    assert 5 <= max(sizes) <= 10


@signed_maps
@pytest.mark.parametrize("key", METHODS)
def test_windows_that_the_region_does_not_touch_are_not_run_again(key):
    counting = toy.shared(counting_levels)
    plan = WindowPlan(4, overlap=0, mode="constant")
    x = toy.random_input(1, 1, 4, 4, 20)
    cam = METHODS[key](counting, "network.1", sliding_window=plan)
    runs = {}
    for name, region in {
        "one": targets.Voxel((0, 1, 9)),
        "two": targets.Box((0, 0, 2), (4, 4, 6)),
        "all": "volume",
    }.items():
        cam(x, targets.ClassLogit(1, region))
        counting.reset()
        cam(x, targets.ClassLogit(1, region))
        runs[name] = counting.inputs
    channels = 4
    assert runs["two"] - runs["one"] == channels
    assert runs["all"] - runs["one"] == 4 * channels


@signed_maps
@pytest.mark.parametrize("plan", [None, WindowPlan(4, overlap=0.5)], ids=["one", "many"])
@pytest.mark.parametrize("key", METHODS)
def test_a_batch_is_scored_item_by_item(key, plan):
    """Items have regions of their own, and windows of their own that these touch."""
    case = toy.cut(toy.shared(two_levels), 3, toy.random_input(2, 1, 8, 4, 8))
    mask = torch.zeros(2, 8, 4, 8)
    mask[0, :2, :2, :2] = mask[1, 6:, 1:, 5:] = 1
    cam = METHODS[key](case.network, "3", sliding_window=plan)
    together = cam(case.x, targets.ClassLogOdds(1, mask)).maps["3"]
    for item in range(2):
        alone = cam(case.x[item : item + 1], targets.ClassLogOdds(1, mask[item]))
        assert deviation(together[item], alone.maps["3"][0]) < EXACT


@signed_maps
@pytest.mark.parametrize("key", METHODS)
def test_region_is_the_one_that_was_predicted_first(key):
    """With less to see the class may not be predicted at all; the score means the old voxels."""
    case = toy.shared(toy.plain_case, 3)
    mask = case.network(case.x).argmax(1) == 1
    assert mask.flatten(1).any(1).all()
    cam = METHODS[key](case.network, "1")
    found = cam(case.x, targets.ClassLogit(1)).maps["1"]
    assert deviation(found, cam(case.x, targets.ClassLogit(1, mask)).maps["1"]) < EXACT
