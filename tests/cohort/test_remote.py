"""Scans that lie elsewhere: the same cases as from a folder, and nothing is left behind here."""

from __future__ import annotations

import hashlib
import json
import tempfile

import pytest
from helpers_cases import write_model, write_scan
from helpers_cohort import content_of, write_cohort

from seg3dcam import cohort
from seg3dcam.cohort import read_cases
from seg3dcam.errors import ConfigError

UPath = pytest.importorskip("upath", reason="universal-pathlib is an extra").UPath

NAMES = ["a", "b", "c"]
SETTINGS = {"target": "lesion", "format": ["nifti"]}


@pytest.fixture
def bucket(tmp_path):
    """A store in memory with the scans of a folder, tables of them, and one DICOM-like folder."""
    scans = write_cohort(tmp_path, NAMES)
    store = UPath("memory://hospital")
    for file in scans.iterdir():
        target = store / "scans" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (store / "cases.csv").write_text("case,scan\nfirst,scans/a.nii.gz\n", encoding="utf-8")
    (store / "data.json").write_text('[{"image": "scans/b.nii.gz"}]', encoding="utf-8")
    yield store
    store.fs.rm("/hospital", recursive=True)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("scans", NAMES),
        ("scans/*.nii.gz", NAMES),
        ("*/[ab].nii.gz", ["a", "b"]),
        ("cases.csv", ["first"]),
        ("data.json", ["b"]),
    ],
)
def test_cases_elsewhere_are_found(bucket, source, names):
    found = read_cases(f"memory://hospital/{source}")
    assert [case.name for case in found] == names
    assert all(str(case.files[0]).startswith("memory://hospital/scans/") for case in found)


def test_a_table_here_may_name_scans_elsewhere(bucket, tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text("scan\nmemory://hospital/scans/a.nii.gz\nscans/b.nii.gz\n", encoding="utf-8")
    here, elsewhere = read_cases(table)[1], read_cases(table)[0]
    assert str(elsewhere.files[0]) == "memory://hospital/scans/a.nii.gz"
    assert here.files[0] == tmp_path / "scans" / "b.nii.gz"


@pytest.mark.parametrize("source", ["nowhere", "nowhere.csv", "scans/*.mha"])
def test_nothing_is_found(bucket, source):
    with pytest.raises(ConfigError, match="memory://hospital"):
        read_cases(f"memory://hospital/{source}")


def test_missing_files_are_named(bucket):
    (bucket / "cases.csv").write_text("scan\nscans/a.nii.gz\nscans/gone.nii.gz\n")
    with pytest.raises(ConfigError, match=r"missing:\n  gone: memory://hospital/scans/gone"):
        read_cases("memory://hospital/cases.csv")


def test_an_unknown_store_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="nostore://a/scans"):
        read_cases("nostore://a/scans")


