"""`seg3dcam explain`: a job from the command line, run and reported."""

from __future__ import annotations

import inspect
import time
from typing import Any

import typer

from seg3dcam.cli.options import job_of, job_options, parameter
from seg3dcam.cli.printing import complain, print_case, progress_bar, say
from seg3dcam.job.checks import check_job
from seg3dcam.job.settings import Job

#: Flags that say how a job is run, not what it is.
_FLAGS = {
    "trust": "allow the model's own Python code to run",
    "force": "do again what is done",
    "verify": "look into every file of what is done; do it again if one is not as it was written",
}


class Termination(KeyboardInterrupt):
    """The system or a cluster asks the process to end."""


def explain(*, trust: bool, force: bool, verify: bool, **options: Any) -> None:
    """Explain a scan: CAM volumes, PNGs, a page for the browser and a scene for 3D Slicer."""
    run(job_of(options), trust=trust, force=force, verify=verify)


def _signature() -> inspect.Signature:
    """Return what Typer makes the options of `explain` from."""
    flags = [
        parameter(name, bool, typer.Option(f"--{name}", help=words), default=False)
        for name, words in _FLAGS.items()
    ]
    return inspect.Signature([*job_options(), *flags])


explain.__signature__ = _signature()  # type: ignore[attr-defined]


def run(job: Job, *, force: bool, trust: bool = False, verify: bool = False) -> None:
    """Run a job and print what it found; where it is interrupted, say so and end."""
    started = time.monotonic()
    try:
        check_job(job)  # before PyTorch is imported, which takes seconds
        from seg3dcam.job import run_job

        with progress_bar() as progress:
            result = run_job(
                job, trust=trust, force=force, verify=verify, progress=progress, say=say
            )
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, Termination) else 130
        complain("interrupted; nothing half-written was left behind", code)
    if result.was_done:
        say(f"{result.folder} holds this case already, complete; --force does it again")
        return
    print_case(result.record, job, result.folder)
    say(f"done in {time.monotonic() - started:.0f} s")
