"""What is said of a map: each finding where it holds, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toy
from helpers_engine import signed_maps
from test_context import GRID, evidence
from test_faithfulness import CUE, MASK, SHAPE

from seg3dcam.cams.catalogue import CAMS
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.evaluate.controls import random_maps
from seg3dcam.evaluate.sanity import Check
from seg3dcam.evaluate.verdict import (
    Verdict,
    explained_by_mask,
    full_verdict,
    quick_verdict,
    together,
    undefined_verdict,
)
from seg3dcam.geometry import FeatureGrid, interpolate

pytestmark = signed_maps

FORMULA = CAMS["hires_cam"].formula
VOXELS = FeatureGrid.of_voxels(SHAPE)
REGION = MASK > 0


def layer_map(values, grid=VOXELS, **more) -> LayerMap:
    return LayerMap(values[None].float(), grid, grid, values.abs().max()[None] + 1, **more)


def coarse(values, stride=2):
    """The values as a layer has them: means over its voxels."""
    return torch.nn.functional.avg_pool3d(values[None].double(), stride)[0]


# -------------------------------------------------------------------------- what the mask explains


@pytest.mark.parametrize("grid", [VOXELS, GRID], ids=["fine", "coarse"])
def test_a_copy_of_the_mask_is_explained_by_it(grid):
    values = MASK if grid is VOXELS else coarse(MASK)
    assert explained_by_mask(layer_map(3 * values, grid), REGION) == pytest.approx(1, abs=1e-6)


def test_it_is_the_squared_correlation_on_the_layers_grid():
    values = torch.rand(GRID.shape, generator=torch.Generator().manual_seed(0))
    both = torch.stack([values.flatten().double(), coarse(MASK).flatten()])
    expected = float(torch.corrcoef(both)[0, 1] ** 2)
    found = explained_by_mask(layer_map(values, GRID), REGION)
    # Blurred masks are tried too, and the best one counts.
    assert expected <= found < 0.1


def test_a_halo_is_an_echo_too():
    from scipy import ndimage

    blurred = torch.from_numpy(ndimage.gaussian_filter(MASK.double().numpy(), 2, mode="nearest"))
    assert explained_by_mask(layer_map(blurred), REGION) > 0.99


@pytest.mark.parametrize("values", [CUE, MASK + CUE, -MASK], ids=["cue", "mask and cue", "against"])
def test_a_map_of_something_else_is_not(values):
    assert explained_by_mask(layer_map(values), REGION) < 0.6


def test_of_a_large_map_means_tell_as_much(monkeypatch):
    values = MASK + 0.7 * CUE
    whole = explained_by_mask(layer_map(values), REGION)
    monkeypatch.setattr("seg3dcam.evaluate.verdict.MOST", values.numel() // 8)
    assert explained_by_mask(layer_map(values), REGION) == pytest.approx(whole, abs=0.05)
    one = torch.zeros(SHAPE)
    one[5, 7, 9] = 1
    assert explained_by_mask(layer_map(one), one > 0) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0, 1.5])
def test_the_mask_is_taken_where_the_layers_voxels_are(offset):
    """A map made of the mask at any phase of the grid is explained by it."""
    grid = FeatureGrid((5, 9, 6), (2.0,) * 3, (offset,) * 3)
    near = torch.nn.functional.avg_pool3d(MASK[None].double(), 2, stride=1)[0]
    at = FeatureGrid(tuple(near.shape), (1.0,) * 3, (0.5,) * 3)
    values = interpolate(near, at, grid)
    assert explained_by_mask(layer_map(values, grid), REGION) == pytest.approx(1, abs=1e-6)


# ----------------------------------------------------------------------------------- quick verdicts


def quick(values=CUE, formula=FORMULA, region=REGION, grid=VOXELS, **more) -> Verdict:
    return quick_verdict(layer_map(values, grid, **more), formula, region)


def test_what_nothing_is_found_against_is_untested():
    said = quick()
    assert said.finding == "untested"
    assert said.words.startswith("no fault found, the mask alone explains 0 % of the map;")
    assert said.words.endswith("not tested by deletion")
    assert not said.is_against


@pytest.mark.parametrize(
    ("finding", "changed", "words"),
    [
        ("unusable", {"values": -CUE}, "no voxel speaks for the target"),
        ("unusable", {"values": CUE * torch.nan}, "NaN or infinite values"),
        ("unusable", {"values": torch.ones(SHAPE)}, "the same everywhere"),
        ("unusable", {"missing": 0.4}, "a branch of the network has no gradient"),
        (
            "class-agnostic",
            {"formula": CAMS["eigen_cam"].formula},
            "gives this map for every class",
        ),
        ("too coarse", {"values": coarse(CUE, 2), "grid": GRID, "region": "one"}, "smaller than"),
        ("perhaps echo", {"values": MASK}, "the mask alone explains 100 % of the map"),
        ("insensitive", {"head": 0.97}, "if the network's last weights are random"),
        ("untested", {"unchecked": "no"}, "its gradient could not be checked"),
        ("untested", {"region": None}, "no fault found; not tested"),
        ("untested", {"region": REGION & False}, "no fault found; not tested"),
    ],
)
def test_each_fault_is_found(finding, changed, words):
    if isinstance(changed.get("region"), str):
        one = torch.zeros(SHAPE, dtype=torch.bool)
        one[4, 4, 4] = True
        changed = changed | {"region": one}
    said = quick(**changed)
    assert said.finding == finding
    assert words in said.words
    assert said.is_against == (finding in ("unusable", "class-agnostic", "too coarse"))


def test_doubts_are_said_together():
    said = quick(values=MASK, head=0.99)
    assert said.finding == "perhaps echo"
    assert "insensitive" in said.words


# ------------------------------------------------------------------------------------ full verdicts

PASSED = Check(("all",), (0.1,), (0.0,), 0.1, 0.7, "ranks correlate by 0.10")
STAYED = Check(("all",), (0.9,), (0.8,), 0.9, 0.7, "ranks correlate by 0.90")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("values", "randomised", "finding"),
    [
        (MASK + CUE, PASSED, "supported"),
        (MASK + CUE, STAYED, "insensitive"),
        (MASK + CUE, None, "supported"),
        (next(random_maps(GRID, SHAPE, draws=1, seed=77)), PASSED, "random"),
    ],
    ids=["the cue", "the cue, not learnt", "not copied", "random"],
)
def test_a_map_is_held_against_controls(values, randomised, finding):
    found = evidence(values)
    said = full_verdict(quick(values), found, randomised)
    assert said.finding == finding, said.words
    assert said.full
    assert found.words in said.words
    assert said.figures["context_deletion"] == found.curve.auc
    assert said.is_against == (finding == "random")


def test_what_is_no_better_than_nearness_is_an_echo():
    found = evidence(MASK + CUE)
    found = replace(found, controls={**found.controls, "nearness to the mask": found.curve.auc})
    said = full_verdict(quick(MASK + CUE), found, PASSED)
    assert said.finding == "echo"
    assert said.is_against
    assert said.words.startswith(
        "echo: says nothing beyond the mask; the nearness to the mask gets 0.0"
    )


def test_what_is_class_agnostic_stays_so():
    before = quick(formula=CAMS["eigen_cam"].formula)
    said = full_verdict(before, evidence(MASK + CUE), STAYED)
    assert said.finding == "class-agnostic"
    assert "ranks correlate by 0.90; points outside" in said.words


def test_what_cannot_be_tested_says_why():
    said = undefined_verdict(quick(), "undefined: only 3 blocks")
    assert said.finding == "undefined"
    assert said.words.endswith("not tested by deletion: undefined: only 3 blocks")
    assert undefined_verdict(quick(values=-CUE), "no").finding == "unusable"


def test_several_layers_are_counted():
    said = together({"a": quick(), "b": quick(values=MASK), "c": quick()})
    assert said == Verdict(
        "perhaps echo", "of 3 layers: 1 perhaps echo, 2 untested; see each layer"
    )
    assert together({"a": quick()}) == quick()
    assert together({}) is None
    assert not replace(said, full=True).is_against


def test_one_lesion_of_two_is_measured_alone():
    """The other lesion is context: it may be deleted, and a prediction there does not count."""
    from seg3dcam.evaluate.blocks import Subject
    from seg3dcam.evaluate.rerun import Rerun

    x = torch.full((1, 1, 24, 12, 12), -1.0)
    x[..., 2:6, 2:6, 2:6] = x[..., 16:20, 2:6, 2:6] = 1
    network = toy.seeded(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1))).float()
    network[0].weight.data[:, 0, 0, 0, 0] = torch.tensor([-1.0, 1.0])
    network[0].bias.data.zero_()
    mask = x[0, 0] > 0
    first = mask & (torch.arange(24) < 12)[:, None, None]
    subject = Subject(Rerun(network, x), 1, "softmax", first)
    assert torch.equal(subject.mask, first)
    without_other = x.clone()
    without_other[..., 16:20, :, :] = -1
    assert subject.dice_at(network(without_other)) == 1
    without_first = x.clone()
    without_first[..., 2:6, :, :] = -1
    assert subject.dice_at(network(without_first)) == 0


def test_a_region_that_is_no_part_of_the_mask_is_refused():
    from seg3dcam.errors import InputError
    from seg3dcam.evaluate.blocks import Subject
    from seg3dcam.evaluate.rerun import Rerun

    network = toy.seeded(torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1))).float()
    x = toy.random_input(1, 1, 12, 12, 12).float()
    with pytest.raises(InputError, match="part of the class's predicted mask"):
        Subject(Rerun(network, x), 1, "softmax", torch.ones(12, 12, 12, dtype=torch.bool))


def test_a_tested_map_keeps_what_was_found_before():
    before = quick(values=MASK + 0.3 * CUE)
    assert before.finding == "perhaps echo"
    said = full_verdict(before, evidence(MASK + CUE), None)
    assert said.finding == "supported"
    assert "perhaps an echo" in said.words
    assert said.words.endswith("not tested by random weights")


def test_what_is_not_certain_is_not_said():
    found = replace(evidence(MASK + CUE), certain=False)
    assert full_verdict(quick(), found, PASSED).finding == "undefined"
    random = replace(found, p_value=0.5)
    assert full_verdict(quick(), random, PASSED).finding == "random"


def test_figures_are_numbers():
    found = replace(evidence(MASK + CUE), left=float("nan"))
    said = full_verdict(quick(), found, replace(PASSED, worst=float("inf")))
    assert said.figures["without_context"] is None
    assert said.figures["random_weights"] is None
    assert said.figures["certain"] == 1
    assert "error, mean" in said.figures
