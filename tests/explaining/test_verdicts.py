"""Every map of a scan carries a verdict, in words, wherever the map goes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from helpers_cases import seg3dcam
from helpers_engine import signed_maps
from torch import nn

from seg3dcam import SegModel, explain, explain_each, load_scan
from seg3dcam.errors import ConfigError, TargetError
from seg3dcam.explaining.evaluating import evaluate_scan
from seg3dcam.job.evaluation import write_evaluation
from seg3dcam.job.read_back import load_explanation
from seg3dcam.job.record import read_record
from seg3dcam.review.look import Look
from seg3dcam.review.plan import review_explanation
from seg3dcam.targets import ClassLogOdds, Component, EveryComponent

pytestmark = signed_maps

SHAPE = (36, 24, 24)
LESION, CUE = (
    (slice(20, 24), slice(8, 12), slice(8, 12)),
    (slice(8, 12), slice(8, 12), slice(8, 12)),
)


class Remote(nn.Module):
    """Class 1 is where the input is 1, if it is 2 twelve voxels before."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU())
        self.features[0].weight.data[:] = 1
        self.features[0].bias.data = torch.tensor([0.0, -1.0])
        self.head = nn.Conv3d(3, 2, 1)
        self.head.weight.data = torch.tensor([[0.0, 0, 0], [1, -2, 1]])[..., None, None, None]
        self.head.bias.data = torch.tensor([0.0, -1.5])

    def forward(self, x):
        a = self.features(x)
        cue = nn.functional.pad(a[:, 1:], (0, 0, 0, 0, 12, 0))[..., :-12, :, :]
        return self.head(torch.cat([a, cue], 1))


def remote_scan(*, lesions=(LESION,)):
    values = 0.05 * np.random.default_rng(0).random(SHAPE)
    values[CUE] = 2
    for place in lesions:
        values[place] = 1
    return load_scan(values.astype(np.float32), affine=np.diag([1.0, 1, 2, 1]))


def model(**settings):
    return SegModel(Remote(), class_names=["background", "lesion"], **settings)


@pytest.mark.slow
def test_a_map_of_the_cue_is_supported():
    found = explain(remote_scan(), model(), "lesion", layers="features", verdict="full")
    said = found.verdict()
    assert said.full
    assert said.figures["context_deletion"] < 0.1 < said.figures["mask_alone"]
    assert said.figures["p_value"] == pytest.approx(1 / 21)
    assert said.finding == "supported", said.words
    assert said.words.startswith("points outside the mask at something the prediction depends on")
    assert said.words in repr(found)


def test_a_class_name_controls_no_terminal():
    hostile = SegModel(Remote(), class_names=["background", "\x1b[2Jlesion"])
    words = repr(explain(remote_scan(), hostile, 1, layers="features"))
    assert "\x1b" not in words
    assert "[2Jlesion" in words


@pytest.mark.slow
def test_every_method_of_the_default_layer_is_tested():
    """Each method of a call is held against random weights at the layer that "auto" means."""
    methods = ["hires_cam", "grad_cam", "eigen_cam"]
    of_all = explain_each(remote_scan(), model(), ["lesion"], method=methods, verdict="full")
    for method, found in zip(methods, of_all, strict=True):
        alone = explain(remote_scan(), model(), "lesion", method=method, verdict="full")
        assert found.verdict().words == alone.verdict().words
        assert "not tested by random weights" not in found.verdict().words


@pytest.mark.slow
def test_an_echo_is_not():
    """Behind the last layer the map is the mask, whatever the prediction was made from."""
    found = explain(remote_scan(), model(), "lesion", layers="head", verdict="full")
    assert found.verdict().finding in ("echo", "random")
    assert found.verdict().is_against
    quick = explain(remote_scan(), model(), "lesion", layers="head").verdict()
    assert quick.finding == "perhaps echo"
    assert not quick.full


def test_a_method_without_classes_is_said():
    found = explain(remote_scan(), model(), "lesion", layers="features", method="eigen_cam")
    assert found.verdict().finding == "class-agnostic"


