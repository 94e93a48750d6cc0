"""The report for a newcomer: on a phone, in a small window, after a reload, with long names."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_browser import Page
from helpers_phantom import make_phantom
from numpy.typing import NDArray

from seg3dcam.explaining.explanation import Explanation
from seg3dcam.review import save_report
from seg3dcam.review.look import Look

#: A quick run looks at the page by test_report_browser.py alone.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def phantom() -> Explanation:
    explanation = make_phantom("LPS", layers=("model.1", "encoder.4"))
    return replace(explanation, provenance={"model": {"name": "UNet"}})


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, phantom: Explanation) -> str:
    file = tmp_path_factory.mktemp("report") / "case.html"
    return save_report(file, phantom, Look(window="soft tissue"), case="case 7").as_uri()


@pytest.fixture
def page(browser: Page, address: str) -> Iterator[Page]:
    browser.open(address)
    yield browser
    assert browser.console() == []


def colour_of(page: Page, canvas: str = "axial-overlay") -> NDArray[np.float64]:
    """How much colour there is at every pixel."""
    shown = page.pixels(canvas)
    return shown.max(2) - shown.min(2)


def without_lines(page: Page) -> None:
    page.press("x", "c")


def resize(page: Page, width: int, height: int, scale: float = 1) -> None:
    page.resize(width, height, scale)
    page.wait(lambda: page.run("return innerWidth") == width)
    page.settle()


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


# ---------------------------------------------------------------- reading first


def test_space_while_the_cam_is_hidden_changes_nothing_and_says_what_to_do(page, address):
    page.open(address + "#read-first")
    page.press(" ")  # once: the CAM would be off when it may be seen
    assert page.run("return state.heat")
    page.wait(lambda: "asked" in page.find("#reading").get_attribute("class"))
    assert not page.find("#heat").is_enabled()
    page.click("#read")
    without_lines(page)
    assert (colour_of(page) > 8).any()
    assert page.find("#heat").is_enabled()
    page.press(" ")
    assert not page.run("return state.heat")


def test_read_first_is_heard_on_an_open_page(page):
    without_lines(page)
    assert (colour_of(page) > 8).any()
    page.run("location.hash = '#read-first'")
    page.wait(lambda: page.is_shown("#reading"))
    page.settle()
    assert not (colour_of(page) > 8).any()
    assert "CAM hidden" in page.text("#readout")
    page.click("#read")
    page.run("location.hash = '#elsewhere'")
    page.run("location.hash = '#read-first'")  # what has been read stays read
    page.settle()
    assert (colour_of(page) > 8).any()


# ---------------------------------------------------------------- room


@pytest.mark.parametrize(("width", "height", "most"), [(900, 700, 80), (390, 844, 170)])
def test_the_header_leaves_room_for_the_pictures(page, width, height, most):
    resize(page, width, height)
    assert page.find("header").rect["height"] < most
    for name in ("case 7", "UNet", "lesion", "mean of 2 layers", "hires_cam", "not known"):
        assert name in page.text("header")
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.resize(1440, 900)


def test_long_names_are_shortened_in_the_middle_and_whole_under_the_mouse(
    browser, phantom, tmp_path
):
    names = [f"encoder.stages.{n}." + "blocks.0." * 12 + f"conv{n}" for n in range(2)]
    maps = dict(zip(names, phantom.maps.values(), strict=True))
    status, spacing = dict.fromkeys(names, "ok"), dict.fromkeys(names, (6.4, 6.4, 10.0))
    long = replace(phantom, maps=maps, status=status, native_spacing=spacing, provenance={})
    browser.open(save_report(tmp_path / "case.html", long, Look()).as_uri())
    texts = browser.run("return [...byId('layer').options].map(o => [o.textContent, o.title])")
    chosen = [pair for pair in texts if pair[1] in names]
    assert [whole for _, whole in chosen] == names
    for number, (text, whole) in enumerate(chosen):
        assert len(text) <= 44
        assert text.startswith("encoder.stages.")
        assert text.endswith(f"conv{number}")
        browser.choose("#layer", text)
        facts = browser.run(
            "return [...document.querySelectorAll('#facts dd')].map(d => [d.innerText, d.title])"
        )
        (shown,) = [words for words, title in facts if title == whole]
        assert len(shown) <= 36
        assert "…" in shown
        assert shown.endswith(f"conv{number}")
    assert browser.find("header").rect["height"] < 90


def test_names_that_would_look_alike_stay_whole(page):
    page.run(
        "fillSelect('layer', ['a' + 'x'.repeat(80) + '1' + 'y'.repeat(80),"
        " 'a' + 'x'.repeat(80) + '2' + 'y'.repeat(80)], 0, () => {})"
    )
    texts = page.run("return [...byId('layer').options].map(o => o.textContent)")
    assert [len(text) for text in texts] == [162, 162]


def test_words_are_explained_once(page):
    page.click("#meanings summary")
    said = page.text("#meanings").split("\n")
    for word in ("Score", "Peak", "CAM inside the prediction", "CAM resolution"):
        assert said.count(word) == 1


# ---------------------------------------------------------------- fingers


def touch(page: Page, kind: str, *points: tuple[float, float]) -> None:
    """Let fingers do something, at places in CSS pixels of the page."""
    where = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
    page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})


@pytest.fixture
def phone(page: Page) -> Iterator[Page]:
    fingers = "Emulation.setTouchEmulationEnabled"
    page.driver.execute_cdp_cmd(fingers, {"enabled": True, "maxTouchPoints": 5})
    resize(page, 390, 844, 2)
    yield page
    page.driver.execute_cdp_cmd(fingers, {"enabled": False})
    page.resize(1440, 900)


def place_on_overlay(page: Page, across: float, down: float) -> tuple[float, float]:
    left, top, width, height = page.run(
        "const b = byId('axial-overlay').getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]"
    )
    return left + across * width, top + down * height


def under(page: Page, x: float, y: float) -> list[float]:
    """Column and row of the axial slice at a place of the page."""
    return page.run(
        "const [x, y] = arguments; const canvas = byId('axial-overlay');"
        "const b = canvas.getBoundingClientRect();"
        "const on = placeOn(canvas, 'axial', state.zoom, state.centre);"
        "return [((x - b.left) * devicePixelRatio - on.left) / on.column,"
        " ((y - b.top) * devicePixelRatio - on.top) / on.row]",
        x,
        y,
    )


def test_two_fingers_zoom_and_what_is_between_them_stays_there(phone):
    x, y = place_on_overlay(phone, 0.4, 0.6)
    before, at = under(phone, x, y), phone.run("return state.at")
    touch(phone, "touchStart", (x - 20, y), (x + 20, y))
    for apart in (30, 40, 50):
        touch(phone, "touchMove", (x - apart, y), (x + apart, y))
    phone.settle()
    assert phone.run("return state.zoom") == pytest.approx(2.5, rel=0.02)
    assert under(phone, x, y) == pytest.approx(before, abs=0.3)
    # Both the same way: the picture goes along.
    touch(phone, "touchMove", (x - 40, y + 10), (x + 60, y + 10))
    phone.settle()
    assert phone.run("return state.zoom") == pytest.approx(2.5, rel=0.02)
    assert under(phone, x + 10, y + 10) == pytest.approx(before, abs=0.3)
    touch(phone, "touchEnd")
    phone.settle()
    assert phone.run("return state.at") == at  # two fingers move no crosshair
    phone.click("#axial .zoom button:nth-child(3)")
    assert phone.run("return state.zoom") == 1


def test_one_finger_moves_the_crosshair_with_a_tap(phone):
    before = phone.run("return state.at")
    touch(phone, "touchStart", place_on_overlay(phone, 0.5, 0.5))
    assert phone.run("return state.at") == before  # it may be about to scroll
    touch(phone, "touchEnd")
    phone.settle()
    at, shape = phone.run("return [state.at, full.shape]")
    assert np.abs(np.subtract(at[:2], np.array(shape[:2]) / 2)).max() < 2


def test_buttons_are_large_enough_for_fingers(phone):
    small = phone.run(
        "return [...document.querySelectorAll('.zoom button, .presets button, #hide')]"
        ".filter(b => b.offsetParent && Math.min(b.offsetWidth, b.offsetHeight) < 36)"
        ".map(b => b.outerHTML)"
    )
    assert small == []


def test_buttons_zoom(page):
    for number, wanted in ((2, 1.5), (2, 2.25), (1, 1.5), (3, 1)):
        page.click(f"#axial .zoom button:nth-child({number})")
        assert page.run("return state.zoom") == pytest.approx(wanted)
    assert page.run("return state.centre") is None


# ---------------------------------------------------------------- what outlives a reload


def reload(page: Page) -> None:
    page.driver.refresh()
    page.wait(lambda: page.run("return document.body?.dataset.ready") == "yes")
    page.settle()


def test_feedback_outlives_a_reload(page, tmp_path):
    page.click("[value=useful]")
    page.find("#comment").send_keys("first")
    page.click("#note")
    page.click("[value=misleading]")
    page.find("#comment").send_keys("half wri")
    page.find("#initials").send_keys("AB")
    reload(page)
    assert "1 noted, and kept in this browser" in page.text("#noted")
    assert page.find("#comment").get_attribute("value") == "half wri"
    assert page.find("[value=misleading]").is_selected()
    first, second = read_csv(page.download(tmp_path, "#save-csv"))
    assert (first["comment"], second["comment"]) == ("first", "half wri")
    assert (second["initials"], second["verdict"]) == ("AB", "misleading")
    assert second["order"].count("CAM of lesion shown at ") == 1  # one visit, one first look
    reload(page)  # what is saved is no longer kept
    assert page.text("#noted") == ""
    assert not page.is_shown("#forget")


def test_a_reload_is_no_way_around_reading_first(page, tmp_path):
    page.click("#hide")
    reload(page)
    without_lines(page)
    assert not (colour_of(page) > 8).any()
    page.click("#read")
    page.click("[value=useful]")
    (row,) = read_csv(page.download(tmp_path, "#save-csv"))
    assert row["read_first"] == "no"  # it had been seen before it was hidden


def test_notes_can_be_deleted_and_those_of_another_report_are_its_own(
    page, address, phantom, tmp_path
):
    page.click("[value=unclear]")
    page.click("#note")
    other = save_report(tmp_path / "other.html", replace(phantom, label="other"), Look())
    page.open(other.as_uri())
    assert page.text("#noted") == ""
    page.open(address)
    assert page.text("#noted").startswith("1 noted")
    page.click("#forget")
    assert page.text("#noted") == "The notes are deleted."
    page.open(address)
    assert page.text("#noted") == ""


# ---------------------------------------------------------------- the close-up


def test_the_close_up_shows_the_place_near_and_hides_what_is_hidden(page):
    without_lines(page)
    heat = colour_of(page, "closeup")
    assert heat[heat.shape[0] // 2, heat.shape[1] // 2] > 30  # the peak is in the middle
    assert (heat > 20).mean() > 3 * (colour_of(page) > 20).mean()
    sides = ("left", "right", "top", "bottom")
    assert [page.text(f"#closeup-figure .{side}") for side in sides] == ["R", "L", "A", "P"]
    page.press("3")
    assert page.text("#closeup-figure .left") == "A"
    assert "sagittal" in page.find("#closeup").get_attribute("aria-label")
    page.click("#hide")
    assert colour_of(page, "closeup").max() == 0
