"""What `case.json` says of a case: its runs, their files and their explanations."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, ValidationError

from seg3dcam.engine.scales import Status
from seg3dcam.errors import InputError
from seg3dcam.explaining.reliability import BINS, Reliability
from seg3dcam.files import digest_of, read_small, write_json
from seg3dcam.job.folder import Name, is_link_free
from seg3dcam.scan import Scan

#: The file that holds a case's record.
NAME = "case.json"

#: A larger file, in bytes, is not read: it is no record.
_LARGEST = 200_000_000


class _Schema(BaseModel):
    """A part of a record. Unknown keys are accepted, and written back as they are."""

    model_config = ConfigDict(extra="allow")


class FileEntry(_Schema):
    """One file of a case: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


class RunEntry(_Schema):
    """One run: its settings, and the files of the case that it wrote.

    Attributes:
        key: a hash of everything that changes what is written: runs with the same key write the
            same files.
        job_key: a hash of the settings, the model and the scan's voxels. A run replaces an earlier
            run with the same one.
        job: the settings.
        files: all names, relative to the folder.
        scan_files: those of the scan's channels.
        prediction_files: that of the predicted labels, or those of the masks of each class.
        inputs: a code of the scan's files, of a run in a cohort; it finds a run up to date without
            reading them.
        empty: why there was nothing to explain, of a run without explanations.
    """

    key: str
    job_key: str
    job: dict[str, Any]
    files: list[Name]
    scan_files: list[Name] = []
    prediction_files: list[Name] = []
    inputs: str | None = None
    empty: str | None = None


# What must be right in an entry before an explanation can be read back from it. Anybody may have
# written the file, so these fields are checked. All others are read as they are, into the
# `Provenance` of `seg3dcam.explaining`, which has a default for each.


class TargetSchema(_Schema):
    """What was explained."""

    name: str
    class_index: Annotated[int, Field(ge=0)] | None
    score: float


class MethodSchema(_Schema):
    """The method that made the maps."""

    name: str


class LayerSchema(_Schema):
    """What one target layer gave."""

    status: Status
    spacing_mm: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)]


class VerdictSchema(_Schema):
    """What may be said of one layer's map; the fields are those of `Verdict`.

    A later version may know other findings and figures.
    """

    finding: str
    words: str
    figures: dict[str, Any] = {}
    full: bool = False


class ModelSchema(_Schema):
    """The network."""

    classes: Annotated[list[str], Field(min_length=1)]


#: Numbers of voxels, as `Reliability` counts them.
_Bins = Annotated[
    list[Annotated[FiniteFloat, Field(ge=0, le=1e15)]], Field(min_length=BINS, max_length=BINS)
]
_Row = Annotated[list[float], Field(min_length=4, max_length=4)]


class ScanSchema(_Schema):
    """Where the scan lies: its affine, (4, 4) voxel -> RAS mm."""

    affine: Annotated[list[_Row], Field(min_length=4, max_length=4)]


class Entry(_Schema):
    """One explanation: its files, its properties, and beside them its `Explanation.provenance`.

    Attributes:
        label: the target in words.
        name: the target as the names of the files have it.
        run: the key of the run that wrote it.
        raw_files: layer -> file of its raw map.
        region_file, truth_file: the files of its masks; None where it has none.
        cam_file: its CAM as a volume; None without one, and in cases of earlier versions.
        thumb_file: its small picture; None without one.
        pattern: where in the body its CAM lies, see `pattern_of`; None where it has no heat.
        reliability: what `Reliability` holds of the class, as lists; None without a truth.
        has_background, over_mask, only_against, of_component: as in `Explanation`.
        verdicts: layer -> what may be said of its map; empty in cases of earlier versions.
        found: what `findings` returns.
        scan, model, target, method, layers: of the provenance; None or empty for an explanation
            that `explain` did not make.
    """

    label: str
    name: str
    run: str
    raw_files: dict[str, Name] = {}
    region_file: Name | None = None
    truth_file: Name | None = None
    cam_file: Name | None = None
    thumb_file: Name | None = None
    pattern: Sequence[float] | None = None
    reliability: Annotated[list[_Bins], Field(min_length=3, max_length=3)] | None = None
    has_background: bool = True
    over_mask: bool = True
    only_against: list[str] = []
    of_component: bool = False
    verdicts: dict[str, VerdictSchema] = {}
    scan: ScanSchema | None = None
    model: ModelSchema | None = None
    target: TargetSchema | None = None
    method: MethodSchema | None = None
    layers: dict[str, LayerSchema] = {}
    found: dict[str, Any] = {}

    def reliable(self) -> Reliability | None:
        """Return how true the probabilities of the class are; None where that is unknown."""
        if self.reliability is None:
            return None
        return Reliability.of_lists(self.reliability)

    def figure(self, name: str) -> float | None:
        """Return a number of what was found; None where it is missing or unknown."""
        number = self.found.get(name)
        return float(number) if isinstance(number, int | float) else None


