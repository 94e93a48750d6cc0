"""What `case.json` says of a case's runs, and explanations read back from it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from seg3dcam.engine.layer_map import Status
from seg3dcam.errors import InputError, nearest
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.files import digest_of, plain, read_small, write_json
from seg3dcam.files.readers import FRAMES, Frame
from seg3dcam.job.folder import Name, is_link_free
from seg3dcam.scan import Scan, load_scan

#: What names a case's record.
NAME = "case.json"

#: Bytes of a record, at most.
_LARGEST = 200_000_000


class _Of(BaseModel):
    model_config = ConfigDict(extra="allow")


class File(_Of):
    """One file of a case: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


class Run(_Of):
    """One run: what it was asked, and which files of the case are its own.

    Attributes:
        key: of everything that changes what is written; the same key, the same files.
        job_key: of the settings, the model and the scan's voxels. A run of the same job takes
            another's place.
        job: the settings.
        files: names, relative to the folder.
        scan_files: of them, the scan's channels.
        prediction_files: of them, the predicted labels, or the mask of each class.
    """

    key: str
    job_key: str
    job: dict[str, Any]
    files: list[Name]
    scan_files: list[Name] = []
    prediction_files: list[Name] = []


class Target(_Of):
    """What was explained."""

    name: str
    class_index: Annotated[int, Field(ge=0)] | None
    score: float


class Method(_Of):
    """By which method."""

    name: str


class Layer(_Of):
    """What a target layer gave."""

    status: Status
    spacing_mm: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)]


class Model(_Of):
    """By which network."""

    classes: Annotated[list[str], Field(min_length=1)]


_Row = Annotated[list[float], Field(min_length=4, max_length=4)]


class Place(_Of):
    """Where the scan lies."""

    affine: Annotated[list[_Row], Field(min_length=4, max_length=4)]


class Entry(_Of):
    """One explanation, with its `Explanation.provenance`.

    Attributes:
        label, name: of the target, in words and in names of files.
        run: its run's key.
        raw_files: layer -> file of its raw map.
        region_file, truth_file: masks, where there are any.
    """

    label: str
    name: str
    run: str
    raw_files: dict[str, Name] = {}
    region_file: Name | None = None
    truth_file: Name | None = None
    has_background: bool = True
    over_mask: bool = True
    only_against: list[str] = []
    of_component: bool = False
    scan: Place | None = None
    model: Model | None = None
    target: Target | None = None
    method: Method | None = None
    layers: dict[str, Layer] = {}


class Record(_Of):
    """What a case holds, run by run.

    Attributes:
        seg3dcam: the version that wrote it.
        case: the scan's name for everybody's eyes.
        voxels_sha256: which scan it is.
        key, job: of the last run.
        files: name -> size and SHA-256.
    """

    seg3dcam: str
    case: str
    voxels_sha256: str
    key: str
    job: dict[str, Any]
    runs: list[Run]
    files: dict[Name, File]
    explanations: list[Entry]


#: What an entry says beside its explanation's provenance.
_BESIDE = {*Entry.model_fields, "found"} - {"scan", "model", "target", "method", "layers"}


def provenance_of(entry: Entry) -> dict[str, Any]:
    """Return what an entry says of what its explanation came from."""
    return {key: value for key, value in entry.model_dump().items() if key not in _BESIDE}


def record_of(folder: str | Path) -> Record | None:
    """Return what a folder's `case.json` says; None where there is none that can be used."""
    with contextlib.suppress(InputError):
        return _record(Path(folder))
    return None


def is_somebody_elses(folder: Path) -> bool:
    """Tell whether a folder has a `case.json` that is no record: another program's, or damaged."""
    return os.path.lexists(folder / NAME) and record_of(folder) is None


def listed_files(folder: Path) -> set[str]:
    """Return the names of the files of a folder's complete runs."""
    record = record_of(folder)
    return set() if record is None else {name for run in record.runs for name in run.files}


def run_with(record: Record | None, key: str) -> Run | None:
    """Return the run of a key."""
    runs = [] if record is None else record.runs
    return next((run for run in runs if run.key == key), None)


