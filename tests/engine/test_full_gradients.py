"""FullGrad: the map sums to the score wherever the network is piecewise linear.

Of one window on the input's own grid every number is checked in the tests of the methods; here are
windows, coarser levels, and networks of which the promise does not hold.
"""

from __future__ import annotations

import re

import pytest
import torch
import toy
from helpers_crossed import crossed
from helpers_engine import EXACT, predicted, signed_maps
from reference import methods as slow
from torch import nn
from toy import deviation

from seg3dcam import FullGrad, WindowPlan, targets
from seg3dcam.engine.full_gradients import _spread
from seg3dcam.errors import Seg3dcamWarning
from seg3dcam.geometry import FeatureGrid


def norm(channels: int, seed: int) -> nn.BatchNorm3d:
    """Return a BatchNorm with statistics as after training."""
    module, generator = nn.BatchNorm3d(channels), torch.Generator().manual_seed(seed)
    module.running_mean.copy_(torch.randn(channels, generator=generator))
    module.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return module


class UNet(nn.Module):
    """Two levels that are added, and a third that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), norm(4, 1), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv3d(4, 6, 3, 2, 1, bias=False), norm(6, 2), nn.LeakyReLU())
        self.three = nn.Sequential(nn.AvgPool3d(2), nn.Conv3d(6, 4, 1), nn.PReLU())
        self.up_three = nn.ConvTranspose3d(4, 6, 2, 2)
        self.up_two = nn.Upsample(scale_factor=2, mode="trilinear")
        self.head = nn.Conv3d(10, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.one(x)
        two = self.two(one)
        return self.head(torch.cat([one, self.up_two(two + self.up_three(self.three(two)))], 1))


#: Piecewise linear networks of two input channels, for inputs of 8 x 4 x 12 voxels.
NETWORKS = {
    "one grid": lambda: nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        norm(4, 1),
        nn.ReLU(inplace=True),
        nn.Conv3d(4, 4, 3, padding=1, groups=2),
        norm(4, 2),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv3d(4, 3, 1),
    ),
    "strides and pooling": lambda: nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 4, 3, padding=2, dilation=2),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose3d(4, 4, 2, stride=2),
        norm(4, 3),
        nn.ConvTranspose3d(4, 3, 4, stride=2, padding=1),
    ),
    "strides along some axes": lambda: nn.Sequential(
        nn.Conv3d(2, 4, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        nn.ReLU(),
        nn.AvgPool3d((2, 1, 2)),
        nn.Conv3d(4, 3, 1),
        nn.Upsample(scale_factor=(2, 2, 4)),
    ),
    "features beyond the volume": lambda: nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=2, padding=2),
        nn.ReLU(),
        nn.ConvTranspose3d(4, 3, 4, stride=2, padding=2),
    ),
    "U-Net": UNet,
}
PLANS = {
    "one window": None,
    "side by side": WindowPlan((4, 4, 4), overlap=0, mode="constant"),
    "overlapping": WindowPlan((4, 4, 8), overlap=0.5, sw_batch_size=2),
    "steps off the grid": WindowPlan((4, 4, 8), overlap=0.3),
    "larger than the volume": WindowPlan((4, 8, 16), overlap=0.5, cval=0.5),
}
TARGETS = {
    "the volume": targets.ClassLogit(1, "volume"),
    "mask": targets.ClassLogit(2, torch.arange(8 * 4 * 12).reshape(8, 4, 12) % 5 == 0),
    "box": targets.ClassLogit(1, targets.Box((0, 1, 2), (3, 3, 5))),
    "weights on logits": lambda z: (z * toy.random_input(1, *z.shape[1:], seed=9)).sum(
        (1, 2, 3, 4)
    ),
}


def seeded(name: str) -> nn.Module:
    return toy.seeded(NETWORKS[name](), seed=4)


@pytest.mark.parametrize(
    ("name", "plan", "target"),
    crossed(NETWORKS, PLANS, TARGETS, rows=1),
)
@signed_maps
def test_map_sums_to_the_score(name, plan, target, recwarn):
    network = toy.shared(seeded, name)
    x = toy.random_input(2, 2, 8, 4, 12, seed=1)
    result = FullGrad(network, sliding_window=PLANS[plan])(x, TARGETS[target])
    assert not [w for w in recwarn if "complete" in str(w.message)]
    values = result.layers["input"].values
    assert values.shape == (2, 8, 4, 12)
    if plan != "larger than the volume":  # there the padding has a part in the score
        assert deviation(values.flatten(1).sum(1), result.score) < EXACT


@signed_maps
def test_every_window_has_its_share_of_every_contribution():
    """Windows of one graph: contributions of input and biases, each where its window lies."""
    network = toy.shared(seeded, "one grid")
    x = toy.random_input(1, 2, 6, 4, 7, seed=1)
    plan = WindowPlan((4, 3, 4), overlap=0.4)
    weights = toy.random_input(1, 3, 6, 4, 7, seed=2)
    places, outputs = [], []

    def predictor(batch, coordinates):
        places.extend(coordinates)
        value = batch.clone().requires_grad_()
        outputs.append([(value, value)])
        for module in network:
            value = module(value.clone())
            bias = slow._bias(module)
            if bias is not None:
                outputs[-1].append((value, bias.reshape(1, -1, 1, 1, 1)))
        return value.clone()

    logits = predicted(predictor, x, plan, with_coord=True)
    expected = torch.zeros(1, 6, 4, 7).double()
    for place, terms in zip(places, outputs, strict=True):
        gradients = torch.autograd.grad(
            (logits * weights).sum(), [value for value, _ in terms], retain_graph=True
        )
        for (_, factor), gradient in zip(terms, gradients, strict=True):
            expected[(0, *place[2:])] += (factor * gradient).detach().sum(1)[0]

    result = FullGrad(network, sliding_window=plan)(x, lambda z: (z * weights).sum((1, 2, 3, 4)))
    assert deviation(result.maps["input"], expected) < EXACT


@pytest.mark.slow
@signed_maps
def test_a_nonlinear_score_is_taken_apart_along_its_slope():
    network, x = toy.shared(seeded, "U-Net"), toy.random_input(2, 2, 8, 4, 12)
    target = targets.ClassProbability(1, "volume")
    for plan in (None, WindowPlan((4, 4, 8), overlap=0)):
        result = FullGrad(network, sliding_window=plan)(x, target)
        logits = result.logits.detach().requires_grad_()
        (slope,) = torch.autograd.grad(target(logits).sum(), logits)
        explained = (slope * result.logits).flatten(1).sum(1)
        assert deviation(result.maps["input"].flatten(1).sum(1), explained) < EXACT


INCOMPLETE = {
    "InstanceNorm": lambda: nn.Sequential(nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(0.1)),
    "GroupNorm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()),
    "a smooth activation": nn.Softplus,
    "a bounded activation": nn.Hardtanh,
}


@pytest.mark.few(3)
@pytest.mark.parametrize("plan", [None, WindowPlan((4, 4, 8), overlap=0.5)], ids=["one", "many"])
@pytest.mark.parametrize("name", INCOMPLETE)
def test_where_the_sum_is_not_the_score_both_are_told(name, plan):
    layers = [nn.Conv3d(2, 4, 3, padding=1), INCOMPLETE[name](), nn.Conv3d(4, 3, 1)]
    network, x = toy.seeded(nn.Sequential(*layers), seed=5), toy.random_input(1, 2, 6, 4, 8)
    network[0].weight.data *= 3
    with pytest.warns(Seg3dcamWarning, match="full_grad is not complete here") as caught:
        result = FullGrad(network, sliding_window=plan)(x, targets.ClassLogit(1, "volume"))
    numbers = re.search(r"sums to (\S+), what it takes apart to (\S+?)\. ", str(caught[0].message))
    total = result.maps["input"].sum().item()
    assert float(numbers[1]) == pytest.approx(total, rel=1e-3)
    assert float(numbers[2]) == pytest.approx(result.score.item(), rel=1e-3)
    assert abs(total - result.score.item()) > 1e-3 * abs(total)
    assert len(result.layers["input"].flags) == 1


class Pooled(nn.Module):
    """Adds a vector made of the whole image, and mixes channels that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 1)
        self.of_vector = nn.Linear(4, 4)
        self.of_voxels = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = x + self.of_vector(x.mean((2, 3, 4)))[..., None, None, None]
        return self.of_voxels(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.slow
@signed_maps
def test_biases_of_vectors_and_of_voxels_in_one_network_are_all_counted():
    network, x = toy.seeded(Pooled(), seed=4), toy.random_input(2, 2, 6, 4, 8, seed=1)
    target = targets.ClassLogit(1, targets.Box((0, 1, 2), (3, 3, 5)))
    result = FullGrad(network)(x, target)
    assert result.layers["input"].flags == ()
    assert deviation(result.maps["input"].flatten(1).sum(1), result.score) < EXACT


@signed_maps
def test_the_papers_psi_on_coarser_levels():
    """Absolute values, every channel scaled to [0, 1], interpolated to the input, and summed."""
    layers = [
        nn.Conv3d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv3d(4, 4, 1),
        nn.ConvTranspose3d(4, 3, 2, stride=2, bias=False),
    ]
    network, x = toy.seeded(nn.Sequential(*layers), seed=4), toy.random_input(2, 2, 8, 4, 12)
    parts = slow.full_grad(network, x, lambda z: z[:, 1].flatten(1).sum(1))
    assert list(parts) == ["input", "0", "2"]
    expected = torch.zeros(2, 8, 4, 12).double()
    for name, part in parts.items():
        scaled = slow.masks(torch.as_tensor(abs(part))).sum(1)
        if name != "input":  # feature u lies at voxel 2 u; the last one is held
            for axis in (1, 2, 3):
                after = scaled.roll(-1, axis)
                last = scaled.shape[axis] - 1
                after.select(axis, last).copy_(scaled.select(axis, last))
                scaled = torch.stack([scaled, (scaled + after) / 2], axis + 1).flatten(
                    axis, axis + 1
                )
        expected += scaled
    result = FullGrad(network, psi="paper")(x, targets.ClassLogit(1, "volume"))
    assert deviation(result.maps["input"], expected) < EXACT
    assert not result.layers["input"].flags


@signed_maps
def test_layers_that_do_not_run_or_do_not_matter_are_left_out():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv3d(2, 3, 3, padding=1)
            self.side = nn.Conv3d(2, 3, 1)
            self.unused = nn.Conv3d(2, 3, 1)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.body(x), self.side(x)[..., ::2]]

    network, x = toy.seeded(Spare()), toy.random_input(1, 2, 8, 4, 12)
    result = FullGrad(network)(x, targets.ClassLogit(1, "volume"))
    assert deviation(result.maps["input"].sum((1, 2, 3)), result.score) < EXACT


@pytest.mark.parametrize(
    ("stride", "offset", "values", "expected"),
    [
        (1.0, 0.0, [1, 2, 3], [1, 2, 3]),
        (1.0, -1.0, [1, 2, 3, 4, 5], [3, 3, 9]),  # the outer two lie in padding
        (2.0, 0.0, [3, 3], [2, 2, 2]),  # voxel 1 lies between them
        (3.0, 1.0, [6], [2, 2, 2]),
    ],
)
def test_a_contribution_is_spread_around_its_place(stride, offset, values, expected):
    grid = FeatureGrid((len(values),), (stride,), (offset,))
    found = _spread(torch.tensor([values]).double(), grid, FeatureGrid.of_voxels((3,)))
    assert found[0].tolist() == pytest.approx(expected)
