"""The command line's targets, regions, methods and feature maps, on cases known by hand."""

from __future__ import annotations

import cv2
import nibabel as nib
import numpy as np
import pytest
from helpers_cases import (
    IN_LESION,
    LESION,
    OBLIQUE,
    ORGAN,
    SHAPE,
    contents,
    seg3dcam,
    voxels,
    write_scan,
)

from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.cams.method_cards import ENTRIES

pytestmark = pytest.mark.usefixtures("measured_once")

BOTTLENECK = "model.1.submodule"


def write_truth(place, labels, affine=OBLIQUE):
    path = place.folder / "truth.nii.gz"
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), path)
    return path


def true_labels():
    """Return the truth: organ 1, and a lesion 2 that reaches two voxels further than the scan's."""
    labels = np.zeros(SHAPE)
    labels[ORGAN] = 1
    labels[8:16, 10:16, 6:12] = 2
    return labels


def by_label(place):
    return {case["label"]: case for case in place.record["explanations"]}


# ---------------------------------------------------------------------------- scores and regions


@pytest.mark.slow
def test_every_lesion_by_itself(place):
    image = voxels()
    image[4:7, 6:7, 4:7] += 0.5  # a second, smaller one
    write_scan(place.scan, image)
    outcome = place.explain("--target", "lesion", "--region", "components")
    assert outcome.code == 0, outcome.err
    found = by_label(place)
    assert list(found) == ["lesion component 0", "lesion component 1"]
    sizes = [case["target"]["region_voxels"] for case in found.values()]
    assert sizes[0] > 4 * sizes[1] > 0
    large, small = (place.volume(f"cam_lesion_component_{n}.nii.gz") for n in (0, 1))
    assert large[IN_LESION] > 0.5
    assert small[5, 6, 5] > 0.3
    assert small[IN_LESION] < 0.1
    options = ("--target", "lesion", "--region", "components", "--min-voxels", 99)
    assert place.explain(*options).code == 0
    labels = [case["label"] for case in place.record["explanations"]]
    assert labels == ["lesion component 0", "lesion component 1", "lesion component 0"]


def test_false_negatives_are_where_truth_and_prediction_differ(place):
    truth = write_truth(place, true_labels())
    options = ("--target", "lesion", "--region", "false_negatives", "--truth", truth)
    outcome = place.explain(*options)
    assert outcome.code == 0, outcome.err
    (case,) = place.record["explanations"]
    assert case["label"] == "lesion false negatives"
    assert case["target"]["uses_truth"] is True
    predicted = place.volume("prediction.nii.gz") == 2
    missed = (true_labels() == 2) & ~predicted
    assert case["target"]["region_voxels"] == missed.sum() > 0
    assert place.volume("cam_lesion_false_negatives.nii.gz").max() == pytest.approx(1)


def test_an_empty_truth_makes_all_that_is_predicted_a_false_positive(place):
    truth = write_truth(place, np.zeros(SHAPE))
    options = ("--target", "lesion", "--region", "false_positives", "--truth", truth)
    assert place.explain(*options).code == 0
    (case,) = place.record["explanations"]
    assert case["target"]["region_voxels"] == (place.volume("prediction.nii.gz") == 2).sum()


def test_a_change_of_the_truth_is_another_case(place):
    truth = write_truth(place, true_labels())
    options = ("--target", "organ", "--score", "soft_dice", "--truth", truth)
    assert place.explain(*options).code == 0
    assert "holds this case already" in place.explain(*options).out
    write_truth(place, np.roll(true_labels(), 1, 0))
    assert "holds this case already" not in place.explain(*options).out


def test_contrast_names_both_classes(place):
    options = ("--score", "contrast", "--against", "organ")
    assert place.explain("--target", "lesion", *options).code == 0
    (case,) = place.record["explanations"]
    assert case["label"] == "lesion against organ"
    assert case["target"]["name"] == "logit of lesion against organ over the predicted mask"


@pytest.mark.few(3)
@pytest.mark.parametrize("score", ["finer", "probability"])
@pytest.mark.parametrize("region", ["boundary", "predicted", "volume"])
def test_scores_over_regions(place, score, region):
    assert place.explain("--target", "lesion", "--score", score, "--region", region).code == 0
    (case,) = place.record["explanations"]
    words = {"boundary": "boundary", "predicted": "predicted mask", "volume": "whole volume"}
    assert words[region] in case["target"]["name"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--score", "contrast", "--target", "lesion"), "contrast and against go together"),
        (("--against", "organ", "--target", "lesion"), "contrast and against go together"),
        (("--region", "false_negatives", "--target", "lesion"), "compare with a truth"),
        (("--score", "soft_dice", "--target", "lesion"), "compare with a truth"),
        (("--score", "mask_output", "--truth", "scan.nii.gz"), "so there is no truth of it"),
        (("--region", "boundary"), "region 'boundary' needs a class"),
        (("--label", 2, "--target", "lesion"), "label is that of a class in the truth"),
        (("--score", "mask_output", "--region", "components"), "is about no class"),
        (("--score", "contrast", "--target", "lesion", "--against", "lesion"), "against itself"),
        (("--score", "contrast", "--target", "lesion", "--against", "spleen"), "does not exist"),
        (("--region", "shell", "--target", "lesion"), "'shell'"),
        (("--min-voxels", 0, "--target", "lesion"), "min_voxels"),
    ],
)
def test_what_does_not_go_together_is_refused(place, options, complaint):
    before = contents(place.folder)
    outcome = place.explain(*options)
    assert outcome.code == 2
    assert complaint in outcome.complaint
    assert contents(place.folder).keys() - {"out"} == before.keys()


