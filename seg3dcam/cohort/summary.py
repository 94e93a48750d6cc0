"""What came of a cohort by now: which cases are done, the tables and the page of all."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from seg3dcam.cohort.calibration import (
    ClassReliability,
    RiskCoverage,
    of_classes,
    reliability_of_classes,
)
from seg3dcam.cohort.page import write_page
from seg3dcam.cohort.plan import CURRENT, OWN, IsWhole, PlannedCase, failures, now
from seg3dcam.cohort.table import summaries, write_tables
from seg3dcam.files import write_json
from seg3dcam.job.folder import OccupiedError, locked

#: So many seconds another part of the cohort may take for its tables.
_PATIENCE = 300

_LOST = "its folder does not hold what was written: something else deletes or writes there"


@dataclass(frozen=True)
class SummedUp:
    """What a cohort holds; the fields are those of `CohortResult`."""

    failed: Mapping[str, str]
    tables: tuple[Path, ...]
    page: Path
    risk_coverage: Mapping[str, RiskCoverage]
    reliability: Mapping[str, ClassReliability]


def sum_up(
    out: Path,
    plan: Sequence[PlannedCase],
    done: Sequence[str],
    failed: Mapping[str, str],
    method: str,
    is_whole: IsWhole,
) -> SummedUp:
    """Write the tables and the page of all cases, of other parts' cases too.

    Args:
        done, failed: what this run says of its cases.
        is_whole: see `planned`.
        method: the one whose explanations say what a confidence is worth.
    """
    with _alone(out / OWN):
        states = now(plan, out, failed, is_whole)
        # "Done" is a promise: it is looked for in the folder, and not taken from the run.
        lost = {one.name: _LOST for one in states if one.name in set(done) and one.state == "to do"}
        states = now(plan, out, {**failed, **lost}, is_whole)
        write_json(out / OWN / CURRENT, {o.name: o.code for o in states if o.state == "done"})
        found = summaries(out, states)
        entries = [entry for one in found for entry in one.of_method(method)]
        curves, reliable = of_classes(entries), reliability_of_classes(entries)
        tables = write_tables(out, found)
        page = write_page(out, found, curves, reliable)
        return SummedUp(failures(states), tables, page, curves, reliable)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one part of a cohort write its tables at a time; the last one has seen all others."""
    started = time.monotonic()
    while True:
        try:
            # Nothing here belongs to a case, so there is nothing that a killed run has to remove.
            with locked(folder, lambda place: [one.name for one in place.iterdir()]):
                yield
                return
        except OccupiedError:
            if time.monotonic() - started > _PATIENCE:
                raise
            time.sleep(0.2)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM: the first one has ended the run, and this ends it in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
