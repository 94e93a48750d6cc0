"""Results at an address: the same files as in a folder here, whole whenever a run ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers_cases import voxels, write_model, write_scan
from helpers_cohort import timeless, write_cohort

from seg3dcam import cohort
from seg3dcam.cohort import read_cases, results, running, summary, work
from seg3dcam.errors import ConfigError, OutputError
from seg3dcam.files import temporary_name, writing
from seg3dcam.job.record import read_record

UPath = pytest.importorskip("upath", reason="universal-pathlib is an extra").UPath
MemoryFile = pytest.importorskip("fsspec.implementations.memory").MemoryFile

NAMES = ["a", "b"]
SETTINGS = {"target": "lesion", "format": ["nifti"]}
ADDRESS = "memory://results/liver"


class Cohort:
    """A cohort of this machine, whose results may lie in memory."""

    def __init__(self, root: Path) -> None:
        self.root, self.scans = root, write_cohort(root, NAMES)
        self.there = UPath(ADDRESS)
        self.here = root / "out"

    def run(self, out=ADDRESS, source=None, **more):
        settings = {"model": str(self.root / "model.yaml")} | SETTINGS | more
        before = set(Path(tempfile.gettempdir()).iterdir())
        found = cohort.run(self.scans if source is None else source, out=out, **settings)
        assert set(Path(tempfile.gettempdir()).glob(".seg3dcam-*")) <= before
        return found

    def replace(self, name, **changes):
        """Put another scan in the place of one."""
        write_scan(self.scans / f"{name}.nii.gz", voxels(**changes) * np.float32(1.01))

    def other_weights(self):
        write_model(self.root, biases=(0.0, -0.4, -1.5))

    def refuse(self, patch, ending, why):
        """Let the store take no file whose name ends so."""
        kind = type(self.there.fs)
        given = kind.put_file

        def put_file(fs, here, there, **more):
            if there.endswith(ending):
                raise OSError(why)
            return given(fs, here, there, **more)

        patch.setattr(kind, "put_file", put_file)

    def kept(self):
        """Return the name of every file at the address -> its bytes, without times and logs."""
        root = self.there.path
        found = {path[len(root) + 1 :]: path for path in self.there.fs.find(root)}
        return {
            name: timeless(name, self.there.fs.cat(path))
            for name, path in found.items()
            if not name.endswith(".log")
        }

    def kept_here(self):
        files = (file for file in self.here.rglob("*") if file.is_file())
        found = {file.relative_to(self.here).as_posix(): file.read_bytes() for file in files}
        return {n: timeless(n, content) for n, content in found.items() if not n.endswith(".log")}


@pytest.fixture
def made(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    one = Cohort(tmp_path)
    yield one
    if one.there.fs.exists("/results"):
        one.there.fs.rm("/results", recursive=True)


def is_whole(files, name):
    """Tell whether a case has no finished run, or all files of those, as they were written."""
    if f"{name}/case.json" not in files:
        return True
    record = json.loads(files[f"{name}/case.json"])
    finished = {file for run in record["runs"] if run["key"] for file in run["files"]}
    return all(
        hashlib.sha256(files.get(f"{name}/{file}", b"")).hexdigest()
        == record["files"][file]["sha256"]
        for file in finished
    )


def listed(files, name):
    record = json.loads(files[f"{name}/case.json"])
    return {f"{name}/case.json", *(f"{name}/{file}" for file in record["files"])}


# ------------------------------------------------------------------------- the same as here


def test_results_are_those_of_a_folder_here(made):
    there, here = made.run(), made.run(out=made.here)
    assert there.done == here.done == tuple(NAMES)
    assert str(there.out) == ADDRESS
    assert there.page.read_bytes() == here.page.read_bytes()
    tables = [f"{ADDRESS}/cohort.csv", f"{ADDRESS}/cohort.parquet"]
    assert [str(table) for table in there.tables] == tables
    assert made.kept() == made.kept_here()
    assert "done after" in (made.there / "cohort" / "a.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another scan", "no lesion", "other weights", "no scan"])
def test_after_a_change_they_still_are(made, change):
    """Another scan takes the place of the first; a run with other weights stands beside it."""
    for out in (ADDRESS, made.here):
        made.run(out=out)
    if change == "other weights":
        made.other_weights()
    elif change == "no scan":
        (made.scans / "b.nii.gz").write_bytes(b"no scan")
    else:
        made.replace("b", lesion=change == "another scan")
    there, here = made.run(), made.run(out=made.here)
    assert there.done == here.done
    assert there.failed == here.failed
    assert made.kept() == made.kept_here()


@pytest.mark.slow
def test_files_of_somebody_else_stay(made):
    for place in (made.there, made.here):
        (place / "a").mkdir(parents=True)
        (place / "a" / "cam_lesion.nii.gz").write_bytes(b"mine")
        (place / "a" / "notes.txt").write_bytes(b"by a reader")
    made.run()
    made.run(out=made.here)
    assert made.kept()["a/cam_lesion.nii.gz"] == b"mine"
    assert made.kept() == made.kept_here()


@pytest.mark.slow
def test_parts_make_the_whole(made):
    made.run(num_parts=2, part_id=1)
    assert made.run(num_parts=2, part_id=0).done == ("a",)
    made.run(out=made.here)
    assert made.kept() == made.kept_here()


# ------------------------------------------------------------------------- what is up to date


@pytest.mark.slow
def test_what_is_done_is_skipped(made):
    made.run()
    before = made.kept()
    again = made.run()
    assert (again.done, again.skipped) == ((), tuple(NAMES))
    assert made.kept() == before
    (made.there / "b" / "case.json").unlink()
    assert made.run().done == ("b",)
    cam = made.there / "a" / "cam_lesion.nii.gz"
    cam.write_bytes(cam.read_bytes()[:-7])
    assert made.run().done == ("a",)
    cam.unlink()
    assert made.run().done == ("a",)
    assert made.kept()["a/cam_lesion.nii.gz"] == before["a/cam_lesion.nii.gz"]


@pytest.mark.slow
def test_a_failure_is_kept_and_tried_again_when_asked(made):
    (made.scans / "b.nii.gz").write_bytes(b"no scan")
    first = made.run()
    assert list(first.failed) == ["b"]
    assert json.loads(made.kept()["cohort/b.ended.json"])["error"] == first.failed["b"]
    assert made.run().failed == first.failed
    assert made.run(retry_failed=True).failed == first.failed
    made.replace("b")
    assert made.run().done == ("b",)
    assert json.loads(made.kept()["cohort/b.ended.json"])["error"] == ""


@pytest.mark.slow
def test_what_goes_during_a_run_is_not_done(made, monkeypatch):
    """What the tables say is what is there at the end."""
    given = work.explained

    def lose(one, *args):
        if one.name == "b":
            made.there.fs.rm(f"{made.there.path}/a", recursive=True)
        return given(one, *args)

    monkeypatch.setattr(work, "explained", lose)
    found = made.run()
    assert found.done == ("b",)
    assert "does not hold what was written" in found.failed["a"]


# ------------------------------------------------------------------------- bad input


def test_another_cohort_is_refused(made):
    made.run()
    with pytest.raises(ConfigError, match="the output folder holds a cohort of other settings"):
        made.run(target="organ")


@pytest.mark.slow
def test_results_are_no_scans_of_the_next_run(made):
    (made.there.parent / "scans").mkdir(parents=True)
    for file in made.scans.iterdir():
        (made.there.parent / "scans" / file.name).write_bytes(file.read_bytes())
    made.run()
    found = read_cases("memory://results/**/*.nii.gz", without=made.there)
    assert [case.name for case in found] == NAMES


def test_results_do_not_go_into_a_series(made):
    (made.there / "p1").mkdir(parents=True)
    for number in range(3):
        (made.there / "p1" / f"{number}.dcm").write_bytes(b"slice")
    with pytest.raises(ConfigError, match="would be written to the scan's own folder"):
        made.run(source=ADDRESS)


@pytest.mark.slow
def test_a_record_that_is_damaged_is_no_reason_to_stop(made):
    made.run()
    (made.there / "a" / "case.json").write_text("{}", encoding="utf-8")
    found = made.run()
    assert f"{ADDRESS}/a/case.json is damaged" in found.failed["a"]
    assert found.skipped == ("b",)
    assert tempfile.gettempdir().encode() not in b"".join(made.kept().values())


@pytest.mark.slow
def test_names_that_lead_out_of_a_folder_are_left_alone(made, monkeypatch):
    made.run()
    fs, copied = made.there.fs, []
    for name in ("a/../x", "a/../../x", "a/../../../x", "a/.hidden", "a/b/../../../x", "a/b\\x"):
        fs.store[f"/results/liver/{name}"] = MemoryFile(fs, name, b"evil")
    given = type(fs).get_file
    monkeypatch.setattr(
        type(fs),
        "get_file",
        lambda self, there, here, **more: copied.append(there) or given(self, there, here, **more),
    )
    made.replace("a")
    assert made.run().done == ("a",)
    assert "/results/liver/a/case.json" in copied
    assert [there for there in copied if there.endswith(("x", ".hidden"))] == []
    assert not list(made.root.rglob("x"))


@pytest.mark.slow
def test_damaged_settings_are_replaced(made):
    made.run()
    settings = made.kept()["cohort/settings.json"]
    (made.there / "cohort" / "settings.json").write_bytes(settings[:-20])
    assert made.run().skipped == tuple(NAMES)
    assert made.kept()["cohort/settings.json"] == settings


@pytest.mark.parametrize("out", ["", "sftp://host/out", "https://host/out", "simplecache::s3://b"])
def test_such_an_address_is_refused(made, monkeypatch, out):
    monkeypatch.chdir(made.root)
    before = sorted(made.root.rglob("*"))
    with pytest.raises(ConfigError, match="is no path" if not out else "results go to a folder"):
        made.run(out=out)
    assert sorted(made.root.rglob("*")) == before


def test_an_address_of_this_machine_is_a_folder(made):
    found = made.run(out=made.here.as_uri())
    assert found.out == made.here
    assert (made.here / "a" / "case.json").exists()


@pytest.mark.parametrize("where", ["results", "scans"])
def test_workers_do_not_see_the_memory_of_this_process(made, where):
    given = {"workers": 1}
    if where == "scans":
        (made.there / "a.nii.gz").write_bytes((made.scans / "a.nii.gz").read_bytes())
        given |= {"source": ADDRESS, "out": made.here}
    with pytest.raises(ConfigError, match="memory:// is seen by this process alone"):
        made.run(**given)


def test_a_store_that_cannot_be_written_is_an_error_before_any_work(made, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("access denied")

    monkeypatch.setattr(type(made.there.fs), "put_file", refuse)
    with pytest.raises(ConfigError, match=f"{ADDRESS} cannot be written: access denied"):
        made.run()
    with pytest.raises(ConfigError, match="nostore://a/out"):
        made.run(out="nostore://a/out")


def test_nothing_is_explained_for_a_store_that_takes_nothing(made, monkeypatch):
    """Not hours of work whose results cannot be kept; the next run does it."""
    kind, explained = type(made.there.fs), []
    given = kind.put_file
    monkeypatch.setattr(work, "explained", lambda one, *_: explained.append(one.name))

    def refuse(self, here, there, **more):
        if there.endswith(".log"):
            raise PermissionError("the token has expired")
        return given(self, here, there, **more)

    monkeypatch.setattr(kind, "put_file", refuse)
    found = made.run()
    assert explained == []
    assert "the token has expired" in found.failed["a"]
    assert "cohort/a.ended.json" not in made.kept()


def test_an_interrupted_run_is_interrupted_also_without_the_store(made, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    def interrupted(*args):
        monkeypatch.setattr(type(made.there.fs), "find", refuse)
        raise KeyboardInterrupt

    said = []
    monkeypatch.setattr(work, "explained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.run(say=said.append)
    monkeypatch.undo()
    assert f"the tables could not be written: {ADDRESS} cannot be read: no network" in said


@pytest.mark.parametrize(
    "login", ["me:secret", "AKIA:sec/ret", ":secret", "me:sec@ret", "me:1/2", "a:b c"]
)
def test_an_address_with_a_password_is_refused(made, login):
    with pytest.raises(ConfigError, match="s3://bucket/out: give name and password") as raised:
        made.run(out=f"s3://{login}@bucket/out")
    assert login.partition(":")[2] not in str(raised.value)
    assert "sec" not in str(raised.value)


@pytest.mark.slow
def test_passwords_of_scans_are_not_kept(made, monkeypatch):
    """Wherever an error quotes them: not in logs, notes, tables, page, nor in what is said."""
    address, said = "memory://me:sec/ret@hospital/scans", []
    folder = UPath(address)
    given = type(folder.fs).get_file

    def warned(self, there, here, **more):
        warnings.warn(f"{address} is slow", stacklevel=1)
        return given(self, there, here, **more)

    monkeypatch.setattr(type(folder.fs), "get_file", warned)
    (folder / "a.nii.gz").write_bytes(b"no scan")
    for missing in ("none", "none.csv", "*.mha"):
        with pytest.raises(ConfigError) as raised:
            made.run(source=f"{address}/{missing}")
        assert "sec/ret" not in str(raised.value)
    table = made.root / "cases.csv"
    table.write_text(f"scan\n{address}/a.nii.gz\n{address}/gone.nii.gz\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="missing") as raised:
        made.run(source=table)
    assert "sec/ret" not in str(raised.value)
    for out in (ADDRESS, made.here):
        assert list(made.run(source=address, out=out, say=said.append).failed) == ["a"]
    logs = [made.there / "cohort" / "a.log", made.here / "cohort" / "a.log"]
    texts = [log.read_bytes() for log in logs] + [repr(said).encode()]
    assert all(b"memory://hospital/scans is slow" in text for text in texts[:2])
    for text in (*texts, *made.kept().values(), *made.kept_here().values()):
        assert b"sec/ret" not in text
    folder.fs.rm(folder.path, recursive=True)


@pytest.mark.slow
def test_a_fault_of_the_store_is_not_taken_for_an_empty_folder(made, monkeypatch):
    """Then settings of another cohort would be replaced."""
    made.run()
    before = made.kept()

    def refuse(*args, **kwargs):
        raise PermissionError("token expired")

    with monkeypatch.context() as patch:
        patch.setattr(type(made.there.fs), "find", refuse)
        with pytest.raises(ConfigError, match="cannot be read: token expired"):
            made.run(target="organ")
    assert made.kept() == before


@pytest.mark.slow
def test_a_run_ends_where_nothing_can_be_kept(made, monkeypatch):
    """Not after hours in which each case waits for a store that has gone."""
    for name in "cdefg":
        (made.scans / f"{name}.nii.gz").write_bytes((made.scans / "a.nii.gz").read_bytes())
    kind, tried = type(made.there.fs), []
    given = kind.put_file

    def refuse(self, here, there, **more):
        if there.endswith(".log") and not there.endswith("/a.log"):
            tried.append(there)
            raise OSError("no network")
        return given(self, here, there, **more)

    monkeypatch.setattr(kind, "put_file", refuse)
    with pytest.raises(OutputError, match=r"3 cases in a row: .* no network"):
        made.run()
    assert len(tried) == 3
    assert made.kept()["cohort.csv"].decode().splitlines()[1].startswith("a,")


@pytest.mark.slow
def test_a_store_that_never_answers_is_given_up(made, monkeypatch):
    waits, asked = threading.Event(), []

    def never(*args, **kwargs):
        asked.append(args)
        waits.wait()

    def interrupted(*args):
        monkeypatch.setattr(type(made.there.fs), "find", never)
        raise KeyboardInterrupt

    made.run()
    before, said = made.kept(), []
    made.replace("a")
    monkeypatch.setattr(results, "PATIENCE", 0.2)
    monkeypatch.setattr(work, "explained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.run(say=said.append)
    monkeypatch.undo()
    assert asked
    assert f"the tables could not be written: {ADDRESS} does not answer" in said
    # When it answers at last, nobody waits any more, and nothing is written behind the run.
    waits.set()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.startswith("Thread-") and "run" in thread.name:
            thread.join(5)
    assert made.kept() == before
    assert list(Path(tempfile.gettempdir()).glob(".seg3dcam-*")) == []


@pytest.mark.slow
def test_a_temporary_folder_that_is_full_is_named(made, monkeypatch):
    made.run()

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    place = re.escape(f"{tempfile.gettempdir()}, the folder for temporary files, cannot be written")
    for where, name, error in (
        (Path, "write_bytes", ConfigError),  # before any work
        (writing, "_create", OutputError),  # of the tables
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            with pytest.raises(error, match=f"{place} .* TMPDIR"):
                made.run()


# ------------------------------------------------------------------------- what ends in between


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another scan", "no lesion", "other weights", "damaged"])
def test_a_run_that_is_interrupted_leaves_what_the_next_one_ends(made, monkeypatch, change):
    """Before changes there, "damaged" before each: what the very same run has to do again."""
    (made.scans / "b.nii.gz").unlink()
    made.run()
    fs = made.there.fs
    (made.there / "a" / "notes.txt").write_bytes(b"by a reader")
    whole = made.kept()
    if change == "damaged":
        for name in (name for name in whole if name.endswith(".nii.gz")):
            (made.there / name).write_bytes(b"half")
    before = {path: fs.cat(path) for path in fs.find("/results")}
    if change == "other weights":
        made.other_weights()
    elif change != "damaged":
        made.replace("a", lesion=change == "another scan")
    made.run()
    expected, kind = made.kept(), type(fs)
    assert change != "damaged" or expected == whole
    put, remove = kind.put_file, kind.rm_file
    count = stop = 0

    def counted(original):
        def call(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        return call

    while stop == 0 or count >= stop:
        fs.rm("/results", recursive=True)
        fs.pipe(before)
        count, stop = 0, stop + (1 if change == "damaged" or stop == 0 else 2)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "put_file", counted(put))
            patch.setattr(kind, "rm_file", counted(remove))
            try:
                made.run()
            except KeyboardInterrupt:
                # Where nothing was changed yet, the record is still that of the damaged files.
                now = {path: fs.cat(path) for path in fs.find("/results/liver/a")}
                untouched = all(before.get(path) == content for path, content in now.items())
                assert untouched or is_whole(made.kept(), "a"), stop
        assert not made.run().failed, stop
        files = made.kept()
        of_case = {name for name in files if name.startswith("a/")}
        assert of_case == listed(files, "a") | {"a/notes.txt"}, stop
        for name in of_case:
            assert files[name] == expected[name], (stop, name)
    assert stop > 8


@pytest.mark.slow
def test_what_another_run_wrote_meanwhile_stays(made, monkeypatch):
    given, said = work.explained, []

    def overtaken(one, *args):
        error = given(one, *args)
        if one.name == "a":
            (made.there / "a" / "case.json").write_bytes(b"by another run")
        (made.there / one.name / "notes.txt").write_bytes(b"by a reader, who is no run")
        return error

    monkeypatch.setattr(work, "explained", overtaken)
    found = made.run(say=said.append)
    assert (found.done, found.failed) == (("b",), {})
    assert f"a is left to another run: {ADDRESS}/a has changed meanwhile" in said
    assert (made.there / "cohort" / "a.log").read_text() == "begun\n"  # that of the other run
    of_a = {name: content for name, content in made.kept().items() if name.startswith("a/")}
    assert of_a == {"a/case.json": b"by another run", "a/notes.txt": b"by a reader, who is no run"}


@pytest.mark.slow
@pytest.mark.parametrize("out", [ADDRESS, None])
def test_a_file_of_an_older_run_may_be_gone(made, out):
    """It stands in the way of no later one, there or here."""
    place = made.there if out else made.here
    made.run(out=out or made.here)
    (place / "a" / "cam_lesion.nii.gz").unlink()
    (place / "b" / "cam_lesion.nii.gz").write_bytes(b"half")
    made.other_weights()
    assert made.run(out=out or made.here).done == tuple(NAMES)
    assert made.run(out=out or made.here).skipped == tuple(NAMES)


@pytest.mark.slow
def test_a_log_says_what_the_store_did(made, monkeypatch):
    with monkeypatch.context() as patch:
        made.refuse(patch, "a/cam_lesion.nii.gz", "quota exceeded")
        assert "quota exceeded" in made.run().failed["a"]
    log = (made.there / "cohort" / "a.log").read_text()
    assert "done after" in log
    assert "quota exceeded" in log
    assert made.run().done == ("a",)


@pytest.mark.slow
def test_a_failure_is_told_as_it_was_the_last_time(made, monkeypatch):
    """Not with the words of the run before."""
    (made.scans / "b.nii.gz").write_bytes(b"no scan")
    first = made.run()
    with monkeypatch.context() as patch:
        made.refuse(patch, ".log", "no network")
        assert "no network" in made.run(retry_failed=True).failed["b"]
    assert made.run().failed == first.failed  # what is noted is the fault of the scan


@pytest.mark.slow
def test_results_may_be_named_by_those_of_a_run_before(made):
    first = made.run()
    assert made.run(out=first.out).skipped == tuple(NAMES)
    with pytest.raises(ConfigError, match="options of a store are not passed on"):
        made.run(out=UPath(ADDRESS, skip_instance_cache=True))


@pytest.mark.slow
def test_nothing_there_goes_where_files_go_here(made, monkeypatch):
    """Something empties the temporary folder in mid-run."""
    made.run()
    made.replace("a")
    before, given = made.kept(), work.explained

    def emptied(one, model, out):
        error = given(one, model, out)
        for file in (out / one.name).glob("*.nii.gz"):
            file.unlink()
        return error

    monkeypatch.setattr(work, "explained", emptied)
    said = made.run().failed["a"]
    assert "went from the folder for temporary files" in said
    assert tempfile.gettempdir() not in said
    now = made.kept()
    assert {n: c for n, c in now.items() if n[0] == "a"} == {
        n: c for n, c in before.items() if n[0] == "a"
    }
    monkeypatch.setattr(work, "explained", given)
    assert made.run().done == ("a",)


@pytest.mark.slow
def test_a_full_disk_of_this_machine_ends_the_run(made, monkeypatch):
    made.run()
    made.replace("a")

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(made.there.fs), "get_file", full)
    with pytest.raises(OutputError, match=r"is full: .* TMPDIR") as raised:
        made.run()
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.slow
def test_a_case_is_done_without_its_log(made, monkeypatch):
    kind = type(made.there.fs)
    given = kind.put_file

    def refuse(self, here, there, **more):
        if there.endswith(".log") and b"done after" in Path(here).read_bytes():
            raise OSError("no network")
        return given(self, here, there, **more)

    monkeypatch.setattr(kind, "put_file", refuse)
    found = made.run()
    assert (found.done, found.failed) == (tuple(NAMES), {})


@pytest.mark.slow
def test_tables_have_what_another_part_did_meanwhile(made, monkeypatch):
    """One part reads what there is; another one ends; the first one writes."""
    given, others = summary.write_tables, []

    def late(*args):
        if not others:
            others.append(None)
            made.run(num_parts=2, part_id=1)
        return given(*args)

    monkeypatch.setattr(running, "sum_up", summary.sum_up)
    monkeypatch.setattr(summary, "write_tables", late)
    made.run(num_parts=2, part_id=0)
    rows = made.kept()["cohort.csv"].decode().splitlines()
    assert [row.split(",")[0:5:4] for row in rows[1:]] == [["a", "ok"], ["b", "ok"]]


@pytest.mark.slow
def test_an_address_with_brackets_is_no_pattern(made):
    address = "memory://results/liver [1]*"
    assert made.run(out=address).done == tuple(NAMES)
    made.replace("a")
    again = made.run(out=address)
    assert (again.done, again.skipped) == (("a",), ("b",))


@pytest.mark.slow
def test_what_a_killed_process_left_here_goes(made):
    scratch = Path(tempfile.gettempdir())
    mine = temporary_name(scratch, ".scratch")
    gone = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-999999999-"))
    gone.mkdir()
    (gone / "patient.nii.gz").write_bytes(b"volume")
    (scratch / "another").mkdir()
    made.run()
    assert not gone.exists()
    assert (scratch / "another").exists()
    gone.mkdir()  # of a worker that died in this run
    work.tidy(made.here / "a")
    assert not gone.exists()


@pytest.mark.slow
def test_a_copy_of_the_results_is_a_folder_of_results(made):
    made.run()
    copied = made.root / "copied"
    for name, content in made.kept().items():
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(content)
    assert read_record(copied / "a").case == "a"
    assert made.run(out=copied).skipped == tuple(NAMES)
