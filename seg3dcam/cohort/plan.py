"""What of a cohort is to be done, from the names of its files and the records that are there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from seg3dcam.cohort.cases import CohortCase
from seg3dcam.errors import ConfigError, InputError, some
from seg3dcam.files import read_small, write_json
from seg3dcam.files.readers import stem
from seg3dcam.files.remote import Place
from seg3dcam.job.checks import check_apart
from seg3dcam.job.formats import FORMATS
from seg3dcam.job.keys import cohort_code, inputs_code, settings_of
from seg3dcam.job.record import Record, damaged, record_of
from seg3dcam.job.settings import Job
from seg3dcam.models import SegModel

#: The folder, in that of the output, that holds what belongs to no single case.
OWN = "cohort"

#: Names in the output folder that no case may have.
RESERVED = (OWN, "group", "cohort.csv", "cohort.parquet", "index.html")

#: The file that says by which code each case is known that is done.
CURRENT = "current.json"

#: The file in it with the settings of all cases.
SETTINGS = "settings.json"

State = Literal["to do", "done", "failed"]

#: So many cases are looked at for the size of one.
_SAMPLE = 20

#: No case takes so many seconds.
_LONGEST = 1e9

#: The seconds of so many runs of a case are kept, the last ones.
_RUNS = 20

#: A larger file of ours, in bytes, is none.
_LARGEST = 1_000_000


@dataclass(frozen=True)
class PlannedCase:
    """A case, and whether it has to be done.

    Attributes:
        case: its files.
        job: what is done for it.
        code: of its files, the model and the settings: it is up to date with the same one.
        state: "failed" for one that failed with this code.
        error: why it failed.
        seconds: that it took to explain it, once it is done; None where nobody has noted it.
    """

    case: CohortCase
    job: Job
    code: str
    state: State
    error: str = ""
    seconds: float | None = None

    @property
    def name(self) -> str:
        return self.case.name


#: Tells whether files of a case (its name, its record, the files' names) are there.
IsWhole = Callable[[str, Record, Iterable[str]], bool]


def planned(
    cases: Sequence[CohortCase],
    template: Job,
    model: SegModel,
    out: Path,
    is_whole: IsWhole | None = None,
) -> tuple[PlannedCase, ...]:
    """Return what is to be done.

    Args:
        template: the job of every case, but for its scan, truth, folder and name.
        out: has a folder for every case.
        is_whole: None looks for the files in `out`.

    Raises:
        ConfigError: a case would write where something else is kept, or has other channels than the
            model takes.
    """
    _check_channels(cases, model)
    for case in cases:
        if case.name.lower() in RESERVED:
            raise ConfigError(
                f"the case {case.name!r}: this name is kept for the cohort in the output folder; "
                "name it otherwise, in a table with a column 'case'"
            )
        check_apart(out / case.name, [str(file) for file in case.files if isinstance(file, Path)])
    code = cohort_code(model, template)
    found = []
    for case in cases:
        job = job_of(case, template, out)
        own = inputs_code(job, code)
        found.append(_with_state(PlannedCase(case, job, own, "to do"), out, is_whole))
    return tuple(found)


def _check_channels(cases: Sequence[CohortCase], model: SegModel) -> None:
    """Raise ConfigError where cases of several volumes have not one for each channel of the model.

    One volume may hold all channels, which is found out when it is read. Slices are no volumes.
    """
    wanted = model.scan_channels or model.in_channels
    volumes = {case.name: sum(stem(file) != file.name for file in case.files) for case in cases}
    other = [
        f"{name} ({count})" for name, count in volumes.items() if count > 1 and count != wanted
    ]
    if wanted is not None and other:
        takes = f"{wanted} channel{'s' * (wanted > 1)}"
        raise ConfigError(f"the model takes {takes}; other numbers of files have {some(other)}")


def job_of(case: CohortCase, template: Job, out: Path) -> Job:
    """Return the job of one case."""
    return template.model_copy(
        update={
            "scan": [str(file) for file in case.files],
            "truth": None if case.truth is None else str(case.truth),
            "out": str(out / case.name),
            "case": case.name,
        }
    )


def check_settings(out: Path, template: Job, model: SegModel) -> None:
    """Keep the settings of a cohort, or raise ConfigError where the folder has others.

    A model is known by its name. Where it has other weights than before, all cases are to be done.
    """
    path, now = out / OWN / SETTINGS, _settings(template, model)
    before = _read(path)
    if not before:
        write_json(path, now)
        return
    other = [key for key in now if before.get(key) != now[key]]
    if other:
        shown = [f"{key}: {before.get(key)!r} there, {now[key]!r} now" for key in other]
        raise ConfigError(
            "the output folder holds a cohort of other settings: choose another one, or give the "
            "same:\n  " + some(shown, 10, "\n  ")
        )


def to_do(plan: Sequence[PlannedCase], *, retry_failed: bool) -> list[PlannedCase]:
    """Return the cases that are explained now."""
    return [one for one in plan if one.state == "to do" or (one.state == "failed" and retry_failed)]


def now(
    plan: Sequence[PlannedCase],
    out: Path,
    failed: Mapping[str, str],
    is_whole: IsWhole | None = None,
) -> tuple[PlannedCase, ...]:
    """Return a plan with the states that cases have by now, other parts' cases too.

    Args:
        failed: name -> why a case of this run failed, whether it is tried again or not.
        is_whole: as for `planned`.
    """
    found = []
    for one in plan:
        current = _with_state(one, out, is_whole)
        if current.state != "done" and one.name in failed:
            current = replace(current, state="failed", error=failed[one.name])
        found.append(current)
    return tuple(found)


def failures(plan: Sequence[PlannedCase]) -> dict[str, str]:
    """Return name -> why of all cases that failed."""
    return {one.name: one.error for one in plan if one.state == "failed"}


def plan_in_words(
    plan: Sequence[PlannedCase],
    waiting: Sequence[PlannedCase],
    classes: int,
    out: Path,
    free: int | None,
) -> str:
    """Return how many cases are done and to be done, and what that takes of the disk.

    Args:
        waiting: the cases that are explained now.
        classes: how many classes the model has.
        out: has the records of the cases.
        free: how many bytes are free where the cases go; None where that is unknown.
    """
    states = Counter(one.state for one in plan)
    words = f"{len(plan)} cases: {states['done']} done, {len(waiting)} to do"
    if left := states["failed"] - sum(one.state == "failed" for one in waiting):
        words += f", {left} failed before (to try them again: --retry-failed)"
    if not waiting:
        return words
    each, known = _size_of_a_case(plan, waiting, classes, out)
    return (
        f"{words}. {', '.join(waiting[0].job.formats)}: {'' if known else 'at most about '}"
        f"{_bytes(each)} for a case, {_bytes(each * len(waiting))} in all"
        + ("" if free is None else f"; {_bytes(free)} are free")
    )


def _size_of_a_case(
    plan: Sequence[PlannedCase], waiting: Sequence[PlannedCase], classes: int, out: Path
) -> tuple[float, bool]:
    """Return the bytes of a case, and whether they are those of cases that are done."""
    done = _spread([one for one in plan if one.state == "done"])
    records = [record for one in done if (record := record_of(out / one.name))]
    if records:
        return mean(sum(file.bytes for file in r.files.values()) for r in records), True
    job = waiting[0].job
    targets = job.target if isinstance(job.target, list) else [job.target]
    explanations = (max(1, classes - 1) if job.target is None else len(targets)) * len(job.methods)
    of_a_voxel = explanations * sum(FORMATS[name].size for name in job.formats)
    voxels = mean(_voxels(one.case.files[0]) for one in _spread(waiting))
    return of_a_voxel * voxels + sum(FORMATS[name].fixed for name in job.formats), False


def _spread(cases: Sequence[PlannedCase]) -> Sequence[PlannedCase]:
    return cases[:: max(1, len(cases) // _SAMPLE)]


def _voxels(file: Place) -> float:
    """Return how many voxels a scan has; of other files than NIfTI two bytes count as one."""
    try:
        return float(np.prod(nib.load(file).shape[:3]))
    except (ImageFileError, OSError, TypeError):  # the last one of a file that lies elsewhere
        inside = file.iterdir() if file.is_dir() else [file]
        return sum(one.stat().st_size for one in inside) / 2


def _bytes(count: float) -> str:
    """Return a number of bytes in words.

    >>> _bytes(31_400_000), _bytes(2e12)
    ('31 MB', '2 TB')
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.2g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def note_file(out: Path, name: str) -> Path:
    """Return the file that says how a case has ended."""
    return out / OWN / f"{name}.ended.json"


