"""A case on disk: everything that one scan's explanation leaves behind, in one folder.

`case.json` says what was done and found; it is written last. `seg3dcam.job.writers` lists the
files of each format.

A target's files are named by its class, and by its region and method where there are several.
`case.json` says which explanation each name stands for, and the size and SHA-256 of every file. A
run with another target or other settings adds its files; where a name is already in use, a number
is added to it. The scan's own file name, which may be a patient's, appears in no file's name or
content: see `Job.case`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from seg3dcam.errors import InputError, OutputError, some
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.findings import findings
from seg3dcam.explaining.pattern import body_mask, pattern_of
from seg3dcam.explaining.reliability import reliability_of
from seg3dcam.export.slicer import SlicerScene
from seg3dcam.files import plain, unique_names
from seg3dcam.job.folder import described, locked, move, placed_as, remove, staging
from seg3dcam.job.formats import FORMATS
from seg3dcam.job.keys import Keys, case_name, keys_of_explanation, look_of, settings_of
from seg3dcam.job.record import (
    NAME,
    Record,
    RunEntry,
    damaged,
    files_of,
    is_somebody_elses,
    listed_files,
    provenance_of,
    record_of,
    unfinished,
    without_job,
    write_record,
)
from seg3dcam.job.settings import Job
from seg3dcam.job.writers import (
    joint_writer,
    own_masks,
    raw_files,
    write_format,
    write_prediction,
)
from seg3dcam.progress import Progress, silent
from seg3dcam.review.writing import JointWriter


def write_case(
    folder: str | Path,
    explanations: Iterable[Explanation],
    job: Job,
    *,
    keys: Keys | None = None,
    progress: Progress = silent,
    inputs: str | None = None,
) -> Mapping[str, Any]:
    """Write one run of a case; the files of other runs in its folder stay.

    A run of the same job is replaced. Explanations may be made while they are iterated over; no
    other process can write to the folder meanwhile.

    Args:
        keys: see `seg3dcam.job.keys`; None makes them from the explanations' provenance.
        progress: called with (step, done, total) before each format is written.
        inputs: a code of the scan's files, kept in the record.

    Returns:
        what `case.json` says of this run: its "files" and "explanations", and the "case".

    Raises:
        OutputError: the folder cannot be written, holds another scan's case or a `case.json` of
            something else, or another run is at work in it. Runs of other jobs are as they were.
        InputError: there are no explanations.
    """
    folder = Path(folder)
    with locked(folder, listed_files) as lock, staging(folder) as staged:
        before = record_of(folder)
        if before is None and is_somebody_elses(folder):
            raise OutputError(
                f"{folder} holds a case.json of something else: choose another folder"
            )
        new = _write_run(staged, explanations, job, keys, before, progress)
        if before is not None and before.voxels_sha256 != new.keys.voxels:
            raise OutputError(f"{folder} holds another scan's case: choose another folder")
        others = without_job(before, new.keys.job)
        replaced = files_of(before) - files_of(others)
        names = placed_as(folder, staged, new.files, replaced)
        files = described(staged, names)
        # If this run is killed from here on, the next one removes its new files. The files that it
        # replaces stay listed, whether replaced yet or not, under a run that has to be done again.
        lock.announce(final for final in names.values() if not os.path.lexists(folder / final))
        if before is not None and replaced:
            write_record(folder, unfinished(before, new.keys.job))
        move(folder, staged, names)
        run = RunEntry(**new.run(names, job), inputs=inputs)
        entries = new.entries(names)
        record = _with_run(others, run, new.case, new.keys.voxels, files, entries)
        _check_there(folder, record, run.files)
        write_record(folder, record)
        remove(folder, replaced - set(names.values()))
    return {"case": new.case, "files": run.files, "explanations": entries}


def write_empty_case(
    folder: Path, job: Job, *, keys: Keys, case: str, why: str, inputs: str | None
) -> Mapping[str, Any]:
    """Write down that there was nothing to explain in a scan; an earlier run of the job goes.

    Args:
        case: the name of the scan.
        why: in words.
        keys, inputs: as for `write_case`, which says what is returned and raised.
    """
    with locked(folder, listed_files):
        before = record_of(folder)
        if before is None and is_somebody_elses(folder):
            raise OutputError(
                f"{folder} holds a case.json of something else: choose another folder"
            )
        others = without_job(before, keys.job)
        run = RunEntry(
            key=keys.all,
            job_key=keys.job,
            job=plain(settings_of(job)),
            files=[],
            inputs=inputs,
            empty=why,
        )
        write_record(folder, _with_run(others, run, case, keys.voxels, {}, []))
        remove(folder, files_of(before) - files_of(others))
    return {"case": case, "files": [], "explanations": []}


def make_room(folder: Path, voxels_sha256: str) -> None:
    """Remove another scan's case from a folder, such as where a scan was replaced by another one.

    Args:
        voxels_sha256: of the scan whose case may stay.

    Raises:
        OutputError: the folder has a `case.json` of something else or a damaged one, or another run
            is at work in it.
    """
    if not os.path.lexists(folder / NAME):
        return
    with locked(folder, listed_files) as lock:
        record = record_of(folder)
        if record is None:
            raise OutputError(
                f"{folder / NAME} is damaged, or none of seg3dcam: delete the folder, or move it "
                "away"
            )
        if record.voxels_sha256 != voxels_sha256:
            # If this run is killed from here on, the next one removes the files.
            lock.announce(files_of(record))
            write_record(folder, None)
            remove(folder, files_of(record))
            lock.announce(())


def note_inputs(folder: Path, key: str, inputs: str) -> None:
    """Keep another code of the files in the record of a complete run, such as after a copy."""
    with locked(folder, listed_files):
        record = record_of(folder)
        if record is not None and any(r.key == key and r.inputs != inputs for r in record.runs):
            runs = [
                run.model_copy(update={"inputs": inputs}) if run.key == key else run
                for run in record.runs
            ]
            write_record(folder, record.model_copy(update={"runs": runs}))


def write_apart(folder: str | Path, name: str, write: Callable[[Path], object]) -> list[Path]:
    """Write files that belong together to a folder of their own, which replaces no other one.

    Where another call wrote other files under this name, they stay, and a number is added to the
    name. Where it wrote the very same files, they are not written again.

    Args:
        folder: gets the new folder.
        name: of the new folder.
        write: writes the files to a folder that it is given.

    Returns:
        The files, in the order of their names.

    Raises:
        OutputError: they cannot be written, or another run is at work in `folder`.
    """
    folder = Path(folder)
    with locked(folder, listed_files) as lock, staging(folder) as staged:
        write(staged / name)
        files = sorted(file for file in staged.rglob("*") if file.is_file())
        names = placed_as(folder, staged, files, replaceable=())
        lock.announce(final for final in names.values() if not os.path.lexists(folder / final))
        move(folder, staged, names)
        lock.announce(())
    return [folder / final for final in names.values()]


def _with_run(
    others: Record | None,
    run: RunEntry,
    case: str,
    voxels_sha256: str,
    files: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
) -> Record:
    """Return the record of a case with one more run, its files and its explanations."""
    return Record.model_validate(
        {
            "seg3dcam": version("seg3dcam"),
            "case": case,
            "voxels_sha256": voxels_sha256,
            "key": run.key,
            "job": run.job,
            "runs": [*(others.runs if others else []), run],
            "files": {**(others.files if others else {}), **files},
            "explanations": [*(others.explanations if others else []), *entries],
        }
    )


def _check_there(folder: Path, record: Record, files: Iterable[str]) -> None:
    """Raise OutputError where files disappeared or changed during the run."""
    if gone := damaged(folder, record, files):
        raise OutputError(
            f"{folder}: {some(gone, 3)} went while the run went "
            "on: something else deletes or writes there. Choose another folder, or run it again"
        )


#: Files that an explanation has for itself, as `case.json` names them.
_OWN_FILES = ("cam_file", "region_file", "truth_file", "thumb_file")


@dataclass
class _NewRun:
    """The files that one run has written to a folder of its own, and what it found.

    Attributes:
        staged: that folder.
        keys, case: of the run; they are set with the first explanation.
        found: entries of `case.json`, in which files have their names in `staged`.
        files: all files.
        scan, prediction: those of them that hold the scan and the prediction.
    """

    staged: Path
    keys: Keys = field(default_factory=lambda: Keys("", "", ""))
    case: str = ""
    found: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    scan: list[Path] = field(default_factory=list)
    prediction: list[Path] = field(default_factory=list)

    def run(self, names: Mapping[str, str], job: Job) -> dict[str, Any]:
        """Return what `case.json` says of the run.

        Args:
            names: name in `staged` -> name in the case.
        """
        final = {self.staged / name: final for name, final in names.items()}
        return {
            "key": self.keys.all,
            "job_key": self.keys.job,
            "job": settings_of(job),
            "files": [final[file] for file in dict.fromkeys(self.files)],
            "scan_files": [final[file] for file in self.scan],
            "prediction_files": [final[file] for file in self.prediction],
        }

    def entries(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return what `case.json` says of the explanations; `names` as for `run`."""
        return [
            entry
            | {"raw_files": {layer: names[file] for layer, file in entry["raw_files"].items()}}
            | {kind: entry[kind] and names[entry[kind]] for kind in _OWN_FILES}
            for entry in self.found
        ]


