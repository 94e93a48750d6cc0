"""Results made with names that somebody hostile chose: every program opens them, none runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import SimpleITK
from helpers_cases import IN_LESION, Place, contents, write_model, write_scan

pytestmark = [pytest.mark.usefixtures("measured_once"), pytest.mark.slow]

NAMES = {
    "lines": "liver\r\nspace origin: (900,0,0)\r\n\r\nSegment0_Name:=none",
    "script": "</script><script>document.title = 'run'</script><img src=x onerror=\"fetch('/x')\">",
    "entities": '"><!ENTITY x SYSTEM "file:///etc/passwd"> &x; ]]> --> \'',
    "path": "../../../x/..\\..\\x|CON:nul",
    "direction": "right\u202etfel\u2066\u200b\ufeff",
    "separators": "a;b=c:d~e|f\t{g}%s%(h)s[bold red]",
    "long": "x" * 600,
    "nothing to see": "\u200b\u2028\u0085\u00a0",
}
FORMATS = ("nifti", "png", "html", "slicer", "nrrd", "fused", "cine")
READER = Path(__file__).parents[1] / "export" / "slicer_reader.py"


def _each_name():
    """Return every name as a parameter; the first two are tried in a quick run too."""
    quick = list(NAMES)[:2]
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in NAMES]


@pytest.fixture(scope="module", params=_each_name())
def place(request, tmp_path_factory):
    """A case whose name and classes are hostile; the folder beside it was listed before."""
    place = Place.at(tmp_path_factory.mktemp("hostile"))
    name = NAMES[request.param]
    write_model(place.folder, classes=["background", f"organ {name}", name])
    write_scan(place.folder / "truth.nii.gz", place_truth())
    before = contents(place.folder)
    words = ("--case", name[:200], "--truth", place.folder / "truth.nii.gz", "--label", 2)
    formats = [word for kind in FORMATS for word in ("--format", kind)]
    outcome = place.explain("--target", 2, *words, *formats)
    assert outcome.code == 0, outcome.err
    after = contents(place.folder)
    assert {k: v for k, v in after.items() if not k.startswith("out")} == before
    return place


def place_truth():
    truth = np.zeros((20, 24, 18), np.float32)
    truth[8:14, 10:16, 6:12] = 2
    return truth


def test_every_file_is_in_the_record_and_has_a_name_for_every_disk(place):
    files = {str(f.relative_to(place.out)) for f in place.out.rglob("*") if f.is_file()}
    assert files == {*place.record["files"], "case.json"}
    for name in files:
        assert len(name.rpartition("/")[2]) < 100
        assert not set(name) - set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./"
        )


def test_volumes_are_where_the_scan_is(place):
    scan = SimpleITK.ReadImage(str(place.scan))
    volumes = [f for f in place.out.rglob("*") if f.name.endswith((".nii.gz", ".nrrd"))]
    assert len(volumes) >= 6
    for file in volumes:
        image = SimpleITK.ReadImage(str(file))
        assert image.GetSize() == scan.GetSize(), file.name
        for corner in ((0, 0, 0), (19, 23, 17)):
            place_of = [one.TransformIndexToPhysicalPoint(corner) for one in (image, scan)]
            assert place_of[0] == pytest.approx(place_of[1], abs=1e-2), file.name


def test_the_segments_of_the_scene(place):
    """One mask each of prediction and truth, with names in one line."""
    (file,) = place.out.rglob("masks.seg.nrrd")
    image = SimpleITK.ReadImage(str(file))
    names = [image.GetMetaData(k) for k in image.GetMetaDataKeys() if k.endswith("_Name")]
    assert len(names) == 2
    assert all(name.isprintable() and len(name) < 700 for name in names)
    array = SimpleITK.GetArrayFromImage(image)
    array = array if array.ndim == 4 else array[..., None]
    assert array[IN_LESION[::-1]].any()


def test_the_scene_is_xml(place):
    (file,) = place.out.rglob("scene.mrml")
    root = ElementTree.parse(file).getroot()
    for node in root.iter():
        for key in ("fileName", "name"):
            assert ".." not in node.get(key, "").replace("…", "") or key == "name"
    stored = {node.get("fileName") for node in root.iter() if node.get("fileName")}
    assert all((file.parent / name).is_file() for name in stored)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("slicer") is None and "CI" not in os.environ,
    reason="3D Slicer's code: pip install slicer-core",
)
def test_slicer_opens_the_scene(place, tmp_path):
    (file,) = place.out.rglob("scene.mrml")
    done = subprocess.run(
        [sys.executable, str(READER), str(file), str(tmp_path / "pictures")],
        env=os.environ | {"VTK_DEFAULT_OPENGL_WINDOW": "vtkEGLRenderWindow"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["loaded"], found["said"], found["heard"]) == (True, "", "")
    assert len(found["volumes"]) == 2
    assert len(found["segments"]) == 2


def test_pictures_can_be_read(place):
    pictures = [f for f in place.out.rglob("*.png")]
    assert len(pictures) > 4
    for file in pictures:
        height, width = cv2.imread(str(file)).shape[:2]
        assert max(height, width) < 4000, file.name


def test_the_page_opens_and_runs_nothing(place, browser):
    page = browser
    page.open((place.out / "report.html").as_uri())
    assert page.console() == []
    assert page.run("return document.title") != "run"
    assert page.run("return document.images.length") == 0
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    requests = page.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in requests if not name.startswith(("blob:", "data:"))] == []
