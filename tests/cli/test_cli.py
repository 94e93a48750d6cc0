"""The commands: what they promise is what they do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from helpers_cases import (
    BIASES,
    GAINS,
    IN_BACKGROUND,
    IN_LESION,
    IN_ORGAN,
    PICTURES,
    Place,
    contents,
    seg3dcam,
    voxels,
    write_model,
    write_scan,
    write_yaml,
)
from helpers_crossed import crossed

import seg3dcam as seg3dcam_package
from seg3dcam import METHODS, load_model, suggest_layers
from seg3dcam.job.settings import Job

pytestmark = pytest.mark.usefixtures("measured_once")

BOTTLENECK = "model.1.submodule"


def explained(place):
    """Return class (or target name) -> what case.json says about it."""
    cases = place.record["explanations"]
    return {case["target"]["class"] or case["target"]["name"]: case for case in cases}


# ---------------------------------------------------------------------- the issue's own words


@pytest.mark.parametrize("method", crossed(METHODS, rows=6))
def test_explain_with_every_option_named(tmp_path, method):
    """In two windows: kpca_cam compares every feature voxel of all windows with every other."""
    place = Place.at(tmp_path, window={"roi_size": [16, 24, 18]})
    outcome = place.explain("--target", "lesion", "--layer", BOTTLENECK, "--method", method)
    assert outcome.code == 0, outcome.err
    assert list(explained(place)) == ["lesion"]
    case = explained(place)["lesion"]
    assert case["method"]["name"] == method
    assert list(case["layers"]) == ["input" if method == "full_grad" else BOTTLENECK]
    cam = place.volume("cam_lesion.nii.gz")
    assert cam.max() == pytest.approx(1)
    assert cam.min() >= 0
    assert cam[IN_LESION] > cam[IN_BACKGROUND]


def test_map_lights_up_where_the_evidence_is(place):
    assert place.explain("--target", "lesion", "--method", "hires_cam").code == 0
    cam = place.volume("cam_lesion.nii.gz")
    assert cam[IN_LESION] > 0.5
    assert cam[IN_BACKGROUND] == 0


def test_prediction_is_the_networks(place):
    assert place.explain().code == 0
    labels = place.volume("prediction.nii.gz")
    assert [labels[v] for v in (IN_BACKGROUND, IN_ORGAN, IN_LESION)] == [0, 1, 2]


def test_layers_names_a_layer_that_explain_takes(place):
    outcome = seg3dcam("layers", "--model", place.model)
    assert outcome.code == 0
    assert f"{BOTTLENECK} (auto)" in outcome.out
    assert "8x8x8" in outcome.out  # half of the window's 16
    assert seg3dcam("layers", "--model", place.model, "--shape", "32,16,8").out.count("16x8x4") == 1
    assert place.explain("--layer", BOTTLENECK).code == 0


def test_layers_says_of_each_layer_what_is_true_of_it():
    """Of a role once, where it is true of all its layers, else by their names."""
    model = Path(seg3dcam_package.__file__).parent / "demo" / "model.yaml"
    said = " ".join(seg3dcam("layers", "--model", model).out.split())
    found = suggest_layers(load_model(model).module, (1, 1, 32, 32, 32))
    assert len(found) > 1
    for role, reason in {(s.role, s.reason) for s in found}:
        names = [s.name for s in found if s.reason == reason]
        every = len(names) == sum(s.role == role for s in found)
        assert f"{role if every else ', '.join(names)}: {reason}" in said


def test_layers_shows_the_models_name_as_it_is(place):
    odd = place.model.rename(place.folder / "net [v2].yaml")
    assert "net [v2]" in seg3dcam("layers", "--model", odd).out


def test_methods_lists_every_method_with_a_sentence():
    outcome = seg3dcam("methods")
    assert outcome.code == 0
    for method in METHODS:
        (line,) = [line for line in outcome.out.splitlines() if line.startswith(f"{method} ")]
        assert len(line) > len(method) + 20


# ------------------------------------------------------------------------------------ targets


def test_layer_names_are_whole_in_a_narrow_terminal():
    """A name that is cut off cannot be given to --layer."""
    model = Path(seg3dcam_package.__file__).parent / "demo" / "model.yaml"
    rows = [line.split("│") for line in seg3dcam("layers", "--model", model).out.splitlines()]
    first_column = "".join(row[1].strip() for row in rows if len(row) > 2)
    assert "model.1.submodule.1.submodule.1.submodule (auto)" in first_column
    assert "…" not in first_column


def test_without_target_every_predicted_class_but_the_background(place):
    assert place.explain().code == 0
    assert list(explained(place)) == ["organ", "lesion"]
    (place.folder / "without").mkdir()
    without = Place.at(place.folder / "without")
    write_scan(without.scan, voxels(lesion=False))
    assert without.explain().code == 0
    assert list(explained(without)) == ["organ"]


def test_several_targets_by_name_and_index(place):
    assert place.explain("--target", "lesion", "--target", "0").code == 0
    assert list(explained(place)) == ["lesion", "background"]


def test_several_layers_each_leave_a_map(place):
    assert place.explain("--target", "1", "--layer", BOTTLENECK, "--layer", "model.0").code == 0
    assert set(explained(place)["organ"]["layers"]) == {BOTTLENECK, "model.0"}
    raw = sorted(file.name for file in place.out.glob("raw_*"))
    assert raw == ["raw_organ_model_0.nii.gz", "raw_organ_model_1_submodule.nii.gz"]


def test_one_class_may_be_named_twice(place):
    """By name and by index; one explanation is enough."""
    assert place.explain("--target", "organ", "--target", "1").code == 0
    assert len(place.record["explanations"]) == 1


@pytest.mark.parametrize(
    ("score", "name", "value"),
    [
        ("log_odds", "log-odds of", lambda z: z[1] - np.logaddexp(z[0], z[2])),
        ("logit", "logit of", lambda z: z[1]),
        ("probability", "probability of", lambda z: np.exp(z[1]) / np.exp(z).sum(0)),
    ],
)
def test_score_of_a_class(place, score, name, value):
    """The score in case.json is the sum over the predicted mask, from the logits by hand."""
    assert place.explain("--score", score, "--target", "organ").code == 0
    target = explained(place)["organ"]["target"]
    assert target["name"].startswith(name)
    logits = logits_by_hand()
    organ = logits.argmax(0) == 1
    assert target["region_voxels"] == pytest.approx(organ.sum(), rel=0.02)
    assert target["score"] == pytest.approx(value(logits)[organ].sum(), rel=0.05)


def logits_by_hand():
    """Return (K, X, Y, Z) in float64: every second voxel, interpolated, times gain plus bias."""
    brightness = torch.from_numpy(voxels())[None, None, ::2, ::2, ::2].double()
    fine = torch.nn.functional.interpolate(
        brightness,
        size=[2 * n - 1 for n in brightness.shape[2:]],
        mode="trilinear",
        align_corners=True,
    )
    fine = torch.nn.functional.pad(fine, (0, 1) * 3)[0, 0].numpy()
    return np.stack([gain[0] * fine + bias for gain, bias in zip(GAINS, BIASES, strict=True)])


def test_mask_output_is_about_no_class(place):
    assert place.explain("--score", "mask_output").code == 0
    (case,) = place.record["explanations"]
    assert case["target"]["class"] is None
    assert case["target"]["name"].startswith("mask output")


# ------------------------------------------------------------- several channels, sigmoid outputs

TWO_CHANNELS = {"gains": [[0, 0], [10, 0], [0, 20]], "biases": [0, -3, -8]}


def two_channels():
    """Return the organ in channel 0 and the lesion in channel 1."""
    return voxels(lesion=False), voxels(organ=False, lesion=True)


@pytest.mark.slow
def test_channels_as_files_and_as_a_fourth_axis_are_the_same(tmp_path):
    place = Place.at(tmp_path, **TWO_CHANNELS)
    organ, lesion = two_channels()
    one = write_scan(tmp_path / "case_0000.nii.gz", organ)
    two = write_scan(tmp_path / "case_0001.nii.gz", lesion)
    both = write_scan(tmp_path / "case.nii.gz", np.stack([organ, lesion], axis=-1))
    assert place.explain(scans=[one, two]).code == 0
    files = contents(place.out)
    assert list(explained(place)) == ["organ", "lesion"]
    assert place.explain("--force", scans=[both]).code == 0
    assert contents(place.out) == files


def test_channels_keep_their_order(tmp_path):
    place = Place.at(tmp_path, **TWO_CHANNELS)
    organ, lesion = two_channels()
    one, two = write_scan(tmp_path / "a.nii.gz", organ), write_scan(tmp_path / "b.nii.gz", lesion)
    assert place.explain(scans=[one, two]).code == 0
    assert place.volume("prediction.nii.gz")[IN_ORGAN] == 1
    assert place.explain("--out", tmp_path / "turned", scans=[two, one]).code == 0
    turned = nib.load(tmp_path / "turned" / "prediction.nii.gz")
    assert np.asarray(turned.dataobj)[IN_ORGAN] == 2


def test_one_channel_sigmoid(tmp_path):
    one = {"gains": [[10]], "biases": [-7], "classes": ["lesion"], "activation": "sigmoid"}
    place = Place.at(tmp_path, **one)
    assert place.explain().code == 0
    assert list(explained(place)) == ["lesion"]  # channel 0 is no background here
    labels = place.volume("prediction.nii.gz")
    assert [labels[v] for v in (IN_BACKGROUND, IN_ORGAN, IN_LESION)] == [0, 0, 1]
    assert set(np.unique(labels)) == {0, 1}


def test_sigmoid_classes_may_overlap_and_be_absent(tmp_path):
    place = Place.at(
        tmp_path,
        gains=[[10], [10], [10]],
        biases=[-3, -7, -99],
        classes=["whole", "core", "absent"],
        activation="sigmoid",
    )
    assert place.explain().code == 0
    assert list(explained(place)) == ["whole", "core"]
    whole, core, absent = (
        place.volume(f"prediction_{name}.nii.gz") for name in ("whole", "core", "absent")
    )
    assert (whole[IN_LESION], core[IN_LESION]) == (1, 1)
    assert (whole[IN_ORGAN], core[IN_ORGAN]) == (1, 0)
    assert not absent.any()


# ------------------------------------------------------------------------------------- pictures


def slices(place):
    return sorted(str(file.relative_to(place.out)) for file in place.out.rglob("*.png"))


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_one_slice_alone(place, axis):
    assert place.explain("--target", "lesion", "--slice", 10, "--axis", axis).code == 0
    assert slices(place) == [f"slices/lesion/{axis}_010.png"]


@pytest.mark.slow
def test_every_slice(place):
    """The overview still shows those that matter."""
    assert place.explain("--target", "lesion", "--slice", "all", "--axis", "coronal").code == 0
    found = slices(place)
    assert found[-24:] == [f"slices/lesion/coronal_{k:03d}.png" for k in range(24)]
    assert found[:3] == ["montage_lesion.png", "planes_lesion.png", "profile_lesion.png"]
    montage = (place.out / "montage_lesion.png").read_bytes()
    other = Place(place.folder / "other")
    other.folder.mkdir()
    words = ("explain", place.scan, "--model", place.model, "--out", other.out, "--axis", "coronal")
    assert seg3dcam(*words, "--target", "lesion", "--format", "png").code == 0
    assert (other.out / "montage_lesion.png").read_bytes() == montage


def test_axial_is_the_patients_not_the_arrays(place):
    """The first array axis runs from feet to head: 20 axial slices."""
    turned = np.array([[0, 2.0, 0, 0], [0, 0, 2.0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    write_scan(place.scan, affine=turned)
    assert place.explain("--target", "lesion", "--slice", 19, "--axis", "axial").code == 0
    assert slices(place) == ["slices/lesion/axial_019.png"]
    assert place.explain("--target", "lesion", "--slice", 19, "--axis", "coronal").code == 2


@pytest.mark.slow
def test_pictures_show_relevant_slices_and_a_montage(place):
    assert place.explain("--target", "lesion", *PICTURES).code == 0
    found = slices(place)
    assert "montage_lesion.png" in found
    assert "slices/lesion/axial_008.png" in found  # through the lesion
    assert "slices/lesion/axial_017.png" not in found  # far from it


def test_no_pictures(place):
    assert place.explain("--format", "nifti").code == 0
    assert slices(place) == []


# ------------------------------------------------------------------------------------ job files


@pytest.fixture
def job(place):
    """A job in a folder of its own, which names scan and model relative to itself."""
    folder = place.folder / "jobs"
    folder.mkdir()
    content = {
        "scan": "../scan.nii.gz",
        "model": "../model.yaml",
        "out": str(place.out),
        "target": "lesion",
        "method": "grad_cam",
        "format": "nifti",
    }
    return write_yaml(folder / "job.yaml", content)


def test_a_job_file_is_a_whole_run(place, job, monkeypatch):
    monkeypatch.chdir("/")
    outcome = seg3dcam("explain", "--config", job)
    assert outcome.code == 0, outcome.err
    assert explained(place)["lesion"]["method"]["name"] == "grad_cam"


def test_options_override_the_job_file(place, job):
    options = ["--method", "hires_cam", "--target", "organ", "--out", place.folder / "elsewhere"]
    assert seg3dcam("explain", "--config", job, *options).code == 0
    assert not place.out.exists()
    (case,) = yaml.safe_load((place.folder / "elsewhere/case.json").read_text())["explanations"]
    assert (case["method"]["name"], case["target"]["class"]) == ("hires_cam", "organ")


def test_a_signed_job_file_stays_signed(place, job):
    job.write_text(job.read_text() + "signed: true\n", encoding="utf-8")
    assert seg3dcam("explain", "--config", job, "--format", "nifti").code == 0
    assert place.record["job"]["signed"] is True


def test_options_paths_are_relative_to_the_shell(place, job, monkeypatch):
    monkeypatch.chdir(place.folder)
    other = write_scan(place.folder / "other.nii.gz", voxels() * 1.01)
    assert seg3dcam("explain", other.name, "--config", job).code == 0
    brightness = place.record["case"]
    assert seg3dcam("explain", "--config", job, "--out", "another").code == 0
    record = json.loads((place.folder / "another" / "case.json").read_text(encoding="utf-8"))
    assert record["case"] != brightness  # another scan, another code


def test_the_output_folder_is_relative_to_the_job_file_too(place, job, monkeypatch):
    monkeypatch.chdir(place.folder)
    write_yaml(job, {**yaml.safe_load(job.read_text()), "out": "found"})
    assert seg3dcam("explain", "--config", job).code == 0
    assert (job.parent / "found" / "case.json").is_file()


def test_a_job_file_lists_channels(tmp_path):
    place = Place.at(tmp_path, **TWO_CHANNELS)
    for name, array in zip("ab", two_channels(), strict=True):
        write_scan(tmp_path / f"{name}.nii.gz", array)
    content = {
        "scan": ["a.nii.gz", "b.nii.gz"],
        "model": "model.yaml",
        "out": str(place.out),
        "format": "nifti",
    }
    assert seg3dcam("explain", "--config", write_yaml(tmp_path / "job.yaml", content)).code == 0
    assert list(explained(place)) == ["organ", "lesion"]


# -------------------------------------------------------------------------------------- devices


@pytest.fixture
def machine(monkeypatch):
    """Make this a machine with as many CUDA devices as the test says."""

    def set_up(cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return set_up


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_device_in_this_machine(place, machine, device):
    machine(cuda=0)
    assert place.explain("--device", device).code == 0


@pytest.mark.parametrize(
    ("device", "cuda", "said"),
    [
        ("cuda", 0, "'cuda' is not in this machine; usable are cpu"),
        ("cuda:1", 0, "'cuda:1' is not in this machine; usable are cpu"),
        ("cuda:1", 1, "'cuda:1' is not in this machine; usable are cpu, cuda"),
        ("mps", 1, "'mps' is not in this machine; usable are cpu, cuda"),
        ("gpu", 1, "'gpu': legal are auto, cpu, cuda, cuda:<number> and mps"),
        ("cuda:one", 1, "'cuda:one': legal are auto, cpu, cuda, cuda:<number> and mps"),
        ("cpu:7", 0, "'cpu:7'"),
    ],
)
def test_device_not_in_this_machine(place, machine, device, cuda, said):
    machine(cuda)
    outcome = place.explain("--device", device)
    assert outcome.code == 2
    assert said in outcome.complaint


# ------------------------------------------------------------------------------ skip and rerun


def test_a_rerun_skips_what_is_done(place):
    assert place.explain(*PICTURES).code == 0
    stamps = {path: path.stat().st_mtime_ns for path in place.out.rglob("*")}
    outcome = place.explain(*PICTURES)
    assert outcome.code == 0
    assert "holds this case already" in " ".join(outcome.out.split())
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} == stamps


def is_skipped(outcome):
    assert outcome.code == 0, outcome.err
    return "holds this case already" in " ".join(outcome.out.split())


def test_force_does_it_again_with_the_same_result(place):
    place.explain()
    files = contents(place.out)
    stamp = (place.out / "case.json").stat().st_mtime_ns
    assert not is_skipped(place.explain("--force"))
    assert (place.out / "case.json").stat().st_mtime_ns > stamp
    assert contents(place.out) == files


@pytest.mark.parametrize(
    "change",
    crossed(
        [
            ("--method", "grad_cam"),
            ("--target", "lesion"),
            ("--layer", "model.0"),
            ("--score", "mask_output"),
            (*PICTURES,),
            ("--slice", 8),
            ("--signed",),
        ],
        rows=2,
    ),
    ids=lambda change: " ".join(map(str, change)),
)
def test_other_settings_are_another_case(place, change):
    place.explain()
    assert not is_skipped(place.explain(*change))
    assert is_skipped(place.explain(*change))


def test_the_default_colours_by_name_are_the_same_case(place):
    place.explain("--signed")
    assert is_skipped(place.explain("--signed", "--colormap", "blue_orange"))
    assert not is_skipped(place.explain("--signed", "--colormap", "coolwarm"))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "change",
    crossed(
        [
            {"biases": [0, -3, -18]},
            {"window": {"roi_size": 16, "overlap": 0.5}},
            {"window": None},
            {"classes": ["background", "liver", "tumour"]},
            {"activation": "sigmoid"},
            {"prepare": {"intensity": {"range": [0.0, 2.0]}}},
            {"prepare": {"spacing": [2.0, 2.0, 2.0]}},
        ],
        rows=3,
    ),
    ids=["weights", "overlap", "no window", "class names", "activation", "intensity", "spacing"],
)
def test_another_model_is_another_case(place, change):
    place.explain("--target", "1")
    write_model(place.folder, **change)
    assert not is_skipped(place.explain("--target", "1"))


def test_another_scan_is_another_case(place):
    place.explain()
    array = voxels()
    array[IN_ORGAN] += 0.001
    write_scan(place.scan, array)
    assert not is_skipped(place.explain())


def test_a_copy_of_the_inputs_is_the_same_case(place, tmp_path_factory):
    """Neither the scan's folder nor the device counts."""
    place.explain()
    copy = tmp_path_factory.mktemp("copy") / place.scan.name
    shutil.copy(place.scan, copy)
    assert is_skipped(place.explain("--device", "cpu", scans=[copy]))


