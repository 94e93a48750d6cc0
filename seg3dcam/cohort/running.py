"""Explain many scans, one by one: what fails is written down, and stops nothing.

    result = run("imagesTs", model="liver.yaml", out="explained")
    result.failed                # name of a case -> why
    result.tables[0]             # explained/cohort.csv: a row for each case, class, layer, method

Every case is a job of its own in a folder of its own, so what is done stays, whenever the run ends.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seg3dcam.checks import check_whole_number
from seg3dcam.cohort.cases import read_cases
from seg3dcam.cohort.plan import PlannedCase, check_settings, failure_file, log_file, planned
from seg3dcam.cohort.table import write_tables
from seg3dcam.errors import ConfigError
from seg3dcam.files import check_writable, write_json
from seg3dcam.job.run import advised, check_before_loading, model_of, run_with_model
from seg3dcam.job.settings import Job
from seg3dcam.models import SegModel
from seg3dcam.progress import Progress, silent
from seg3dcam.settings import validate

#: Settings of a job that each case has for itself.
_OF_A_CASE = ("scan", "truth", "out", "case")


@dataclass(frozen=True)
class CohortResult:
    """What a run has done.

    Attributes:
        out: its folder.
        done: names of the cases that this run has explained.
        skipped: names of those that were up to date.
        failed: name -> why, also of those that failed before and were not tried again.
        tables: the files with a row for each case, class, layer and method.
    """

    out: Path
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: Mapping[str, str]
    tables: tuple[Path, ...]


def run(
    source: str | Path,
    *,
    model: str,
    out: str | Path,
    trust: bool = False,
    retry_failed: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> CohortResult:
    """Explain all scans of a cohort that are not explained yet.

    Args:
        source: see `read_cases`.
        model: see `Job.model`.
        out: gets a folder for every case, `cohort.csv` and `cohort.parquet`, and the folder
            "cohort" with a log for every case.
        trust: allow the model's own Python code to run.
        retry_failed: try cases again that failed before, with the same files and settings.
        num_parts, part_id: every `num_parts`-th case from number `part_id` on, counted from 0, such
            as for an array of jobs on a cluster.
        progress: called with ("cases", done, total).
        say: called with a line for every case that failed, and where a recommended layer is used.
        settings: more settings of a `Job`.

    Raises:
        ConfigError: illegal settings, a wrong source, or an output folder of other settings; before
            any work begins.
        ModelError: the model cannot be loaded.

    Example:
        >>> result = run("imagesTs", model="liver.yaml", out="explained")  # doctest: +SKIP
        >>> len(result.done), result.failed  # doctest: +SKIP
        (40, {})
    """
    check_whole_number("num_parts", num_parts)
    check_whole_number("part_id", part_id, least=0)
    if part_id >= num_parts:
        raise ConfigError(f"part_id {part_id}: legal are 0 to {num_parts - 1}")
    if own := [name for name in _OF_A_CASE if name in settings]:
        raise ConfigError(f"{own[0]}: every case of a cohort has its own")
    template = validate({"scan": "of the case", "model": model, **settings}, Job, "cohort")
    check_before_loading(template)
    folder = check_writable(out)
    cases = read_cases(source)
    loaded = model_of(template, trust=trust)
    # What is recommended for the model takes the place of "auto" before cases are known by it.
    template, advice = advised(template, loaded)
    if advice and say is not None:
        say(advice)
    check_settings(folder, template, loaded)
    plan = planned(cases, template, loaded, folder)
    done, failed = [], {one.name: one.error for one in plan if one.state == "failed"}
    waiting = [
        one
        for one in plan[part_id::num_parts]
        if one.state == "to do" or (one.state == "failed" and retry_failed)
    ]
    for number, one in enumerate(waiting):
        (progress or silent)("cases", number, len(waiting))
        failed.pop(one.name, None)
        error = _explained(one, loaded, folder)
        if error is None:
            done.append(one.name)
        else:
            failed[one.name] = error
            if say is not None:
                say(f"{one.name} failed: {error}")
    skipped = tuple(one.name for one in plan if one.state == "done")
    return CohortResult(folder, tuple(done), skipped, failed, write_tables(folder, plan, failed))


def _explained(one: PlannedCase, model: SegModel, out: Path) -> str | None:
    """Explain a case and keep its log; return why it failed, None if it did not."""
    start, lines = time.perf_counter(), [f"begun {time.strftime('%Y-%m-%d %H:%M:%S')}"]
    error = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            run_with_model(one.job, model, inputs=one.code, say=lines.append)
        except Exception as raised:
            # Whatever is wrong with one scan must not stop the others.
            error = str(raised) or type(raised).__name__
            trace = traceback.format_exc()
    lines += [f"{w.category.__name__}: {w.message}" for w in said]
    if error is None:
        failure_file(out, one.name).unlink(missing_ok=True)
    else:
        lines.append(trace)
        write_json(failure_file(out, one.name), {"code": one.code, "error": error})
    seconds = time.perf_counter() - start
    lines.append(f"{'done' if error is None else 'failed'} after {seconds:.1f} s")
    log_file(out, one.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return error
