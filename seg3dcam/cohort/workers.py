"""Cases spread over worker processes, of which any may die at any time.

A worker is a process with a model. It has one case at a time, so where a process dies it is known
which case it was at. That case is tried once more, in another process: it may have been the process
that was killed. A case whose process dies twice has failed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from seg3dcam.cohort.plan import PlannedCase
from seg3dcam.cohort.work import CaseWorker, Work
from seg3dcam.errors import ModelError

#: How often a case is begun whose process dies.
ATTEMPTS = 2

#: After so many seconds without any process that is ready, it is said that the cohort waits.
PATIENCE = 60

_DIED = (
    f"the process that explained it died {ATTEMPTS} times, such as by lack of memory or a fault in "
    "a library. Explain this scan alone to see more"
)


class Worker(Protocol):
    """A process with a model, here or on another machine."""

    def load(self) -> Future[None]:
        """Begin to load the model."""
        ...

    def explain(self, one: PlannedCase) -> Future[str | None]:
        """Begin to explain a case; the result says why it failed, None if it did not."""
        ...

    def reason(self, error: BaseException) -> BaseException | None:
        """Return what was raised in the process, from a future's error; None where it has died."""
        ...

    def close(self) -> None:
        """Let the process end, if it has not; a case that it is at is given up."""
        ...

    def join(self) -> None:
        """Wait until it has ended."""
        ...


def spread(
    cases: Sequence[PlannedCase],
    opened: Callable[[], Worker],
    workers: int,
    say: Callable[[str], None],
) -> Generator[tuple[PlannedCase, str | None, bool]]:
    """Yield each case when it is done, with why it failed, and whether its process died.

    Args:
        opened: starts a worker.
        workers: how many there are, at most.
        say: called with a line where a worker cannot begin.

    Raises:
        ModelError: no worker could load the model.
        OutputError: the disk is full.
    """
    crew = _Crew(opened, workers, say)
    left, begun = deque(cases), Counter[str]()
    try:
        for _ in range(min(workers, len(left))):
            crew.open_one()
        while left or crew.at_work:
            for worker, one, ended in crew.next_ended():
                if ended.died:
                    if one is not None and begun[one.name] == ATTEMPTS:
                        yield one, _DIED, True
                    elif one is not None:
                        left.append(one)
                    if left:
                        crew.open_one()
                    continue
                if one is not None:
                    yield one, ended.result, False
                if left:
                    following = left.popleft()
                    begun[following.name] += 1
                    crew.give(worker, following)
                else:
                    worker.close()
    finally:
        crew.close()


@dataclass(frozen=True)
class _Ended:
    """How something that a worker did has ended.

    Attributes:
        result: of a case: why it failed.
        died: the worker's process is gone.
    """

    result: str | None = None
    died: bool = False


class _Crew:
    """The workers, and what each of them is at."""

    def __init__(self, opened: Callable[[], Worker], most: int, say: Callable[[str], None]) -> None:
        self._opened, self._most, self._say = opened, most, say
        # What is awaited -> the worker, and its case; without a case it loads the model.
        self._awaited: dict[Future[Any], tuple[Worker, PlannedCase | None]] = {}
        self._workers: list[Worker] = []
        self._failed_loads = 0

    @property
    def at_work(self) -> bool:
        """Whether any worker has a case."""
        return any(one is not None for _, one in self._awaited.values())

    def open_one(self) -> None:
        """Start a worker, which loads the model first."""
        worker = self._opened()
        self._workers.append(worker)
        self._awaited[worker.load()] = (worker, None)

    def give(self, worker: Worker, one: PlannedCase) -> None:
        """Give a worker a case."""
        self._awaited[worker.explain(one)] = (worker, one)

    def next_ended(self) -> Iterator[tuple[Worker, PlannedCase | None, _Ended]]:
        """Wait for something to end; yield the worker, its case (None: the model) and how."""
        finished, _ = wait(self._awaited, timeout=PATIENCE, return_when=FIRST_COMPLETED)
        if not finished and not self.at_work:
            self._say("no worker is ready yet: the cohort waits")
        for future in finished:
            worker, one = self._awaited.pop(future)
            error = future.exception()
            raised = None if error is None else worker.reason(error)
            if error is None:
                yield worker, one, _Ended(None if one is None else future.result())
                continue
            worker.close()
            if one is None:
                self._note_failed_load(raised)
            elif raised is not None:
                raise raised
            if raised is None:
                worker.join()  # so that nothing takes the dead process for one that is at work
                yield worker, one, _Ended(died=True)

    def close(self) -> None:
        """End all processes; the cases that they are at are given up."""
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join()

    def _note_failed_load(self, raised: BaseException | None) -> None:
        """Raise an error where no worker can load the model; one machine alone may lack it."""
        self._failed_loads += 1
        if raised is not None and not self._awaited:
            raise raised
        if self._failed_loads > ATTEMPTS * self._most:
            raise raised or ModelError(
                "workers die while they load the model, such as by lack of memory: take fewer"
            )
        self._say(f"a worker is left out: {raised or 'its process died'}")


# --------------------------------------------------------------------- processes of this machine


def local_workers(work: Work, workers: int) -> Callable[[], Worker]:
    """Return what starts a worker on this machine; several GPUs are taken in turns."""
    numbers = count()
    gpus = torch.cuda.device_count() if work.template.device in ("auto", "cuda") else 0
    threads = max(1, torch.get_num_threads() // workers)

    def opened() -> Worker:
        device = f"cuda:{next(numbers) % gpus}" if gpus > 1 else work.template.device
        template = work.template.model_copy(update={"device": device})
        return _LocalWorker(replace(work, template=template, threads=threads))

    return opened


class _LocalWorker:
    """A process of this machine. A pool has one, so that its end is that of the pool alone."""

    def __init__(self, work: Work) -> None:
        self._context = _Context()
        self._pool = ProcessPoolExecutor(1, self._context, initializer=_begin, initargs=(work,))
        self._now: Future[Any] = Future()

    def load(self) -> Future[None]:
        self._now = self._pool.submit(_load)
        return self._now

    def explain(self, one: PlannedCase) -> Future[str | None]:
        self._now = self._pool.submit(_explain, one)
        return self._now

    def reason(self, error: BaseException) -> BaseException | None:
        return None if isinstance(error, BrokenProcessPool) else error

    def close(self) -> None:
        if not self._now.done():
            for process in self._started:
                process.terminate()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        for process in self._started:
            process.join()

    @property
    def _started(self) -> list[BaseProcess]:
        """The processes that have begun; one that could not has no number."""
        return [process for process in self._context.made if process.pid is not None]


class _Context(SpawnContext):
    """Makes new processes, since PyTorch does not outlive a fork; and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[BaseProcess] = []

    def Process(self, *args: Any, **settings: Any) -> Any:  # type: ignore[override]  # noqa: N802
        """Make a process, as the pool does."""
        process = SpawnProcess(*args, **settings)
        self.made.append(process)
        return process


# ------------------------------------------------------------------- in a process of its own

_worker: CaseWorker
_at_work = False


def _begin(work: Work) -> None:
    """Prepare a new process: it ends when it is told to or when its parent has died."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = CaseWorker(work)


def _end(*_: Any) -> None:
    """End; where a case is being written, as after Ctrl-C, so that it is cleaned up."""
    if _at_work:
        raise KeyboardInterrupt
    os._exit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _load() -> None:
    _worker.load()


def _explain(one: PlannedCase) -> str | None:
    global _at_work
    _at_work = True
    try:
        return _worker.explain(one)
    finally:
        _at_work = False