def _write_run(
    staged: Path,
    explanations: Iterable[Explanation],
    job: Job,
    keys: Keys | None,
    before: Record | None,
    progress: Progress,
) -> _NewRun:
    """Write every file of a run to its own folder."""
    new = _NewRun(staged)
    joint: dict[str, JointWriter] = {}
    names: list[str] = []
    for explanation in explanations:
        if not names:
            new.case = case_name(explanation.scan, job)
            new.keys = keys or keys_of_explanation(explanation, job)
            kinds = [kind for kind in job.formats if FORMATS[kind].joint]
            joint = {kind: joint_writer(kind, staged, look_of(job), new.case) for kind in kinds}
            if "nifti" in job.formats:
                new.prediction = write_prediction(staged, explanation)
                new.files += new.prediction
        words = explanation.label + f" {explanation.method}" * (len(job.methods) > 1)
        taken = _names_of_others(without_job(before, new.keys.job), explanation)
        name = unique_names([*taken, *names, words])[-1]
        names.append(name)
        for number, kind in enumerate(job.formats):
            progress(f"writing {name}: {kind}", number, len(job.formats))
            if kind in joint:
                joint[kind].add(explanation, name)
            else:
                new.files += write_format(kind, staged, explanation, name, job, new.case)
        new.found.append(_entry(explanation, name, job, new.keys))
    if not new.found:
        raise InputError("there is no explanation to write")
    for number, (last, writer) in enumerate(joint.items()):
        progress(f"writing {last}", number, len(joint))
        new.files += writer.finish()
        if isinstance(writer, SlicerScene):
            new.scan = writer.scan_files
    return new