@pytest.mark.slow
def test_lesions_are_tested_one_by_one():
    """The second lesion has no cue before it: nothing but the first one is predicted."""
    scan, other = remote_scan(), (LESION[0], slice(16, 20), LESION[2])
    scan.data[(0, *other)] = 1
    scan.data[(0, CUE[0], slice(16, 20), CUE[2])] = 2
    each = explain_each(
        scan, model(), [EveryComponent(1)], layers="features", method="hires_cam", verdict="full"
    )
    said = [one.verdict() for one in each]
    assert len(said) == 2
    assert all(one.figures["context_deletion"] < 0.2 < one.figures["mask_alone"] for one in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (lambda logits: logits[:, 1].flatten(1).sum(1), "about no class"),
        (ClassLogOdds(1, "volume"), "nothing"),
    ],
    ids=["a function", "the whole volume"],
)
def test_what_cannot_be_tested_says_so(target, reason):
    said = explain(remote_scan(), model(), target, layers="features", verdict="full").verdict()
    if reason == "about no class":
        assert said.finding == "undefined"
        assert reason in said.words
    else:  # the mask of its class is what changes
        assert said.figures["context_deletion"] is not None


def test_a_word_that_is_no_level_is_refused():
    with pytest.raises(ConfigError, match="'quick' and 'full'"):
        explain(remote_scan(), model(), "lesion", layers="features", verdict="thorough")


def test_pictures_and_pages_and_scenes_say_it(tmp_path):
    pytest.importorskip("nrrd")
    from seg3dcam.export.dicom_picture import shown_words
    from seg3dcam.export.slicer import save_scene
    from seg3dcam.review import save_report

    found = explain(remote_scan(), model(), "lesion", layers="features")
    words = found.verdict().words
    assert f"verdict: {words}" in review_explanation(found).caption
    page = save_report(tmp_path / "report.html", found).read_text(encoding="utf-8")
    assert json.dumps(words)[1:-1] in page
    assert words in shown_words(found, Look())
    save_scene(tmp_path / "scene", found)
    scene = (tmp_path / "scene" / "scene.mrml").read_text(encoding="utf-8")
    assert words in scene.replace("&#37;", "%")


def test_a_case_keeps_it(place):
    assert place.explain("--target", "lesion", "--format", "nifti").code == 0
    (entry,) = read_record(place.out).explanations
    (said,) = entry.verdicts.values()
    again = load_explanation(place.out, scan=place.scan)
    assert again.verdict().words == said.words
    assert again.verdict().figures == said.figures


@pytest.mark.slow
def test_the_command_tests_on_demand(place):
    run = place.explain("--target", "lesion", "--format", "nifti", "--verdict")
    assert run.code == 0
    (entry,) = read_record(place.out).explanations
    (said,) = entry.verdicts.values()
    assert said.full
    assert said.words in run.out.replace("\n", " ") or said.finding == "undefined"


# ------------------------------------------------------------------------------------ evaluations


@pytest.fixture(scope="module")
def evaluations():
    truth = np.zeros(SHAPE, dtype=np.float32)
    truth[LESION] = 1
    truth = load_scan(truth, affine=np.diag([1.0, 1, 2, 1]))
    return list(
        evaluate_scan(remote_scan(), model(), ["lesion"], layers="features", truth={1: truth})
    )


@pytest.mark.slow
def test_an_evaluation_has_every_figure_beside_chance(evaluations):
    (one,) = evaluations
    by_name = {(m.group, m.name): m for m in one.measurements}
    assert one.verdict.finding == "supported"
    assert {group for group, _ in by_name} == {
        "faithfulness",
        "sanity",
        "complexity",
        "localisation in the prediction",
        "localisation in the truth",
    }
    energy = by_name["localisation in the truth", "energy"]
    # Half of the map lies in the lesion and half in the cue.
    assert energy.value == pytest.approx(0.5, abs=0.02)
    assert energy.chance == pytest.approx(64 / np.prod(SHAPE), rel=0.2)
    assert by_name["faithfulness", "deletion"].value < 0.1
    assert "mask alone gets 0." in by_name["faithfulness", "deletion"].note
    assert set(one.curves) >= {"context deletion", "deletion", "insertion"}
    assert all(m.value is not None or m.note for m in one.measurements)


