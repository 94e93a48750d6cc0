"""The page of a cohort in a real browser, opened from the disk."""

from __future__ import annotations

import pytest
from helpers_cohort import write_page_of

pytestmark = pytest.mark.slow

COUNT = 400


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    file = write_page_of(tmp_path_factory.mktemp("page"), COUNT)
    browser.driver.get(file.as_uri())
    browser.wait(lambda: browser.run("return document.body?.dataset.ready") == "yes")
    browser.console()
    return browser


def cells(page, column):
    """Return the texts of a column, from above, of the rows that are drawn."""
    return page.run(
        "const index = [...document.querySelectorAll('#head th')]"
        ".findIndex((cell) => cell.dataset.name === arguments[0]);"
        "return [...document.querySelectorAll('#rows tr')].map((r) => r.cells[index].textContent)",
        column,
    )


def sort_by(page, column):
    page.run("document.querySelector(`th[data-name=${arguments[0]}] button`).click()", column)


def choose(page, selector, value):
    page.run(
        "const [at, value] = arguments; at.value = value;"
        "at.dispatchEvent(new Event(at.tagName === 'SELECT' ? 'change' : 'input'))",
        page.find(selector),
        value,
    )


def reset(page):
    for selector in ("#search", "#class", "#status"):
        choose(page, selector, "")


def test_the_most_unusual_come_first_and_few_rows_are_drawn_at_once(page):
    page.run("window.scrollTo(0, 0)")
    found = [float(score) for score in cells(page, "unusual") if score != "–"]
    assert found == sorted(found, reverse=True)
    assert 20 < len(found) < COUNT
    assert page.text("#count") == f"{COUNT + 1} of {COUNT + 1} rows"


def test_pictures_are_loaded_where_they_are_seen(page):
    loaded = "return [...document.images].map((image) => image.naturalWidth)"
    page.wait(lambda: page.run(loaded)[0] == 160)
    assert page.run("return [...document.images].every((image) => image.loading === 'lazy')")


def test_a_row_leads_to_its_report(page):
    link = page.run("return document.querySelector('#rows a').href")
    case = page.run("return document.querySelector('#rows a').textContent")
    assert link.endswith(f"/{case}/report.html")
    assert link.startswith("file://")


def test_columns_are_sorted_both_ways_and_unknown_comes_last(page):
    sort_by(page, "confidence")
    down = [float(value) for value in cells(page, "confidence")]
    assert down == sorted(down, reverse=True)
    sort_by(page, "confidence")
    up = [float(value) for value in cells(page, "confidence")]
    assert up == sorted(up)
    assert up[0] < down[0]
    sort_by(page, "case")
    assert cells(page, "case")[:2] == ["broken", "case0000"]
    sort_by(page, "unusual")


def test_rows_are_filtered(page):
    choose(page, "#class", "lesion")
    assert set(cells(page, "class")) == {"lesion"}
    choose(page, "#search", "case012")
    count = sum(number % 3 > 0 for number in range(120, 130))
    assert page.text("#count") == f"{count} of {COUNT + 1} rows"
    reset(page)
    choose(page, "#status", "failed")
    assert cells(page, "case") == ["broken"]
    assert cells(page, "why") == ["no <scan>"]
    reset(page)


def test_scrolling_draws_the_rest(page):
    for _ in range(20):
        page.run("window.scrollTo(0, document.body.scrollHeight)")
        page.driver.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 30))"
        )
    assert len(cells(page, "case")) == COUNT + 1


def test_texts_are_never_read_as_html(page):
    choose(page, "#search", "onerror")
    assert cells(page, "why") == ["<img src=x onerror=alert(1)>"]
    reset(page)
    choose(page, "#class", "organ </script><b>")
    assert set(cells(page, "class")) == {"organ </script><b>"}
    reset(page)


def test_distributions_are_drawn(page):
    names = page.run(
        "return [...document.querySelectorAll('#plots figcaption span:first-child')]"
        ".map((one) => one.textContent)"
    )
    assert names == ["unusual", "confidence", "ml", "outside"]
    label = page.run("return document.querySelector('#plots svg').getAttribute('aria-label')")
    assert label.startswith("unusual: from 0.0 to ")
    heights = page.run(
        "return [...document.querySelectorAll('#plots figure')].map((one) =>"
        " [...one.querySelectorAll('rect')].filter((bar) => bar.getAttribute('height') > 0).length)"
    )
    assert all(height > 5 for height in heights)


def test_the_browser_has_nothing_to_complain_of(page):
    assert page.console() == []
