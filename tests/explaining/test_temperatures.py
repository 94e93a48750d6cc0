"""Reliability beside a slow reference; temperatures of networks whose temperature is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_cases import Place, seg3dcam, voxels, write_scan
from scipy.special import expit, softmax
from torch import nn

from seg3dcam import SegModel, explain, load_model, load_scan
from seg3dcam.cohort.calibration import reliability_of_classes
from seg3dcam.errors import ConfigError, EvaluationError, TargetError
from seg3dcam.explaining.calibration import COLDEST, HOTTEST, calibrate
from seg3dcam.explaining.reliability import (
    BINS,
    NEAR_MM,
    near_masks,
    reliability,
    reliability_of,
)
from seg3dcam.explaining.uncertainty import uncertainty
from seg3dcam.job.case import write_case
from seg3dcam.job.keys import case_keys
from seg3dcam.job.record import read_record, record_of
from seg3dcam.job.settings import Job
from seg3dcam.models.preparation import build_preparation
from seg3dcam.models.specs import Prepare
from seg3dcam.windows import WindowPlan

SHAPE = (26, 20, 22)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
NAMES = ["none", "organ", "lesion"]


# ---------------------------------------------------------------------------------- reliability


def slow_ece(probability, there):
    total = 0.0
    for number in range(BINS):
        last = number == BINS - 1
        inside = [
            (p, t)
            for p, t in zip(probability, there, strict=True)
            if number / BINS <= p < (number + 1) / BINS or (last and p == 1)
        ]
        if inside:
            mean = math.fsum(p for p, _ in inside) / len(inside)
            part = sum(t for _, t in inside) / len(inside)
            total += len(inside) * abs(mean - part)
    return total / len(probability)


@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_that_of_the_definition(seed):
    random = np.random.default_rng(seed)
    probability = np.concatenate([random.random(400), [0, 1, 1, 0.5]])
    there = random.random(404) < probability**2
    assert reliability(probability, there).ece == pytest.approx(
        slow_ece(probability, there), abs=1e-12
    )
    region = random.random(404) < 0.5
    part = reliability(probability, there, region)
    assert part.ece == pytest.approx(slow_ece(probability[region], there[region]), abs=1e-12)


def test_the_sum_of_two_is_that_of_all_voxels():
    random = np.random.default_rng(0)
    probability, there = random.random(500), random.random(500) < 0.3
    both = reliability(probability[:200], there[:200]) + reliability(probability[200:], there[200:])
    whole = reliability(probability, there)
    assert both.ece == pytest.approx(whole.ece, abs=1e-12)
    assert np.array_equal(both.count, whole.count)


def test_probabilities_that_are_true_have_no_error_and_others_do():
    random = np.random.default_rng(0)
    probability = random.random(200_000)
    there = random.random(200_000) < probability
    assert reliability(probability, there).ece < 0.005
    assert reliability(np.sqrt(probability), there).ece > 0.1
    assert math.isnan(reliability([], []).ece)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 5), (4, 11, 3)])
def test_voxels_near_masks_are_those_by_distance(spacing):
    random = np.random.default_rng(1)
    masks = [random.random((20, 15, 12)) < 0.002 for _ in range(2)]
    places = np.argwhere(masks[0] | masks[1]) * spacing
    every = np.argwhere(np.ones((20, 15, 12))) * spacing
    nearest = np.sqrt(((every[:, None] - places) ** 2).sum(-1)).min(1)
    assert np.array_equal(near_masks(masks, spacing).ravel(), nearest <= NEAR_MM)
    assert not near_masks([np.zeros((3, 3, 3), bool)], spacing).any()


# ---------------------------------------------------------------------------------- temperatures


class TimesTable(nn.Module):
    """Logits that are weights times the voxel's value; no place looks at another one."""

    def __init__(self, weights):
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 1, 1, bias=False), nn.Conv3d(1, len(weights), 1)
        with torch.no_grad():
            self.first.weight.fill_(1)
            self.last.weight[:, 0, 0, 0, 0] = torch.tensor(weights)
            self.last.bias.zero_()

    def forward(self, x):
        return self.last(self.first(x))


