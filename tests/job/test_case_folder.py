"""A case's folder: runs add to it, nothing of anybody is lost, and the dead leave nothing."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from helpers_cases import (
    IN_ORGAN,
    PICTURE,
    PICTURES,
    contents,
    seg3dcam,
    voxels,
    write_model,
    write_scan,
)
from helpers_crossed import crossed

from seg3dcam.errors import OutputError
from seg3dcam.explaining.explain import explain_each
from seg3dcam.files import temporary_name
from seg3dcam.job import case, writers
from seg3dcam.job.folder import LOCK, locked, staging
from seg3dcam.job.record import is_done, listed_files, record_of

pytestmark = pytest.mark.usefixtures("explained_once")


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def is_whole(folder):
    """Tell whether a folder holds its case and nothing else, every file as it was written."""
    record = record_of(folder)
    assert files_of(folder) == {*record.files, "case.json"}
    return all(is_done(folder, run.key, verify=True) for run in record.runs)


def other_scan(place, name="other.nii.gz"):
    array = voxels()
    array[IN_ORGAN] += 0.001
    return write_scan(place.folder / name, array)


# ------------------------------------------------------------------------------------- adds


CHANGES = [
    ("--target", "lesion"),
    ("--target", "organ", "--method", "grad_cam"),
    ("--target", "organ", "--layer", "model.0"),
    ("--target", "organ", "--signed"),
    ("--target", "organ", "--region", "boundary"),
    ("--target", "organ", "--threshold", "0.5", "--format", "html"),
]


@pytest.mark.parametrize("change", crossed(CHANGES, rows=2), ids=" ".join)
def test_a_job_that_differs_adds_to_the_case(place, change):
    kinds = ("nifti", "png", "html", "slicer")
    formats = ("--slice", 8, *(word for kind in kinds for word in ("--format", kind)))
    assert place.explain("--target", "organ", *formats).code == 0
    before = contents(place.out)
    formats = () if "--format" in change else formats
    assert place.explain(*change, *formats).code == 0
    after = contents(place.out)
    assert {k: v for k, v in after.items() if k in before and k != "case.json"} == {
        k: v for k, v in before.items() if k != "case.json"
    }
    assert len(after) > len(before)
    assert is_whole(place.out)
    assert len(place.record["runs"]) == 2


def test_another_model_adds_to_the_case(place):
    assert place.explain("--target", "organ").code == 0
    before = place.volume("cam_organ.nii.gz")
    write_model(place.folder, biases=[0, -3, -30])
    assert place.explain("--target", "organ").code == 0
    assert np.array_equal(place.volume("cam_organ.nii.gz"), before)
    (entry, other) = place.record["explanations"]
    assert (entry["name"], other["name"]) == ("organ", "organ_2")
    assert place.volume("prediction_2.nii.gz").max() < place.volume("prediction.nii.gz").max()


def test_the_same_explanation_in_another_format_is_written_once(place):
    assert place.explain("--target", "organ").code == 0
    assert place.explain("--target", "organ", *PICTURE).code == 0
    assert not list(place.out.glob("*_2*"))
    assert [entry["name"] for entry in place.record["explanations"]] == ["organ", "organ"]
    assert is_whole(place.out)


def test_each_case_has_a_folder_of_its_own_by_default(place, monkeypatch):
    monkeypatch.chdir(place.folder)
    other = other_scan(place)
    for scan in (place.scan, other, place.scan):
        outcome = place.explain_by_default("--target", "organ", scans=[scan])
        assert outcome.code == 0, outcome.err
    one, two = sorted((place.folder / "seg3dcam_out").iterdir())
    assert is_whole(one)
    assert is_whole(two)
    assert len(record_of(one).runs) == len(record_of(two).runs) == 1  # the third was done already


@pytest.mark.parametrize("words", [(), ("--force",)], ids=["", "force"])
def test_another_patients_case_is_never_touched(place, words):
    assert place.explain("--target", "organ").code == 0
    before = contents(place.out)
    other = other_scan(place)
    outcome = place.explain("--target", "organ", *words, scans=[other])
    assert outcome.code == 0, outcome.err
    assert before.items() <= contents(place.out).items()
    (folder,) = [path for path in place.out.iterdir() if path.is_dir()]
    assert f"holds another scan's case: this one goes to {folder}" in outcome.out
    assert is_whole(folder)


def test_two_patients_of_one_name(place):
    scans = [place.scan, other_scan(place)]
    third = write_scan(place.folder / "third.nii.gz", voxels() + 0.01)
    for scan in (*scans, third):
        assert place.explain("--target", "organ", "--case", "A", scans=[scan]).code == 0
    folders = sorted(path for path in place.out.iterdir() if path.is_dir())
    assert [path.name[:2] for path in folders] == ["A", "A_"]
    hashes = {record_of(path).voxels_sha256 for path in (place.out, *folders)}
    assert len(hashes) == 3


def test_another_programs_case_json_stays(place):
    place.out.mkdir()
    (place.out / "case.json").write_text('{"patient": 3}')
    assert place.explain("--target", "organ").code == 0
    assert (place.out / "case.json").read_text() == '{"patient": 3}'
    (folder,) = [path for path in place.out.iterdir() if path.is_dir()]
    assert is_whole(folder)


def test_a_folder_called_case_json_stays(place):
    (place.out / "case.json").mkdir(parents=True)
    assert place.explain("--target", "organ").code == 0
    assert not any((place.out / "case.json").iterdir())


@pytest.mark.parametrize("name", ["cam_organ.nii.gz", "slices/organ/axial_008.png", "case.txt"])
def test_files_of_others_stay_whatever_their_names(place, name):
    mine = place.out / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert place.explain("--target", "organ", *PICTURE).code == 0
    assert mine.read_bytes() == b"mine"
    assert files_of(place.out) == {*place.record["files"], "case.json", name}


@pytest.mark.parametrize("name", ["slices", "slicer", "slices/organ", "report.html"])
def test_a_file_or_folder_of_others_where_another_kind_is_wanted(place, name):
    mine = place.out / name
    if "." in name:
        mine.mkdir(parents=True)
    else:
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
    formats = [word for kind in ("png", "slicer", "html") for word in ("--format", kind)]
    outcome = place.explain("--target", "organ", "--slice", 8, *formats)
    assert outcome.code == 0, outcome.err
    assert mine.is_dir() if "." in name else mine.read_text() == "mine"
    assert is_done(place.out, place.record["key"], verify=True)


@pytest.mark.parametrize("name", ["slices", "slicer", "cam_organ.nii.gz", "slices/organ"])
def test_links_are_not_followed(place, name, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (place.out / name).parent.mkdir(parents=True)
    (place.out / name).symlink_to(elsewhere / "file" if "." in name else elsewhere)
    formats = (*PICTURE, "--format", "slicer")
    assert place.explain("--target", "organ", *formats).code == 0
    assert not any(elsewhere.iterdir())
    assert is_done(place.out, place.record["key"], verify=True)


def test_a_forged_record_removes_nothing_elsewhere(place):
    """A record that names files elsewhere is none."""
    assert place.explain("--target", "organ").code == 0
    precious = place.folder / "precious.txt"
    precious.write_text("keep")
    record = place.record
    for name in ("../precious.txt", str(precious), "sub/../../precious.txt"):
        record["files"][name] = {"bytes": 4, "sha256": "0"}
        record["runs"][0]["files"].append(name)
    (place.out / "case.json").write_text(json.dumps(record))
    before = contents(place.out)
    assert place.explain("--target", "organ", "--force").code == 0
    assert precious.read_text() == "keep"
    assert before.items() <= contents(place.out).items()
    (folder,) = [path for path in place.out.iterdir() if path.is_dir()]
    assert is_whole(folder)


# ------------------------------------------------------------------------------------- replaced


def test_a_job_is_done_again_where_the_scans_place_changed(place):
    assert place.explain("--target", "organ").code == 0
    image = nib.load(place.scan)
    affine = image.affine.copy()
    affine[:3, 3] += 20
    write_scan(place.scan, np.asarray(image.dataobj), affine)
    outcome = place.explain("--target", "organ")
    assert "is done again, and replaced" in outcome.out
    assert np.allclose(nib.load(place.out / "cam_organ.nii.gz").affine, affine, atol=1e-4)
    assert len(place.record["runs"]) == 1
    assert is_whole(place.out)


@pytest.mark.parametrize("package", ["torch", "monai", "nibabel", "matplotlib", "seg3dcam"])
def test_another_version_of_a_package_is_another_key(place, package, monkeypatch):
    place.explain("--target", "organ")
    monkeypatch.setattr(
        "seg3dcam.job.keys.version", lambda name: "99" if name == package else version(name)
    )
    assert "holds this case already" not in place.explain("--target", "organ").out


def test_what_a_job_writes_no_more_goes(place, monkeypatch):
    """As where fewer classes are predicted after an update of a package."""
    assert place.explain().code == 0
    monkeypatch.setattr("seg3dcam.job.keys.version", lambda name: "99")
    for module in ("case", "writers"):
        monkeypatch.setattr(f"seg3dcam.job.{module}.own_masks", lambda explanation: {})
        monkeypatch.setattr(f"seg3dcam.job.{module}.raw_files", lambda explanation, name: {})
    assert place.explain().code == 0
    assert not list(place.out.glob("raw_*"))
    assert is_whole(place.out)


# ------------------------------------------------------------------------------------- damage


def test_a_truncated_file_is_seen_and_a_changed_one_if_asked(place):
    assert place.explain("--target", "organ").code == 0
    cam = place.out / "cam_organ.nii.gz"
    whole = cam.read_bytes()
    assert "holds this case already" in place.explain("--target", "organ").out
    cam.write_bytes(b"")
    assert "holds this case already" not in place.explain("--target", "organ").out
    assert cam.read_bytes() == whole
    cam.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    assert "holds this case already" in place.explain("--target", "organ").out
    assert "holds this case already" not in place.explain("--target", "organ", "--verify").out
    assert cam.read_bytes() == whole
    assert "holds this case already" in place.explain("--target", "organ", "--verify").out


@pytest.mark.slow
@pytest.mark.parametrize("what", ["file", "folder"])
def test_files_that_go_while_the_run_goes_on_are_missed(place, what, monkeypatch):
    """A clean-up job, or a colleague, in the middle of the run."""
    write = writers.save_planes

    def delete(*args, **kwargs):
        found = write(*args, **kwargs)
        staged = found.parent
        if what == "file":
            found.unlink()
        else:
            shutil.rmtree(staged.parent)
        return found

    monkeypatch.setattr("seg3dcam.job.writers.save_planes", delete)
    outcome = place.explain("--target", "organ", *PICTURES)
    assert outcome.code == 1
    assert "is gone" in outcome.complaint or "cannot be" in outcome.complaint
    assert not place.out.exists() or not any(place.out.iterdir())


# ------------------------------------------------------------------------------------- locks


def test_a_second_run_is_refused_while_the_first_is_at_work(place):
    with locked(place.out, listed_files):
        outcome = place.explain("--target", "organ")
    assert outcome.code == 1
    assert f"process {os.getpid()} on {socket.gethostname()} is at work" in outcome.complaint
    assert place.explain("--target", "organ").code == 0
    assert is_whole(place.out)


def write_lock(folder, **changes):
    folder.mkdir(exist_ok=True)
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": 1.0, "files": []}
    (folder / LOCK).write_text(json.dumps(holder | changes))


def _last_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("of", ["a dead process", "a process that has the number now", "nobody"])
def test_a_dead_ones_lock_is_taken_over(place, of):
    assert place.explain("--target", "organ").code == 0
    left = ["left.nii.gz", "slices/left/a.png"]
    for name in left:
        (place.out / name).parent.mkdir(parents=True, exist_ok=True)
        (place.out / name).write_bytes(b"left")
    announced = [*left, "cam_organ.nii.gz"]
    if of == "a dead process":
        write_lock(place.out, process=_last_pid(), files=announced)
    elif of == "nobody":
        (place.out / LOCK).write_text("{")
        os.utime(place.out / LOCK, (0, 0))
    else:
        write_lock(place.out, files=announced)
    assert place.explain("--target", "lesion").code == 0
    if of == "nobody":
        assert (place.out / "left.nii.gz").is_file()
        (place.out / "left.nii.gz").unlink()
        (place.out / "slices/left/a.png").unlink()
    assert is_whole(place.out)
    assert (place.out / "cam_organ.nii.gz").is_file()


def test_a_lock_takes_no_listed_file_from_features_either(place):
    assert place.explain("--target", "organ").code == 0
    write_lock(place.out, process=_last_pid(), files=["cam_organ.nii.gz", "left.png"])
    (place.out / "left.png").touch()
    words = ("--model", place.model, "--layer", "model.0", "--top", 1, "--out", place.out)
    assert seg3dcam("features", place.scan, *words).code == 0
    assert not (place.out / "left.png").exists()
    assert (place.out / "cam_organ.nii.gz").is_file()


BAD_LOCKS = {
    "a time that is none": {"since": float("nan")},
    "a process beyond all": {"process": 10**18},
    "no process": {"process": -1},
    "the folder itself": {"files": [""]},
    "the folder by a dot": {"files": ["."]},
    "NUL": {"files": ["a\0/b"]},
    "a name that is too long": {"files": ["x" * 300]},
    "a number": {"files": [3]},
}


@pytest.mark.few(3)
@pytest.mark.parametrize("changes", BAD_LOCKS.values(), ids=BAD_LOCKS)
def test_a_lock_that_nobody_wrote_is_taken_over(place, changes):
    assert place.explain("--target", "organ").code == 0
    write_lock(place.out, **{"process": _last_pid()} | changes)
    os.utime(place.out / LOCK, (0, 0))
    outcome = place.explain("--target", "lesion")
    assert outcome.code == 0, outcome.err
    assert is_whole(place.out)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to itself"])
def test_a_lock_that_is_no_file_is_named(place, kind):
    place.out.mkdir()
    lock = place.out / LOCK
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(lock)
    outcome = place.explain("--target", "organ")
    assert outcome.code == 1
    assert f"cannot be locked: {lock}" in outcome.complaint
    assert "delete it" in outcome.complaint


def test_odd_names_of_temporary_files_do_no_harm(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: "%s")
        name = temporary_name(place.out, "").name
    place.out.mkdir()
    for number in ("\u00b2", "9" * 30, "", "-1", "%s"):
        (place.out / name.replace("%s", number)).write_text("keep")
    assert place.explain("--target", "organ").code == 0
    assert len(list(place.out.glob(".seg3dcam-*"))) == 5


def test_a_record_that_is_a_pipe_is_not_waited_for(place):
    place.out.mkdir()
    os.mkfifo(place.out / "case.json")
    assert place.explain("--target", "organ").code == 0


def test_a_link_below_the_folder_is_not_followed_either(place, tmp_path_factory):
    """Beside another scan's case, where a folder for this one would be."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert place.explain("--target", "organ").code == 0
    (place.out / "b").symlink_to(elsewhere)
    (place.out / "c").write_text("mine")
    other = other_scan(place)
    for case_name in ("b", "c"):
        assert place.explain("--target", "organ", "--case", case_name, scans=[other]).code == 0
    assert not any(elsewhere.iterdir())
    assert (place.out / "c").read_text() == "mine"
    assert {path.name[:2] for path in place.out.iterdir() if path.is_dir()} == {"b", "b_", "c_"}


