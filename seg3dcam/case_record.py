"""What `case.json` says of a case's runs, and explanations read back from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seg3dcam.case_folder import is_link_free
from seg3dcam.errors import InputError, nearest
from seg3dcam.explanation import Explanation
from seg3dcam.files import digest_of, plain, write_json
from seg3dcam.result import Status
from seg3dcam.scan import Scan, load_scan

#: What names a case's record.
NAME = "case.json"


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
    files: list[str]
    scan_files: list[str] = []
    prediction_files: list[str] = []


class Target(_Of):
    """What was explained."""

    name: str
    class_index: int | None
    score: float


class Method(_Of):
    """By which method."""

    name: str


class Layer(_Of):
    """What a target layer gave."""

    status: Status
    spacing_mm: tuple[float, ...]


class Model(_Of):
    """By which network."""

    classes: list[str]


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
    raw_files: dict[str, str] = {}
    region_file: str | None = None
    truth_file: str | None = None
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
    files: dict[str, File]
    explanations: list[Entry]


#: What an entry says beside its explanation's provenance.
_BESIDE = {*Entry.model_fields, "found"} - {"scan", "model", "target", "method", "layers"}


def provenance_of(entry: Entry) -> dict[str, Any]:
    """Return what an entry says of what its explanation came from."""
    return {key: value for key, value in entry.model_dump().items() if key not in _BESIDE}


def record_of(folder: str | Path) -> Record | None:
    """Return what a folder's `case.json` says; None where there is none that can be used."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = (Path(folder) / NAME).read_bytes()
        return Record.model_validate_json(content)
    return None


def is_somebody_elses(folder: Path) -> bool:
    """Tell whether a folder's `case.json` is another program's."""
    path = folder / NAME
    if path.is_dir():
        return True
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(content, dict) and "seg3dcam" not in content
    return False


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
    unlike = entry.raw_files.keys() != entry.layers.keys()
    if target is None or method is None or model is None or unlike:
        raise InputError(
            f"{folder / NAME}: the entry of {entry.label!r} lacks its target, method, model or "
            "layers: it was not made by explain()"
        )
    masks = [file for file in (entry.region_file, entry.truth_file) if file is not None]
    names = [*entry.raw_files.values(), *run.prediction_files, *masks]
    names += run.scan_files if scan is None else []
    for file in names:
        if not is_link_free(folder, file) or file not in run.files:
            raise InputError(f"{folder / NAME}: file {file!r} lies outside of the case")
    if broken := damaged(folder, record, names, verify=True):
        raise InputError(
            f"{folder}: {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} gone, or not as "
            "written. Explain the scan again"
        )
    maps = {layer: _volume(folder / file) for layer, file in entry.raw_files.items()}
    first = nib.load(folder / next(iter(entry.raw_files.values())))
    found = _scan(folder, record, run, entry, scan, first.affine)
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
        native_spacing={layer: of.spacing_mm for layer, of in entry.layers.items()},
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
        return Record.model_validate_json(path.read_bytes())
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
    names = [entry.name for entry in record.explanations]
    if name is None and len(names) == 1:
        return record.explanations[0]
    if name is None:
        raise InputError(f"{folder} holds {len(names)} explanations: name one of {names}")
    by_name = [entry for entry in record.explanations if entry.name == name]
    found = by_name or [entry for entry in record.explanations if entry.label == name]
    if len(found) > 1:
        raise InputError(f"{folder} holds several of {name!r}: name one of {names}")
    if not found:
        raise InputError(f"{folder} holds no explanation {name!r}: {nearest(name, names)}")
    return found[0]


def _scan(
    folder: Path,
    record: Record,
    run: Run,
    entry: Entry,
    given: Scan | str | Path | None,
    affine: np.ndarray,
) -> Scan:
    """Return the scan of a case: the one that is given, or the case's own copy."""
    if given is None and not run.scan_files:
        raise InputError(
            f"{folder} holds no copy of the scan, as the format slicer does: give it as scan="
        )
    if given is None:
        scan = load_scan([folder / file for file in run.scan_files])
        place = affine if entry.scan is None else np.array(entry.scan.affine)
        scan = Scan(scan.data, place, record.case)
    else:
        scan = load_scan(given)
    if voxels_sha256(scan) != record.voxels_sha256:
        raise InputError(f"{scan.name} is another scan than that of {folder}: its voxels differ")
    if not np.allclose(scan.affine, affine, atol=1e-3):
        raise InputError(f"{scan.name} lies elsewhere in the patient than the maps in {folder}")
    return scan


def _volume(path: Path) -> torch.Tensor:
    """Return the voxels of one of our own files, (X, Y, Z) float32."""
    return torch.from_numpy(np.asarray(nib.load(path).dataobj, dtype=np.float32))


def _prediction(folder: Path, run: Run, classes: Sequence[str], exclusive: bool) -> torch.Tensor:
    """Return the masks (K, X, Y, Z) of all classes."""
    volumes = [_volume(folder / file) for file in run.prediction_files]
    if len(volumes) > 1 or not exclusive:
        return torch.stack([volume > 0 for volume in volumes])
    return torch.stack([volumes[0] == index for index in range(len(classes))])
