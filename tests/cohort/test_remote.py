"""Scans that lie elsewhere: the same cases as from a folder, and nothing is left behind here.

Results that go elsewhere are tested in test_elsewhere.py, and here in a bucket.
"""

from __future__ import annotations

import tempfile

import pytest
from helpers_cohort import content_of, write_cohort

from seg3dcam import cohort
from seg3dcam.cohort import read_cases
from seg3dcam.cohort.work import names_kept
from seg3dcam.errors import ConfigError, ScanError
from seg3dcam.files.remote import fingerprint
from seg3dcam.job.settings import Job

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
        there = {**settings, "out": "s3://hospital/results/liver"}
        for name in ("x", "x/y"):  # in a store a name may be a file and a folder
            store.pipe_file(f"hospital/results/liver/b/{name}", b"by somebody")
        done = cohort.run("s3://hospital/scans", workers=2, **there).done
        assert sorted(done) == NAMES
        store.rm("hospital/results/liver/b/cam_lesion.nii.gz")
        again = cohort.run("s3://hospital/scans", **there)
        assert (again.done, again.skipped, again.failed) == (("b",), ("a", "c"), {})
        for name in NAMES:
            for file in sorted((tmp_path / "out" / name).iterdir()):
                assert store.cat(f"hospital/results/liver/{name}/{file.name}") == file.read_bytes()
        with pytest.raises(ConfigError, match="s3://hopsital/out cannot be"):
            cohort.run("s3://hospital/scans", **(there | {"out": "s3://hopsital/out"}))
        assert store.ls("") == ["hospital"]
        assert [c.name for c in read_cases("s3://hospital/*/[ab].nii.gz")] == ["a", "b"]
        with pytest.raises(ConfigError, match="s3://nowhere"):
            read_cases("s3://nowhere/scans")
        table = tmp_path / "t.csv"
        table.write_text("scan\ns3://hospital/scans/gone.nii.gz\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"missing:\n  gone: s3://hospital"):
            read_cases(table)
    finally:
        server.stop()


def test_errors_name_the_file_elsewhere(bucket, tmp_path):
    (bucket / "scans" / "b.nii.gz").write_bytes(b"no scan")
    found = cohort.run(
        "memory://hospital/scans",
        model=str(tmp_path / "model.yaml"),
        out=tmp_path / "out",
        **SETTINGS,
    )
    assert "memory://hospital/scans/b.nii.gz" in found.failed["b"]
    assert tempfile.gettempdir() not in found.failed["b"]


def test_addresses_of_this_machine_are_paths(tmp_path):
    scans = write_cohort(tmp_path, NAMES)
    settings = {"model": str(tmp_path / "model.yaml"), "out": tmp_path / "out"} | SETTINGS
    assert cohort.run(f"file://{scans}", **settings).done == tuple(NAMES)
    assert cohort.run(scans, **settings).skipped == tuple(NAMES)
    everything = f"file://{tmp_path}/**/*.nii.gz"
    assert [c.name for c in read_cases(everything, without=tmp_path / "out")] == NAMES
    (tmp_path / "cases.csv").write_text(f"scan\nfile://{scans}/a.nii.gz\n", encoding="utf-8")
    assert read_cases(tmp_path / "cases.csv")[0].files == (scans / "a.nii.gz",)


def test_a_file_is_the_same_however_a_store_tells_of_it(bucket, monkeypatch):
    """A store says more of a file that is asked for than of one in a list."""
    file = bucket / "scans" / "a.nii.gz"
    before = fingerprint(file)
    given = type(file.fs).info
    monkeypatch.setattr(
        type(file.fs), "info", lambda *args, **more: given(*args, **more) | {"StorageClass": "IA"}
    )
    assert fingerprint(file) == before
    file.write_bytes(file.read_bytes())  # at another time
    assert fingerprint(file) != before


def test_no_error_shows_a_password(tmp_path):
    with pytest.raises(ConfigError, match="nostore://host/scans") as raised:
        read_cases("nostore://user:secret@host/scans")
    assert "secret" not in str(raised.value)
    given = Job(scan="s3://user:secret@host/a.nii.gz", model="m")
    copied = given.model_copy(update={"scan": ["/scratch/a.nii.gz"]})
    with (
        pytest.raises(ScanError, match=r"^s3://host/a\.nii\.gz is no scan"),
        names_kept(given, copied),
    ):
        raise ScanError("/scratch/a.nii.gz is no scan")