@pytest.mark.parametrize(
    ("labels", "affine", "complaint"),
    [
        (
            np.zeros((20, 24, 17)),
            OBLIQUE,
            r"the truth has (20, 24, 17) voxels, the scan (20, 24, 18)",
        ),
        (true_labels(), OBLIQUE + np.eye(4, k=3) * 3, "lies elsewhere in the patient"),
        (np.zeros(SHAPE), OBLIQUE, "the region is empty"),
    ],
)
def test_a_truth_on_another_grid_is_refused(place, labels, affine, complaint):
    truth = write_truth(place, labels, affine)
    options = ("--target", "lesion", "--region", "false_negatives", "--truth", truth)
    outcome = place.explain(*options)
    assert outcome.code in (1, 2)
    assert complaint in outcome.complaint
    assert not (place.out / "case.json").exists()


def test_a_truth_alone_is_drawn_and_measured(place):
    truth = write_truth(place, true_labels())
    assert place.explain("--truth", truth, "--format", "nifti").code == 0
    prediction = place.volume("prediction.nii.gz")
    assert set(by_label(place)) == {"organ", "lesion"}
    for index, label in [(1, "organ"), (2, "lesion")]:
        found = by_label(place)[label]["found"]
        true, predicted = true_labels() == index, prediction == index
        assert found["truth_voxels"] == true.sum()
        dice = 2 * (true & predicted).sum() / (true.sum() + predicted.sum())
        assert found["dice"] == pytest.approx(dice)
        assert not by_label(place)[label]["target"]["uses_truth"]


def test_a_truth_with_labels_of_another_scheme_is_refused(place):
    assert place.explain().code == 0
    earlier = contents(place.out)
    truth = write_truth(place, np.where(true_labels() == 2, 255, 0))
    for target in (("--target", "lesion"), ()):  # all classes
        outcome = place.explain(*target, "--truth", truth)
        assert outcome.code == 2
        assert "the truth holds label 255" in outcome.complaint
        assert contents(place.out) == earlier  # refused before it is replaced
    assert place.explain("--target", "lesion", "--truth", truth, "--label", 255).code == 0
    assert by_label(place)["lesion"]["found"]["truth_voxels"] == (true_labels() == 2).sum()


def test_label_of_the_class_in_the_truth(place):
    truth = write_truth(place, np.where(true_labels() == 2, 7, 0))
    options = ("--target", "lesion", "--region", "true_positives", "--truth", truth)
    assert "the truth holds label 7" in place.explain(*options).complaint
    assert place.explain(*options, "--label", 7).code == 0
    options = ("--target", "lesion", "--score", "soft_dice", "--truth", truth)
    assert "the truth holds label 7" in place.explain(*options).complaint
    assert place.explain(*options, "--label", 7).code == 0
    write_truth(place, true_labels() == 2)
    outcome = place.explain(*options)
    assert (outcome.code, "it has 0, 1" in outcome.complaint) == (1, True)


# ------------------------------------------------------------------------------------- methods


def test_several_methods_leave_a_map_each(place):
    methods = ("grad_cam", "layer_cam", "eigen_cam")
    words = [word for method in methods for word in ("--method", method)]
    assert place.explain("--target", "lesion", *words).code == 0
    found = [case["method"]["name"] for case in place.record["explanations"]]
    assert found == list(methods)
    for method in methods:
        assert place.volume(f"cam_lesion_{method}.nii.gz").max() == pytest.approx(1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("gradient", {}), ("integrated_gradients", {"steps": 4}), ("occlusion", {"block": 8})],
)
def test_attributions_of_captum_are_methods_too(place, method, settings):
    words = [word for pair in settings.items() for word in ("--settings", "{}={}".format(*pair))]
    outcome = place.explain("--target", "lesion", "--method", method, *words)
    assert outcome.code == 0, outcome.err
    (case,) = place.record["explanations"]
    assert list(case["layers"]) == ["input"]
    assert settings.items() <= case["method"]["settings"].items()
    assert place.volume("cam_lesion.nii.gz")[IN_LESION] > 0.1