def too_sure(weights, activation, times, seed=0):
    """Return a case whose truth is drawn by a network's probabilities, and one too sure by far."""
    random = np.random.default_rng(seed)
    image = random.normal(size=SHAPE)
    logits = np.stack([image * weight for weight in weights])
    if activation == "sigmoid":
        truth = (random.random(SHAPE) < expit(logits[0])).astype(np.uint8)
    else:
        cumulated = softmax(logits, axis=0).cumsum(0)
        truth = (random.random(SHAPE) > cumulated[:-1]).sum(0).astype(np.uint8)
    case = load_scan(image, affine=AFFINE), load_scan(truth, affine=AFFINE)
    network = TimesTable([float(weight * times) for weight in weights]).eval()
    names = ["lesion"] if activation == "sigmoid" else NAMES
    return case, SegModel(network, class_names=names, activation=activation)


@pytest.mark.parametrize("times", [0.4, 1, 3.0])
@pytest.mark.parametrize(
    ("weights", "activation", "target"),
    [([-1, 0.3, 2], "softmax", None), ([-1, 0.3, 2], "softmax", "lesion"), ([2], "sigmoid", None)],
)
def test_the_temperature_is_found_by_which_logits_were_multiplied(
    weights, activation, target, times
):
    case, model = too_sure(weights, activation, times)
    found = calibrate([case], model, target)
    assert found.temperature == pytest.approx(times, rel=0.05)
    assert list(found.before) == (["lesion"] if target or len(weights) == 1 else NAMES[1:])
    assert not found.at_an_end
    assert found.loss_after <= found.loss_before
    if times != 1:
        for name, after in found.after.items():
            assert after.ece < 0.5 * found.before[name].ece
    assert found.voxels == math.prod(SHAPE)  # all are near the classes
    windowed = replace(model, window=WindowPlan((16, 16, 16)))
    assert calibrate([case], windowed, target).temperature == pytest.approx(
        found.temperature, rel=1e-3
    )


def test_the_loss_is_the_likelihood_of_the_truth():
    (scan, truth), model = too_sure([-1, 0.3, 2], "softmax", 2)
    found = calibrate([(scan, truth)], model)
    logits = np.stack([scan.data[0].double().numpy() * w for w in (-2, 0.6, 4)])
    labels = truth.data[0].numpy().astype(int)
    p = np.take_along_axis(softmax(logits, axis=0), labels[None], 0)
    assert found.loss_before == pytest.approx(-np.log(p).mean(), rel=1e-5)


def test_a_case_held_out_gets_the_temperature_of_the_others():
    one, model = too_sure([-1, 0.3, 2], "softmax", 3, seed=0)
    other, _ = too_sure([-1, 0.3, 2], "softmax", 1, seed=1)  # as seen by the same network
    both = calibrate([one, other], model)
    of_one, of_other = calibrate([one], model), calibrate([other], model)
    assert both.cases == 2
    assert not of_one.held_out

    def at(case, temperature):
        logits = np.stack([case[0].data[0].double().numpy() * w for w in (-3, 0.9, 6)])
        p = softmax(logits / temperature, axis=0)[2].ravel()
        return reliability(p, case[1].data[0].numpy().ravel() == 2)

    expected = at(one, of_other.temperature) + at(other, of_one.temperature)
    assert both.held_out["lesion"].ece == pytest.approx(expected.ece, abs=1e-4)


def test_what_no_temperature_mends_is_said():
    """Truth against the logits: the hottest is best, and still wrong."""
    (scan, truth), model = too_sure([-4, 0, 4], "softmax", 5)
    against = load_scan(2 - truth.data[0].numpy(), affine=AFFINE)
    found = calibrate([(scan, against)], model)
    assert found.at_an_end
    assert found.temperature == pytest.approx(HOTTEST, rel=0.01)
    perfect = load_scan((scan.data[0] > 0).numpy() * 2.0, affine=AFFINE)
    assert calibrate([(scan, perfect)], model).temperature == pytest.approx(COLDEST, rel=0.02)


