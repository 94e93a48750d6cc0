"""What a cohort costs beside its work: the plan, the engine, memory, workers, and the page.

    python benchmarks/cohort.py             # all
    python benchmarks/cohort.py plan page   # some

plan     10,000 tiny cases are planned: none done, and all done
engine   seconds for each case beyond the same jobs one after another
workers  two workers with one thread each beside one worker, once all are at work
memory   resident memory of this process and of a worker over 200 cases
page     2,000 cases in a browser: until the table is there
confidence  corrupted copies of the demo's scan: is the network less sure where it is worse?
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from measure import machine, resident, summary, take_turns

from seg3dcam import cohort
from seg3dcam.cohort import planned, read_cases
from seg3dcam.job.run import model_of, run_with_model
from seg3dcam.job.settings import Job

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

KEPT = {"target": "lesion", "format": ["nifti", "html"]}


def plan(root: Path) -> None:
    """Plan 10,000 cases whose scans are copies of one, none of them done, and all of them done."""
    from helpers_cohort import write_cohort

    scans = write_cohort(root, ["case"])
    one = (scans / "case.nii.gz").read_bytes()
    for number in range(10_000):
        (scans / f"case{number:05d}.nii.gz").write_bytes(one)
    (scans / "case.nii.gz").unlink()
    model, out = str(root / "model.yaml"), root / "out"
    template = Job(scan="of the case", model=model, **KEPT)
    loaded = model_of(template)
    for what in ("none done", "all done"):
        start = time.perf_counter()
        found = planned(read_cases(scans), template, loaded, out)
        seconds, done = time.perf_counter() - start, sum(one.state == "done" for one in found)
        print(f"plan, {what}: {seconds:.1f} s for {len(found)} cases, of which {done} are done")
        if what == "none done":
            _done(found, loaded, out)


def _done(found, loaded, out: Path) -> None:
    """Let all cases be done: the first one's folder is copied, and its record changed."""
    run_with_model(found[0].job, loaded, inputs=found[0].code)
    for one in found[1:]:
        shutil.copytree(out / found[0].name, out / one.name, copy_function=os.link)
        record = out / one.name / "case.json"
        text = record.read_text(encoding="utf-8").replace(found[0].code, one.code)
        record.unlink()
        record.write_text(text.replace(found[0].name, one.name), encoding="utf-8")


def engine(root: Path) -> None:
    """Compare a cohort of 40 cases with the same jobs one after another."""
    from helpers_cohort import write_cohort

    scans = write_cohort(root, [f"case{number:02d}" for number in range(40)])
    model = str(root / "model.yaml")
    settings = KEPT | {"format": ["nifti", "html", "thumb"]}
    loaded = model_of(Job(scan="x", model=model))

    def plain() -> None:
        for file in sorted(scans.iterdir()):
            folder = tempfile.mkdtemp(dir=root)
            job = Job(scan=str(file), model=model, out=f"{folder}/case", case="x", **settings)
            run_with_model(job, loaded)

    def together() -> None:
        cohort.run(scans, model=model, out=tempfile.mkdtemp(dir=root), **settings)

    seconds = take_turns({"jobs": plain, "cohort": together}, 5)
    beyond = [1000 * (b - a) / 40 for a, b in zip(*seconds.values(), strict=True)]
    print(f"engine: {summary(beyond, ' ms')} for each case beyond its {_each(seconds['jobs'])}")


def _each(seconds: list[float]) -> str:
    return f"{1000 * statistics.median(seconds) / 40:.0f} ms"


def workers(root: Path) -> None:
    """Compare two workers with one; the time in which they start is left out."""
    from helpers_cohort import write_cohort

    scans = write_cohort(root, [f"case{number:03d}" for number in range(160)])
    model = str(root / "model.yaml")

    def rate(count: int) -> float:
        times: list[float] = []
        cohort.run(
            scans,
            model=model,
            out=tempfile.mkdtemp(dir=root),
            workers=count,
            progress=lambda step, done, total: times.append(time.perf_counter()),
            **KEPT,
        )
        return (len(times) - 50) / (times[-1] - times[49])

    ratios = []
    for _ in range(3):
        one, two = rate(1), rate(2)
        ratios.append(two / one)
        print(f"workers: {one:.2f} and {two:.2f} cases a second", flush=True)
    print(f"workers: two are {summary(ratios)} times as fast as one")


