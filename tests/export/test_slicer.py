"""The 3D Slicer scene, read and drawn by 3D Slicer's own code (in a process of its own)."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import cv2
import nibabel as nib
import nrrd
import numpy as np
import pytest
import slicerio
import torch
from helpers_phantom import (
    AIR,
    BODY,
    MARKER,
    SPACING,
    TRUTH_SHIFT_MM,
    against_mm,
    make_grid,
    make_phantom,
    make_phantom_against,
    make_signed_phantom,
    marker_mm,
    silent,
)

from seg3dcam import SegModel, explain_each
from seg3dcam.errors import InputError, OutputError
from seg3dcam.export import save_scene
from seg3dcam.export.slicer import SlicerScene, outline
from seg3dcam.review.look import Look, colours
from seg3dcam.scan import Scan, load_scan
from seg3dcam.targets import EveryComponent

needs_slicer = pytest.mark.skipif(
    importlib.util.find_spec("slicer") is None and "CI" not in os.environ,
    reason="3D Slicer's code: pip install slicer-core",
)
#: Of tests that start 3D Slicer for a scene of their own; a quick run starts it for one alone.
starts_slicer = pytest.mark.slow
READER = Path(__file__).with_name("slicer_reader.py")
CORNER = np.s_[-110:, -110:]  # of a view: arrows with letters
LOOK = Look(window="soft tissue", threshold=0.3, opacity=0.4)


def slicer_reads(scene: Path) -> dict:
    """What 3D Slicer finds in a scene, and the pixels of its slice views."""
    pictures = scene.parent / f"pictures_{scene.suffix[1:]}"
    done = subprocess.run(
        [sys.executable, str(READER), str(scene), str(pictures)],
        env=os.environ | {"VTK_DEFAULT_OPENGL_WINDOW": "vtkEGLRenderWindow"},  # without a screen
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["loaded"], found["said"], found["heard"]) == (True, "", "")
    with np.load(pictures / "views.npz") as pixels:
        found["pixels"] = {name: pixels[name].astype(int) for name in pixels}
    found["drawn"] = {
        name: cv2.imread(str(pictures / f"{name}.png"))[..., ::-1].astype(int)
        for name in found["views"]
    }
    return found


def places(found: dict, view: str) -> np.ndarray:
    """RAS mm of every pixel of a view, (row, column, 3)."""
    size = len(found["pixels"][view])
    width, height, _ = found["views"][view]["field_of_view"]
    steps = (np.arange(size) + 0.5) / size - 0.5
    x, y = np.meshgrid(steps * width, -steps * height)
    place = np.array(found["views"][view]["place"])
    return x[..., None] * place[:3, 0] + y[..., None] * place[:3, 1] + place[:3, 3]


def heat(pixels: np.ndarray) -> np.ndarray:
    return np.ptp(pixels, axis=-1) > 8


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(layers=("model.1", "model.2"))


@pytest.fixture(scope="module")
def folder(phantom, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slicer")
    save_scene(folder, phantom, LOOK, case="Fall 肝 1")
    return folder


@pytest.fixture(scope="module")
def scene(folder):
    return slicer_reads(folder / "scene.mrml")


# ------------------------------------------------------------------------------ what Slicer finds


@pytest.mark.slow
@needs_slicer
def test_settings_of_the_scan(scene):
    scan = scene["volumes"][0]
    assert scan["name"] == "Fall 肝 1"
    assert (scan["window"], scan["level"], scan["auto"]) == (400, 40, 0)
    assert scan["colours"] == "Grey"
    assert scan["threshold"][0] == 0


@pytest.mark.slow
@needs_slicer
def test_settings_of_the_cams(scene, phantom):
    cams = scene["volumes"][1:]
    layers = ["mean of 2 layers", "model.1", "model.2"]
    assert [cam["name"] for cam in cams] == [f"CAM lesion, hires_cam, {one}" for one in layers]
    for cam, layer in zip(cams, layers, strict=True):
        assert (cam["window"], cam["level"], cam["auto"]) == (1, 0.5, 0)
        assert cam["threshold"] == [1, 0.3]
        assert cam["colours"] == "CAM inferno"
        np.testing.assert_array_equal(cam["table"], colours("inferno"))
        assert "not for diagnosis" in cam["description"]
        assert cam["attributes"]["Layer"] == layer
        assert cam["attributes"]["Class"] == "lesion"
        assert cam["attributes"]["Target"] == phantom.target


@needs_slicer
def test_voxels_are_the_ones_that_were_explained(scene, phantom):
    volumes = [phantom.scan.data[0], *(phantom.volume(one) for one in phantom.shown_layers)]
    for shown, volume in zip(scene["volumes"], volumes, strict=True):
        assert tuple(shown["shape"]) == tuple(volume.shape)
        assert shown["sum"] == pytest.approx(float(volume.double().sum()), rel=1e-6)
    flat = phantom.volume().numpy().ravel(order="F")  # x runs fastest
    assert scene["volumes"][1]["peak"] == flat.argmax()


@needs_slicer
def test_views(scene, phantom):
    size = len(phantom.maps) + 1
    assert len(scene["views"]) == 3
    assert scene["slices"] == 3  # the program's own, none beside them
    assert scene["active"] == scene["volumes"][0]["id"]
    assert len(scene["volumes"]) == 1 + size
    for name, orientation in {"Red": "Axial", "Green": "Coronal", "Yellow": "Sagittal"}.items():
        view = scene["views"][name]
        assert view["orientation"] == orientation
        assert view["background"] == scene["volumes"][0]["id"]
        assert view["foreground"] == scene["volumes"][1]["id"]
        assert view["opacity"] == 0.4
        across = {"Axial": 2, "Coronal": 1, "Sagittal": 0}[orientation]
        assert np.array(view["place"])[across, 3] == pytest.approx(phantom.peak()[1][across])


@needs_slicer
@pytest.mark.parametrize("view", ["Red", "Green", "Yellow"])
def test_the_whole_scan_is_in_view(scene, phantom, view):
    body = phantom.affine[:3, :3] @ ((np.array(phantom.scan.shape) - 1) / 2)
    shown = places(scene, view)
    for corner in np.ndindex(2, 2, 2):
        voxel = np.array(corner) * np.array(phantom.scan.shape) - 0.5
        mm = phantom.affine[:3, :3] @ voxel + phantom.affine[:3, 3]
        across = np.ptp(shown, axis=(0, 1)) < 1e-6
        inside = (shown.min((0, 1)) <= mm) & (mm <= shown.max((0, 1)))
        assert (inside | across).all()
    middle = shown.mean((0, 1))[~across]
    np.testing.assert_allclose(middle, (body + phantom.affine[:3, 3])[~across], atol=1e-6)


@needs_slicer
def test_segments(scene, phantom):
    prediction, truth = scene["segments"]
    assert [prediction["name"], truth["name"]] == ["lesion, prediction", "lesion, truth"]
    assert [prediction["colour"], truth["colour"]] == [[0, 1, 1], [0, 1, 0]]
    for found, mask in ((prediction, phantom.mask), (truth, phantom.truth)):
        assert found["voxels"] == int(mask.sum())
        np.testing.assert_allclose(found["middle"], np.argwhere(mask.numpy()).mean(0))
        assert (found["fill"], found["outline"], found["visible"]) == (False, True, True)
        assert found["of"] == scene["volumes"][0]["id"]


# ---------------------------------------------------------------------------------- what is drawn


def assert_heat_on_the_marker(found, phantom):
    """In every view the heat's middle is the marker's, which is right, in front and above."""
    marker = marker_mm(phantom.affine, phantom.scan.shape)
    for view, pixels in found["pixels"].items():
        warm = heat(pixels)
        rows, columns = np.nonzero(warm)
        middle = (len(pixels) - 1) / 2
        assert columns.mean() < middle  # right; in the sagittal view in front
        assert rows.mean() < middle  # in front; in the other views above
        away = places(found, view)[warm].mean(0) - marker
        across = np.argmax(np.abs(np.array(found["views"][view]["place"])[:3, 2]))
        assert np.abs(np.delete(away, across)).max() < min(SPACING) / 2
        assert abs(away[across]) < max(SPACING) / 2


@needs_slicer
def test_heat_is_on_the_marker(scene, phantom):
    assert_heat_on_the_marker(scene, phantom)


@needs_slicer
@pytest.mark.parametrize("view", ["Red", "Green", "Yellow"])
def test_scan_and_heat_have_their_own_colours(scene, phantom, view):
    pixels, place = scene["pixels"][view], places(scene, view)
    across = np.argmax(np.abs(np.array(scene["views"][view]["place"])[:3, 2]))
    away = np.delete(place - marker_mm(phantom.affine, phantom.scan.shape), across, -1)
    levels = [round((value + 160) / 400 * 255) for value in (AIR, BODY, MARKER)]
    assert levels[0] < 0  # black
    grey = pixels[~heat(pixels)]
    assert (np.ptp(grey, axis=-1) <= 1).all()
    often = np.bincount(grey[:, 0], minlength=256).argsort()[-2:].tolist()
    assert sorted(often) in ([0, levels[1] - 1], [0, levels[1]])
    peak = pixels[np.linalg.norm(away, axis=-1) < 1.5].mean(0)
    expected = 0.6 * levels[2] + 0.4 * colours("inferno")[-3:].mean(0)
    np.testing.assert_allclose(peak, expected, atol=12)


@needs_slicer
@starts_slicer
@pytest.mark.parametrize(("height", "sign"), [(1.0, -1), (4.0, 1)])
def test_a_signed_scene_shows_each_sign_in_its_colour_and_nothing_between(tmp_path, height, sign):
    """The views go through the strongest place: with bumps of 1 and -2 the one against."""
    phantom = make_signed_phantom(height=height)
    look = replace(LOOK, colormap="", signed=True)
    save_scene(tmp_path, replace(phantom, class_index=None, truth=None), look)
    found = slicer_reads(tmp_path / "scene.mrml")
    (cam,) = found["volumes"][1:]
    assert (cam["window"], cam["level"], cam["auto"]) == (2, 0, 0)
    assert cam["threshold"][0] == 0  # the table is transparent in the middle
    assert cam["colours"] == "CAM blue_orange"
    np.testing.assert_array_equal(cam["table"], colours("blue_orange"))
    middle = against_mm(phantom) if sign < 0 else marker_mm(phantom.affine, phantom.scan.shape)
    for view, pixels in found["pixels"].items():
        place = np.array(found["views"][view]["place"])
        across = np.argmax(np.abs(place[:3, 2]))
        away = np.linalg.norm(np.delete(places(found, view) - middle, across, -1), axis=-1)
        coloured = np.sign((pixels[..., 0] - pixels[..., 2]) * (heat(pixels)))
        assert (coloured[away < 14] == sign).all()  # 0.3 of a bump of 10 mm lies at 15.5 mm
        assert (np.ptp(pixels[away > 18], axis=-1) <= 1).all()  # the scan alone
        grey = round(((MARKER if sign > 0 else BODY) + 160) / 400 * 255)
        strongest = colours("blue_orange")[255 if sign > 0 else 0]
        expected = 0.6 * grey + 0.4 * strongest
        np.testing.assert_allclose(pixels[away < 1.5].mean(0), expected, atol=12)


@pytest.mark.parametrize("signed", [False, True])
def test_a_map_that_is_all_against_is_heat_of_the_signed_scene_alone(tmp_path, signed):
    phantom = make_phantom_against()
    save_scene(tmp_path, phantom, replace(LOOK, colormap="", signed=signed))
    (file,) = tmp_path.glob("cam_*.nrrd")
    found, _ = nrrd.read(str(file))
    assert (found.min(), found.max()) == (-1 * signed, 0)
    text = (tmp_path / "scene.mrml").read_text(encoding="utf-8")
    assert "all evidence speaks against the target" in text
    assert ("no CAM" in text) == (not signed)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_the_table_of_a_signed_scene_is_transparent_where_the_cam_is_weak(tmp_path, threshold):
    look = Look(threshold=threshold, signed=True)
    save_scene(tmp_path, make_signed_phantom(), look)
    rows = np.loadtxt(tmp_path / "cam.ctbl", comments="#", usecols=(1, 5))
    values, opaque = rows.T
    assert set(opaque) == {0, 255}
    assert (opaque == 255).tolist() == (np.abs(values) >= max(threshold, 0.01)).tolist()
    assert (opaque == opaque[::-1]).all()
    text = (tmp_path / "scene.mrml").read_text()
    assert "against" in re.search('titleText="([^"]*)"', text)[1]
    save_scene(tmp_path, make_phantom(), Look())
    assert set(np.loadtxt(tmp_path / "cam.ctbl", comments="#", usecols=5)) == {255}


@needs_slicer
@pytest.mark.parametrize("view", ["Red", "Green", "Yellow"])
def test_outlines_and_legend_are_drawn(scene, phantom, view):
    drawn, place = scene["drawn"][view].copy(), places(scene, view)
    drawn[CORNER] = 0
    marker = marker_mm(phantom.affine, phantom.scan.shape)
    for colour, shift in (((0, 255, 255), 0), ((0, 255, 0), TRUTH_SHIFT_MM)):
        line = (np.abs(drawn - colour) < 60).all(-1)
        away = place[line] - (marker + shift)
        assert len(away) > 40
        assert np.linalg.norm(away, axis=1).max() < 11 + 2 * max(SPACING)
    across = np.argmax(np.abs(np.array(scene["views"][view]["place"])[:3, 2]))
    green = place[(np.abs(drawn - (0, 255, 0)) < 60).all(-1)].mean(0)  # drawn last
    away = np.delete(green - marker - TRUTH_SHIFT_MM, across)
    assert np.linalg.norm(away) < max(SPACING) / 2
    legend = drawn[:, int(drawn.shape[1] * 0.85) :]
    for colour in colours("inferno")[[60, 128, 250]].astype(int):
        assert (np.abs(legend - colour) < 12).all(-1).sum() > 5


@needs_slicer
@pytest.mark.parametrize(
    ("view", "to_the_left", "up"), [("Red", 0, 1), ("Green", 0, 2), ("Yellow", 1, 2)]
)
def test_arrows_lead_to_the_patients_right_front_and_head(scene, view, to_the_left, up):
    """Slicer's own arrows: R is red, A green, S blue, each with its letter."""
    corner = scene["drawn"][view][CORNER]
    arrows = {}
    for axis in (to_the_left, up):
        strongest = corner[..., axis] - np.delete(corner, axis, -1).max(-1)
        rows, columns = np.nonzero(strongest > 100)
        assert len(rows) > 20
        arrows[axis] = columns.mean(), rows.mean()
    across, down = np.subtract(arrows[to_the_left], arrows[up])
    assert across < -10
    assert down > 10


