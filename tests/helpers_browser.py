"""A page in a real, headless Chromium, as a test sees it: pixels, keys, words, downloads."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

BROWSER = shutil.which("chromium") or "/usr/bin/chromium"
DRIVER = shutil.which("chromedriver") or "/usr/bin/chromedriver"
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


@contextmanager
def open_browser(width: int = 1440, height: int = 900) -> Iterator[Page]:
    """Start Chromium; without it the test is skipped, except in CI, where it must be there."""
    missing = [name for name in (BROWSER, DRIVER) if not Path(name).exists()]
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing.append("the Python package selenium")
    if missing and os.environ.get("CI"):
        pytest.fail(f"needed in CI, and not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"--window-size={width},{height}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        page = Page(driver)
        page.resize(width, height)
        yield page
    finally:
        driver.quit()


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine, and return its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Page:
    """What a test does with the page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, inside: str = "") -> None:
        """Open a page, and wait until everything in it is read; `inside`: in this frame."""
        self.driver.get("about:blank")  # else only the part after # would change
        self.driver.get(url)
        if inside:
            self.driver.switch_to.frame(self.find(inside))
        self.wait(lambda: self.run("return document.body?.dataset.ready") == "yes")
        self.settle()

    def settle(self) -> None:
        """Wait until maps and masks are unpacked and the last change is drawn."""
        unpacked = "return [...maps.values(), ...masks.values()].every(Boolean)"
        self.wait(lambda: self.run(unpacked))
        twice = "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))"
        self.driver.execute_async_script(
            twice.replace("arguments[0]()", "done()").join(("const done = arguments[0]; ", ""))
        )

    def wait(self, reached: Callable[[], Any], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, f"not reached; the console says {self.console()}"
            time.sleep(0.02)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def is_shown(self, selector: str) -> bool:
        return self.find(selector).is_displayed()

    def click(self, selector: str) -> None:
        self.find(selector).click()
        self.settle()

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)
        self.settle()

    def slide(self, selector: str, value: float) -> None:
        """Move a slider."""
        self.run(
            "const [at, value] = arguments; at.value = value;"
            "at.dispatchEvent(new Event('input', {bubbles: true}))",
            self.find(selector),
            value,
        )
        self.settle()

    def choose(self, selector: str, text: str) -> None:
        from selenium.webdriver.support.select import Select

        Select(self.find(selector)).select_by_visible_text(text)
        self.settle()

    def click_at(self, selector: str, x: float, y: float) -> None:
        """Click at a place of an element, in CSS pixels from its left top corner."""
        from selenium.webdriver import ActionChains

        box = self.find(selector).rect
        moved = round(x - box["width"] / 2), round(y - box["height"] / 2)
        ActionChains(self.driver).move_to_element_with_offset(
            self.find(selector), *moved
        ).click().perform()
        self.settle()

    def pixels(self, canvas: str) -> NDArray[np.float64]:
        """What a canvas shows, (height, width, 3): red, green and blue."""
        url = self.run("return document.getElementById(arguments[0]).toDataURL()", canvas)
        data = np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8)
        return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(float)

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, theme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def download(self, folder: Path, selector: str) -> Path:
        """Click, and return the file that is saved."""
        before = set(folder.iterdir())
        where = {"behavior": "allow", "downloadPath": str(folder)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        self.find(selector).click()

        def found() -> list[Path]:
            new = sorted(set(folder.iterdir()) - before)
            return [file for file in new if file.suffix in (".csv", ".json")]

        self.wait(found)
        return found()[0]

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        found = self.driver.get_log("browser")
        return [one["message"] for one in found if one["level"] in ("SEVERE", "WARNING")]
