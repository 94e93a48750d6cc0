"""`seg3dcam cohort`: many scans explained, on one machine or a cluster."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seg3dcam.cli.explain import Termination
from seg3dcam.cli.options import job_options, parameter, settings_of
from seg3dcam.cli.printing import complain, err, print_file, say
from seg3dcam.errors import ConfigError
from seg3dcam.job.formats import FORMATS

#: Settings of a job that each case has for itself, and options of one scan.
_OF_A_CASE = ("scan", "input", "truth", "case", "config", "format", "out")

#: Without a terminal, progress is a line every so many seconds.
_EVERY = 30

_INPUT = (
    "folder of scans or of DICOM series, nnU-Net folder (imagesTs), pattern in quotes, table "
    "(.csv or .parquet with a column scan; case and truth are optional) or datalist of MONAI "
    "(.json)"
)

#: Options that say how a cohort is run -> type, default and help.
_OPTIONS: dict[str, tuple[type, Any, str]] = {
    "out": (str, None, "folder, or address such as s3://..., that gets the cases and the tables"),
    "keep": (
        str,
        None,
        f"what is kept of a case, joined by commas: {', '.join(FORMATS)}; default: nifti,html",
    ),
    "workers": (int, None, "processes side by side; default: this one alone, on Ray all that fit"),
    "ray": (str, None, "Ray cluster to work on: host:port, auto, or local to start one here"),
    "cpus": (float, None, "of a worker on Ray; default: 1"),
    "gpus": (float, None, "of a worker on Ray, such as 0.5; default: 1 where there are any"),
    "num_parts": (int, 1, "parts of the cohort, such as for an array of jobs of SLURM"),
    "part_id": (int, 0, "the part to do, from 0 on"),
    "retry_failed": (bool, False, "try cases again that failed before"),
    "trust": (bool, False, "allow the model's own Python code to run"),
}


def cohort(**options: Any) -> None:
    """Explain many scans, each in a folder of its own; run it again to go on."""
    how = {name: options.pop(name) for name in _OPTIONS}
    source = options.pop("source")
    settings = settings_of(options)
    for name, value in {"model": settings.get("model"), "out": how["out"]}.items():
        if value is None:
            raise ConfigError(f"--{name} is missing: seg3dcam cohort INPUT --model MODEL --out DIR")
    if (keep := how.pop("keep")) is not None:
        settings["format"] = [word.strip() for word in keep.split(",")]
    from seg3dcam.cohort import run

    started = time.monotonic()
    try:
        with _progress() as progress:
            result = run(source, **how, **settings, progress=progress, say=say)
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, Termination) else 130
        complain("interrupted; what is done stays, and the same command goes on from there", code)
    for what, path in [*(("table", table) for table in result.tables), ("page", result.page)]:
        print_file(what, path)
    seconds = timedelta(seconds=round(time.monotonic() - started))
    counts = {"done": result.done, "done before": result.skipped, "failed": result.failed}
    say(", ".join(f"{len(names)} {word}" for word, names in counts.items()) + f"; {seconds}")
    if result.failed:
        complain(
            f"failed: {len(result.failed)} of the cases, see the logs in {result.out / 'cohort'}; "
            "--retry-failed tries them again",
            1,
        )


def _signature() -> inspect.Signature:
    """Return what Typer makes the options of `cohort` from: its own, and those of every case."""
    words = typer.Argument(metavar="INPUT", help=_INPUT)
    source = parameter("source", str, words, default=inspect.Parameter.empty)
    found = [one for one in job_options() if one.name not in _OF_A_CASE]
    own = []
    for name, (kind, default, words) in _OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        own.append(parameter(name, kind, typer.Option(flag, help=words), default=default))
    return inspect.Signature([source, *found, *own])


cohort.__signature__ = _signature()  # type: ignore[attr-defined]


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (step, done, total) that shows how far a cohort is, with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    last = started
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("cases", total=None, rate="")

        def report(step: str, done: int, total: int) -> None:
            nonlocal last
            passed = time.monotonic() - started
            rate = f"{passed / done:.3g} s each" if done else ""
            bar.update(task, description=step, completed=done, total=total, rate=rate)
            if not err.is_terminal and done and time.monotonic() - last > _EVERY:
                last = time.monotonic()
                left = timedelta(seconds=round(passed / done * (total - done)))
                say(f"{done} of {total} {step}, {rate}, {left} left")

        yield report
