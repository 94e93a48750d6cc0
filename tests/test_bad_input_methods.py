"""A user's mistake in a setting, a target or a truth: what is said, and by which error."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_cases import (
    LESION,
    OBLIQUE,
    SHAPE,
    brightness_network,
    contents,
    voxels,
    write_yaml,
)
from monai.data import MetaTensor
from torch import nn

from seg3dcam import (
    GradCAM,
    ScoreCAM,
    SegModel,
    WindowPlan,
    explain,
    explain_each,
    load_scan,
    targets,
)
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import (
    ConfigError,
    InputError,
    LayerError,
    ModelError,
    Seg3dcamWarning,
    TargetError,
)
from seg3dcam.geometry import resample_labels
from seg3dcam.models.preparation import build_preparation
from seg3dcam.models.specs import Prepare
from seg3dcam.targets import ClassLogit, EveryComponent, FalseNegatives, SoftDice, WeightedSum
from seg3dcam.targets.use import as_target, as_targets

NAN, INFINITE = math.nan, math.inf


def small_model(**changes) -> SegModel:
    """Return a model whose class 1 is where the scan is bright, with one layer "0"."""
    network = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.Conv3d(2, 2, 1))
    network[0].weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    network[1].weight.data = torch.tensor([[0, 0], [1.0, 0]]).view(2, 2, 1, 1, 1)
    network[1].bias.data = torch.tensor([0.0, -1.0])
    return SegModel(network, ("background", "tumour"), **changes)


def bright_cube(affine=None):
    image = np.full((8, 8, 8), 0.1, dtype=np.float32)
    image[2:6, 2:6, 2:6] = 3.3
    return load_scan(image, np.eye(4) if affine is None else affine)


# ------------------------------------------------------------------------------ truths and masks

COARSER = {"prepare": build_preparation(Prepare(orientation="RAS", spacing=(1.5, 1, 1)))}


@pytest.mark.parametrize("changes", [{}, COARSER], ids=["as it is", "resampled"])
def test_a_truth_between_whole_numbers_is_refused(changes):
    scan, model = bright_cube(), small_model(**changes)
    with pytest.raises(TargetError, match=r"no whole numbers, such as .*nearest neighbour"):
        explain(scan, model, ClassLogit(1, FalseNegatives(scan)), layers="0")


def on_disk(labels, folder):
    path = folder / "labels.nii.gz"
    nib.save(nib.Nifti1Image(labels.numpy(), np.eye(4)), path)
    return load_scan(path)


def as_tensor_in_lps(labels, folder):
    return MetaTensor(labels[None], affine=np.diag([-1.0, -1.0, 1.0, 1.0]), meta={"space": "LPS"})


#: How a label map comes that knows where it lies.
ON_ITS_GRID = {
    "scan": lambda labels, folder: load_scan(labels.numpy(), np.eye(4)),
    "tensor": lambda labels, folder: MetaTensor(labels, affine=torch.eye(4)),
    "tensor in LPS": as_tensor_in_lps,
    "file": on_disk,
}


@pytest.mark.parametrize("kind", ON_ITS_GRID)
def test_one_fraction_in_a_truth_is_refused_also_where_the_coarser_grid_misses_it(kind, tmp_path):
    scan, model = bright_cube(), small_model(**COARSER)
    for plane in range(8):  # of three neighbours the coarser grid has two
        labels = torch.zeros(8, 8, 8)
        labels[2:6, 2:6, 1:6] = 1
        labels[plane, 0, 0] = 0.5
        region = FalseNegatives(ON_ITS_GRID[kind](labels, tmp_path))
        for target in (ClassLogit(1, region), WeightedSum([(1, ClassLogit(1, region))])):
            with pytest.raises(TargetError, match=r"1 values .*no whole numbers, such as 0\.5"):
                explain(scan, model, target, layers="0")


@pytest.mark.parametrize("kind", ON_ITS_GRID)
def test_a_truth_of_whole_numbers_is_compared_on_the_coarser_grid(kind, tmp_path):
    labels = torch.zeros(8, 8, 8)
    labels[2:6, 2:6, 1:6] = 1
    region = FalseNegatives(ON_ITS_GRID[kind](labels, tmp_path))
    found = explain(bright_cube(), small_model(**COARSER), ClassLogit(1, region), layers="0")
    assert found.region[2:5, 2:6, 1].all()  # the truth begins a voxel below the bright cube
    assert not found.region[..., 2:].any()


@pytest.mark.parametrize("changes", [{}, COARSER], ids=["as it is", "resampled"])
def test_a_mask_of_fractions_means_its_nonzero_voxels(changes):
    scan, model = bright_cube(), small_model(**changes)
    inside = np.zeros((8, 8, 8), dtype=np.float32)
    inside[3:6, 1:5, 2:7] = 1
    whole, weak = load_scan(inside, np.eye(4)), load_scan(0.45 * inside, np.eye(4))
    for make in (ClassLogit, SoftDice):
        expected, found = (explain(scan, model, make(1, m), layers="0") for m in (whole, weak))
        assert found.score == expected.score
        assert torch.equal(found.maps["0"], expected.maps["0"])


def test_nearest_labels_are_the_very_values():
    values = torch.rand(5, 6, 7)
    moved = resample_labels(values, np.eye(4), np.diag([0.7, 1.3, 1, 1]), (6, 4, 7))
    assert torch.isin(moved, values).all()
    assert moved.unique().numel() > 50


def write_labels(place, labels, name="truth.nii.gz"):
    path = place.folder / name
    nib.save(nib.Nifti1Image(labels.astype(np.float32), OBLIQUE), path)
    return path


@pytest.mark.parametrize(
    "options", [("--region", "false_negatives"), ("--score", "soft_dice")], ids=lambda o: o[1]
)
def test_a_file_between_whole_numbers_is_no_truth(place, options):
    blurred = np.zeros(SHAPE)
    blurred[LESION] = 2
    blurred[9] = 1.75
    truth = write_labels(place, blurred)
    outcome = place.explain("--target", "lesion", *options, "--truth", truth)
    assert outcome.code == 1
    assert "432 voxels hold no whole number, such as 1.75" in outcome.complaint
    assert "nearest neighbour" in outcome.complaint
    assert not (place.out / "case.json").exists()


@pytest.mark.parametrize("options", [(), ("--region", "true_positives")], ids=["drawn", "region"])
def test_one_fraction_in_a_file_is_refused_before_anything_is_explained(place, options):
    labels = np.zeros(SHAPE)
    labels[LESION] = 2
    labels[1, 1, 1] = 0.5
    outcome = place.explain("--target", "lesion", *options, "--truth", write_labels(place, labels))
    assert (outcome.code, "1 voxels hold no whole number" in outcome.complaint) == (1, True)
    assert not (place.out / "case.json").exists()


def test_the_scan_itself_is_no_truth(place):
    options = ("--target", "lesion", "--region", "false_negatives", "--truth")
    outcome = place.explain(*options, place.scan)
    assert (outcome.code, "that is the scan itself" in outcome.complaint) == (2, True)
    outcome = place.explain(*options, write_labels(place, voxels(), "copy.nii.gz"))
    assert (outcome.code, "no whole number" in outcome.complaint) == (1, True)


# --------------------------------------------------------------------------- settings of methods

NOT_COUNTS = (0, -2, 4.5, "abc", True, None, NAN)

ILLEGAL = [
    *(("integrated_gradients", "steps", value) for value in NOT_COUNTS),
    *(("smooth_grad", "samples", value) for value in NOT_COUNTS),
    *(("occlusion", "batch", value) for value in NOT_COUNTS),
    *(("smooth_grad", "noise", value) for value in (-1, "a", NAN, INFINITE, True, None)),
    *(("occlusion", "baseline", value) for value in ("a", NAN, INFINITE, None, (0, 1))),
    *(("integrated_gradients", "baseline", value) for value in ("a", NAN)),
    *(("occlusion", "block", value) for value in (*NOT_COUNTS, (), (4, 0, 4), [2, 2.5, 2])),
    *(("score_cam", "memory_gb", value) for value in ("x", NAN, INFINITE, -1, 0, True, None)),
    *(("ablation_cam", "memory_gb", value) for value in ("x", NAN, INFINITE, -1, 0)),
    *(("random", "seed", value) for value in ("a", 1.5, True, None, 2**64, -(2**63) - 1)),
    *(("kpca_cam", "gamma", value) for value in ("a", NAN, INFINITE, 0, -1, True)),
]


@pytest.mark.parametrize(("method", "name", "value"), ILLEGAL, ids=str)
def test_illegal_values_of_methods(method, name, value):
    kind = {**CAMS, **ATTRIBUTIONS}[method]
    with pytest.raises(ConfigError, match=rf"^{name} .*number"):
        kind(nn.Conv3d(1, 2, 1), **{name: value})


CHOICES = [
    *(("kpca_cam", "kernel", value, "'sigmoid' and 'rbf'") for value in ("cubic", None, 1)),
    *(("xres_cam", "mode", value, "'mean', 'max'") for value in ("median", None, 1)),
    *(("full_grad", "psi", value, "'signed' and 'paper'") for value in ("abs", None, 1)),
    *(("xres_cam", "window", value, "a whole number from 1") for value in (0, -1, 1.5, (1, 0, 2))),
]


@pytest.mark.parametrize(("method", "name", "value", "legal"), CHOICES, ids=str)
def test_a_choice_that_a_method_does_not_have_is_refused_with_those_it_has(
    method, name, value, legal
):
    with pytest.raises(ConfigError, match=legal):
        CAMS[method](nn.Conv3d(1, 2, 1), **{name: value})


def test_every_seed_of_64_bits_is_legal():
    for seed in (-(2**63), -1, 0, 2**64 - 1):
        assert CAMS["random"](nn.Conv3d(1, 2, 1), seed=seed).settings == {"seed": seed}


def test_a_window_for_another_number_of_axes_than_the_layers_is_refused():
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1))
    cam = CAMS["xres_cam"](network, "0", window=(1, 2))
    with pytest.raises(
        ConfigError, match=r"window \(1, 2\) has 2 numbers, the layer has 3 spatial"
    ):
        cam(torch.rand(1, 1, 4, 4, 4), ClassLogit(1, "volume"))


LEGAL = {
    "gradient": set(),
    "gradient_x_input": set(),
    "guided_backprop": set(),
    "smooth_grad": {"samples", "noise", "batch"},
    "integrated_gradients": {"baseline", "steps", "batch"},
    "occlusion": {"baseline", "block", "batch"},
}


@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_an_attribution_takes_its_own_settings_alone(method):
    network = nn.Conv3d(1, 2, 1)
    for name in ("baseline", "steps", "samples", "noise", "block", "batch"):
        if name in LEGAL[method]:
            ATTRIBUTIONS[method](network, **{name: 2})
        else:
            with pytest.raises(ConfigError, match=f"has no setting '{name}'"):
                ATTRIBUTIONS[method](network, **{name: 2})


def test_a_block_of_other_axes_is_refused():
    pytest.importorskip("captum")
    cam = ATTRIBUTIONS["occlusion"](nn.Conv3d(1, 2, 1), block=(2, 2))
    with pytest.raises(ConfigError, match=r"block \(2, 2\) has 2 numbers; the input has 3 axes"):
        cam(torch.rand(1, 1, 4, 4, 4), ClassLogit(1, "volume"))
    cam = ATTRIBUTIONS["occlusion"](nn.Conv3d(1, 2, 1), block=[2, 4, 2])  # as YAML gives it
    assert cam(torch.rand(1, 1, 4, 4, 4), ClassLogit(1, "volume")).layers


def test_kpca_says_what_helps():
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1))
    cam = CAMS["kpca_cam"](network, "0", sliding_window=WindowPlan(12, overlap=0))
    with pytest.raises(ConfigError, match=r"16 x 16 x 16.*coarser layer, or eigen_cam") as refusal:
        cam(torch.rand(1, 1, 24, 24, 24), ClassLogit(1, "volume"))
    assert "smaller windows" not in str(refusal.value)
    assert "GB" not in str(refusal.value)


def test_guided_backprop_says_what_it_left():
    pytest.importorskip("captum")
    layers = [nn.Conv3d(1, 2, 1), nn.ReLU(inplace=True), nn.Conv3d(2, 2, 1), nn.LeakyReLU()]
    network = nn.Sequential(*layers, nn.Conv3d(2, 2, 1), nn.GELU(), nn.LeakyReLU())
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.5)  # so that the gradient is not cut away
    x, target = torch.rand(1, 1, 4, 4, 4), ClassLogit(1, "volume")
    with pytest.warns(Seg3dcamWarning, match=r"nn.ReLU only: 1 of them here; 1 GELU, 2 LeakyReLU"):
        ATTRIBUTIONS["guided_backprop"](network)(x, target)


# --------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("overlap", value) for value in ("a", 1, -0.1, NAN, True, None, (0.5, "a", 0.5))),
        *(("sw_batch_size", value) for value in (1.5, 0, "a", True)),
        *(("cache_gb", value) for value in ("a", -1, NAN, INFINITE)),
        *(("sigma_scale", value) for value in (0, -1, NAN, "a")),
        *(("cval", value) for value in ("a", NAN)),
        *(("roi_size", value) for value in (True, 1.5, "a", 0, (4, True, 4))),
        ("padding_mode", "zeros"),
        ("padding_mode", None),
        ("mode", None),
    ],
    ids=str,
)
def test_illegal_values_of_a_window(name, value):
    with pytest.raises(ConfigError, match=rf"{name} .*(number|fraction|legal are)"):
        WindowPlan(**{"roi_size": 8, name: value})


# ------------------------------------------------------------------------------------------ jobs


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"settings": [1]}, (), "settings: "),
        ({"settings": [1]}, ("--settings", "window=3"), "settings: "),
        ({"settings": None}, ("--settings", "window=3"), "settings: "),
        ({"target": []}, (), "target: an empty list: name one or more, or leave the key out"),
        ({"method": []}, (), "method: an empty list"),
        ({"layer": []}, (), "layer: an empty list"),
        ({"min_voxels": 5}, (), "min_voxels 5 is about components"),
        ({}, ("--min-voxels", 5), "min_voxels 5 is about components"),
        ({}, ("--layer", "all", "--layer", "auto"), "'auto' chooses one layer and stands alone"),
    ],
    ids=str,
)
def test_illegal_jobs(place, changes, options, said):
    job = write_yaml(place.folder / "job.yaml", {"method": "xres_cam", **changes})
    before = contents(place.folder)
    target = () if "target" in changes else ("--target", "lesion")
    outcome = place.explain("--config", job, *target, *options)
    assert outcome.code == 2
    assert said in outcome.complaint
    assert contents(place.folder).keys() - {"out"} == before.keys()


def test_min_voxels_of_one_is_what_it_is_anyway(place):
    assert place.explain("--target", "lesion", "--min-voxels", 1).code == 0


# ----------------------------------------------------------------------- explain and its targets


class NoTargets:
    """A family that stands for none."""

    def expand(self, logits):
        return []

    def __repr__(self):
        return "NoTargets()"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "list of targets is empty"),
        ((), "list of targets is empty"),
        ("tumour", r"targets 'tumour': give a list, such as \['tumour'\]"),
        (1, r"targets 1: give a list, such as \[1\]"),
        (ClassLogit(1), "give a list"),
        ([NoTargets()], "stand for none"),
        ([ClassLogit], r"target ClassLogit is a class: give an instance, such as ClassLogit\(1\)"),
        ([EveryComponent], "target EveryComponent is a class"),
    ],
    ids=str,
)
def test_illegal_lists_of_targets(given, said):
    with pytest.raises(TargetError, match=said):
        explain_each(bright_cube(), small_model(), given, layers="0")


def test_targets_may_come_from_a_generator():
    found = explain_each(bright_cube(), small_model(), (c for c in (1, "tumour")), layers="0")
    assert [one.class_name for one in found] == ["tumour", "tumour"]


def test_no_method_at_all():
    with pytest.raises(ConfigError, match="no method given"):
        explain_each(bright_cube(), small_model(), [1], layers="0", method=[])


def test_a_bare_network_is_no_model():
    with pytest.raises(ModelError, match=r"a UNet; .*SegModel\(network, class_names="):
        explain(bright_cube(), brightness_network(), 1)


@pytest.mark.parametrize(
    ("name", "value", "place_of_it"),
    [
        ("activation", "sigmoid", r"SegModel\(network, activation="),
        ("output", 0, r"SegModel\(network, output="),
        ("sliding_window", WindowPlan(8), r"SegModel\(network, window="),
        ("target_layers", "0", "layers="),
    ],
)
def test_settings_of_the_model_are_given_there(name, value, place_of_it):
    with pytest.raises(ConfigError, match=rf"{name} is no setting of a method.*{place_of_it}"):
        explain(bright_cube(), small_model(), 1, **{name: value})


def test_auto_stands_alone():
    for spec in (["auto"], ["0", "auto"], ["all", "auto"]):
        with pytest.raises(LayerError, match="'auto' chooses one layer and stands alone"):
            explain(bright_cube(), small_model(), 1, layers=spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.to_sparse, r"must be a dense tensor.*torch.sparse_coo: give x.to_dense\(\)"),
        (lambda x: x.to(torch.float8_e4m3fn), r"is torch.float8_e4m3fn, .*: give x.float\(\)"),
        (lambda x: x + 0j, "must be floating point, as the network is; got torch.complex64"),
    ],
)
def test_inputs_that_nothing_is_computed_in(change, message):
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with pytest.raises(InputError, match=message):
        GradCAM(network, "0")(change(torch.rand(1, 1, 8, 8)), 1)


def within_no_grad(logits):
    with torch.no_grad():
        logits.mul_(2)
    return logits[:, 1].sum((1, 2))


@pytest.mark.parametrize("method", [GradCAM, ScoreCAM])
@pytest.mark.parametrize(
    "target",
    [
        lambda logits: logits.mul_(2)[:, 1].sum((1, 2)),
        lambda logits: logits[:, 1].relu_().sum((1, 2)),
        lambda logits: logits.detach().mul_(2)[:, 1].sum((1, 2)) + logits[:, 1].sum((1, 2)),
        within_no_grad,
    ],
)
def test_a_target_that_changes_the_logits_is_refused(target, method):
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with pytest.raises(TargetError, match=r"changes the logits in place.*logits.clone\(\)"):
        method(network, "0")(torch.rand(1, 1, 8, 8), target)


def test_complex_scores_are_refused():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with pytest.raises(TargetError, match="complex scores; a score is a real number"):
        GradCAM(network, "0")(torch.rand(1, 1, 8, 8), lambda logits: logits[:, 1].sum((1, 2)) + 0j)


@pytest.mark.parametrize("kind", [ClassLogit, targets.EveryClass, nn.ReLU])
def test_a_class_is_no_target(kind):
    with pytest.raises(TargetError, match=f"target {kind.__name__} is a class: give an instance"):
        as_target(kind)
    with pytest.raises(TargetError, match=f"target {kind.__name__} is a class: give an instance"):
        as_targets([kind], torch.zeros(1, 2, 3))
