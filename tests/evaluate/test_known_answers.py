"""On networks with planted evidence: what shows it passes, and what only looks convincing does not.

The networks are those of the benchmark, with the weights that are kept beside it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_engine import signed_maps
from scipy import ndimage

from benchmarks.known import PROBLEMS
from benchmarks.known.score import Field
from benchmarks.known.training import dice, predicted
from benchmarks.known.volumes import CUBE, SHAPE, shortcut, side_by_side
from seg3dcam import EigenCAM, GradCAM, HiResCAM
from seg3dcam.cams.calls import each_by
from seg3dcam.evaluate import context_deletion, context_evidence, randomisation
from seg3dcam.evaluate.controls import mask_alone, random_maps
from seg3dcam.geometry import FeatureGrid
from seg3dcam.targets import ClassLogOdds

pytestmark = signed_maps

SEEDS = (201, 202)
CLASS = 1


@pytest.fixture(scope="module")
def remote():
    """The network whose class needs a remote cue, one volume, its prediction and its evidence."""
    network = PROBLEMS["remote_cue"].load()
    x, _, evidence = PROBLEMS["remote_cue"].volume(SEEDS[0])
    with torch.no_grad():
        mask = network(x).argmax(1)[0] == CLASS
    return network, x, mask, evidence


# ---------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_volume_is_what_its_problem_says(name):
    problem = PROBLEMS[name]
    x, truth, evidence = problem.volume(SEEDS[0])
    assert x.shape == (1, 1, *SHAPE)
    assert truth.shape == evidence.shape == SHAPE
    assert (truth == problem.class_index).any()
    assert evidence.any()
    distance = ndimage.distance_transform_edt(truth.numpy() != problem.class_index)
    # Context deletion spares a margin of 2 voxels and the blocks of 4 that meet it.
    assert distance[evidence.numpy()].min() > {"remote_cue": 11, "shortcut": 3}.get(name, 5)
    assert torch.equal(x, problem.volume(SEEDS[0])[0])
    assert not torch.equal(x, problem.volume(SEEDS[1])[0])


@pytest.mark.parametrize("name", ["remote_cue", "absence", "side_by_side"])
def test_brightness_tells_no_cue_from_its_rivals(name):
    scene = PROBLEMS[name].scene(SEEDS[0])
    cue = scene.changed if name == "absence" else scene.image
    assert np.abs(cue[scene.evidence]) == pytest.approx(CUBE)
    assert np.abs(scene.image[scene.rival]) == pytest.approx(CUBE)


# --------------------------------------------------------------------------------------- networks


@pytest.mark.few(5)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_network_has_learnt_what_was_planted(name, seed):
    """It draws the class, and the class goes if nothing but its evidence is changed."""
    problem = PROBLEMS[name]
    network, scene = problem.load(), problem.scene(seed)
    own = predicted(network, scene.image) == problem.class_index
    assert dice(own, scene.labels == problem.class_index) > 0.85
    after = predicted(network, scene.changed) == problem.class_index
    assert (after & own).sum() < 0.1 * own.sum()
    assert problem.weights.stat().st_size < 300_000


@pytest.mark.parametrize("seed", SEEDS)
def test_the_shortcut_is_the_letter_and_not_the_lesion(seed):
    network = PROBLEMS["shortcut"].load()
    harmless = shortcut(np.random.default_rng(seed), False)
    with_letter = shortcut(np.random.default_rng(seed), False, letter=True)
    assert not (predicted(network, harmless.image) == CLASS).any()
    called = predicted(network, with_letter.image) == CLASS
    assert dice(called, with_letter.objects["nodule"]) > 0.8


# ------------------------------------------------------------------------------------------- maps


@pytest.mark.slow
def test_a_map_of_the_remote_cue_passes(remote):
    network, x, _, evidence = remote
    found = context_evidence(evidence.double(), x, network, CLASS, steps=12)
    assert found.passed
    assert found.words.startswith("points outside the mask at something the prediction depends on")


@pytest.mark.slow
def test_the_mask_itself_does_not_pass(remote):
    network, x, mask, _ = remote
    found = context_evidence(mask_alone(mask), x, network, CLASS, steps=12)
    assert found.needs_context
    assert not found.passed


@pytest.mark.slow
def test_an_echo_of_the_decoder_does_not_pass(remote):
    """It lies on the mask like a good map, and says nothing about what the class depends on."""
    network, x, mask, _ = remote
    result = HiResCAM(network, "upcat_1")(x, target=CLASS)
    values = result.maps["upcat_1"][0]
    assert values.clamp(min=0)[mask].sum() > 0.5 * values.clamp(min=0).sum()
    found = context_evidence(
        values, x, network, CLASS, grid=result.layers["upcat_1"].grid, steps=12
    )
    assert not found.passed


@pytest.mark.slow
def test_eigen_cam_fails_randomisation(remote):
    network, x, _, _ = remote
    target = ClassLogOdds(CLASS)
    check = randomisation(EigenCAM(network, "down_1"), x, target, stages=4)
    assert not check.passed
    assert check.spearman[0] == pytest.approx(1)
    assert randomisation(GradCAM(network, "down_1"), x, target, stages=4).passed


@pytest.mark.slow
def test_a_target_on_one_object_lights_its_own_cue_alone():
    """Both balls are of one class and touch: only the target's voxels tell them apart.

    Grad-CAM has one weight for each channel, so it lights both cues, which look alike.
    """
    network = PROBLEMS["side_by_side"].load()
    cams = [HiResCAM(network, "down_2"), GradCAM(network, "down_2")]
    parts = []
    for seed in range(SEEDS[0], SEEDS[0] + 4):
        scene = side_by_side(np.random.default_rng(seed), True, both=True)
        x = torch.from_numpy(scene.image)[None, None].float()
        target = ClassLogOdds(CLASS, torch.from_numpy(scene.objects["first"])[None])
        (results,) = each_by(cams, x, [target])
        cues = [torch.from_numpy(mask) for mask in (scene.rival, scene.evidence)]
        lit = [[float(r.maps["down_2"][0].clamp(min=0)[m].sum()) for m in cues] for r in results]
        parts.append([other / own for other, own in lit])
    hires, grad = zip(*parts, strict=True)
    assert np.median(hires) < 0.1
    assert all(one < other for one, other in zip(hires, grad, strict=True))
    assert min(grad) > 0.5


@pytest.mark.slow
def test_figures_are_those_of_the_library(remote):
    """The benchmark puts many inputs through the network together; the areas stay the same."""
    network, x, mask, evidence = remote
    field = Field(PROBLEMS["remote_cue"], network, SEEDS[0])
    grid = FeatureGrid((6, 4, 4), (8.0,) * 3, (3.5,) * 3)
    values = [*random_maps(grid, SHAPE, draws=2, seed=5), mask.double() + evidence]
    found = field.areas(values)
    for one, area in zip(values, found, strict=True):
        assert area == pytest.approx(context_deletion(one, x, network, CLASS).auc, abs=0.03)
    assert max(found) - min(found) > 0.1
