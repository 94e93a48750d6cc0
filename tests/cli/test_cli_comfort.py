"""What a newcomer meets first: how the command is called, what it says, and that it moves."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers_cases import PICTURES, Place, contents, seg3dcam
from rich.console import Console

from seg3dcam.cli import printing as cli
from seg3dcam.explaining.explain import explain_each
from seg3dcam.job.case import write_case
from seg3dcam.job.settings import Job
from seg3dcam.models import load_model

pytestmark = pytest.mark.usefixtures("measured_once")

# ------------------------------------------------------------------------------- how it is called


def as_module(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "seg3dcam", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_python_m_is_the_command():
    done = as_module("--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: seg3dcam [OPTIONS] COMMAND" in done.stdout


def test_version():
    outcome = seg3dcam("--version")
    assert (outcome.code, outcome.out) == (0, f"seg3dcam {version('seg3dcam')}\n")


@pytest.mark.slow
def test_the_shell_completes_commands():
    words = {"COMP_WORDS": "seg3dcam fea", "COMP_CWORD": "1"}
    done = as_module(_SEG3DCAM_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["features"]
    without = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # of who runs the tests
    shown = as_module("--show-completion", "bash", **without).stdout
    assert "complete -o default -F _seg3dcam_completion seg3dcam" in shown


# ------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ((), ["model", "scan"]),
        (("--model", "m.yaml"), ["scan"]),
        (("scan.nii.gz",), ["model"]),
    ],
    ids=["nothing", "model alone", "scan alone"],
)
def test_what_is_missing_is_said_with_what_to_write(words, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = seg3dcam("explain", *words)
    assert outcome.code == 2
    said = [line.strip() for line in outcome.err.splitlines()]
    assert [line for line in said if line.endswith(": missing")] == [
        f"{m}: missing" for m in missing
    ]
    assert "Usage: seg3dcam explain SCAN --model MODEL, such as" in said
    assert contents(tmp_path) == {}


def test_what_a_job_file_lacks_is_said_of_the_file(tmp_path):
    (tmp_path / "job.yaml").write_text("scan: a.nii.gz\n", encoding="utf-8")
    outcome = seg3dcam("explain", "--config", tmp_path / "job.yaml")
    assert outcome.code == 2
    assert "job.yaml:\n  model: missing" in outcome.err


FLAGS = {
    "explain --trust true": ("explain", "--trust", "true", "scan.nii.gz", "--model", "m"),
    "at the end": ("explain", "scan.nii.gz", "--model", "m.yaml", "--force", "Yes"),
    "with an equals sign": ("explain", "scan.nii.gz", "--model", "m.yaml", "--signed=1"),
    "layers": ("layers", "--model", "m.yaml", "--trust", "false"),
    "features": ("features", "scan.nii.gz", "--model", "m.yaml", "--trust", "0"),
    "demo": ("demo", "--force", "on"),
}


@pytest.mark.parametrize("words", FLAGS.values(), ids=FLAGS)
def test_a_flag_takes_no_value(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = seg3dcam(*words)
    assert outcome.code == 2
    flag = next(word for word in words if word in ("--trust", "--force") or "=" in word)
    flag = flag.partition("=")[0]
    assert f"{flag} is a flag, which takes no value. Write {flag} alone" in outcome.complaint
    assert contents(tmp_path) == {}


def test_a_scan_behind_a_flag_is_a_scan(place, monkeypatch):
    """Also one that is called as somebody else would answer a question."""
    odd = place.scan.rename(place.folder / "1")
    monkeypatch.chdir(place.folder)
    outcome = seg3dcam("explain", "--trust", odd.name, "--model", "model.yaml", "--out", "o")
    assert "is a flag" not in outcome.err
    assert outcome.code == 1  # no NIfTI's name


# ------------------------------------------------------------------------ memory that is full


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "error: CUDA out of memory.\n"),
        (torch.OutOfMemoryError(), "error: out of memory\n"),
        (MemoryError(), "error: out of memory\n"),
        (RuntimeError("not enough memory"), "error: out of memory: not enough memory\n"),
    ],
    ids=repr,
)
def test_full_memory_is_said_in_a_line(place, monkeypatch, error, said):
    def fill(*args, **kwargs):
        raise error

    monkeypatch.setattr("seg3dcam.job.run.explain_each", fill)
    outcome = place.explain()
    assert (outcome.code, outcome.err, outcome.out) == (1, said, "")


def test_another_error_of_the_program_is_no_message_for_the_user(place, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("seg3dcam.job.run.explain_each", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        place.explain()


# ----------------------------------------------------------------------------- what is printed


def test_the_table_says_once_what_its_columns_mean(place):
    out = place.explain().out
    assert out.count("CAM inside: the part of the whole CAM that lies inside the prediction") == 1
    assert out.count("peak: the place where the CAM is strongest") == 1


def test_long_names_leave_the_table_whole(place):
    names = ["background", "organ " + "x" * 90 + " left", "organ " + "x" * 90 + " right"]
    place = Place.at(place.folder, classes=names)
    out = place.explain("--method", "hires_cam", "--method", "grad_cam").out
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert len({len(row) for row in rows}) == 1
    cells = ["".join(column) for column in zip(*(row.split("│") for row in rows), strict=True)]
    joined = "".join(cells[1].split())
    assert "left" in joined
    assert "right" in joined
    assert "…" in joined


# -------------------------------------------------------------------------------------- progress


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 100 columns that keeps what it was sent."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(cli, "err", console)
    return console.file


def test_progress_counts_what_it_knows_and_nothing_else(terminal, monkeypatch):
    bars = []

    class Kept(cli.Progress):
        def __init__(self, *columns, **settings):
            super().__init__(*columns, **settings)
            bars.append(self)

    monkeypatch.setattr(cli, "Progress", Kept)
    totals = []
    with cli.progress_bar() as report:
        for call in (("reading", 0, 1), ("predicting", 27, 27), ("resampling lesion", 0, 1)):
            report(*call)
            bars[0].refresh()
            totals.append([task.total for task in bars[0].tasks])
    assert totals == [[None], [27], [None]]  # what has no total moves to and fro
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "27/27" in shown
    assert "/100" not in shown
    assert "0/1" not in shown


def test_the_time_goes_on_when_all_of_a_step_is_counted(terminal, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    column = cli._Elapsed()
    now[0] += 84
    assert column.render(None).plain == "0:01:24"


def test_resampling_and_writing_are_steps_that_are_counted(place):
    calls = []
    job = Job(
        scan=str(place.scan), model=str(place.model), out=str(place.out), format=["nifti", "html"]
    )

    def progress(*call):
        calls.append(call)

    found = explain_each(
        place.scan,
        load_model(place.model),
        ["organ", "lesion"],
        layers=["model.0", "model.1.submodule"],
        progress=progress,
    )
    write_case(place.out, found, job, progress=progress)
    steps = [call for call in calls if call[0].startswith(("resampling", "writing"))]
    assert steps == [
        *(("resampling the prediction", n, total) for n, total in ((0, 1), (0, 3), (1, 3), (2, 3))),
        *(
            (step, n, 2)
            for name in ("organ", "lesion")
            for step, n in (
                (f"resampling {name}", 0),
                (f"resampling {name}", 1),
                (f"writing {name}: nifti", 0),
                (f"writing {name}: html", 1),
            )
        ),
        ("writing html", 0, 1),
    ]


# -------------------------------------------------------------------------------------- pictures


@pytest.mark.slow
def test_slices_are_those_of_one_plane_unless_more_are_asked_for(place):
    def planes():
        return {f.name.partition("_")[0] for f in (place.out / "slices").rglob("*.png")}

    assert place.explain("--target", "lesion", *PICTURES).code == 0
    assert planes() == {"axial"}
    more = ("--axis", "axial", "--axis", "sagittal")
    assert place.explain("--target", "lesion", *PICTURES, *more).code == 0
    assert planes() == {"axial", "sagittal"}


@pytest.mark.parametrize(
    ("plane", "axis"), [("sagittal", "0"), ("coronal", "1"), ("axial", "2")], ids=str
)
def test_features_take_the_planes_words(place, plane, axis):
    """The scan's axes run mostly to the left, front and head; the network sees them so."""
    options = ("--model", place.model, "--target", "lesion", "--top", "1")
    files = []
    for word in (plane, axis):
        out = Path(place.folder) / word
        outcome = seg3dcam("features", place.scan, *options, "--axis", word, "--out", out)
        assert outcome.code == 0, outcome.err
        files.append({name: data for name, data in contents(out).items()})
    assert files[0] == files[1]


def test_an_axis_that_features_do_not_know(place):
    outcome = seg3dcam("features", place.scan, "--model", "none.yaml", "--axis", "axail")
    assert outcome.code == 2
    assert "--axis 'axail': legal are axial, coronal, sagittal, and 0, 1, 2" in outcome.complaint