class Record(_Schema):
    """What a case holds: all runs, with their files and explanations.

    Attributes:
        seg3dcam: the version of the package that wrote it.
        case: a name of the scan that tells nothing about the patient.
        voxels_sha256: the hash of the scan's voxels, by which another scan is told from it.
        key, job: those of the last run.
        runs: from the first to the last.
        files: name -> size and SHA-256.
        explanations: of all runs.
    """

    seg3dcam: str
    case: str
    voxels_sha256: str
    key: str
    job: dict[str, Any]
    runs: list[RunEntry]
    files: dict[Name, FileEntry]
    explanations: list[Entry]


#: Keys of an entry that do not belong to the explanation's provenance.
_BESIDE = {*Entry.model_fields, "found"} - {"scan", "model", "target", "method", "layers"}


def provenance_of(entry: Entry) -> dict[str, Any]:
    """Return the provenance of an entry's explanation, as `Explanation.provenance` has it."""
    return {key: value for key, value in entry.model_dump().items() if key not in _BESIDE}


def read_record(folder: str | Path) -> Record:
    """Return what a folder's `case.json` says.

    Raises:
        InputError: there is none, or it is no record of a case; says what is wrong in it.
    """
    path = Path(folder) / NAME
    try:
        return Record.model_validate_json(read_small(path, _LARGEST))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}): name the folder of a case, which "
            "`seg3dcam explain` wrote to the end"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {f'{where}: ' * bool(where)}{first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def record_of(folder: str | Path) -> Record | None:
    """Return a folder's record; None where there is none, or none that can be read."""
    with contextlib.suppress(InputError):
        return read_record(folder)
    return None


def is_somebody_elses(folder: Path) -> bool:
    """Tell whether a folder has a `case.json` that is no record of a case, or is damaged."""
    return os.path.lexists(folder / NAME) and record_of(folder) is None


def listed_files(folder: Path) -> set[str]:
    """Return the names of all files that a folder's record lists."""
    return files_of(record_of(folder))


def files_of(record: Record | None) -> set[str]:
    """Return the names of all files that a record lists; none where there is no record."""
    return set() if record is None else {name for run in record.runs for name in run.files}


def run_with(record: Record | None, key: str) -> RunEntry | None:
    """Return the run with a key; None where there is none."""
    runs = [] if record is None else record.runs
    return next((run for run in runs if run.key == key), None)


def without_job(record: Record | None, job_key: str) -> Record | None:
    """Return a record without the runs of a job; None where no other run is left."""
    runs = [] if record is None else [run for run in record.runs if run.job_key != job_key]
    if record is None or not runs:
        return None
    keys, names = {run.key for run in runs}, {name for run in runs for name in run.files}
    return record.model_copy(
        update={
            "key": runs[-1].key,
            "job": runs[-1].job,
            "runs": runs,
            "files": {name: file for name, file in record.files.items() if name in names},
            "explanations": [entry for entry in record.explanations if entry.run in keys],
        }
    )


def unfinished(record: Record, job_key: str) -> Record:
    """Return a record in which the runs of a job count as not finished; files stay listed."""
    runs = [
        run.model_copy(update={"key": ""}) if run.job_key == job_key else run for run in record.runs
    ]
    keys = {run.key for run in runs}
    entries = [entry for entry in record.explanations if entry.run in keys]
    return record.model_copy(update={"key": "", "runs": runs, "explanations": entries})


def write_record(folder: Path, record: Record | None) -> None:
    """Write `case.json`, or remove it where there is no record."""
    if record is None:
        (folder / NAME).unlink(missing_ok=True)
    else:
        write_json(folder / NAME, record.model_dump())


def is_done(folder: str | Path, key: str, *, verify: bool = False) -> bool:
    """Tell whether a folder holds a complete run with this key, with all files as written.

    Args:
        verify: compare the content of the files too, not only their sizes.
    """
    folder = Path(folder)
    record = record_of(folder)
    run = run_with(record, key)
    if record is None or run is None:
        return False
    return not damaged(folder, record, run.files, verify=verify)


def damaged(
    folder: Path, record: Record, names: Iterable[str], *, verify: bool = False
) -> list[str]:
    """Return the files that are gone or are not what was written."""
    return [name for name in names if not _is_whole(folder, name, record.files.get(name), verify)]


def _is_whole(folder: Path, name: str, file: FileEntry | None, verify: bool) -> bool:
    path = folder / name
    if not is_link_free(folder, name):
        return False
    with contextlib.suppress(OSError):
        if file is None or not path.is_file() or path.stat().st_size != file.bytes:
            return False
        return not verify or digest_of(path) == file.sha256
    return False


def voxels_sha256(scan: Scan) -> str:
    """Return the hash of a scan's voxels, which does not depend on its place in the patient."""
    voxels = np.ascontiguousarray(scan.data.numpy())
    return hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()
