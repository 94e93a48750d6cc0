"""The report in a real browser: what its canvases show, and what its controls do."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers_browser import Page, serve
from helpers_crossed import crossed
from helpers_phantom import (
    against_mm,
    make_phantom,
    make_signed_phantom,
    marker_mm,
    silent,
)
from numpy.typing import NDArray

from seg3dcam.explaining.explanation import Explanation
from seg3dcam.geometry import to_world
from seg3dcam.review.look import Look
from seg3dcam.review.report import notebook_view, packing, save_report

PADDING = 20
#: Plane -> axes of the page's volumes for columns, rows and slices, and whether rows go down.
PLANES = {"axial": (0, 1, 2, True), "coronal": (0, 2, 1, False), "sagittal": (1, 2, 0, False)}


@pytest.fixture(scope="module")
def phantom() -> Explanation:
    """Axes to the left, back and up: those of the page."""
    explanation = make_phantom("LPS", layers=("model.1", "encoder.4"))
    # A layer between the scan's voxels: the page stores its map on another grid than the scan.
    grid = {"shape": (24, 21, 14), "stride": (4.0, 4.0, 2.0), "offset": (1.5, 1.5, 0.5)}
    provenance = {
        "model": {"name": "UNet"},
        "prepared": {"affine": explanation.affine},
        "layers": dict.fromkeys(explanation.maps, grid),
    }
    return replace(explanation, provenance=provenance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, phantom: Explanation) -> Path:
    folder = tmp_path_factory.mktemp("report")
    others = [
        replace(phantom, method="grad_cam", truth=None),
        replace(make_phantom("LPS", classes=("background", "Läsion </script>"))),
        silent(make_phantom("LPS", classes=("background", "../x")), "zero"),
    ]
    save_report(folder / "case.html", [phantom, *others], Look(window="soft tissue"), case="case 7")
    (folder / "notebook.html").write_text(notebook_view(phantom), encoding="utf-8")
    return folder


@pytest.fixture
def page(browser: Page, folder: Path) -> Iterator[Page]:
    browser.open((folder / "case.html").as_uri())
    yield browser
    assert browser.console() == []


def bare(page: Page) -> None:
    """Leave nothing on the pictures but grey values."""
    for box in ("#heat", "#prediction", "#truth", "#cross"):
        if page.find(box).is_selected():
            page.click(box)


def box_of(page: Page, plane: str, explanation: Explanation) -> tuple[float, float, float, float]:
    """Left, top, width and height of a slice on its canvas: fitted in, with square pixels."""
    columns, rows, _, _ = PLANES[plane]
    shape, spacing = explanation.scan.shape, explanation.scan.spacing
    high, wide = page.pixels(f"{plane}-scan").shape[:2]
    size = shape[columns] * spacing[columns], shape[rows] * spacing[rows]
    zoom = min((wide - 2 * PADDING) / size[0], (high - 2 * PADDING) / size[1])
    width, height = size[0] * zoom, size[1] * zoom
    return (wide - width) / 2, (high - height) / 2, width, height


def centre(weights: NDArray[np.float64]) -> tuple[float, float]:
    y, x = np.indices(weights.shape) + 0.5
    return float((x * weights).sum() / weights.sum()), float((y * weights).sum() / weights.sum())


def heat_on(page: Page, plane: str = "axial") -> NDArray[np.float64]:
    """How much colour there is at every pixel."""
    overlay = page.pixels(f"{plane}-overlay")
    return overlay.max(2) - overlay.min(2)


# ---------------------------------------------------------------- what is shown


@pytest.mark.parametrize("plane", crossed(PLANES, rows=1))
def test_marker_and_heat_are_where_they_are_in_the_patient(page, phantom, plane):
    bare(page)
    columns, rows, _, down = PLANES[plane]
    left, top, width, height = box_of(page, plane, phantom)
    shape = phantom.scan.shape
    voxel = np.linalg.inv(phantom.affine) @ [*marker_mm(phantom.affine, shape), 1]
    row = voxel[rows] if down else shape[rows] - 1 - voxel[rows]
    wanted = (
        left + (voxel[columns] + 0.5) / shape[columns] * width,
        top + (row + 0.5) / shape[rows] * height,
    )
    # Known by eye as well: the marker is right, in front, above.
    assert wanted[1] < top + height / 2
    assert wanted[0] < left + width / 2

    marker = np.maximum(page.pixels(f"{plane}-scan")[..., 0] - 135, 0)
    assert any(page.run("return meta.maps[0].start"))
    page.click("#heat")
    page.slide("#threshold", 0.5)
    for weights in (marker, heat_on(page, plane)):
        found = centre(weights)
        off = np.subtract(found, wanted) / [width / shape[columns], height / shape[rows]]
        assert np.abs(off).max() < 0.2  # voxels


def test_canvas_shows_the_very_slice(page, phantom):
    bare(page)
    page.press(*["\ue015"] * 3)  # down
    page.press("\ue013")  # up
    index = phantom.peak()[0][2] - 2
    assert f"slice {index + 1}/" in page.text("#axial .place")
    left, top, width, height = (round(side) for side in box_of(page, "axial", phantom))
    shown = page.pixels("axial-scan")[top : top + height, left : left + width, 0]
    scan = phantom.scan.data[0].numpy()

    def drawn(number: int) -> NDArray[np.float64]:
        grey = ((scan[:, :, number].T + 160) / 400).clip(0, 1) * 255
        return cv2.resize(grey, shown.shape[::-1], interpolation=cv2.INTER_LINEAR)

    gaps = {number: np.abs(shown - drawn(number)).mean() for number in range(scan.shape[2])}
    assert min(gaps, key=gaps.get) == index
    assert gaps[index] < 1.5
    assert np.corrcoef(shown.ravel(), drawn(index).ravel())[0, 1] > 0.995


@pytest.mark.slow
def test_letters_are_on_the_patients_sides(page):
    sides = {
        plane: [
            page.text(f"#{plane} figure .{side}") for side in ("left", "right", "top", "bottom")
        ]
        for plane in PLANES
    }
    assert sides == {
        "axial": ["R", "L", "A", "P"],
        "coronal": ["R", "L", "S", "I"],
        "sagittal": ["A", "P", "S", "I"],
    }


def test_page_opens_at_the_peak_and_says_where_that_is(page, phantom):
    voxel, mm = phantom.peak()
    words = page.text("#readout")
    side = [f"{'LPI'[n] if x < 0 else 'RAS'[n]} {abs(x):.1f}" for n, x in enumerate(mm)]
    assert words.startswith(", ".join(side) + " mm")
    assert f"voxel {voxel[0]}, {voxel[1]}, {voxel[2]}" in words
    assert "CAM 1.00" in words
    assert "in the prediction" in words
    page.wait(
        lambda: "axial slice" in page.run("return document.querySelector('#live').textContent")
    )
    banner = page.text("header")
    for part in ("case 7", "UNet", "lesion", "mean of 2 layers", "hires_cam", "not known", "0.1"):
        assert part in banner
    assert "Research use, not for diagnosis" in banner


@pytest.mark.slow
def test_readout_follows_a_click(page, phantom):
    left, top, width, height = box_of(page, "axial", phantom)
    shape = phantom.scan.shape
    wanted = (20, 50, phantom.peak()[0][2])
    x, y = (
        start + (index + 0.5) / size * length
        for start, length, index, size in zip(
            (left, top), (width, height), wanted, shape, strict=False
        )
    )
    page.click_at("#axial-overlay", x, y)
    value = float(phantom.scan.data[0][wanted])
    cam = float(phantom.volume()[wanted])
    words = page.text("#readout")
    assert "voxel {}, {}, {}".format(*wanted) in words
    mm = to_world(phantom.affine, wanted)
    assert f"{abs(mm[0]):.1f}" in words
    assert abs(float(words.split("scan ")[1].split()[0]) - value) <= 2
    assert abs(float(words.split("CAM ")[1].split()[0]) - cam) < 0.02
    assert f"slice {wanted[0] + 1}/{shape[0]}" in page.text("#sagittal .place")
    assert f"slice {wanted[1] + 1}/{shape[1]}" in page.text("#coronal .place")
    values = page.run(
        "const {at} = layer().peaks[0];"
        "return [...Array(full.shape[0]).keys()].map(n => sumAt(heatNow(), at.with(0, n)))"
    )
    assert min(values) == 0  # evidence against the target is no heat


@pytest.mark.slow
def test_a_turned_scan_is_counted_in_its_own_voxels(browser, tmp_path):
    turned = make_phantom("PIR")
    browser.open(save_report(tmp_path / "case.html", turned, Look()).as_uri())
    voxel, shape = turned.peak()[0], turned.scan.shape
    assert "voxel {}, {}, {} ·".format(*voxel) in browser.text("#readout")
    for axis, plane in enumerate(("coronal", "axial", "sagittal")):
        assert f"slice {voxel[axis] + 1}/{shape[axis]}" in browser.text(f"#{plane} .place")


@pytest.mark.slow
@pytest.mark.parametrize("plane", crossed(PLANES, rows=1))
def test_crosshair_and_scale_bar(page, phantom, plane):
    bare(page)
    without = page.pixels(f"{plane}-scan")
    page.press("x")
    changed = np.abs(page.pixels(f"{plane}-scan") - without).max(2) > 20
    columns, rows, _, down = PLANES[plane]
    left, top, width, height = box_of(page, plane, phantom)
    shape, voxel = phantom.scan.shape, phantom.peak()[0]
    row = voxel[rows] if down else shape[rows] - 1 - voxel[rows]
    wanted = (
        left + (voxel[columns] + 0.5) / shape[columns] * width,
        top + (row + 0.5) / shape[rows] * height,
    )
    found = changed.sum(0).argmax() + 0.5, changed.sum(1).argmax() + 0.5
    assert np.abs(np.subtract(found, wanted)).max() <= 1

    length, unit = page.text(f"#{plane} .scale").split()
    mm = float(length) * {"mm": 1, "cm": 10}[unit]
    drawn = page.find(f"#{plane} .scale").rect["width"]
    pixels_per_mm = width / (shape[columns] * phantom.scan.spacing[columns])
    assert drawn == pytest.approx(mm * pixels_per_mm, rel=0.02)


# ---------------------------------------------------------------- both signs


@pytest.fixture(scope="module")
def signed() -> Explanation:
    """At the marker 0.5, at another place -1."""
    return make_signed_phantom("LPS")


@pytest.fixture
def signed_page(browser: Page, signed: Explanation, tmp_path: Path) -> Iterator[Page]:
    look = Look(window="soft tissue", signed=True)
    browser.open(save_report(tmp_path / "case.html", signed, look).as_uri())
    yield browser
    assert browser.console() == []


def pixel_on(page: Page, plane: str, explanation: Explanation, mm: NDArray[np.float64]):
    """Row and column on a plane's canvases of a place in the patient, and its voxel."""
    columns, rows, _, down = PLANES[plane]
    left, top, width, height = box_of(page, plane, explanation)
    shape = explanation.scan.shape
    voxel = (np.linalg.inv(explanation.affine) @ [*mm, 1])[:3]
    row = voxel[rows] if down else shape[rows] - 1 - voxel[rows]
    y, x = (row + 0.5) / shape[rows] * height, (voxel[columns] + 0.5) / shape[columns] * width
    return (int(top + y), int(left + x)), voxel