# ------------------------------------------------------------------------------ while it moves


class _Killed(BaseException):
    """As SIGKILL: no one cleans up."""


def killed_while_moving(place, monkeypatch, moved, *options):
    """End a run in the middle of its last step, with its lock and its files as they are."""

    def move(folder, staged, names):
        whole(folder, staged, dict(list(names.items())[:moved]))
        left = place.folder / "left"
        shutil.copytree(folder, left, symlinks=True)
        raise _Killed

    whole = case.move
    with monkeypatch.context() as patch:
        patch.setattr("seg3dcam.job.case.move", move)
        with pytest.raises(_Killed):
            place.explain(*options)
    shutil.rmtree(place.out)
    (place.folder / "left").rename(place.out)
    lock = json.loads((place.out / LOCK).read_text())
    (place.out / LOCK).write_text(json.dumps(lock | {"process": _last_pid(), "since": 1.0}))
    # The staging folder is of this process, which goes on.
    for staged in place.out.glob(".seg3dcam-*.run"):
        shutil.rmtree(staged)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("moved", "options", "then"),
    crossed([0, 2, 4], [("--force",), ("--threshold", 0.3)], ["organ", "features"]),
)
def test_what_was_complete_outlives_a_kill_in_the_last_step(
    place, monkeypatch, moved, options, then
):
    assert place.explain("--target", "lesion").code == 0
    before = {k: v for k, v in contents(place.out).items() if k != "case.json"}
    killed_while_moving(place, monkeypatch, moved, "--target", "lesion", *options)
    if then == "organ":
        assert place.explain("--target", "organ").code == 0
    else:
        words = ("--model", place.model, "--layer", "model.0", "--top", 1, "--out", place.out)
        assert seg3dcam("features", place.scan, *words).code == 0
    after = contents(place.out)
    assert before.items() <= after.items()
    assert before.keys() <= listed_files(place.out)
    assert not (place.out / LOCK).exists()
    assert place.explain("--target", "lesion").code == 0
    record = record_of(place.out)
    assert all(is_done(place.out, run.key, verify=True) for run in record.runs)
    unlisted = files_of(place.out) - {*record.files, "case.json"}
    assert all("/" in name for name in unlisted)  # the features


