"""One case of a cohort: explained, with a log; what fails is written down."""

from __future__ import annotations

import contextlib
import errno
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import torch

from seg3dcam.cohort.plan import PlannedCase, log_file, note_ended
from seg3dcam.cohort.results import made_at
from seg3dcam.errors import OutputError, Seg3dcamError
from seg3dcam.files import remove_scratch_left_behind, write_text
from seg3dcam.files.remote import local_copy, without_login
from seg3dcam.files.store import Store
from seg3dcam.job.folder import OccupiedError, locked
from seg3dcam.job.record import listed_files
from seg3dcam.job.run import model_of, run_with_model
from seg3dcam.job.settings import Job
from seg3dcam.models import SegModel

#: How the answer begins where another run is at the case, which is no failure.
BUSY = "left to another run: "

#: How it begins where a store does not take the results.
NOT_KEPT = "the results cannot be kept: "


def explained(one: PlannedCase, model: SegModel, out: Path) -> str | None:
    """Explain a case and keep its log; return why it failed, None if it did not.

    Where another run is at the case the answer begins with `BUSY`.

    Raises:
        OutputError: the disk is full, so that the next case would fail, too.
    """
    start, lines = time.perf_counter(), [f"begun {time.strftime('%Y-%m-%d %H:%M:%S')}"]
    given = [*one.job.scans, one.job.truth or ""]
    error = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with local_files(one.job) as job, names_kept(one.job, job):
                result = run_with_model(
                    job, model, inputs=one.code, say=lines.append, of_cohort=True
                )
        except OccupiedError as raised:
            return BUSY + str(raised)
        except Exception as raised:
            # Whatever is wrong with one scan must not stop the others.
            if isinstance(raised, OutputError) and raised.errno == errno.ENOSPC:
                raise
            error = without_login(str(raised) or type(raised).__name__, given)
            # It may name a file by bytes that are no UTF-8, which no table can hold.
            error = error.encode("utf-8", "backslashreplace").decode()
            trace = traceback.format_exc()
            # What cannot be written is no fault of the scan: the next run tries it again.
            lasting = not isinstance(raised, OutputError)
    lines += [f"{w.category.__name__}: {w.message}" for w in said]
    seconds = time.perf_counter() - start
    if error is None:
        # Of a scan that was read again and found to be done, the work took what it took before.
        took = {} if result.was_done else {result.key: round(seconds, 3)}
        note_ended(out, one, took=took)
    else:
        lines.append(trace)
        if lasting:
            note_ended(out, one, error)
    lines.append(f"{'done' if error is None else 'failed'} after {seconds:.1f} s")
    write_text(log_file(out, one.name), without_login("\n".join(lines) + "\n", given))
    return error


def explained_at(one: PlannedCase, model: SegModel, out: Path | str) -> str | None:
    """Explain a case whose results go to a folder, or to an address; see `explained`.

    Where the results cannot be kept at the address, the answer begins with `NOT_KEPT`.
    """
    if isinstance(out, Path):
        return explained(one, model, out)

    def make(folder: Path) -> str | None:
        job = one.job.model_copy(update={"out": str(folder / one.name)})
        return explained(replace(one, job=job), model, folder)

    try:
        return made_at(Store(out), one.name, make)
    except OccupiedError as error:
        return BUSY + str(error)
    except OutputError as error:
        # A full disk of this machine would stop the next case, too.
        if error.errno == errno.ENOSPC:
            raise
        return NOT_KEPT + str(error)


@contextlib.contextmanager
def local_files(job: Job) -> Iterator[Job]:
    """Give a job whose files lie on this machine, copied there while it is done."""
    with contextlib.ExitStack() as stack:
        scans = [stack.enter_context(local_copy(file)) for file in job.scans]
        truth = None if job.truth is None else stack.enter_context(local_copy(job.truth))
        yield job.model_copy(update={"scan": scans, "truth": truth})


@contextlib.contextmanager
def names_kept(given: Job, local: Job) -> Iterator[None]:
    """Let errors name files as they were given, and not the copies of them on this machine."""
    try:
        yield
    except Seg3dcamError as error:
        words = str(error)
        pairs = [*zip(local.scans, given.scans, strict=True), (local.truth, given.truth)]
        for copy, name in pairs:
            if copy is not None and copy != name:
                words = words.replace(str(copy), without_login(name, [str(name)]))
        if words == str(error):
            raise
        raise type(error)(words) from error


def tidy(folder: Path) -> None:
    """Remove what a process that died has left in a case's folder, as its next run would."""
    remove_scratch_left_behind()
    if folder.is_dir():
        with contextlib.suppress(OutputError), locked(folder, listed_files):
            pass
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing else is in it


@dataclass(frozen=True)
class Work:
    """What a process has to know to explain the cases of a cohort.

    Attributes:
        template: a job whose model, device and settings are those of every case.
        out: the cohort's folder, or its address.
        trust: whether the model's own Python code may run.
        threads: of PyTorch, in each process.
    """

    template: Job
    out: Path | str
    trust: bool
    threads: int


class CaseWorker:
    """Explains cases in a process of its own, with a model that is loaded once."""

    def __init__(self, work: Work) -> None:
        self._work = work

    @cached_property
    def _model(self) -> SegModel:
        torch.set_num_threads(self._work.threads)
        cv2.setNumThreads(self._work.threads)
        return model_of(self._work.template, trust=self._work.trust)

    def load(self) -> None:
        """Load the model; a worker is ready when this is done."""
        _ = self._model

    def explain(self, one: PlannedCase) -> str | None:
        """Explain a case, see `explained`."""
        return explained_at(one, self._model, self._work.out)