@pytest.mark.slow
@pytest.mark.parametrize("plane", crossed(PLANES, rows=1))
def test_each_sign_has_its_colour_at_its_place(signed_page, signed, plane):
    bare(signed_page)
    grey = signed_page.pixels(f"{plane}-overlay")
    signed_page.click("#heat")
    table = np.array(signed_page.run("return meta.look.colours"))
    places = ((against_mm(signed), -1.0), (marker_mm(signed.affine, signed.scan.shape), 0.5))
    for (mm, value), presses in zip(places, (0, 1), strict=True):
        signed_page.press(*["p"] * presses)  # the page opens at the strongest place
        at, _ = pixel_on(signed_page, plane, signed, mm)
        overlay = signed_page.pixels(f"{plane}-overlay")
        scan = signed_page.pixels(f"{plane}-scan")
        wanted = scan[at] * 0.5 + table[round((value + 1) / 2 * 255)] * 0.5
        assert np.abs(overlay[at] - wanted).max() < 14
        sign = np.sign(overlay[..., 0] - overlay[..., 2]) * (heat_on(signed_page, plane) > 12)
        assert set(np.unique(sign)) == {0, np.sign(value)}
        weights = (sign != 0) * 1.0
        assert np.abs(np.subtract(centre(weights), at[::-1])).max() < 8
    assert grey.shape == overlay.shape


