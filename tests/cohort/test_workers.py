"""Cases in worker processes, of which any may end at any time: nothing is lost or half-written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers_cohort import content_of, leftovers, write_cohort, write_fragile

from seg3dcam import cohort
from seg3dcam.cohort.plan import noted
from seg3dcam.errors import ConfigError, ModelError

pytestmark = pytest.mark.slow

GOOD = [f"case{number}" for number in range(6)]
SETTINGS = {"target": "lesion", "format": ["nifti"]}


def test_a_dead_worker_stops_nothing_and_changes_nothing(tmp_path):
    scans = write_cohort(tmp_path, GOOD, raises=["bad"], crashes=["worst"])
    model, killed = str(write_fragile(tmp_path)), []

    def kill_one(step, done, total):
        if done == 2 and not killed:
            child = multiprocessing.active_children()[0]
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    settings = {"model": model, "trust": True} | SETTINGS
    result = cohort.run(scans, out=tmp_path / "out", workers=2, progress=kill_one, **settings)
    assert killed
    assert sorted(result.done) == GOOD
    assert result.failed["bad"].endswith(": a scan that the network cannot take")
    assert "died 2 times" in result.failed["worst"]
    assert multiprocessing.active_children() == []
    assert leftovers(tmp_path / "out") == []

    # In this process the scan that ends it cannot be tried, and is known to have failed.
    alone = tmp_path / "alone"
    (scans / "worst.nii.gz").unlink()
    cohort.run(scans, out=alone, **settings)
    for name in GOOD:
        assert content_of(result.out, name) == content_of(alone, name)
    one, other = noted(result.out, "bad"), noted(alone, "bad")
    assert (one.code, one.error) == (other.code, other.error)


def test_a_rerun_with_workers_does_what_is_missing(tmp_path):
    scans = write_cohort(tmp_path, GOOD[:3])
    settings = {"model": str(tmp_path / "model.yaml"), "out": tmp_path / "out"} | SETTINGS
    first = cohort.run(scans, **settings)
    (first.out / "case1" / "case.json").unlink()
    again = cohort.run(scans, workers=2, **settings)
    assert again.done == ("case1",)
    assert again.skipped == ("case0", "case2")


def test_a_model_that_cannot_be_loaded_ends_the_run(tmp_path, monkeypatch):
    """It can be loaded here and not in a worker, as with a GPU that is too small."""
    scans = write_cohort(tmp_path, GOOD[:2])
    from seg3dcam.cohort import running

    given = running.model_of

    def loaded_and_gone(*args, **settings):
        model = given(*args, **settings)
        (tmp_path / "model.safetensors").unlink()
        return model

    monkeypatch.setattr(running, "model_of", loaded_and_gone)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        cohort.run(
            scans, model=str(tmp_path / "model.yaml"), out=tmp_path / "out", workers=2, **SETTINGS
        )
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("workers", "end", "times"), [(None, "TERM", 1), (2, "INT", 3)])
def test_what_is_interrupted_goes_on(tmp_path, workers, end, times):
    """However often it is interrupted: the first signal ends it, and it ends in order."""
    scans = write_cohort(tmp_path, [f"case{number:02d}" for number in range(30)])
    out, number = tmp_path / "out", signal.Signals[f"SIG{end}"]
    process, children = begun(scans, out, workers)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.03)
    said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "the same command goes on from there" in said[1]
    assert "Traceback" not in said[0] + said[1]
    assert gone(children)
    assert leftovers(out) == []
    complete = sorted(file.parent.name for file in out.glob("*/case.json"))
    assert 0 < len(complete) < 30
    assert (out / "cohort.csv").read_text(encoding="utf-8").count(",ok,") == len(complete)
    assert (out / "cohort.parquet").is_file()
    assert (out / "index.html").is_file()


def test_workers_end_with_their_parent(tmp_path):
    scans = write_cohort(tmp_path, [f"case{number:02d}" for number in range(30)])
    process, children = begun(scans, tmp_path / "out", 2)
    process.kill()
    process.communicate(timeout=60)
    assert children
    assert gone(children)


def test_bad_workers(tmp_path):
    with pytest.raises(ConfigError, match="workers"):
        cohort.run(tmp_path, model="m.yaml", out=tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match="give ray, too"):
        cohort.run(tmp_path, model="m.yaml", out=tmp_path / "out", gpus=0.5)


def begun(scans, out, workers):
    """Return a run as a process of its own, of which some cases are done, and its children."""
    command = [sys.executable, "-m", "seg3dcam", "cohort", str(scans), "--out", str(out)]
    command += ["--model", str(scans.parent / "model.yaml"), "--target", "lesion"]
    command += [] if workers is None else ["--workers", str(workers)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a shell that is no terminal, Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/case.json"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, psutil.Process(process.pid).children(recursive=True)


def gone(processes):
    """Tell whether processes end soon."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive
