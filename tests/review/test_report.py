"""The report's data, read back: where everything is, how exact, how large, what is not there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_phantom import (
    against_mm,
    make_phantom,
    make_phantom_against,
    make_signed_phantom,
    marker_mm,
    offset_mm,
    silent,
)
from helpers_report import Reader

from seg3dcam.errors import ConfigError, InputError, OutputError, Seg3dcamWarning
from seg3dcam.explaining.explain import explain
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.models import SegModel
from seg3dcam.review.look import GreyWindow, Look, choose_window, colours
from seg3dcam.review.report import Report, notebook_view, packing, save_report
from seg3dcam.review.report.display_order import plan_order
from seg3dcam.scan import Scan, load_scan
from seg3dcam.targets import ClassLogit

CT = Look(window="soft tissue")


@pytest.fixture
def phantom() -> Explanation:
    return make_phantom(layers=("model.1", "encoder.4"))


def read(path: Path, explanation: Explanation) -> Reader:
    return Reader(path, explanation.affine, explanation.scan.shape)


def saved(folder: Path, *explanations: Explanation, look: Look = CT, **settings) -> Reader:
    path = save_report(folder / "case.html", explanations, look, **settings)
    return read(path, explanations[0])


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(40, 12, shape)).float()


def plain(scan: torch.Tensor, cam: torch.Tensor, **others) -> Explanation:
    mask = torch.zeros((1, *scan.shape), dtype=torch.bool)
    mask[0, : scan.shape[0] // 2] = True
    given = {
        "scan": Scan(scan[None], np.diag([1.0, 1.0, 2.0, 1.0]), "scan"),
        "maps": {"conv": cam},
        "status": {"conv": "ok"},
        "prediction": mask,
        "class_names": ["lesion"],
        "target": "log-odds",
        "method": "hires_cam",
        "class_index": 0,
        "score": 1.0,
        "native_spacing": {"conv": (4.0, 4.0, 4.0)},
        "label": "lesion",
    }
    return Explanation(**{**given, **others})


# ---------------------------------------------------------------- where things are


@pytest.mark.few(2)
@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLA", "PIR", "ARI"])
def test_scan_maps_and_masks_lie_where_they_were(tmp_path, codes):
    explanation = make_phantom(codes, layers=("model.1", "encoder.4"))
    page = saved(tmp_path, explanation)
    scan = explanation.scan.data[0].numpy()

    values = np.array(page.meta["scan"]["values"])
    found = page.scan()
    step = np.interp(scan, (values[1:] + values[:-1]) / 2, np.diff(values))
    assert (np.abs(found - scan) <= step / 2 + 1e-3).all()
    wanted = marker_mm(explanation.affine, explanation.scan.shape)
    marker = np.maximum(found - 100, 0)
    assert offset_mm(marker, explanation.affine, wanted) < min(explanation.scan.spacing) / 2

    item = page.meta["items"][0]
    for number, layer in enumerate(explanation.shown_layers):
        volume = explanation.volume(layer).numpy()
        assert np.abs(page.volume(0, number) - volume).max() < 0.02
    assert (page.mask(item["prediction"]) == explanation.mask.numpy()).all()
    assert (page.mask(item["truth"]) == explanation.truth.numpy()).all()

    spacing = page.meta["scan"]["spacing"]
    affine = np.array(page.meta["scan"]["affine"])
    assert np.allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing)
    assert (np.diag(affine)[:3] * [-1, -1, 1] > 0).all()  # x to the left, y back, z up
    assert item["layers"][0]["peaks"][0]["mm"] == pytest.approx(
        (affine @ [*item["layers"][0]["peaks"][0]["at"], 1])[:3], abs=0.01
    )
    letters = page.meta["scan"]["letters"]
    assert letters == {
        "axial": ["R", "L", "A", "P"],
        "coronal": ["R", "L", "S", "I"],
        "sagittal": ["A", "P", "S", "I"],
    }


def test_profiles_are_the_volumes_own_sums(tmp_path, phantom):
    page = saved(tmp_path, phantom)
    volume, mask = phantom.volume().double().numpy(), phantom.mask.numpy()
    profile = page.meta["items"][0]["layers"][0]["profile"]
    counts = page.meta["masks"][page.meta["items"][0]["prediction"]]["profile"]
    axes = "LPS"  # the phantom's own axes are the page's x, y and z
    for axis in range(len(axes)):
        others = tuple({0, 1, 2} - {axis})
        assert profile[axis]["max"] == pytest.approx(volume.max(others), rel=1e-3, abs=1e-6)
        assert profile[axis]["sum"] == pytest.approx(volume.sum(others), rel=1e-3, abs=1e-3)
        assert counts[axis]["voxels"] == mask.sum(others).tolist()


@pytest.mark.parametrize("codes", ["LPS", "PIR"])
def test_a_signed_page_holds_both_signs_where_they_are(tmp_path, codes):
    explanation = make_signed_phantom(codes, layers=("model.1", "encoder.4"))
    # A second layer that speaks against the first one: their sum is not that of each sign alone.
    other = explanation.maps["model.1"].roll(3, 0) * -0.4
    explanation = replace(explanation, maps=explanation.maps | {"encoder.4": other})
    page = saved(tmp_path, explanation, look=replace(CT, colormap="", signed=True))
    for number, layer in enumerate(explanation.shown_layers):
        volume = explanation.volume(layer, scale="signed").numpy()
        assert volume.min() < -0.4
        assert volume.max() > 0.4
        assert np.abs(page.volume(0, number) - volume).max() < 0.03
    against = np.maximum(-page.volume(0, 1), 0)
    middle = offset_mm(against, explanation.affine, against_mm(explanation))
    assert middle < min(explanation.scan.spacing) / 2

    layer = page.meta["items"][0]["layers"][1]
    first, second = layer["peaks"][:2]
    assert (first["value"], second["value"]) == (-1, pytest.approx(0.5, abs=0.02))
    assert np.linalg.norm(np.array(first["mm"]) - against_mm(explanation)) < 3
    look = page.meta["look"]
    assert (look["signed"], look["ends"]) == (True, [-1, 1])
    assert look["colours"] == colours("blue_orange").tolist()


def test_a_map_that_is_all_against_is_on_the_signed_page_alone(tmp_path):
    explanation = make_phantom_against()
    page = saved(tmp_path, explanation, look=replace(CT, colormap="", signed=True))
    volume = explanation.volume(scale="signed").numpy()
    assert (volume.min(), volume.max()) == (-1, 0)
    assert np.abs(page.volume(0, 0) - volume).max() < 0.03
    (layer,) = page.meta["items"][0]["layers"]
    assert layer["notice"] == ""
    assert layer["found"]["evidence_against"] == 1
    assert layer["found"]["warnings"][0].startswith("all evidence speaks against the target: ")
    assert layer["peaks"][0]["value"] == -1
    (layer,) = saved(tmp_path, explanation).meta["items"][0]["layers"]
    assert layer["maps"] == []
    words = "no CAM: all evidence speaks against the target; the signed view shows it"
    assert layer["notice"] == layer["found"]["warnings"][0] == words


def test_profiles_of_a_signed_page(tmp_path):
    explanation = make_signed_phantom()
    page = saved(tmp_path, explanation, look=Look(signed=True))
    volume = explanation.volume(scale="signed").double().numpy()
    for axis, profile in enumerate(page.meta["items"][0]["layers"][0]["profile"]):
        others = tuple({0, 1, 2} - {axis})
        assert profile["max"] == pytest.approx(volume.max(others), rel=1e-3, abs=1e-6)
        assert profile["min"] == pytest.approx(volume.min(others), rel=1e-3, abs=1e-6)
        assert profile["sum"] == pytest.approx(np.abs(volume).sum(others), rel=1e-3, abs=1e-3)


def test_a_signed_map_on_a_layers_own_grid_loses_nothing(tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 2, stride=2), torch.nn.Upsample(scale_factor=2, mode="trilinear")
    )
    torch.manual_seed(1)
    torch.nn.init.normal_(network[0].weight)
    model = SegModel(network, ("a", "b", "c", "d"))
    scan = load_scan(noise((24, 28, 20)) - 40, affine=np.diag([1.0, 1.0, 2.0, 1.0]))
    explanation = explain(scan, model, ClassLogit(1, "volume"), layers="0")
    page = saved(tmp_path, explanation, look=Look(signed=True))
    volume = explanation.volume(scale="signed").numpy()
    assert volume.min() < -0.5 or volume.max() < 1
    (packed,) = page.meta["maps"]
    assert np.prod(packed["shape"]) < volume.size / 4
    assert np.abs(page.volume(0, 0) - volume).max() < 0.01


def test_what_is_mostly_against_the_target_is_a_notice(tmp_path):
    page = saved(tmp_path, make_signed_phantom(height=0.1))
    layer = page.meta["items"][0]["layers"][0]
    assert "mostly evidence against the target" in layer["found"]["warnings"][0]
    assert layer["peaks"][0]["value"] == 1  # the usual page shows what speaks for it alone
    assert page.meta["look"]["signed"] is False


def test_a_real_layer_is_stored_on_its_own_grid_and_nothing_is_lost(tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 6, 2, stride=2),  # nodes between voxels: at 0.5, 2.5, ..
        torch.nn.ReLU(),
        torch.nn.Conv3d(6, 6, 2, stride=2),  # at 1.5, 5.5, ..
        torch.nn.ReLU(),
        torch.nn.Upsample(scale_factor=4, mode="trilinear"),
        torch.nn.Conv3d(6, 2, 1),
    )
    affine = np.diag([-1.0, 1.0, -2.0, 1.0])
    scan = load_scan(np.random.default_rng(3).normal(size=(32, 40, 24)), affine=affine)
    found = explain(scan, SegModel(network), 1, layers=["0", "2"], method="grad_cam")
    page = saved(tmp_path, found, look=Look())
    for number, layer in enumerate(found.shown_layers):
        gap = np.abs(page.volume(0, number) - found.volume(layer).float().numpy())
        assert gap.max() < 0.012, layer
    sizes = [one["shape"] for one in page.meta["maps"]]
    assert all(np.prod(size) < np.prod(scan.shape) / 6 for size in sizes), sizes


def test_stated_error_of_a_map_is_its_error(tmp_path):
    """A map of single voxels is too much for a small file: blocks are averaged, and it says so."""
    scan = noise((48, 40, 32))
    cam = torch.rand((48, 40, 32), generator=torch.Generator().manual_seed(1)) ** 8
    explanation = plain(scan, cam, native_spacing={"conv": (1.0, 1.0, 2.0)})
    generous = saved(tmp_path, explanation)
    assert np.abs(generous.volume(0, 0) - explanation.volume().numpy()).max() < 0.003
    small = saved(tmp_path, explanation, limit_mb=0.2)
    error = np.abs(small.volume(0, 0) - explanation.volume().numpy()).max()
    stated = small.meta["maps"][0]["error"]
    assert 0.1 < stated <= error < 1.5 * stated
    lost = small.volume(0, 0).sum() / explanation.volume().sum() - 1
    assert abs(lost) < 0.05  # means, not samples


def test_blocks_are_centred_where_their_voxels_are(tmp_path):
    ramp = torch.arange(48.0)[:, None, None].expand(48, 40, 16) / 47
    cam = ramp + 0.2 * torch.rand(ramp.shape)
    explanation = plain(noise(cam.shape), cam, native_spacing={"conv": (1.0, 1.0, 2.0)})
    page = saved(tmp_path, explanation, limit_mb=0.1)
    assert page.meta["maps"][0]["step"][0] > 1
    drawn = page.volume(0, 0).mean((1, 2))[4:-4]
    wanted = explanation.volume().numpy().mean((1, 2))[4:-4]
    assert abs((drawn - wanted).mean()) < 0.1 / 47  # a tenth of a voxel along the ramp


# ---------------------------------------------------------------- sizes


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("limit", "words"), [(9, "every grey code"), (0.6, "WebP"), (0.15, "shrunk")]
)
def test_file_stays_below_its_limit_and_says_how(tmp_path, limit, words):
    scan = noise((160, 160, 40))
    scan[:80] -= 100
    explanation = plain(scan, torch.ones_like(scan).cumsum(0))
    page = saved(tmp_path, explanation, limit_mb=limit, look=Look(window=(400, 40)))
    assert len(page.text.encode()) <= limit * 1e6
    assert words in page.meta["scan"]["stored"]["text"]
    found = page.scan()
    error = np.abs(found - scan.numpy())[8:72].mean(), np.abs(found - scan.numpy())[88:].mean()
    assert max(error) < 14, error
    # The step between the halves is where it was: no shift by half a voxel.
    profile = found.mean((1, 2))
    edge = np.interp(-10, profile, np.arange(160))
    assert abs(edge - 79.5) < 0.2


def test_file_above_its_limit_is_written_with_a_warning(tmp_path, phantom):
    with pytest.warns(Seg3dcamWarning, match=r"has 0\.\d MB, more than 0\.02.*raise limit_mb"):
        path = save_report(tmp_path / "case.html", phantom, CT, limit_mb=0.02)
    assert read(path, phantom).scan().max() > 100


def test_most_codes_lie_in_the_window_and_other_windows_can_be_chosen():
    scan = np.linspace(-1024, 3071, 4096, dtype=np.float32).reshape(16, 16, 16)
    order = plan_order(scan.shape, np.eye(4))
    greys = packing.grey_codes(scan, order, choose_window(scan, "soft tissue"), True)
    inside = (greys.values >= -160) & (greys.values <= 240)
    assert inside.sum() > 150
    assert np.diff(greys.values[inside]).max() < 3
    lung = (greys.values > -1350) & (greys.values < 150)
    assert np.diff(greys.values[lung]).max() < 40
    assert greys.values[[0, -1]].tolist() == [-1024, 3071]
    back = greys.values[greys.codes]
    steps = np.diff(greys.values)
    assert np.abs(back - order.arrange(scan)).max() <= steps.max() / 2 + 0.1


# ---------------------------------------------------------------- odd input


def test_constant_scan(tmp_path):
    scan = torch.full((12, 10, 8), 7.0)
    page = saved(tmp_path, plain(scan, noise(scan.shape)), look=Look())
    assert np.abs(page.scan() - 7).max() < 0.01
    window = page.meta["scan"]["window"]
    assert window["low"] < 7 < window["high"]


@pytest.mark.parametrize("shape", [(20, 16, 2), (20, 16, 1), (1, 5, 3)])
def test_few_slices(tmp_path, shape):
    explanation = plain(noise(shape), noise(shape, 1), native_spacing={"conv": (1.0, 1.0, 2.0)})
    page = saved(tmp_path, explanation)
    assert page.meta["scan"]["shape"] == list(shape)
    assert np.abs(page.volume(0, 0) - explanation.volume().numpy()).max() < 0.01


@pytest.mark.parametrize("status", ["zero", "nonfinite", "degenerate"])
def test_a_map_that_is_not_usable_is_said_in_words_and_not_drawn(tmp_path, phantom, status):
    explanation = silent(phantom, status)
    page = saved(tmp_path, explanation)
    for layer in page.meta["items"][0]["layers"]:
        assert layer["maps"] == []
        assert layer["peaks"] == []
        assert layer["profile"] is None
        assert layer["notice"] == explanation.notice() != ""
        assert layer["notice"] in layer["found"]["warnings"]
    assert page.bytes["maps"] == []


def test_one_silent_layer_of_two_leaves_the_other(tmp_path, phantom):
    maps = {**phantom.maps, "model.1": torch.zeros_like(phantom.maps["model.1"])}
    status = {"model.1": "zero", "encoder.4": "ok"}
    explanation = replace(phantom, maps=maps, status=status)
    page = saved(tmp_path, explanation)
    assert np.abs(page.volume(0, 0) - explanation.volume().numpy()).max() < 0.02
    assert page.meta["items"][0]["layers"][1]["maps"] == []
    assert len(page.bytes["maps"]) == 1


def test_no_class_no_truth_and_an_empty_prediction(tmp_path, phantom):
    own = replace(phantom, class_index=None, truth=None, target="a target of mine", label="mine")
    item = saved(tmp_path, own).meta["items"][0]
    assert (item["prediction"], item["truth"], item["class"]) == (None, None, "a target of mine")
    empty = replace(phantom, prediction=torch.zeros_like(phantom.prediction))
    page = saved(tmp_path, empty)
    assert not page.mask(page.meta["items"][0]["prediction"]).any()
    assert (
        "the predicted region is empty" in page.meta["items"][0]["layers"][0]["found"]["warnings"]
    )


def test_several_classes_and_methods_share_masks_and_keep_their_maps(tmp_path, phantom):
    other = replace(phantom, method="grad_cam", maps={k: m**2 for k, m in phantom.maps.items()})
    third = replace(make_phantom(classes=("background", "../x")), truth=None)
    page = saved(tmp_path, phantom, other, third)
    items = page.meta["items"]
    assert [(i["label"], i["method"]) for i in items] == [
        ("lesion", "hires_cam"),
        ("lesion", "grad_cam"),
        ("../x", "hires_cam"),
    ]
    assert [i["prediction"] for i in items] == [0, 0, 0]
    assert [i["truth"] for i in items] == [1, 1, None]
    assert len(page.bytes["masks"]) == 2
    for number, explanation in enumerate((phantom, other, third)):
        gap = np.abs(page.volume(number, 0) - explanation.volume().numpy())
        assert gap.max() < 0.03, number


def test_scans_on_different_grids_are_refused(tmp_path, phantom):
    report = Report(tmp_path / "case.html", CT)
    report.add(phantom, "one")
    with pytest.raises(InputError, match=r"lies on another grid.*one for each"):
        report.add(make_phantom("RAS"), "two")


def test_settings_that_cannot_be_used_are_refused(tmp_path, phantom):
    with pytest.raises(ConfigError, match=r"must end in \.html, not 'case\.pdf'"):
        Report(tmp_path / "case.pdf", CT)
    with pytest.raises(ConfigError, match="limit_mb must be above 0"):
        save_report(tmp_path / "case.html", phantom, limit_mb=float("nan"))
    with pytest.raises(InputError, match="at least one explanation"):
        save_report(tmp_path / "case.html", [])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        save_report(tmp_path / "file" / "case.html", phantom)


def test_volumes_are_not_kept(tmp_path, phantom):
    report = Report(tmp_path / "case.html", CT)
    report.add(phantom, "one")
    kept, seen = [report], set()
    while kept:
        value = kept.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        assert not isinstance(value, torch.Tensor | Explanation | Scan)
        if isinstance(value, np.ndarray):
            assert value.dtype == np.uint8 or value.size < 1000
        kept += value.values() if isinstance(value, dict) else []
        kept += value if isinstance(value, list | tuple) else []
        kept += vars(value).values() if hasattr(value, "__dict__") else []


# ---------------------------------------------------------------- text


NASTY = "</script><script>alert(1)</script><!-- &amp; \u2028 Läsion 肺 {{script}} \"'"


def test_no_text_breaks_out_of_the_page(tmp_path, phantom):
    explanation = replace(
        phantom, class_names=["background", NASTY], label=NASTY, target=NASTY, method=NASTY
    )
    page = saved(tmp_path, explanation, case=NASTY)
    item = page.meta["items"][0]
    assert (item["label"], item["class"], page.meta["case"]) == (NASTY, NASTY, NASTY)
    assert page.text.count("<script") == page.text.count("</script>") == 5
    assert "alert(1)</" not in page.text
    assert page.text.count('"use strict"') == 1


def test_nothing_of_names_and_paths_gets_into_the_page(tmp_path, phantom):
    secret = "DOE_JANE_1970"
    folder = tmp_path / secret
    explanation = replace(
        phantom,
        scan=replace(phantom.scan, name=secret),
        provenance={
            "scan": {"name": secret},
            "model": {"name": "UNet", "spec": {"weights": f"/home/{secret}/model.pt"}},
        },
    )
    page = saved(folder, explanation, case="case 7")
    assert secret not in page.text
    assert str(tmp_path) not in page.text
    assert page.meta["items"][0]["model"] == "UNet"
    assert page.meta["case"] == "case 7"


def test_page_asks_nothing_of_any_server(tmp_path, phantom):
    text = saved(tmp_path, phantom).text
    assert re.findall(r"https?://|@import|url\(|<link|<img|\bfetch\(|XMLHttp|innerHTML", text) == []
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_look_is_carried_into_the_page(tmp_path, phantom):
    look = Look(window=(300, 50), threshold=0.35, opacity=0.4, colormap="viridis")
    meta = saved(tmp_path, phantom, look=look).meta
    assert meta["scan"]["window"] == {"low": -100, "high": 200, "text": "W 300 L 50"}
    assert meta["look"]["threshold"] == 0.35
    assert meta["look"]["opacity"] == 0.4
    assert meta["look"]["colours"] == colours("viridis").tolist()
    assert set(meta["scan"]["presets"]) == {"brain", "lung", "soft tissue", "abdomen", "bone"}


def test_windows_in_hounsfield_units_only_for_a_ct(tmp_path):
    cam = noise((12, 10, 8), 1)
    mr = saved(tmp_path, plain(noise(cam.shape) + 100, cam), look=Look())
    assert mr.meta["scan"]["presets"] == {}
    assert packing.is_ct(-1000.0)
    assert not packing.is_ct(-4.0)


def test_notebook_view_is_the_page_in_a_closed_frame(phantom):
    fragment = notebook_view(phantom)
    assert phantom._repr_html_() == fragment
    assert fragment.startswith('<iframe srcdoc="')
    assert 'sandbox="allow-scripts allow-downloads"' in fragment
    inner = re.search(r'srcdoc="([^"]*)"', fragment)[1]
    assert inner.count("&lt;script") == 5
    assert "<" not in inner
    assert len(fragment) < 6e6


def test_window_is_part_of_the_curve_even_when_outside_of_the_scan():
    scan = np.zeros((4, 4, 4), np.float32)
    order = plan_order(scan.shape, np.eye(4))
    greys = packing.grey_codes(scan, order, GreyWindow(100, 300, ""), False)
    assert greys.values[[0, -1]].tolist() == [0, 300]
    assert (greys.codes == 0).all()