@pytest.mark.slow
def test_threshold_of_a_signed_page_goes_by_the_size(signed_page):
    bare(signed_page)
    grey = signed_page.pixels("axial-overlay")
    signed_page.click("#heat")
    areas = []
    for threshold in (0, 0.2, 0.6):
        signed_page.slide("#threshold", threshold)
        areas.append((heat_on(signed_page) > 8).mean())
        assert signed_page.text("#o-threshold") == f"±{threshold:.2f}"
    assert areas[0] > areas[1] > areas[2] > 0
    signed_page.slide("#threshold", 0)  # where there is nothing, nothing is drawn
    corner = np.s_[30:60, 30:60]
    assert (signed_page.pixels("axial-overlay")[corner] == grey[corner]).all()


@pytest.mark.slow
def test_words_of_a_signed_page(signed_page, signed):
    assert "CAM -0.9" in signed_page.text("#readout") or "CAM -1.00" in signed_page.text("#readout")
    assert signed_page.text("#readout").split(" · ")[3].endswith(" against")
    signed_page.press("p")
    assert signed_page.text("#readout").split(" · ")[3] in ("CAM 0.50 for", "CAM 0.49 for")
    signed_page.press("\ue011")  # home: a slice where the map is zero
    assert signed_page.text("#readout").split(" · ")[3] == "CAM 0.00"
    assert signed_page.text("#peaks").split("\n")[1] == "-1.00 against"
    assert signed_page.text("#bar-low") == "-1 against"
    assert signed_page.text("#bar-high") == "for 1"
    assert "against the target" in signed_page.find("#bar").get_attribute("aria-label")
    assert signed_page.is_shown("#profile-min")
    assert "Evidence against" in signed_page.text("#numbers")
    bar = signed_page.pixels("bar")
    assert bar[0, 20, 2] > bar[0, 20, 0] + 60  # blue at the left
    assert bar[0, 235, 0] > bar[0, 235, 2] + 60
    label = signed_page.find("#axial-overlay").get_attribute("aria-label")
    assert label.endswith("scan with CAM from ±0.20")