def test_a_case_that_lost_a_file_is_done_again(place):
    place.explain()
    (place.out / "cam_organ.nii.gz").unlink()
    assert not is_skipped(place.explain())
    assert (place.out / "cam_organ.nii.gz").is_file()


# ------------------------------------------------------------------------------- what is printed


@pytest.mark.slow
def test_every_path_on_stdout_exists(place, tmp_path_factory):
    place = Place.at(tmp_path_factory.mktemp("a folder whose name is so long that it fills a line"))
    outcome = place.explain(*PICTURES)
    assert outcome.code == 0
    named = [path for file in outcome.files for path in file.parent.glob(file.name)]
    assert set(named) == set(place.out.iterdir())  # files, and the folder of slices
    assert len(named) == len(set(named))
    again = place.explain(*PICTURES).out
    assert str(place.out) in again  # not broken over two lines


def test_few_lines_say_where_many_files_are_and_what_to_open_first(place):
    formats = [f"--format={name}" for name in ("nifti", "html", "slicer", "nrrd")]
    outcome = place.explain(*formats, "--layer", "model.0", "--layer", BOTTLENECK)
    assert [str(file.relative_to(place.out)) for file in outcome.files] == [
        "report.html",
        "slicer/scene.mrml",
        "slicer/case.mrb",
        "prediction.nii.gz",
        "cam_*.nii.gz",
        "raw_*.nii.gz",
        "cam_*.nrrd",
        "slicer",
        "case.json",
    ]
    assert "4 files" in outcome.out  # of two classes at two layers each