def _names_of_others(others: Record | None, explanation: Explanation) -> list[str]:
    """Return the names already in use, without those of this same explanation in other formats."""

    def told(provenance: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in provenance.items() if key != "versions"}

    now = told(plain(explanation.provenance))
    entries = [] if others is None else others.explanations
    return list(dict.fromkeys(e.name for e in entries if told(plain(provenance_of(e))) != now))


def _entry(explanation: Explanation, name: str, job: Job, keys: Keys) -> dict[str, Any]:
    """Return what `case.json` says of an explanation, with names of files in the run's folder."""
    volumes = "nifti" in job.formats
    entry = {
        "label": explanation.label,
        "name": name,
        "run": keys.all,
        **explanation.provenance,
        "has_background": explanation.has_background,
        "over_mask": explanation.over_mask,
        "only_against": list(explanation.only_against),
        "of_component": explanation.of_component,
        "verdicts": {layer: asdict(said) for layer, said in explanation.verdicts.items()},
        "found": findings(explanation, scale=look_of(job).scale),
        "raw_files": raw_files(explanation, name) if volumes else {},
        "pattern": _pattern(explanation),
        "reliability": _reliability(explanation),
        **dict.fromkeys(_OWN_FILES),
    }
    for kind in own_masks(explanation) if volumes else ():
        entry[f"{kind}_file"] = f"{kind}_{name}.nii.gz"
    if volumes:
        entry["cam_file"] = f"cam_{name}.nii.gz"
    if "thumb" in job.formats:
        entry["thumb_file"] = f"thumb_{name}.webp"
    return plain(entry)


def _reliability(explanation: Explanation) -> list[list[float]] | None:
    """Return what `Reliability` holds, as lists; None where that is unknown."""
    found = reliability_of(explanation)
    return None if found is None else found.lists


def _pattern(explanation: Explanation) -> list[float] | None:
    """Return where in the body the CAM lies, see `pattern_of`, as a list."""
    heat, scan = explanation.volume().numpy(), explanation.scan
    found = pattern_of(heat, body_mask(scan.data[0].numpy()), scan.affine)
    return None if found is None else [round(float(part), 5) for part in found.ravel()]