def test_the_usual_page_says_nothing_of_signs(page):
    assert page.text("#bar-low") == "0"
    assert not page.is_shown("#profile-min")
    assert "±" not in page.text("#o-threshold")
    assert "against" not in page.text("#readout")


# ---------------------------------------------------------------- sliders


@pytest.mark.slow
def test_heat_follows_threshold_and_opacity_and_the_formula(page, phantom):
    bare(page)
    grey = page.pixels("axial-overlay")
    assert (grey == page.pixels("axial-scan")).all()
    page.click("#heat")
    shares = []
    for threshold in (0, 0.2, 0.6, 1):
        page.slide("#threshold", threshold)
        shares.append((heat_on(page) > 8).mean())
        assert page.text("#o-threshold") == f"{threshold:.2f}"
    assert shares[0] > shares[1] > shares[2] > 50 * max(shares[3], 1e-6)
    page.slide("#threshold", 0.2)
    page.slide("#opacity", 0)
    assert np.abs(page.pixels("axial-overlay") - grey).max() <= 1

    page.slide("#opacity", 0.4)
    look = Look(window="soft tissue", threshold=0.2, opacity=0.4)
    left, top, width, height = box_of(page, "axial", phantom)
    volume, peak = phantom.volume().numpy(), phantom.peak()[0]
    table = np.array(page.run("return meta.look.colours"))
    overlay, checked = page.pixels("axial-overlay"), 0
    for x in range(peak[0] - 12, peak[0] + 13, 2):
        value = volume[x, peak[1], peak[2]]
        if abs(value - 0.2) < 0.05:  # at the edge a hair decides
            continue
        at = (
            int(top + (peak[1] + 0.5) / volume.shape[1] * height),
            int(left + (x + 0.5) / volume.shape[0] * width),
        )
        alpha = float(look.alpha(np.array(value)))
        wanted = grey[at] * (1 - alpha) + table[round(value * 255)] * alpha
        assert np.abs(overlay[at] - wanted).max() < 14, (x, value)
        checked += 1
    assert checked >= 10