def test_a_lock_of_another_machine_is_respected(place):
    write_lock(place.out, host="node17", process=1)
    outcome = place.explain("--target", "organ")
    assert outcome.code == 1
    assert "process 1 on node17 is at work" in outcome.complaint
    assert f"If it died, delete {place.out / LOCK}" in outcome.complaint


def test_a_lock_that_names_files_elsewhere_removes_none(place):
    precious = place.folder / "precious.txt"
    precious.write_text("keep")
    write_lock(place.out, files=["../precious.txt", str(precious)])
    os.utime(place.out / LOCK, (0, 0))
    assert place.explain("--target", "organ").code == 0
    assert precious.read_text() == "keep"


def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(place, monkeypatch):
    place.out.mkdir()
    dead_process = _last_pid()
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: dead_process)
        dead, staged = temporary_name(place.out, ".nii.gz"), temporary_name(place.out, ".run")
    alive = temporary_name(place.out, ".nii.gz")
    dead.touch()
    alive.touch()
    (staged / "slices").mkdir(parents=True)
    (staged / "slices" / "a.png").touch()
    assert place.explain("--target", "organ").code == 0
    assert not dead.exists()
    assert not staged.exists()
    assert alive.exists()


# ------------------------------------------------------------------------------------- kills

#: One file of its own, one in the explanation's folder, and a folder of files that belong together.
ENDED = ("--slice", 8, "--format", "nrrd", "--format", "png", "--format", "slicer")


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", [("organ",), ("lesion", "--force")], ids=["another job", "the same job again"]
)
def test_a_run_that_is_ended_leaves_what_the_next_one_cleans(place, job):
    """Before every change on the disk, and by signals from outside; see `ended_runs`."""
    assert place.explain("--target", "lesion", *ENDED).code == 0
    before = contents(place.out)
    kept = place.folder / "kept"
    words = ("explain", place.scan, "--model", place.model, "--target", *job, *ENDED)
    script = Path(__file__).with_name("ended_runs.py")
    run = subprocess.run(
        [sys.executable, *map(str, (script, place.out, kept, *words))],
        check=True,
        capture_output=True,
        text=True,
    )
    codes = json.loads(run.stdout.splitlines()[-1])
    for kind, code in {"SIGTERM": {143}, "SIGINT": {130}, "whole": {0}, "again": {0}}.items():
        assert {codes[name] for name in codes if name.startswith(kind)} == code
    whole = contents(kept / "whole")
    assert contents(kept / "again") == whole
    assert is_whole(kept / "whole")
    for folder in kept.iterdir():
        there = contents(folder)
        for name, content in before.items():
            assert name == "case.json" or there[name] == content, (folder.name, name)
        with locked(folder, listed_files):  # as the next run begins
            pass
        there = contents(folder)
        if record_of(folder).key:
            as_it_was = there in (before, whole)
        else:  # has to be done again
            as_it_was = there | {"case.json": whole["case.json"]} == whole
            assert listed_files(folder) == files_of(folder) - {"case.json"}
        assert as_it_was, folder.name  # not compared here: to show the differences takes minutes
    for folder in sorted(kept.glob("SIGKILL_*"))[::10]:
        assert place.explain("--target", *job, *ENDED, "--out", folder).code == 0
        there = contents(folder)
        records = (files["case.json"].decode().splitlines() for files in (there, whole))
        assert not list(difflib.unified_diff(*records, lineterm="", n=0))
        assert there == whole


