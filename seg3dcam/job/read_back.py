"""An explanation read back from a case: its maps, masks, figures and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch

from seg3dcam.errors import InputError, nearest
from seg3dcam.evaluate.verdict import verdict_of
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.files import plain
from seg3dcam.files.readers import FRAMES, Frame
from seg3dcam.geometry import same_grid
from seg3dcam.job.folder import is_link_free
from seg3dcam.job.record import (
    NAME,
    Entry,
    MethodSchema,
    ModelSchema,
    Record,
    RunEntry,
    TargetSchema,
    damaged,
    provenance_of,
    read_record,
    run_with,
    voxels_sha256,
)
from seg3dcam.scan import Scan, load_scan


def load_explanation(
    folder: str | Path, name: str | None = None, *, scan: Scan | str | Path | None = None
) -> Explanation:
    """Read an explanation back from a case: its maps, masks, figures and provenance.

    Args:
        folder: the folder of a case that was written with the format "nifti".
        name: which explanation, by its `name` or `label` in `case.json`; not needed for one alone.
        scan: the scan; not needed where the case holds a copy, which the format "slicer" writes.

    Raises:
        InputError: there is no case, or no such explanation; several, and no name is given; files
            are gone or were changed; or the scan is another one.

    Example:
        >>> from seg3dcam.demo.scan import write_demo_scan  # doctest: +SKIP
        >>> load_explanation("seg3dcam_out/scan_1a2b3c4d", "lesion").peak()  # doctest: +SKIP
        ((12, 40, 31), (-9.5, 12.0, 30.0))
    """
    folder = Path(folder)
    record = read_record(folder)
    entry = _entry(record, name, folder)
    run = _run_with_maps(folder, record, entry)
    target, method, model = _parts_by_explain(folder, entry)
    copies = next((one.scan_files for one in (run, *record.runs) if one.scan_files), [])
    _check_files(folder, record, [*_own_files(entry, run), *(copies if scan is None else [])])
    maps = {layer: _volume(folder / file) for layer, file in entry.raw_files.items()}
    affine = nib.load(folder / next(iter(entry.raw_files.values()))).affine
    if scan is None:
        scan = _copied_scan(folder, record, copies, entry, affine)
    elif not isinstance(scan, Scan):
        scan = load_scan(scan, frame=_frame(run))
    _check_is_scan_of(folder, record, scan, affine)
    return Explanation(
        scan=scan,
        maps=maps,
        status={layer: of.status for layer, of in entry.layers.items()},
        prediction=_prediction(folder, run, model.classes, entry.has_background),
        class_names=model.classes,
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
        verdicts={
            layer: verdict_of(said.finding, said.words, said.figures, full=said.full)
            for layer, said in entry.verdicts.items()
        },
        confidence=entry.figure("confidence"),
    )


class WrittenMap(NamedTuple):
    """A CAM and the mask that it explains, as they were written.

    Attributes:
        cam: (X, Y, Z) in [0, 1].
        mask: (X, Y, Z) bool, the class's or the region's.
        affine: (4, 4), voxel -> RAS mm.
    """

    cam: torch.Tensor
    mask: torch.Tensor
    affine: np.ndarray


def written_map(folder: str | Path, record: Record, entry: Entry) -> WrittenMap:
    """Return the CAM of one explanation of a case, without its scan.

    Raises:
        InputError: it was written without the format "nifti", or files are gone or were changed.
    """
    folder = Path(folder)
    run = next((run for run in record.runs if run.key == entry.run), None)
    if run is None or entry.cam_file is None or entry.target is None or entry.model is None:
        raise InputError(
            f"{folder}: {entry.label} has no volumes: explain it with the format nifti"
        )
    _check_files(folder, record, [entry.cam_file, *_own_files(entry, run)])
    index = entry.target.class_index
    if entry.region_file is not None:
        mask = _volume(folder / entry.region_file).bool()
    elif index is None:
        raise InputError(f"{folder}: {entry.label} is about no class, so that it has no mask")
    else:
        mask = _prediction(folder, run, entry.model.classes, entry.has_background)[index]
    file = nib.load(folder / entry.cam_file)
    return WrittenMap(_volume(folder / entry.cam_file), mask, file.affine)


# --------------------------------------------------------------------------------- what is read


def _entry(record: Record, name: str | None, folder: Path) -> Entry:
    """Return the entry of one explanation, by its name, or by a label that no other one has."""
    # Runs in several formats may list the very same explanation under one name: an entry with maps
    # goes before one without.
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


def _run_with_maps(folder: Path, record: Record, entry: Entry) -> RunEntry:
    """Return the run that wrote an entry's raw maps."""
    run = run_with(record, entry.run)
    if run is None or not entry.raw_files:
        raise InputError(
            f"{folder}: of {entry.label!r} no raw maps were written, which the format nifti holds. "
            "Explain the scan again with --format nifti"
        )
    return run