@pytest.mark.slow
def test_nothing_on_stderr_when_it_is_no_terminal(place):
    assert place.explain(*PICTURES).err == ""


def test_a_warning_is_one_line(place):
    write_model(place.folder, weights="random")
    outcome = place.explain("--score", "mask_output")
    assert outcome.code == 0
    first, *more = outcome.err.splitlines()
    assert first.startswith("warning: model.yaml: the network has random weights, as asked")
    assert all(line.startswith("warning: ") for line in more)  # of the map, if it is zero


def test_mostly_evidence_against_is_said_of_the_class(place):
    """One channel speaks against the organ; the other one for it, in a faint spot."""
    spot = np.zeros_like(voxels())
    spot[1:4, 1:4, 1:4] = 0.3
    scans = [place.scan, write_scan(place.folder / "spot.nii.gz", spot)]
    write_model(place.folder, gains=[[0, 0], [-10, 10], [10, 0]])
    words = "mostly evidence against the target: at most"
    options = ("--score", "logit", "--region", "volume")
    outcome = place.explain("--target", "organ", *options, scans=scans)
    assert outcome.code == 0
    assert words in outcome.err
    assert f"organ whole volume: {words}" in outcome.out
    assert words in place.record["explanations"][0]["found"]["warnings"][0]
    assert words not in place.explain("--target", "lesion", *options, scans=scans).out


@pytest.mark.parametrize("signed", [False, True])
def test_all_evidence_against_is_shown_in_every_format_of_the_signed_view(place, signed):
    write_model(place.folder, gains=[[0], [-10], [10]])
    formats = [word for name in ("nifti", "fused", "html") for word in ("--format", name)]
    options = ["--score", "logit", "--region", "volume", *formats]
    outcome = place.explain("--target", "organ", *options, *["--signed"] * signed)
    assert outcome.code == 0, outcome.err
    assert "all evidence speaks against the target" in outcome.err
    assert explained(place)["organ"]["layers"][BOTTLENECK]["status"] == "zero"
    raw = place.volume("raw_organ_whole_volume_model_1_submodule.nii.gz")
    wanted = raw / np.abs(raw).max() * signed
    assert raw.min() < raw.max() < 0
    np.testing.assert_allclose(place.volume("cam_organ_whole_volume.nii.gz"), wanted, atol=1e-5)
    fused = np.asarray(nib.load(place.out / "fused_organ_whole_volume.nii.gz").dataobj)
    blue = fused["B"].astype(int) - fused["R"]
    assert (blue > 25).any() == signed
    page = (place.out / "report.html").read_text(encoding="utf-8")
    assert ("no CAM: all evidence speaks against the target" in page) == (not signed)


