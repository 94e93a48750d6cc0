"""The README's pictures, made again by the demo itself.

    python docs/make_pictures.py

Needs the extra `test`, chromium and chromedriver.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
VIEWS = ("Red", "Green", "Yellow")  # axial, coronal, sagittal
sys.path.insert(0, str(TESTS))


def main() -> None:
    """Run the demo and show what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["seg3dcam", "demo", "--out", folder], check=True)
        case = Path(folder) / "explained"
        save("demo_planes", cv2.imread(str(case / "planes_lesion.png")))
        save("demo_report", of_browser(case / "report.html"))
        save("demo_slicer", of_slicer(case / "slicer" / "scene.mrml", Path(folder) / "views"))


def of_browser(page: Path) -> np.ndarray:
    """Return the page as Chromium shows it."""
    from helpers_browser import open_browser

    with open_browser(1440, 900) as shown:
        shown.open(page.as_uri())
        data = np.frombuffer(shown.driver.get_screenshot_as_png(), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def of_slicer(scene: Path, views: Path) -> np.ndarray:
    """Return the three slice views as 3D Slicer's own code draws them."""
    subprocess.run(
        [sys.executable, str(TESTS / "export" / "slicer_reader.py"), str(scene), str(views)],
        env=os.environ | {"VTK_DEFAULT_OPENGL_WINDOW": "vtkEGLRenderWindow"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return np.hstack(
        [cv2.imread(str(views / f"{name}.png")) for name in ("Red", "Green", "Yellow")]
    )


def save(name: str, picture: np.ndarray) -> None:
    """Write a picture as small as PNG can."""
    cv2.imwrite(str(DOCS / f"{name}.png"), picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