def _parts_by_explain(folder: Path, entry: Entry) -> tuple[TargetSchema, MethodSchema, ModelSchema]:
    """Return the parts of an entry that `explain` fills in and that an explanation needs."""
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
    return target, method, model


def _own_files(entry: Entry, run: RunEntry) -> list[str]:
    """Return the names of an entry's maps and masks, and of its run's prediction."""
    masks = [file for file in (entry.region_file, entry.truth_file) if file is not None]
    return [*entry.raw_files.values(), *run.prediction_files, *masks]


def _check_files(folder: Path, record: Record, names: Sequence[str]) -> None:
    """Refuse files that lie outside of the case, are gone, or are not what was written."""
    for file in names:
        if not is_link_free(folder, file) or file not in record.files:
            raise InputError(f"{folder / NAME}: file {file!r} lies outside of the case")
    if broken := damaged(folder, record, names, verify=True):
        raise InputError(
            f"{folder}: {', '.join(broken)} {'is' if len(broken) == 1 else 'are'} gone, or not as "
            "written. Explain the scan again"
        )


# ------------------------------------------------------------------------------ scan and volumes


def _frame(run: RunEntry) -> Frame | None:
    """Return the form of a NIfTI header by which a run read its scan; None: the usual one."""
    return next((frame for frame in FRAMES if frame == run.job.get("frame")), None)


def _copied_scan(
    folder: Path, record: Record, copies: Sequence[str], entry: Entry, affine: np.ndarray
) -> Scan:
    """Return the case's own copy of its scan, one file a channel.

    Its affine is the one that the entry names, in full precision; without one, that of the maps.
    """
    if not copies:
        raise InputError(
            f"{folder} holds no copy of the scan, as the format slicer does: give it as scan="
        )
    copy = load_scan([folder / file for file in copies])
    place = affine if entry.scan is None else np.array(entry.scan.affine)
    return Scan(copy.data, place, record.case)


def _check_is_scan_of(folder: Path, record: Record, scan: Scan, affine: np.ndarray) -> None:
    """Refuse a scan with other voxels than the case's, or in another place than its maps."""
    if voxels_sha256(scan) != record.voxels_sha256:
        raise InputError(f"{scan.name} is another scan than that of {folder}: its voxels differ")
    if not same_grid(scan.affine, affine, scan.shape):
        raise InputError(f"{scan.name} lies elsewhere in the patient than the maps in {folder}")


def _volume(path: Path) -> torch.Tensor:
    """Return the voxels of one of our own files, (X, Y, Z) float32."""
    return torch.from_numpy(np.ascontiguousarray(nib.load(path).dataobj, dtype=np.float32))


def _prediction(
    folder: Path, run: RunEntry, classes: Sequence[str], exclusive: bool
) -> torch.Tensor:
    """Return the masks (K, X, Y, Z) of all classes.

    Args:
        exclusive: True where the classes exclude each other, so that one file of labels holds all.
    """
    volumes = [_volume(folder / file) for file in run.prediction_files]
    if len(volumes) != (len(classes) if len(volumes) > 1 or not exclusive else 1):
        raise InputError(
            f"{folder / NAME}: {len(volumes)} files of a prediction, and {len(classes)} classes"
        )
    if len(volumes) > 1 or not exclusive:
        return torch.stack([volume > 0 for volume in volumes])
    return torch.stack([volumes[0] == index for index in range(len(classes))])