@pytest.mark.slow
def test_of_two_runs_at_once_one_is_refused(place, monkeypatch):
    """The other one is another process, which begins and ends while this one explains."""
    ends = []

    def explain_meanwhile(*args, **kwargs):
        words = ("explain", place.scan, "--model", place.model, "--out", place.out)
        code = "from seg3dcam.cli.commands import main; main()"
        command = [sys.executable, "-c", code, *map(str, words), "--method", "grad_cam"]
        ends.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return explain_each(*args, **kwargs)

    monkeypatch.setattr("seg3dcam.job.run.explain_each", explain_meanwhile)
    assert place.explain().code == 0
    (other,) = ends
    assert other.returncode == 1
    assert f"process {os.getpid()} on {socket.gethostname()} is at work in" in other.stderr
    assert is_whole(place.out)
    assert len(place.record["runs"]) == 1


def test_locked_refuses_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"), locked(tmp_path / "file", listed_files):
        pass


def test_a_dead_process_that_nobody_has_noticed_holds_no_lock(tmp_path):
    """A parent that does not wait for its child leaves it as a zombie, whose number is in use."""
    code = (
        "import os, signal, sys; from seg3dcam.job.folder import locked\n"
        "with locked(sys.argv[1], lambda folder: []): os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, lambda folder: []):
        pass
    assert not (tmp_path / LOCK).exists()
    child.wait()


def test_an_interrupted_cleaning_up_is_done_again(tmp_path, monkeypatch):
    given, calls = shutil.rmtree, []

    def interrupted(path, **settings):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        given(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), staging(tmp_path) as staged:
        (staged / "file").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []
