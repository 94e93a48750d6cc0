"""A run that is killed at any moment: what was complete stays, and the next run does the rest."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import pytest
from helpers_cohort import content_of, leftovers, timeless, write_cohort

from seg3dcam import cohort
from seg3dcam.job.record import damaged, read_record

NAMES = [f"case{number:02d}" for number in range(30)]
SETTINGS = {"target": "lesion", "format": ["nifti"]}


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times(tmp_path):
    scans = write_cohort(tmp_path, NAMES)
    settings = {"model": str(tmp_path / "model.yaml")} | SETTINGS
    start = time.perf_counter()
    whole = cohort.run(scans, out=tmp_path / "whole", **settings)
    seconds = time.perf_counter() - start
    assert len(whole.done) == len(NAMES)

    out, random = tmp_path / "out", np.random.default_rng(0)
    # A process that is forked has everything imported, so that it is killed at its work.
    context = multiprocessing.get_context("fork")
    complete: dict[str, int] = {}
    for _ in range(20):
        process = context.Process(target=cohort.run, args=(scans,), kwargs={"out": out, **settings})
        process.start()
        process.join(random.uniform(0.02, seconds / 8))
        process.kill()
        process.join()
        now = {file.parent.name: file.stat().st_mtime_ns for file in out.glob("*/case.json")}
        for name in now:
            record = read_record(out / name)
            assert not damaged(out / name, record, record.files, verify=True)
        # What was complete has not been written again.
        assert {name: now[name] for name in complete} == complete
        complete = now
    assert complete

    last = cohort.run(scans, out=out, **settings)
    assert not last.failed
    assert set(last.skipped) >= set(complete)
    assert sorted([*last.done, *last.skipped]) == NAMES
    assert leftovers(out) == []
    for name in NAMES:
        assert content_of(out, name) == content_of(whole.out, name)
    for table in ("cohort.csv", "index.html"):
        contents = [(folder / table).read_bytes() for folder in (out, whole.out)]
        assert timeless(table, contents[0]) == timeless(table, contents[1])