def test_class_names_are_no_markup(place):
    write_model(place.folder, classes=["background", "[red]organ", "[/lesion]"])
    outcome = place.explain()
    assert outcome.code == 0
    assert "[red]organ" in outcome.out
    assert "[/lesion]" in outcome.out


def test_interrupted_by_the_user(place, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("seg3dcam.job.run.explain_each", interrupt)
    outcome = place.explain()
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    assert not any(place.out.iterdir())


# ------------------------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "--model"], "--model"),
        (["explain", "--nope"], "--nope"),
        (["explain", "--slice", "ten"], "--slice"),
        (["explain"], "scan: missing"),
        (["explain", "scan.nii.gz"], "model: missing"),
        (["layers"], "--model"),
        (["layer"], "layer"),
        (["methods", "extra"], "extra"),
    ],
    ids=" ".join,
)
def test_wrong_use(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = seg3dcam(*words)
    assert outcome.code == 2
    assert said in outcome.complaint
    assert outcome.out == ""
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("command", ["", "explain", "compare", "layers", "methods", "demo"])
def test_help(command):
    outcome = seg3dcam(*command.split(), "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


def test_every_setting_of_a_job_has_an_option():
    words = seg3dcam("explain", "--help").out
    options = set(Job.model_fields) - {"scan"}
    assert [o for o in options if f"--{o.replace('_', '-')}" not in words] == []


# ------------------------------------------------------------------------ the installed command


def installed(*words, cwd=None):
    command = Path(sys.executable).with_name("seg3dcam")
    return subprocess.run(
        [command, *map(str, words)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.slow
def test_installed_command_explains(place):
    done = installed("explain", "scan.nii.gz", "--model", "model.yaml", cwd=place.folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (out,) = (place.folder / "seg3dcam_out").iterdir()
    assert (out / "case.json").is_file()
    cam = nib.load(out / "cam_lesion.nii.gz")
    assert np.array_equal(cam.affine, nib.load(place.scan).affine)


@pytest.mark.slow
def test_installed_command_fails_without_traceback(place):
    place.scan.write_bytes(b"no scan")
    done = installed("explain", place.scan, "--model", place.model, "--out", place.out)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
