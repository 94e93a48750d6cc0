"""How a run of a cohort ends when it is disturbed again and again."""

from __future__ import annotations

import signal
import time

import pytest
from helpers_cohort import leftovers, write_cohort
from test_workers import begun, gone


@pytest.mark.slow
def test_many_signals_end_it_as_one_does(tmp_path):
    scans = write_cohort(tmp_path, [f"case{number:02d}" for number in range(30)])
    out = tmp_path / "out"
    process, children = begun(scans, out, 2)
    for _ in range(6):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said[0] + said[1]
    assert gone(children)
    assert leftovers(out) == []
    for name in ("cohort.csv", "cohort.parquet", "index.html"):
        assert (out / name).is_file()