@dataclass(frozen=True)
class Note:
    """How a case has ended when it was last tried.

    Attributes:
        code: see `PlannedCase`.
        error: why it failed; empty where it did not.
        seconds: key of a run in the case's record -> the seconds that it took.
    """

    code: str = ""
    error: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def noted(out: Path, name: str) -> Note:
    """Return how a case has ended; nothing where no note is there, or what is there is none."""
    found = _read(note_file(out, name))
    code, error, seconds = (found.get(key) for key in ("code", "error", "seconds"))
    if not isinstance(code, str) or not isinstance(error, str) or not isinstance(seconds, dict):
        return Note()
    return Note(
        code,
        error.encode("utf-8", "replace").decode(),
        {
            key: float(took)
            for key, took in seconds.items()
            if isinstance(took, int | float) and 0 <= took < _LONGEST
        },
    )


def note_ended(
    out: Path, one: PlannedCase, error: str = "", took: Mapping[str, float] | None = None
) -> None:
    """Write down how a case has ended.

    One that failed is not tried again until its files or settings change.

    Args:
        error: why it failed.
        took: the key of a run that was made -> its seconds; those of earlier runs are kept.
    """
    seconds = {**noted(out, one.name).seconds, **(took or {})}
    last = dict(list(seconds.items())[-_RUNS:])
    write_json(note_file(out, one.name), asdict(Note(one.code, error, last)))


def log_file(out: Path, name: str) -> Path:
    """Return the log of a case."""
    return out / OWN / f"{name}.log"


def _settings(template: Job, model: SegModel) -> dict[str, Any]:
    """Return the settings in the form in which JSON gives them back."""
    settings = settings_of(template) | {"model": model.name}
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def _with_state(one: PlannedCase, out: Path, is_whole: IsWhole | None) -> PlannedCase:
    """Return a case with its state by now."""
    record, note = record_of(out / one.name), noted(out, one.name)
    if record is not None:
        run = next((run for run in record.runs if run.inputs == one.code and run.key), None)
        if run is not None and (
            not damaged(out / one.name, record, run.files)
            if is_whole is None
            else is_whole(one.name, record, run.files)
        ):
            return replace(one, state="done", error="", seconds=note.seconds.get(run.key))
    if note.error and note.code == one.code:
        return replace(one, state="failed", error=note.error, seconds=None)
    return replace(one, state="to do", error="", seconds=None)


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of ours says; nothing where it is missing or cannot be read."""
    try:
        content = json.loads(read_small(path, _LARGEST))
    except (OSError, ValueError, RecursionError, InputError):
        return {}
    return content if isinstance(content, dict) else {}