def test_settings_of_a_method(place):
    options = ("--target", "lesion", "--method", "xres_cam")
    assert place.explain(*options, "--settings", "window=3", "--settings", "mode=max").code == 0
    (case,) = place.record["explanations"]
    assert case["method"]["settings"] == {"block": 3, "mode": "max"}
    one = place.volume("cam_lesion.nii.gz")
    assert place.explain(*options, "--settings", "window=1").code == 0
    assert np.array_equal(one, place.volume("cam_lesion.nii.gz"))
    assert not np.allclose(one, place.volume("cam_lesion_2.nii.gz"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--method", "hires_cam", "--settings", "windw=3"), "HiResCAM has no setting 'windw'"),
        (("--method", "xres_cam", "--settings", "mode=median"), "legal are 'mean', 'max'"),
        (("--method", "kpca_cam", "--settings", "kernel=cubic"), "legal are 'sigmoid' and 'rbf'"),
        (("--method", "xres_cam", "--settings", "window"), "write name=value"),
        (("--method", "xres_cam", "--settings", "progress=1"), "it has an option of its own"),
        (
            ("--method", "xres_cam", "--method", "grad_cam", "--settings", "window=3"),
            "those of one method",
        ),
        (("--method", "gradcam"), "did you mean 'grad_cam'"),
    ],
)
def test_illegal_methods_and_settings(place, words, complaint):
    outcome = place.explain("--target", "lesion", *words)
    assert outcome.code == 2
    assert complaint in outcome.complaint


def test_a_pattern_of_layers(place):
    assert place.explain("--target", "lesion", "--layer", "model.*").code == 0
    (case,) = place.record["explanations"]
    assert set(case["layers"]) >= {"model.0", "model.1"}


def test_methods_lists_what_each_is():
    lines = seg3dcam("methods").out
    words = " ".join(lines.split())
    for key in (*CAMS, *ATTRIBUTIONS):
        assert f"{key} " in words
    for name in ENTRIES:
        assert lines.count(f"    {name}: ") == len(CAMS) + len(ATTRIBUTIONS)


# ------------------------------------------------------------------------------------- features


def test_features_of_a_layer(place):
    out = place.folder / "features"
    words = ("--model", place.model, "--layer", "model.0", "--slice", 4, "--out", out)
    outcome = seg3dcam("features", place.scan, *words)
    assert outcome.code == 0, outcome.err
    (folder,) = out.iterdir()
    assert folder.name.endswith("model_0")
    assert str(folder) in outcome.out
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"channel_{n:03d}.png" for n in range(4)),
        "mosaic.png",
    ]
    assert cv2.imread(str(folder / "mosaic.png")) is not None
    # Channel 0 holds the brightness of every second voxel, the others nothing.
    assert cv2.imread(str(folder / "channel_000.png")).max() > 100
    assert cv2.imread(str(folder / "channel_001.png")).max() == 0


def test_features_of_others_are_never_replaced(place):
    """Another slice, another scan, and a stranger's file; the same again is written once."""
    out = place.folder / "features"
    words = ("--model", place.model, "--layer", "model.0", "--top", 1, "--out", out)
    other = write_scan(place.folder / "other.nii.gz", voxels() + 1)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    before = contents(out)
    for number, (scan, index) in enumerate([(place.scan, 4), (place.scan, 5), (other, 4)], 2):
        assert seg3dcam("features", scan, *words, "--slice", index).code == 0
        after = contents(out)
        assert before.items() <= after.items()
        assert len(list(out.iterdir())) == number
        assert seg3dcam("features", scan, *words, "--slice", index).code == 0
        assert contents(out) == after
        before = after


def test_features_ranked_for_a_class(place):
    out = place.folder / "features"
    words = ("--model", place.model, "--layer", BOTTLENECK, "--target", "lesion", "--out", out)
    assert seg3dcam("features", place.scan, *words, "--top", 2).code == 0
    (folder,) = out.iterdir()
    assert (folder / "rank_000_channel_000.png").is_file()  # the one channel with a weight


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--layer", "model.7"), "no layer 'model.7'"),
        (("--layer", "model.0", "--slice", 99), "99"),
        (("--layer", "model.0", "--target", "spleen"), "does not exist"),
        (("--layer", "model.0", "--scale", "none"), "none"),
        (("--layer", "model.0", "--axis", 5), "5"),
    ],
)
def test_bad_input_of_features(place, words, complaint):
    outcome = seg3dcam("features", place.scan, "--model", place.model, *words, "--out", place.out)
    assert outcome.code in (1, 2)
    assert complaint in outcome.complaint


def test_the_lesion_is_where_it_was_put():
    assert voxels()[LESION].min() > 0.9