def memory(root: Path) -> None:
    """Watch memory over 200 cases, in this process and in a worker."""
    from helpers_cohort import write_cohort

    scans = write_cohort(root, [f"case{number:03d}" for number in range(200)])
    model = str(root / "model.yaml")
    for count in (None, 1):
        seen: list[float] = []

        def watch(step: str, done: int, total: int, seen=seen, count=count) -> None:
            children = psutil.Process().children()
            workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
            of = workers[0].memory_info().rss / 1e6 if count and workers else resident()
            seen.append(of)

        out = tempfile.mkdtemp(dir=root)
        cohort.run(scans, model=model, out=out, workers=count, progress=watch, **KEPT)
        early, late = statistics.median(seen[20:40]), statistics.median(seen[180:200])
        where = "this process" if count is None else "a worker"
        print(f"memory of {where}: {early:.0f} MB after 30 cases, {late:.0f} MB after 190")


def page(root: Path) -> None:
    """Open the page of 2,000 cases, each with a picture, in Chromium, from the disk."""
    from helpers_browser import open_browser
    from helpers_cohort import write_page_of

    file = write_page_of(root, 2000)
    print(f"page: {file.stat().st_size / 1e6:.1f} MB")
    with open_browser() as browser:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            browser.driver.get(file.as_uri())
            browser.wait(lambda: browser.run("return document.body?.dataset.ready") == "yes")
            assert browser.run("return document.querySelectorAll('#rows tr').length") > 10
            seconds.append(time.perf_counter() - start)
        print(f"page: {summary(seconds, ' s')} until the table of 2,000 cases is there")


def confidence(root: Path) -> None:
    """Explain corrupted copies of the demo's scan, and look at risk by confidence."""
    import nibabel as nib
    import numpy as np
    from scipy import ndimage

    import seg3dcam.demo
    from seg3dcam.demo.scan import write_demo_scan

    scan_file, truth_file = write_demo_scan(root / "demo")
    image = nib.load(scan_file)
    voxels = image.get_fdata(dtype=np.float32)
    random = np.random.default_rng(0)
    scale = float(voxels.std())
    ways = {
        "noise": lambda k: voxels + random.normal(0, 0.12 * k * scale, voxels.shape),
        "blur": lambda k: ndimage.gaussian_filter(voxels, 0.5 * k),
        "bias": lambda k: (
            voxels * np.linspace(1 - 0.12 * k, 1 + 0.12 * k, voxels.shape[0])[:, None, None]
        ),
        "dark": lambda k: np.where(
            voxels > 0, voxels ** (1 - 0.08 * k) * voxels.max() ** (0.08 * k), 0
        ),
    }
    rows = ["case,scan,truth"]
    for name, way in ways.items():
        for strength in (1, 2, 3, 4):
            file = root / f"{name}{strength}.nii.gz"
            nib.save(nib.Nifti1Image(way(strength).astype(np.float32), image.affine), file)
            rows.append(f"{name}{strength},{file.name},{truth_file.relative_to(root)}")
    (root / "cases.csv").write_text("\n".join(rows), encoding="utf-8")
    result = cohort.run(
        root / "cases.csv",
        model=f"{seg3dcam.demo.__path__[0]}/model.yaml",
        out=root / "out",
        target=["grey matter", "white matter", "lesion"],
        format=["thumb"],
        say=print,
    )
    print(f"confidence: {len(result.done)} copies explained, {len(result.failed)} failed")


PARTS = {part.__name__: part for part in (plan, engine, workers, memory, page, confidence)}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help=f"default: all of {', '.join(PARTS)}")
    torch.set_num_threads(1)  # workers have as many, all together, or one each
    print(machine())
    for name in parser.parse_args().part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder))


if __name__ == "__main__":
    main()