def without_job(record: Record | None, job_key: str) -> Record | None:
    """Return a record without the runs of a job; None where nothing else is in it."""
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
    """Return a record in which the runs of a job are not complete; their files stay listed."""
    runs = [
        run.model_copy(update={"key": ""}) if run.job_key == job_key else run for run in record.runs
    ]
    keys = {run.key for run in runs}
    entries = [entry for entry in record.explanations if entry.run in keys]
    return record.model_copy(update={"key": "", "runs": runs, "explanations": entries})


def write_record(folder: Path, record: Record | None) -> None:
    """Write `case.json`; without a record there is none."""
    if record is None:
        (folder / NAME).unlink(missing_ok=True)
    else:
        write_json(folder / NAME, record.model_dump())


def is_done(folder: str | Path, key: str, *, verify: bool = False) -> bool:
    """Tell whether a folder holds a complete run with this key, with every file as it was written.

    Args:
        verify: look at the files' content, not at their sizes alone.
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


def _is_whole(folder: Path, name: str, file: File | None, verify: bool) -> bool:
    path = folder / name
    if not is_link_free(folder, name):
        return False
    with contextlib.suppress(OSError):
        if file is None or not path.is_file() or path.stat().st_size != file.bytes:
            return False
        return not verify or digest_of(path) == file.sha256
    return False


def voxels_sha256(scan: Scan) -> str:
    """Return a hash of a scan's voxels alone: whose it is, wherever its header places it."""
    voxels = np.ascontiguousarray(scan.data.numpy())
    return hashlib.sha256(repr(voxels.shape).encode() + voxels.tobytes()).hexdigest()


# ----------------------------------------------------------------------------- read back


def load_explanation(
    folder: str | Path, name: str | None = None, *, scan: Scan | str | Path | None = None
) -> Explanation:
    """Read an explanation of a case back, whole: maps, masks, figures and what they came from.

    Args:
        folder: of a case that has the format "nifti".
        name: of several explanations, which one: its `name` or `label` in `case.json`.
        scan: the scan, where the case holds no copy of it, as the format "slicer" does.

    Raises:
        InputError: no case, no such explanation, several and no name, files that are gone or are
            not what was written, or another scan.

    Example:
        >>> from seg3dcam.demo.scan import write_demo_scan  # doctest: +SKIP
        >>> load_explanation("seg3dcam_out/scan_1a2b3c4d", "lesion").peak()  # doctest: +SKIP
        ((12, 40, 31), (-9.5, 12.0, 30.0))
    """
    folder = Path(folder)
    record = _record(folder)
    entry = _entry(record, name, folder)
    run = run_with(record, entry.run)
    if run is None or not entry.raw_files:
        raise InputError(
            f"{folder}: of {entry.label!r} no raw maps were written, which the format nifti holds. "
            "Explain the scan again with --format nifti"
        )
    target, method, model = entry.target, entry.method, entry.model
    if (
        target is None
        or method is None
        or model is None
        or (target.class_index or 0) >= len(model.classes)
        or entry.raw_files.keys() != entry.layers.keys()
    ):
        raise InputError(
            f"{folder / NAME}: the entry of {entry.label!r} lacks its target, method, model or "
            "layers: it was not made by explain()"
        )
    masks = [file for file in (entry.region_file, entry.truth_file) if file is not None]
    names = [*entry.raw_files.values(), *run.prediction_files, *masks]
    copies = next((one.scan_files for one in (run, *record.runs) if one.scan_files), [])
    names += copies if scan is None else []
    for file in names:
        if not is_link_free(folder, file) or file not in record.files:
            raise InputError(f"{folder / NAME}: file {file!r} lies outside of the case")
    if broken := damaged(folder, record, names, verify=True):
        raise InputError(
            f"{folder}: {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} gone, or not as "
            "written. Explain the scan again"
        )
    maps = {layer: _volume(folder / file) for layer, file in entry.raw_files.items()}
    first = nib.load(folder / next(iter(entry.raw_files.values())))
    given = scan if scan is None or isinstance(scan, Scan) else load_scan(scan, frame=_frame(run))
    found = _scan(folder, record, copies, entry, given, first.affine)
    classes = model.classes
    return Explanation(
        scan=found,
        maps=maps,
        status={layer: of.status for layer, of in entry.layers.items()},
        prediction=_prediction(folder, run, classes, entry.has_background),
        class_names=classes,
        target=target.name,
        method=method.name,
        class_index=target.class_index,
        score=target.score,
        native_spacing={layer: tuple(of.spacing_mm) for layer, of in entry.layers.items()},
        label=entry.label,
        provenance=plain(provenance_of(entry)),
        truth=None if entry.truth_file is None else _volume(folder / entry.truth_file).bool(),
        region=None if entry.region_file is None else _volume(folder / entry.region_file).bool(),
        has_background=entry.has_background,
        over_mask=entry.over_mask,
        only_against=entry.only_against,
        of_component=entry.of_component,
    )