def test_a_class_may_be_made_up_of_labels_and_missing_in_a_case(tmp_path):
    """As a whole tumour is, in a network whose classes overlap."""
    (scan, truth), _ = too_sure([-1, 0.3, 2], "softmax", 3)
    whole = SegModel(TimesTable([1.0, 4.0]).eval(), class_names=["a", "b"], activation="sigmoid")
    both = calibrate([(scan, truth)], whole, "b", label=[1, 2])
    merged = load_scan((truth.data[0] > 0).numpy().astype(np.uint8), affine=AFFINE)
    one = calibrate([(scan, merged)], whole, "b", label=1)
    assert both.temperature == one.temperature
    assert both.temperature != calibrate([(scan, truth)], whole, "b", label=2).temperature
    healthy = write_scan(tmp_path / "healthy.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    assert calibrate([(scan, truth), (scan, healthy)], whole, "b", label=2).cases == 2


def test_a_class_counts_near_itself_alone():
    """So a case's figure is the one that its explanation has."""
    image = -1 - np.random.default_rng(0).random((60, 12, 12))
    image[5:9, 4:8, 4:8] += 4
    truth = np.zeros((60, 12, 12), np.uint8)
    truth[6:9, 4:8, 4:8] = 2
    truth[50:55, 4:8, 4:8] = 1  # missed
    scan, labels = (load_scan(array, affine=np.eye(4)) for array in (image, truth))
    model = SegModel(TimesTable([-1.0, 0.0, 1.0]).eval(), class_names=NAMES)
    found = calibrate([(scan, labels)], model)
    known = explain(scan, model, "lesion", layers="first").with_truth(labels)
    assert found.before["lesion"].ece == pytest.approx(reliability_of(known).ece, abs=1e-6)
    assert found.before["lesion"].count.sum() < found.voxels
    assert found.before["organ"].found.sum() == 5 * 4 * 4


def test_what_does_not_help_is_not_recommended():
    case, model = too_sure([-1, 0.3, 2], "softmax", 1)
    assert not calibrate([case], model).helps  # they are true already
    one, hot = too_sure([-1, 0.3, 2], "softmax", 3, seed=0)
    cold, _ = too_sure([-1, 0.3, 2], "softmax", 0.3, seed=1)
    assert calibrate([one], hot).helps
    assert calibrate([one], hot).worse == []
    # Each case is made worse by the temperature of the other one.
    bright = load_scan(cold[0].data[0].numpy() * 10, affine=AFFINE), cold[1]
    assert not calibrate([bright, one], model).helps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value):
    (scan, truth), _ = too_sure([-1, 0.3, 2], "softmax", 1)
    broken = SegModel(TimesTable([-1.0, value, 2.0]).eval(), class_names=NAMES)
    with pytest.raises(EvaluationError, match="b: the network's output is not finite"):
        calibrate([(scan, truth)], broken, names=["b"])
    with pytest.raises(EvaluationError, match="probabilities must be finite"):
        reliability([0.5, value], [True, False])


def test_voxels_outside_of_the_scan_and_of_the_view_do_not_count():
    """Padding is no background, and what was cropped away got no probability."""
    image = np.random.default_rng(0).normal(size=(14, 14, 14)).astype(np.float32)
    truth = (image > 0).astype(np.uint8)
    scan, labels = (load_scan(array, affine=np.eye(4)) for array in (image, truth))
    plain = SegModel(TimesTable([0.0, 3.0]).eval(), class_names=["none", "all"])
    padded = replace(plain, prepare=build_preparation(Prepare(pad_divisible=16)))
    cropped = replace(plain, prepare=build_preparation(Prepare(crop_foreground=True)))
    expected = calibrate([(scan, labels)], plain).before["all"]
    assert expected.count.sum() == 14**3
    assert calibrate([(scan, labels)], padded).before["all"].ece == pytest.approx(expected.ece)
    image[:, :3] = -1 - image[:, :3] ** 2  # nothing above 0, and so cropped away
    scan = load_scan(image, affine=np.eye(4))
    seen = explain(scan, cropped, "all", layers="first").with_truth(labels)
    assert reliability_of(seen).count.sum() == 14 * 11 * 14