def test_results_are_those_of_the_same_files_here(bucket, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    settings = {"model": str(tmp_path / "model.yaml")} | SETTINGS
    elsewhere = cohort.run("memory://hospital/scans", out=tmp_path / "elsewhere", **settings)
    here = cohort.run(tmp_path / "scans", out=tmp_path / "here", **settings)
    assert elsewhere.done == here.done == tuple(NAMES)
    for name in NAMES:
        one, other = content_of(elsewhere.out, name), content_of(here.out, name)
        # The record knows the files by what their store says of them.
        assert {k: v for k, v in one.items() if not k.endswith("case.json")} == {
            k: v for k, v in other.items() if not k.endswith("case.json")
        }
    assert list(scratch.glob("seg3dcam-*")) == []
    again = cohort.run("memory://hospital/scans", out=tmp_path / "elsewhere", **settings)
    assert again.skipped == tuple(NAMES)
    changed = bucket / "scans" / "b.nii.gz"
    changed.write_bytes((bucket / "scans" / "c.nii.gz").read_bytes())
    assert cohort.run("memory://hospital/scans", out=tmp_path / "elsewhere", **settings).done == (
        "b",
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scans_in_a_bucket(tmp_path, monkeypatch):
    """A server of S3 on this machine, with the scans of a folder and a table that names them."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    scans = write_cohort(tmp_path, NAMES)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        store = s3fs.S3FileSystem()
        store.mkdir("hospital")
        for file in scans.iterdir():
            store.put(str(file), f"hospital/scans/{file.name}")
        settings = {"model": str(tmp_path / "model.yaml"), "out": tmp_path / "out"} | SETTINGS
        assert cohort.run("s3://hospital/scans", **settings).done == tuple(NAMES)
        assert cohort.run("s3://hospital/scans", **settings).skipped == tuple(NAMES)
        there = settings | {"out": "s3://hospital/out", "workers": 2}
        assert sorted(cohort.run("s3://hospital/scans", **there).done) == NAMES
        assert cohort.run("s3://hospital/scans", **there).skipped == tuple(NAMES)
        with pytest.raises(ConfigError, match="s3://hosptal/out: there is no hosptal"):
            cohort.run("s3://hospital/scans", **(there | {"out": "s3://hosptal/out"}))
        results = UPath("s3://hospital/out")
        for name in NAMES:
            found = of_cases(files_in(results))
            assert (
                found[f"{name}/cam_lesion.nii.gz"]
                == (tmp_path / "out" / name / "cam_lesion.nii.gz").read_bytes()
            )
            assert is_whole(found, name)
        assert "cohort.csv" in files_in(results)
        assert [c.name for c in read_cases("s3://hospital/*/[ab].nii.gz")] == ["a", "b"]
        with pytest.raises(ConfigError, match="s3://nowhere"):
            read_cases("s3://nowhere/scans")
        table = tmp_path / "t.csv"
        table.write_text("scan\ns3://hospital/scans/gone.nii.gz\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"missing:\n  gone: s3://hospital"):
            read_cases(table)
    finally:
        server.stop()


# ------------------------------------------------------------------------ results elsewhere


def files_in(place):
    """Return the name of every file in a store's folder -> its bytes."""
    root = place.path.rstrip("/")
    return {path.removeprefix(root + "/"): place.fs.cat(path) for path in place.fs.find(root)}


def of_cases(files):
    return {name: content for name, content in files.items() if name.split("/")[0] in NAMES}


def files_here(folder):
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def is_whole(files, name):
    """Tell whether a case has no record, or all files that it lists, as they were written."""
    if f"{name}/case.json" not in files:
        return True
    listed = json.loads(files[f"{name}/case.json"])["files"]
    return all(
        hashlib.sha256(files.get(f"{name}/{file}", b"")).hexdigest() == entry["sha256"]
        for file, entry in listed.items()
    )


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """A function that runs the cohort with its results in memory, and the same on this disk."""
    scans, store = write_cohort(tmp_path, NAMES), UPath("memory://results/liver")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    settings = {"model": str(tmp_path / "model.yaml")} | SETTINGS

    def run(out=str(store), **more):
        found = cohort.run(scans, out=out, **(settings | more))
        assert list(scratch.iterdir()) == []
        return found

    run.store, run.scans = store, scans
    yield run
    if store.fs.exists("/results"):
        store.fs.rm("/results", recursive=True)


def test_results_elsewhere_are_those_of_a_folder_here(outcome, tmp_path):
    there, here = outcome(), outcome(out=tmp_path / "here")
    assert there.done == here.done == tuple(NAMES)
    assert str(there.out) == "memory://results/liver"
    assert there.page.read_bytes() == here.page.read_bytes()
    assert [table.read_bytes() for table in there.tables] == [
        table.read_bytes() for table in here.tables
    ]
    found = {name: b for name, b in files_in(outcome.store).items() if not name.endswith(".log")}
    expected = {name: b for name, b in files_here(here.out).items() if not name.endswith(".log")}
    assert found == expected
    assert "cohort/a.log" in files_in(outcome.store)


def test_what_is_done_elsewhere_is_skipped(outcome, monkeypatch):
    outcome()
    before = files_in(outcome.store)
    again = outcome()
    assert (again.done, again.skipped) == ((), tuple(NAMES))
    assert files_in(outcome.store) == before
    (outcome.store / "b" / "case.json").unlink()
    assert outcome().done == ("b",)
    cam = outcome.store / "c" / "cam_lesion.nii.gz"
    cam.write_bytes(cam.read_bytes()[:-7])
    assert outcome().done == ("c",)
    assert of_cases(files_in(outcome.store)) == of_cases(before)


def test_files_that_another_run_no_longer_writes_go(outcome):
    outcome()
    write_model(outcome.scans.parent, biases=(0.0, -0.4, -1.5))  # other weights: all is done again
    target = outcome.store / "a" / "notes.txt"
    target.write_text("by a reader", encoding="utf-8")
    assert outcome().done == tuple(NAMES)
    files = files_in(outcome.store)
    assert files["a/notes.txt"] == b"by a reader"
    for name in NAMES:
        assert is_whole(files, name)
        listed = set(json.loads(files[f"{name}/case.json"])["files"])
        there = {file.removeprefix(f"{name}/") for file in files if file.startswith(f"{name}/")}
        assert there - {"case.json", "notes.txt"} == listed


def test_a_failure_elsewhere_is_kept_and_tried_again_when_asked(outcome):
    (outcome.scans / "b.nii.gz").write_bytes(b"no scan")
    first = outcome()
    assert list(first.failed) == ["b"]
    assert "cohort/b.failed.json" in files_in(outcome.store)
    assert outcome().failed == first.failed
    write_scan(outcome.scans / "b.nii.gz")
    assert outcome().done == ("b",)
    assert "cohort/b.failed.json" not in files_in(outcome.store)


def test_another_cohort_elsewhere_is_refused(outcome):
    outcome()
    with pytest.raises(ConfigError, match="the output folder holds a cohort of other"):
        outcome(target="organ")


def test_results_are_no_scans_of_the_next_run(outcome):
    """A pattern may match what was written."""
    for file in outcome.scans.iterdir():
        (outcome.store.parent / "scans" / file.name).parent.mkdir(parents=True, exist_ok=True)
        (outcome.store.parent / "scans" / file.name).write_bytes(file.read_bytes())
    outcome()
    found = read_cases("memory://results/**/*.nii.gz", without=outcome.store)
    assert [case.name for case in found] == NAMES


def test_a_store_that_cannot_be_written_is_an_error_before_any_work(outcome, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("access denied")

    monkeypatch.setattr(type(outcome.store.fs), "put", refuse)
    with pytest.raises(ConfigError, match="memory://results/liver cannot be written: access den"):
        outcome()
    with pytest.raises(ConfigError, match="nostore://a/out"):
        outcome(out="nostore://a/out")


@pytest.mark.slow
def test_copies_that_are_interrupted_leave_no_half_case(outcome, monkeypatch):
    """At every copy and every removal of a run with other weights, one after another."""
    outcome()
    write_model(outcome.scans.parent, biases=(0.0, -0.4, -1.5))
    kind = type(outcome.store.fs)
    put, removed = kind.put_file, kind.rm_file
    calls = []

    def counted(original):
        def call(self, *args, **kwargs):
            calls.append(args)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        return call

    monkeypatch.setattr(kind, "put_file", counted(put))
    monkeypatch.setattr(kind, "rm_file", counted(removed))
    stop, ended = 1, False
    while not ended:
        calls.clear()
        try:
            outcome()
            ended = True
        except KeyboardInterrupt:
            files = files_in(outcome.store)
            assert all(is_whole(files, name) for name in NAMES), stop
        stop += 3
    assert stop > 10
    monkeypatch.setattr(kind, "put_file", put)
    monkeypatch.setattr(kind, "rm_file", removed)
    again = outcome()
    assert not again.failed
    interrupted = of_cases(files_in(outcome.store))
    outcome.store.fs.rm("/results", recursive=True)
    outcome()
    assert of_cases(files_in(outcome.store)) == interrupted