@pytest.mark.slow
def test_window_changes_both_pictures_alike(page):
    bare(page)
    before = page.pixels("coronal-scan")
    page.run(
        "[...document.querySelectorAll('#presets button')].find(b => b.innerText == 'bone').click()"
    )
    page.settle()
    assert (page.text("#o-width"), page.text("#o-level")) == ("2000", "500")
    after = page.pixels("coronal-scan")
    assert np.abs(before - after).max() > 50
    assert (after == page.pixels("coronal-overlay")).all()
    middle = after[after.shape[0] // 2, after.shape[1] // 2, 0]
    assert abs(middle - (40 + 500) / 2000 * 255) < 4
    page.slide("#level", 40)
    page.slide("#width", 80)
    middle = page.pixels("coronal-scan")[after.shape[0] // 2, after.shape[1] // 2, 0]
    assert abs(middle - 127.5) < 8


# ---------------------------------------------------------------- keys


@pytest.mark.slow
def test_keys(page, phantom):
    size = phantom.scan.shape
    start = phantom.peak()[0]
    place = "#axial .place"
    assert f"slice {start[2] + 1}/{size[2]}" in page.text(place)
    page.press("\ue013", "\ue014")  # up, right
    assert f"slice {start[2] + 3}/{size[2]}" in page.text(place)
    page.press("\ue00f")  # page down
    assert f"slice {start[2] - 7}/{size[2]}" in page.text(place)
    page.press("\ue011")  # home
    assert f"slice 1/{size[2]}" in page.text(place)
    page.press("\ue010")  # end
    assert f"slice {size[2]}/{size[2]}" in page.text(place)
    page.press("p")
    assert f"slice {start[2] + 1}/{size[2]}" in page.text(place)

    page.press("2")
    assert "large" in page.find("#coronal").get_attribute("class")
    page.press("\ue013")
    assert f"slice {start[1] + 2}/{size[1]}" in page.text("#coronal .place")
    for plane, key in (("sagittal", "3"), ("axial", "1"), ("coronal", "2"), ("axial", "1")):
        page.press(key)
        assert "large" in page.find(f"#{plane}").get_attribute("class")
        sizes = page.run(
            "return [...document.querySelectorAll('figure canvas')]"
            ".map(c => [c.width, c.height, c.clientWidth, c.clientHeight])"
        )
        assert [size[:2] for size in sizes] == [size[2:] for size in sizes]  # not stretched

    page.press("p", "x", "c")
    page.press("\ue009c")  # control and c copies text
    assert not page.find("#prediction").is_selected()
    assert (heat_on(page) > 8).any()
    page.press(" ")
    assert not (heat_on(page) > 8).any()
    page.press(" ")
    assert (heat_on(page) > 8).any()

    page.press("?")
    assert page.is_shown("#help")
    page.press("\ue004", " ", "\ue013")  # tab leaves the button: no key reaches the pictures
    assert page.find("#heat").is_selected()
    assert f"slice {start[2] + 1}/{size[2]}" in page.text(place)
    page.press("\ue00c")  # escape
    assert not page.is_shown("#help")


@pytest.mark.slow
def test_zoom_keeps_the_crosshair_in_the_middle(page):
    bare(page)
    page.press("+", "+", "+", "+")
    marker = np.maximum(page.pixels("axial-scan")[..., 0] - 135, 0)
    high, wide = marker.shape
    assert np.abs(np.array(centre(marker)) - [wide / 2, high / 2]).max() < 12
    bigger = (marker > 0).sum()
    page.press("0")
    smaller = (np.maximum(page.pixels("axial-scan")[..., 0] - 135, 0) > 0).sum()
    assert bigger / smaller == pytest.approx(1.25**8, rel=0.1)


@pytest.mark.slow
def test_zoomed_pictures_follow_the_crosshair(page):
    def in_the_middle(plane: str) -> bool:
        cross = page.run(
            "const [plane] = arguments, {columns, rows, upwards} = PLANES[plane];"
            "const canvas = panels[plane].canvases[0];"
            "const on = placeOn(canvas, plane, state.zoom, state.centre);"
            "const row = upwards ? on.height - 1 - state.at[rows] : state.at[rows];"
            "return [(on.left + (state.at[columns] + 0.5) * on.column) / canvas.width,"
            " (on.top + (row + 0.5) * on.row) / canvas.height]",
            plane,
        )
        return cross == pytest.approx([0.5, 0.5])

    page.press("+", "+", "+", *["\ue00f"] * 2)  # page down
    assert all(map(in_the_middle, PLANES))
    page.click_at("#axial-scan", 60, 60)
    assert not in_the_middle("axial")
    page.press("+")
    assert all(map(in_the_middle, PLANES))


@pytest.mark.slow
def test_wheel_moves_one_slice_for_a_notch_and_for_many_small_events(page):
    def roll(**event: float) -> int:
        page.run(
            "byId('axial-scan').dispatchEvent(new WheelEvent('wheel', arguments[0]))",
            {"bubbles": True, "cancelable": True, **event},
        )
        return page.run("return state.at[2]")

    start = page.run("return state.at[2]")
    assert roll(deltaX=100) == start
    assert roll(deltaY=-120) == start + 1
    assert roll(deltaY=3, deltaMode=1) == start
    assert [roll(deltaY=-10) for _ in range(4)] == [start] * 3 + [start + 1]
    roll(deltaY=-10, ctrlKey=True)
    assert 1 < page.run("return state.zoom") < 1.1


@pytest.mark.slow
def test_right_drag_changes_the_window(page):
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    drag = ActionBuilder(page.driver, duration=0)
    drag.pointer_action.move_to(page.find("#axial-scan")).pointer_down(button=2)
    drag.pointer_action.move_by(100, 0).move_by(0, 50).pointer_up(button=2)
    drag.perform()
    page.settle()
    # The default window, 400 wide, is 400 pixels; down: a lower level, so brighter.
    assert (page.text("#o-width"), page.text("#o-level")) == ("500", "-10")


@pytest.mark.slow
def test_keys_do_not_disturb_writing(page):
    page.find("#comment").send_keys("p c x 1 2 3")
    assert page.find("#comment").get_attribute("value") == "p c x 1 2 3"
    assert page.find("#cross").is_selected()


@pytest.mark.slow
def test_a_clicked_button_gives_the_keys_back(page):
    page.click("#presets button")
    page.press(" ")
    assert not page.find("#heat").is_selected()


# ---------------------------------------------------------------- contours, choices


@pytest.mark.slow
def test_contours_are_drawn_on_the_masks_edges(page, phantom):
    bare(page)
    without = page.pixels("axial-overlay")
    page.press("c")
    drawn = page.pixels("axial-overlay")
    green = (drawn[..., 1] > 180) & (drawn[..., 0] < 110) & (drawn[..., 2] < 110)
    cyan = (drawn[..., 1] > 180) & (drawn[..., 2] > 180) & (drawn[..., 0] < 110)
    left, top, width, height = box_of(page, "axial", phantom)
    for colour, mask in ((green, phantom.truth), (cyan, phantom.mask)):
        plane = mask.numpy()[:, :, phantom.peak()[0][2]].T
        rows, columns = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
        y, x = np.nonzero(colour)
        found = [x.min(), x.max() + 1, y.min(), y.max() + 1]
        wanted = [
            left + columns[0] / plane.shape[1] * width,
            left + (columns[-1] + 1) / plane.shape[1] * width,
            top + rows[0] / plane.shape[0] * height,
            top + (rows[-1] + 1) / plane.shape[0] * height,
        ]
        assert np.abs(np.subtract(found, wanted)).max() < 2.5
    # Dashed: there are gaps in it.
    assert cyan.sum() < 0.8 * green.sum()
    page.press("c")
    assert (page.pixels("axial-overlay") == without).all()
    assert (page.pixels("axial-scan") == page.pixels("axial-overlay")).all()


def test_class_layer_and_method_switch(page):
    bare(page)
    page.click("#heat")
    page.slide("#threshold", 0.5)
    mean = (heat_on(page) > 8).sum()
    page.choose("#layer", "encoder.4")
    wide = (heat_on(page) > 8).sum()
    page.choose("#layer", "model.1")
    narrow = (heat_on(page) > 8).sum()
    assert narrow < mean < wide
    assert page.text("header").count("model.1") == 1
    page.choose("#method", "grad_cam")
    assert "grad_cam" in page.text("header")
    assert not page.is_shown("#f-truth")
    page.choose("#target", "Läsion </script>")
    assert "Läsion </script>" in page.text("header")
    assert (heat_on(page) > 8).any()
    assert page.is_shown("#f-truth")


@pytest.mark.slow
def test_no_heat_is_said_in_words(page, phantom):
    page.choose("#target", "../x")
    bare(page)
    page.click("#heat")
    assert not (heat_on(page) > 8).any()
    assert silent(phantom, "zero").notice() in page.text("#notices")
    assert "no CAM" in page.text("#readout")
    assert not page.is_shown("#profile-section")


def test_a_report_without_any_heat_tells_no_exactness_of_it(browser, phantom, tmp_path):
    path = save_report(tmp_path / "case.html", silent(phantom, "nonfinite"), Look())
    browser.open(path.as_uri())
    assert "CAM" not in browser.text("#stored")
    assert "NaN" in browser.text("#notices")


@pytest.mark.slow
def test_a_constant_scan_is_said_to_be_one(browser, phantom, tmp_path):
    flat = replace(phantom.scan, data=torch.full_like(phantom.scan.data, -3))
    path = save_report(tmp_path / "case.html", replace(phantom, scan=flat), Look())
    browser.open(path.as_uri())
    assert "constant: no value but -3" in browser.text("#window-text")
    bare(browser)
    left, top, width, height = (round(side) for side in box_of(browser, "axial", phantom))
    inside = browser.pixels("axial-scan")[top + 2 : top + height - 2, left + 2 : left + width - 2]
    assert np.ptp(inside) == 0
    assert 60 < inside.mean() < 195


@pytest.mark.slow
def test_profile_and_peaks_lead_to_their_slices(page, phantom):
    count = phantom.scan.shape[2]
    width = page.find("#profile").rect["width"]
    page.click_at("#profile", (4 + 0.5) / count * width, 20)
    assert f"slice 5/{count}" in page.text("#axial .place")
    page.click("#peaks button")
    assert f"slice {phantom.peak()[0][2] + 1}/{count}" in page.text("#axial .place")
    assert page.text("#peaks li").endswith("1.00")
    page.run("layer().peaks.push({value: 0.5, at: [1, 2, 3], mm: [0, 0, 0]})")
    places = [page.press("p") or page.run("return state.at") for _ in range(2)]
    assert places == [[1, 2, 3], list(phantom.peak()[0])]


@pytest.mark.slow
def test_numbers(page):
    words = page.text("#numbers")
    for name in ("Predicted volume", "True volume", "Dice", "CAM inside the prediction"):
        assert name in words
    assert "6.4 × 6.4 × 10.0 mm" in words


# ---------------------------------------------------------------- reading first, feedback


def read_feedback(file: Path) -> list[dict[str, str]]:
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_cam_stays_hidden_until_the_prediction_is_read(browser, folder, tmp_path):
    page = browser
    page.open((folder / "case.html").as_uri() + "#read-first")
    page.press("x", "c")
    for _ in range(2):
        assert not (heat_on(page) > 8).any()
        assert not page.is_shown("#peaks-section")
        assert not page.is_shown("#profile-section")
        assert "CAM" not in page.text("#numbers")
        assert "CAM hidden" in page.text("#readout")
        page.press("p", " ", " ")  # no way around
    page.click("#read")
    assert (heat_on(page) > 8).any()
    assert page.is_shown("#peaks-section")
    page.press("\ue011")
    page.choose("#target", "Läsion </script>")  # each target has to be read
    assert not (heat_on(page) > 8).any()
    assert "in the prediction" in page.text("#readout")
    page.choose("#target", "../x")  # nor is it told that there is no CAM
    assert page.text("#notices") == ""
    page.choose("#target", "lesion")
    page.click("[value=misleading]")
    (row,) = read_feedback(page.download(tmp_path, "#save-csv"))
    assert row["read_first"] == "yes"
    events = row["order"].split("; ")
    assert events[0].startswith("CAMs hidden at 0")
    assert events[1].startswith("prediction of lesion read at ")
    assert events[2].startswith("CAM of lesion shown at ")
    assert page.console() == []


@pytest.mark.slow
def test_feedback_says_what_was_seen(page, phantom, tmp_path):
    page.click("#save-csv")
    assert "Choose useful, misleading or unclear first" in page.text("#noted")
    page.click("[value=useful]")
    page.find("#comment").send_keys('=1+1 "quoted", Läsion')
    page.find("#initials").send_keys("AB")
    page.slide("#threshold", 0.3)
    leaves = "return dispatchEvent(new Event('beforeunload', {cancelable: true}))"
    assert not page.run(leaves)  # asks first
    page.click("#note")
    assert not page.run(leaves)
    assert page.find("#comment").get_attribute("value") == ""
    page.click("#hide")  # too late: it has been seen
    page.click("#read")
    page.click("[value=unclear]")
    first, second = read_feedback(page.download(tmp_path, "#save-csv"))
    assert first["comment"] == '\'=1+1 "quoted", Läsion'  # no formula in a spreadsheet
    voxel, mm = phantom.peak()
    assert [first[key] for key in "ijk"] == [str(index) for index in voxel]
    wanted = [float(first[key]) for key in ("r_mm", "a_mm", "s_mm")]
    assert wanted == pytest.approx(mm, abs=0.01)
    shown = {
        "case": "case 7",
        "target": "lesion",
        "class": "lesion",
        "layer": "mean of 2 layers",
        "method": "hires_cam",
        "model": "UNet",
        "verdict": "useful",
        "initials": "AB",
        "threshold": "0.3",
        "opacity": "0.5",
        "window_width": "400",
        "window_level": "40",
        "read_first": "no",
        "cam_shown": "yes",
    }
    assert {key: first[key] for key in shown} == shown
    assert (second["verdict"], second["comment"], second["read_first"]) == ("unclear", "", "no")
    assert page.run(leaves)
    as_json = read_feedback(page.download(tmp_path, "#save-json"))
    assert [row["verdict"] for row in as_json] == ["useful", "unclear"]
    assert as_json[0]["comment"].startswith("=1+1")


# ---------------------------------------------------------------- where it runs, how it looks


@pytest.mark.slow
def test_over_http_and_without_asking_for_more(browser, folder):
    with serve(folder) as address:
        browser.open(f"{address}/case.html")
        assert (heat_on(browser) > 8).any()
        asked = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] in (
        [],
        [f"{address}/favicon.ico"],
    )
    assert [line for line in browser.console() if "favicon" not in line] == []


@pytest.mark.slow
def test_a_shrunk_scan_is_where_it_was_and_its_values_are_said_to_be_rough(
    browser, phantom, tmp_path, monkeypatch
):
    small = packing.Encoding("shrunk", 2, 90)
    monkeypatch.setattr(packing, "ENCODINGS", [small])
    path = save_report(tmp_path / "case.html", phantom, Look(window="soft tissue"))
    browser.open(path.as_uri())
    assert "· scan ≈ 1" in browser.text("#readout")
    for axis, size in enumerate(phantom.scan.shape):
        shown = browser.run(f"return Array.from({{length: {size}}}, (_, n) => nearest(n, {axis}))")
        step = browser.run(f"return stored.step[{axis}]")
        assert shown == np.floor((np.arange(size) + 0.5) / step).tolist()
    bare(browser)
    for plane in PLANES:
        columns, rows, _, down = PLANES[plane]
        left, top, width, height = box_of(browser, plane, phantom)
        voxel, shape = phantom.peak()[0], phantom.scan.shape
        row = voxel[rows] if down else shape[rows] - 1 - voxel[rows]
        wanted = (voxel[columns] + 0.5) / shape[columns], (row + 0.5) / shape[rows]
        x, y = centre(np.maximum(browser.pixels(f"{plane}-scan")[..., 0] - 135, 0))
        off = np.subtract([(x - left) / width, (y - top) / height], wanted)
        assert np.abs(off * [shape[columns], shape[rows]]).max() < 0.5  # voxels
    assert browser.console() == []


def test_a_damaged_map_is_said_in_words(browser, folder, tmp_path):
    text = (folder / "case.html").read_text(encoding="utf-8")
    start = text.index('id="maps">') + len('id="maps">')
    broken = text[: start + 40] + "A" * 40 + text[start + 80 :]
    (tmp_path / "case.html").write_text(broken, encoding="utf-8")
    browser.driver.get((tmp_path / "case.html").as_uri())
    browser.wait(lambda: "the file is damaged" in browser.text("#notices"))
    assert "CAM not read" in browser.text("#readout")
    assert browser.console() == []


@pytest.mark.slow
def test_in_a_notebook_frame(browser, folder):
    browser.open((folder / "notebook.html").as_uri(), inside="iframe")
    assert (heat_on(browser) > 8).any()
    browser.click_at("#axial-scan", 100, 100)  # the keys go into the frame
    browser.press("x", "c", " ")
    assert not (heat_on(browser) > 8).any()
    browser.driver.switch_to.default_content()
    assert browser.console() == []


@pytest.mark.slow
def test_light_and_dark(page):
    def brightness() -> float:
        script = "return getComputedStyle(document.querySelector('aside')).backgroundColor"
        numbers = page.run(script).removeprefix("rgb(").removesuffix(")").split(",")
        return np.mean([float(number) for number in numbers])

    page.prefer("light")
    assert brightness() > 200
    page.prefer("dark")
    assert brightness() < 60
    page.click("#theme")
    assert brightness() > 200
    page.click("#theme")
    assert brightness() < 60
    page.prefer("light")


@pytest.mark.parametrize(
    "window", crossed([(1000, 700, 1), (1920, 1080, 2), (480, 800, 2)], rows=1)
)
def test_nothing_is_cut_off_at_any_size(page, window):
    width, height, scale = window
    page.resize(width, height, scale)
    page.wait(lambda: page.run("return innerWidth") == width)
    page.settle()
    assert page.run("return document.documentElement.scrollWidth") <= width
    cut_off = page.run(
        "const e = byId('readout');"
        "return [e.scrollWidth - e.clientWidth, e.scrollHeight - e.clientHeight]"
    )
    assert max(cut_off) <= 0
    for name in ("axial-scan", "axial-overlay", "coronal-scan", "sagittal-overlay"):
        shown = page.pixels(name)
        assert min(shown.shape[:2]) > 60 * scale, (name, shown.shape)
        ratio = page.run(
            "const c = document.getElementById(arguments[0]); return c.width / c.clientWidth", name
        )
        assert ratio == pytest.approx(scale, rel=0.02)
    page.resize(1440, 900)


@pytest.mark.slow
def test_every_control_has_a_name(page):
    nameless = page.run(
        "return [...document.querySelectorAll('button, input, select, textarea, canvas')]"
        ".filter(e => !(e.getAttribute('aria-label') || e.labels?.[0]?.textContent.trim()"
        " || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert nameless == []
    for name in ("threshold", "opacity", "width", "level"):
        assert page.find(f"#{name}").get_attribute("aria-valuetext") == page.text(f"#o-{name}")


@pytest.mark.slow
def test_a_very_long_name_leaves_room_for_the_pictures(browser, phantom, tmp_path):
    long = replace(phantom, label="A" * 300, provenance={"model": {"name": "a model " * 50}})
    browser.open(save_report(tmp_path / "case.html", long, Look()).as_uri())
    assert browser.find("header").rect["height"] < 200
    assert browser.run("return document.querySelectorAll('#facts dd')[0].title") == "a model " * 50