def test_many_voxels_are_drawn_by_the_seed(monkeypatch):
    case, model = too_sure([-1, 0.3, 2], "softmax", 3)
    whole = calibrate([case], model)
    monkeypatch.setattr("seg3dcam.explaining.calibration.MOST_VOXELS", 4000)
    drawn = [calibrate([case], model, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].voxels == 4000
    assert drawn[0].temperature == drawn[1].temperature != drawn[2].temperature
    assert drawn[0].temperature == pytest.approx(whole.temperature, rel=0.1)


def test_bad_input(tmp_path):
    (scan, truth), model = too_sure([-1, 0.3, 2], "softmax", 3)
    overlapping = SegModel(model.module, class_names=NAMES, activation="sigmoid")
    with pytest.raises(TargetError, match=r"^the classes of this network overlap.*0 none"):
        calibrate([(scan, truth)], overlapping)
    with pytest.raises(TargetError, match=r"^class 'lesio' does not exist.*lesion"):
        calibrate([(scan, truth)], model, "lesio")
    nameless = SegModel(model.module)
    with pytest.raises(TargetError, match="class 7 does not exist; the classes are 0 to 2"):
        calibrate([(scan, truth)], nameless, 7)
    with pytest.raises(ConfigError, match="name the class with target"):
        calibrate([(scan, truth)], model, label=2)
    with pytest.raises(TargetError, match="no truth has a voxel of label 7, 9"):
        calibrate([(scan, truth)], model, "lesion", label=[7, 9])
    elsewhere = load_scan(truth.data[0].numpy(), affine=np.eye(4))
    with pytest.raises(TargetError, match="b: the truth has the scan's shape but lies elsewhere"):
        calibrate([(scan, truth), (scan, elsewhere)], model, names=["a", "b"])
    other_labels = load_scan(100 * truth.data[0].numpy(), affine=AFFINE)
    with pytest.raises(TargetError, match="the truth holds labels"):
        calibrate([(scan, other_labels)], model)
    dark = load_scan(-1 - np.random.default_rng(0).random(SHAPE), affine=AFFINE)
    nothing = write_scan(tmp_path / "nothing.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    with pytest.raises(EvaluationError, match="no case has a voxel of the class"):
        calibrate([(dark, nothing)], model)
    assert calibrate([(dark, nothing), (scan, truth)], model).left_out == (0,)


# ---------------------------------------------------------------------------------- and their use


def test_a_temperature_changes_probabilities_and_nothing_else(place):
    plain = load_model(place.model)
    warm = load_model(place.model, temperature=2.5)
    assert (plain.temperature, warm.temperature) == (1, 2.5)
    one, other = (explain(place.scan, model, "lesion") for model in (plain, warm))
    for layer in one.maps:
        assert torch.equal(one.maps[layer], other.maps[layer])
    assert torch.equal(one.prediction, other.prediction)
    assert other.confidence < one.confidence
    assert other.provenance["model"]["spec"]["temperature"] == 2.5
    # Logits by another factor are probabilities by another power.
    powers = torch.stack([one.probability(index).double() ** (1 / 2.5) for index in range(3)])
    assert torch.allclose(other.probability(2).double(), powers[2] / powers.sum(0), atol=1e-5)
    scan = load_scan(place.scan)
    assert uncertainty(scan, warm).entropy.mean() > uncertainty(scan, plain).entropy.mean()


def test_cases_are_told_apart_by_the_temperature(place):
    scan, job = load_scan(place.scan), Job(scan=str(place.scan), model=str(place.model))
    plain, warm = (load_model(place.model, **more) for more in ({}, {"temperature": 1.5}))
    assert warm.spec == plain.spec
    keys = case_keys(scan, plain, job)
    assert case_keys(scan, warm, job).job != keys.job
    assert case_keys(scan, replace(warm, temperature=1.0), job) == keys
    back = explain(scan, replace(warm, temperature=1.0), "lesion")
    assert "temperature" not in back.provenance["model"]["spec"]


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf"), 1e-40, 1e9, "warm"])
def test_illegal_temperatures(place, temperature):
    with pytest.raises(ConfigError, match="temperature"):
        load_model(place.model, temperature=temperature)
    with pytest.raises(ConfigError, match="temperature"):
        replace(load_model(place.model), temperature=temperature)


def test_reliability_of_an_explanation(place):
    plain = explain(place.scan, load_model(place.model), "lesion")
    assert reliability_of(plain) is None
    truth = write_scan(place.folder / "truth.nii.gz", 2.0 * (voxels() > 1.5))
    known = plain.with_truth(truth)
    p, there = plain.probability(2).numpy(), known.truth.numpy()
    near = near_masks([there, known.mask.numpy()], known.scan.spacing)
    found = reliability_of(known)
    assert found.ece == pytest.approx(slow_ece(p[near].tolist(), there[near].tolist()), abs=1e-6)
    assert reliability_of(replace(known, probability=None)) is None
    assert reliability_of(replace(known, region=known.mask)) is None
    write_case(place.out, [known], Job(scan="s", model="m", format=["nifti"]))
    (entry,) = read_record(place.out).explanations
    assert entry.reliable().ece == found.ece
    twice = reliability_of_classes([entry, entry])["lesion"]
    assert (twice.cases, twice.reliability.ece) == (2, pytest.approx(found.ece))
    bad = json.loads((place.out / "case.json").read_text())
    for numbers in ([1.0] * 14, [-1.0] + [0.0] * 14, [1e300] * 15, ["inf"] * 15):
        bad["explanations"][0]["reliability"][1] = numbers
        (place.out / "case.json").write_text(json.dumps(bad))
        assert record_of(place.out) is None
    del bad["explanations"][0]["reliability"]  # as in a case of an earlier version
    (place.out / "case.json").write_text(json.dumps(bad))
    assert read_record(place.out).explanations[0].reliable() is None


@pytest.fixture
def cases(place: Place):
    rows = ["case,scan,truth"]
    for number in range(2):
        array = voxels() + np.float32(0.001 * number)
        write_scan(place.folder / f"scan{number}.nii.gz", array)
        write_scan(place.folder / f"truth{number}.nii.gz", 2.0 * (array > 1.5))
        rows.append(f"case{number},scan{number}.nii.gz,truth{number}.nii.gz")
    table = place.folder / "cases.csv"
    table.write_text("\n".join(rows), encoding="utf-8")
    return table


def test_the_command(place, cases, tmp_path):
    out = tmp_path / "found"
    done = seg3dcam("calibrate", cases, "--model", place.model, "--out", out)
    assert done.code == 0, done.complaint
    record = json.loads((out / "calibration.json").read_text())
    assert record["helps"]
    key = f"`temperature: {record['temperature']:.4g}`"
    assert f"Write {key} into the model's YAML" in " ".join(done.out.split())
    assert record["cases"] == 2
    assert set(record["classes"]) == {"organ", "lesion"}
    assert record["classes"]["lesion"]["held_out"]["ece"] is not None
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    alone = seg3dcam("calibrate", cases, "--model", place.model, "--label", 2, "--out", out)
    assert alone.code == 2
    assert "name the class with --target" in alone.complaint


def test_the_command_needs_truths(place, tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text(f"case,scan\na,{place.scan}\n", encoding="utf-8")
    done = seg3dcam("calibrate", table, "--model", place.model, "--out", tmp_path / "found")
    assert done.code == 2
    assert "no case has a truth" in done.complaint