# ---------------------------------------------------------------------------------------- places


@needs_slicer
@starts_slicer
@pytest.mark.parametrize("codes", ["PIR", "SLA", "gantry tilt"])
def test_every_grid_keeps_its_place(tmp_path, codes):
    phantom = make_phantom(codes) if len(codes) == 3 else tilted_phantom()
    save_scene(tmp_path, phantom, LOOK)
    found = slicer_reads(tmp_path / "scene.mrml")
    affine = turned = phantom.affine
    if np.linalg.det(affine) < 0:  # Slicer turns a volume of a left-handed grid round as it reads
        turned = affine @ np.diag([1, 1, -1, 1])
        turned[:, 3] = affine @ [0, 0, phantom.scan.shape[2] - 1, 1]
    for part, expected in (("volumes", turned), ("segments", affine)):
        assert len(found[part]) == 2
        for one in found[part]:
            np.testing.assert_allclose(one["affine"], expected, atol=1e-6, rtol=0)
    assert_heat_on_the_marker(found, phantom)


def tilted_phantom():
    """The phantom on a sheared grid, as of a CT with gantry tilt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers_phantom.make_grid", tilted_grid)
        return make_phantom()


def tilted_grid(*args):
    shape, affine = make_grid(*args)
    middle = affine @ [*((np.array(shape) - 1) / 2), 1]
    affine[:3, 2] += 0.3 * np.linalg.norm(affine[:3, 2]) * affine[:3, 1] / SPACING[1]
    affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine


# ---------------------------------------------------------------------------------------- bundle


@needs_slicer
@starts_slicer
def test_the_bundle_holds_the_same(folder, scene):
    found = slicer_reads(folder / "case.mrb")
    for part in ("volumes", "segments", "views"):
        assert found[part] == scene[part]
    for view, pixels in scene["pixels"].items():
        np.testing.assert_array_equal(found["pixels"][view], pixels)


def test_nothing_in_the_bundle_is_encoded_twice(folder):
    with zipfile.ZipFile(folder / "case.mrb") as bundle:
        entries = {entry.filename: entry for entry in bundle.infolist()}
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.values())
        assert all(name.startswith("Fall_1/") for name in entries)
        for name in entries:
            if not name.endswith(".mrml"):
                assert bundle.read(name) == (folder / Path(name).name).read_bytes()
    files = {file.name for file in folder.iterdir() if file.is_file()}
    inside = {Path(name).name for name in entries}
    assert inside == files - {"case.mrb"}


def test_files(folder, phantom, tmp_path):
    files = save_scene(tmp_path, phantom, LOOK)
    assert [file.name for file in files] == [
        "scene.mrml",
        "case.mrb",
        "scan.nrrd",
        "cam_1_lesion.nrrd",
        "cam_2_lesion_model.1.nrrd",
        "cam_3_lesion_model.2.nrrd",
        "cam.ctbl",
        "masks.seg.nrrd",
    ]
    assert sorted(files) == sorted(tmp_path.iterdir())
    for file in files:  # the same input gives the same bytes, but for the case's name
        if file.suffix == ".nrrd":
            assert file.read_bytes() == (folder / file.name).read_bytes()


# -------------------------------------------------------------------------------- unusual content


def channels_of(phantom):
    data = torch.cat([phantom.scan.data, phantom.scan.data * 2 + 7])
    return replace(phantom, scan=Scan(data, phantom.affine, "DOE_JANE"))


@needs_slicer
@starts_slicer
def test_odd_names_several_classes_and_channels(tmp_path):
    names = ("background", "../x", 'Läsion 肝 <a&b>"x";1:2%3B', "none\n")
    first = channels_of(make_phantom(classes=names))
    explanations = [
        replace(
            first,
            class_index=n,
            label=names[n],
            target=f"log-odds of {names[n]}",
            truth=first.truth,
        )
        for n in (1, 2, 3)
    ]
    explanations[0] = silent(explanations[0], "zero")
    files = save_scene(tmp_path / "out", explanations, LOOK, case="../Fäll & <1>")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", file.name) for file in files)
    assert all(file.parent == tmp_path / "out" for file in files)
    found = slicer_reads(tmp_path / "out" / "case.mrb")
    shown = [one["name"] for one in found["volumes"]]
    assert shown[:2] == ["../Fäll & <1>, channel 1", "../Fäll & <1>, channel 2"]
    assert shown[2].startswith("CAM ../x, hires_cam, model.1 (no CAM: no voxel speaks")
    assert shown[3] == f"CAM {names[2]}, hires_cam, model.1"
    attributes = found["volumes"][3]["attributes"]
    assert (attributes["Class"], attributes["Layer"]) == (names[2], "model.1")
    assert attributes["Target"] == f"log-odds of {names[2]}"
    assert found["volumes"][1]["level"] == 40
    assert found["views"]["Red"]["background"] == found["volumes"][0]["id"]
    assert found["views"]["Red"]["foreground"] == found["volumes"][3]["id"]
    segments = {one["name"]: one for one in found["segments"]}
    assert len(segments) == 6
    assert segments["../x, prediction"]["voxels"] == 0
    assert segments[f"{names[2]}, prediction"]["voxels"] == 0
    assert segments["none , prediction"]["voxels"] == int(first.mask.sum())
    assert len({tuple(one["colour"]) for one in segments.values()}) == 6
    visible = [name for name, one in segments.items() if one["visible"]]
    assert visible == [f"{names[2]}, prediction", f"{names[2]}, truth"]  # of the CAM shown


@needs_slicer
@starts_slicer
def test_without_heat_the_scan_is_shown_alone(tmp_path):
    quiet = silent(make_phantom(), "nonfinite")
    save_scene(tmp_path, quiet, LOOK)
    found = slicer_reads(tmp_path / "scene.mrml")
    assert found["volumes"][1]["sum"] == 0
    for view, pixels in found["pixels"].items():
        assert found["views"][view]["foreground"] is None
        assert not heat(pixels).any()
        assert pixels.max() > 100
    # The slices go through the prediction instead.
    red = np.array(found["views"]["Red"]["place"])[2, 3]
    assert abs(red - marker_mm(quiet.affine, quiet.scan.shape)[2]) < max(SPACING)


@pytest.mark.parametrize("status", ["zero", "nonfinite", "degenerate"])
def test_without_heat_the_cams_name_says_why(tmp_path, phantom, status):
    quiet = silent(phantom, status)
    save_scene(tmp_path, [quiet, phantom], LOOK)
    scene = ElementTree.parse(tmp_path / "scene.mrml").getroot()
    names = {node.get("id"): node.get("name") for node in scene.iter("Volume")}
    assert sum(name.endswith(f"({quiet.notice()})") for name in names.values()) == 3
    for blend in scene.iter("SliceComposite"):  # the first that has any is shown
        front = re.search("foregroundVolume:(.*?);", blend.get("references"))[1]
        assert names[front] == "CAM lesion, hires_cam, mean of 2 layers"


@needs_slicer
@starts_slicer
def test_two_slices_one_value_and_no_mask(tmp_path):
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    cam = torch.zeros(30, 20, 2)
    cam[5, 6, 1] = 1
    bare = replace(
        make_phantom(),
        scan=Scan(torch.full((1, 30, 20, 2), 7.0), affine, ""),
        maps={"model.1": cam},
        prediction=torch.zeros(2, 30, 20, 2, dtype=torch.bool),
        class_index=None,
        truth=None,
    )
    files = save_scene(tmp_path, bare, Look(threshold=0))
    assert "masks.seg.nrrd" not in [file.name for file in files]
    found = slicer_reads(tmp_path / "scene.mrml")
    assert found["segments"] == []
    assert found["volumes"][0]["sum"] == 7 * 1200
    scan = found["volumes"][0]
    assert scan["window"] > 0
    assert abs(scan["level"] - 7) < 1e-6  # mid grey
    red = found["pixels"]["Red"]
    assert 0 < heat(red).sum() < 0.05 * heat(red).size
    plain = red[~heat(red)]  # no heat where the CAM is 0: mid grey, not darker
    assert np.isin(plain, (0, 127, 128)).mean() > 0.95
    assert np.array(found["views"]["Red"]["place"])[2, 3] == 5


# ---------------------------------------------------------------------------------------- lesions


class TwoBalls(torch.nn.Module):
    """Predicts what is bright."""

    def __init__(self):
        super().__init__()
        self.feature = torch.nn.Conv3d(1, 1, 1)
        torch.nn.init.ones_(self.feature.weight)
        torch.nn.init.zeros_(self.feature.bias)

    def forward(self, x):
        bright = self.feature(x) - 0.5
        return torch.cat([-bright, bright], 1)


def lesions(sizes):
    scan = np.zeros((24, 20, 16))
    for number, size in enumerate(sizes):
        scan[2 + 7 * number : 2 + 7 * number + size, 3:6, 4:8] = 1
    model = SegModel(TwoBalls(), class_names=["background", "lesion"])
    scan = load_scan(scan, affine=np.diag([-1.0, -1.0, 2.0, 1.0]))
    return list(explain_each(scan, model, [EveryComponent(1)], layers="feature"))


def test_every_explained_lesion_is_a_segment(tmp_path):
    found_lesions = lesions([3, 5, 1])
    save_scene(tmp_path, found_lesions, LOOK)
    masks, colour_of = segments_of(tmp_path)
    rows = {"lesion component 0": 9, "lesion component 1": 2, "lesion component 2": 16}
    assert list(masks) == ["lesion, prediction", *rows]
    np.testing.assert_array_equal(masks["lesion, prediction"], found_lesions[0].mask)
    for (name, first), size in zip(rows.items(), (5, 3, 1), strict=True):
        expected = np.zeros((24, 20, 16), bool)
        expected[first : first + size, 3:6, 4:8] = True
        np.testing.assert_array_equal(masks[name], expected)
    assert len(set(colour_of.values())) == 4


def test_masks_of_one_name_stay_apart(tmp_path):
    """Two given regions, say, or the predictions of two models; the same mask is there once."""
    whole = lesions([3, 5])[0]
    halves = torch.zeros(2, *whole.scan.shape, dtype=torch.bool)
    halves[0, :12], halves[1, 12:] = True, True
    of_halves = [replace(whole, label="lesion given mask", region=half) for half in halves]
    save_scene(tmp_path, [*of_halves, of_halves[0]], LOOK)
    masks, colour_of = segments_of(tmp_path)
    assert list(masks) == ["lesion, prediction", "lesion given mask", "lesion given mask 2"]
    for name, half in zip(list(masks)[1:], halves, strict=True):
        np.testing.assert_array_equal(masks[name], half)
    assert len(set(colour_of.values())) == 3


def segments_of(folder):
    """Name -> mask, and name -> colour."""
    described = slicerio.read_segmentation(str(folder / "masks.seg.nrrd"))
    layers = described["voxels"]
    layers = layers if layers.ndim == 4 else layers[None]
    masks = {s["name"]: layers[s["layer"]] == s["labelValue"] for s in described["segments"]}
    return masks, {s["name"]: tuple(s["color"]) for s in described["segments"]}


def test_outlines_of_many_classes_differ():
    colours_of = {outline(kind, n) for kind in ("prediction", "truth", "region") for n in range(8)}
    assert len(colours_of) == 24


# ------------------------------------------------------------------------------- errors and names


def test_no_explanation(tmp_path):
    with pytest.raises(InputError, match="no explanation"):
        save_scene(tmp_path, [], LOOK)


def test_explanations_of_different_scans(tmp_path, phantom):
    other = make_phantom("RAS")
    with pytest.raises(InputError, match=r"shows one scan. Write a scene for each"):
        save_scene(tmp_path, [phantom, other], LOOK)
    assert not (tmp_path / "scene.mrml").exists()


def test_a_folder_that_cannot_be_written(tmp_path, phantom):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="A part of this path is a file"):
        save_scene(tmp_path / "file" / "out", phantom, LOOK)


@pytest.mark.slow
def test_no_volume_is_kept(tmp_path):
    phantom = make_phantom()
    kept = [
        weakref.ref(volume)
        for volume in (
            phantom.scan.data,
            phantom.prediction,
            phantom.truth,
            phantom.maps["model.1"],
        )
    ]
    scene = SlicerScene(tmp_path, LOOK)
    scene.add(phantom, "lesion")
    del phantom
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4
    assert len(scene.finish()) == 6


def test_the_scans_name_is_in_no_file(tmp_path, phantom):
    header = nib.Nifti1Header()
    header.set_data_shape(phantom.scan.shape)
    header.set_sform(phantom.affine, 1)
    header["descrip"] = header["db_name"] = b"DOE^JANE"
    scan = replace(phantom.scan, name="DOE_JANE", header=header)
    for file in save_scene(tmp_path / "DOE", replace(phantom, scan=scan), LOOK):
        assert b"DOE" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