@pytest.mark.slow
def test_what_is_undefined_has_a_reason(tmp_path):
    """The whole volume is the truth, so that no map can lie in or out of it."""
    whole = load_scan(np.ones(SHAPE, dtype=np.float32), affine=np.diag([1.0, 1, 2, 1]))
    (one,) = evaluate_scan(
        remote_scan(), model(), ["lesion"], layers="features", truth={1: whole}, baseline="blur"
    )
    undefined = [m for m in one.measurements if m.value is None]
    assert [m.group for m in undefined] == ["localisation in the truth"]
    assert "fills the whole volume" in undefined[0].note


def test_a_target_of_no_class_is_refused():
    with pytest.raises(TargetError, match="about no class"):
        list(evaluate_scan(remote_scan(), model(), [lambda logits: logits.sum((1, 2, 3, 4))]))


@pytest.mark.slow
def test_an_evaluation_is_written_as_a_whole(evaluations, tmp_path):
    picture, table, record = write_evaluation(tmp_path / "out", evaluations)
    assert picture.stat().st_size > 5000
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["group"] == "verdict"
    assert rows[0]["note"] == evaluations[0].verdict.words
    (one,) = json.loads(record.read_text(encoding="utf-8"))
    assert len(one["measurements"]) == len(rows) - 1
    assert one["curves"]["deletion"]["dice"][0] == 1
    write_evaluation(tmp_path / "out", evaluations)
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.slow
def test_the_command_evaluates(place, tmp_path):
    run = seg3dcam(
        *("evaluate", place.scan, "--model", place.model, "--target", "lesion"),
        *("--out", tmp_path / "out"),
    )
    assert run.code == 0
    assert "localisation in the" in run.out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "curves.png",
        "evaluation.csv",
        "evaluation.json",
    }


def test_component_targets_have_their_own_words():
    found = explain(remote_scan(), model(), ClassLogOdds(1, Component(0)), layers="features")
    assert found.verdict().finding in ("untested", "perhaps echo", "insensitive")


# --------------------------------------------------------------------------------- odd targets


def a_mask(*place) -> torch.Tensor:
    values = torch.zeros(SHAPE)
    values[place] = 1
    return values


@pytest.mark.slow
def test_what_is_not_predicted_cannot_be_followed():
    """Another lesion is predicted, and its prediction says nothing about this place."""
    elsewhere = a_mask(slice(28, 32), slice(8, 12), slice(8, 12))
    target = ClassLogOdds(1, elsewhere[None])
    said = explain(remote_scan(), model(), target, layers="features", verdict="full").verdict()
    assert said.finding in ("undefined", "unusable")
    assert "not predicted" in said.words or said.finding == "unusable"


@pytest.mark.slow
def test_it_is_said_when_the_whole_class_was_followed():
    target = ClassLogOdds(1, "volume")
    said = explain(remote_scan(), model(), target, layers="features", verdict="full").verdict()
    assert "followed was the whole predicted mask of the class" in said.words


def test_a_function_with_an_index_of_no_class_is_explained():
    def score(logits):
        return logits[:, 1].flatten(1).sum(1)

    score.index = 7
    found = explain(remote_scan(), model(), score, layers="features")
    assert found.verdict().figures["mask_explains"] is None


def test_only_a_region_that_is_summed_over_can_be_too_small():
    """The lesion has 64 voxels; a stride of 8 makes voxels of 512."""
    network = Remote()
    network.features.append(nn.AvgPool3d(8, 8))
    network.features.append(nn.Upsample(scale_factor=8))
    coarse = SegModel(network, class_names=["background", "lesion"])
    scan = load_scan(remote_scan().data[0, :32].numpy(), affine=np.eye(4))
    said = explain(scan, coarse, ClassLogOdds(1, "volume"), layers="features.2").verdict()
    assert said.finding != "too coarse"


def test_a_baseline_that_is_none_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(Remote, "forward", lambda *_: pytest.fail("a prediction was made"))
    with pytest.raises(ConfigError, match="bogus"):
        list(evaluate_scan(remote_scan(), model(), ["lesion"], baseline="bogus"))