def _record(folder: Path) -> Record:
    """Return a case's record; InputError, with what is wrong in it, where it cannot be used."""
    path = folder / NAME
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


def _entry(record: Record, name: str | None, folder: Path) -> Entry:
    """Return one explanation's entry, by its name, or by its label where that is one's alone."""
    # Runs in several formats have one name for the very same explanation: take one with maps.
    named = {entry.name: entry for entry in record.explanations if not entry.raw_files}
    named |= {entry.name: entry for entry in record.explanations if entry.raw_files}
    names = list(named)
    if name is None and len(names) == 1:
        return named[names[0]]
    if name is None:
        raise InputError(f"{folder} holds {len(names)} explanations: name one of {names}")
    labelled = [entry for entry in named.values() if entry.label == name]
    if name not in named and len(labelled) > 1:
        raise InputError(f"{folder} holds several of {name!r}: name one of {names}")
    if name not in named and not labelled:
        raise InputError(f"{folder} holds no explanation {name!r}: {nearest(name, names)}")
    return named[name] if name in named else labelled[0]


def _frame(run: Run) -> Frame | None:
    """Return the form of a NIfTI header that a run read its scan by."""
    return next((frame for frame in FRAMES if frame == run.job.get("frame")), None)


def _scan(
    folder: Path,
    record: Record,
    copies: Sequence[str],
    entry: Entry,
    given: Scan | None,
    affine: np.ndarray,
) -> Scan:
    """Return the scan of a case: the one that is given, or the case's own copy."""
    if given is None and not copies:
        raise InputError(
            f"{folder} holds no copy of the scan, as the format slicer does: give it as scan="
        )
    if given is None:
        scan = load_scan([folder / file for file in copies])
        place = affine if entry.scan is None else np.array(entry.scan.affine)
        scan = Scan(scan.data, place, record.case)
    else:
        scan = given
    if voxels_sha256(scan) != record.voxels_sha256:
        raise InputError(f"{scan.name} is another scan than that of {folder}: its voxels differ")
    if not np.allclose(scan.affine, affine, atol=1e-3):
        raise InputError(f"{scan.name} lies elsewhere in the patient than the maps in {folder}")
    return scan


def _volume(path: Path) -> torch.Tensor:
    """Return the voxels of one of our own files, (X, Y, Z) float32."""
    return torch.from_numpy(np.ascontiguousarray(nib.load(path).dataobj, dtype=np.float32))


def _prediction(folder: Path, run: Run, classes: Sequence[str], exclusive: bool) -> torch.Tensor:
    """Return the masks (K, X, Y, Z) of all classes."""
    volumes = [_volume(folder / file) for file in run.prediction_files]
    if len(volumes) != (len(classes) if len(volumes) > 1 or not exclusive else 1):
        raise InputError(
            f"{folder / NAME}: {len(volumes)} files of a prediction, and {len(classes)} classes"
        )
    if len(volumes) > 1 or not exclusive:
        return torch.stack([volume > 0 for volume in volumes])
    return torch.stack([volumes[0] == index for index in range(len(classes))])
