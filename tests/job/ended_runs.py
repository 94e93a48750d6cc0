"""Run a command again and again in copies of a folder, and end each run at another moment.

    python ended_runs.py before kept explain scan.nii.gz --model model.yaml

The runs are forks of one process, which has imported everything and has explained the scan, so that
each costs no more than what it writes. Every run has a folder of its own in `kept`:

    whole        goes on to its end; `again` the same
    SIGKILL_n    as `whole` was just before its nth change of its folder
    SIGTERM_n    hears this signal just before every second one of them, and SIGINT_n in turns
    outside_n    hears one of the three from outside, at any time

The last line of the output is JSON: the exit code of each run by the name of its folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seg3dcam.cli.commands import main
from seg3dcam.job import run

#: How many runs hear each signal from outside.
OUTSIDE = 3
#: What Python says before it changes something on the disk, beside opening a file to write to it.
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Changes:
    """Counts the changes of a folder from 1 on, and calls a function just before each."""

    def __init__(self, folder: Path, then: Callable[[int], object]) -> None:
        self.folder, self.then, self.count = f"{folder}/", then, 0
        sys.addaudithook(self)

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if not (event in CHANGES or (event == "open" and given[2] & WRITING)) or not self.folder:
            return
        path = os.fsdecode(given[0]) if isinstance(given[0], str | bytes | os.PathLike) else "/"
        # Only what is in a folder that is being removed has a path that is not absolute.
        if path.startswith(self.folder) or not path.startswith("/"):
            self.count += 1
            folder, self.folder = self.folder, ""  # what `then` does is not counted
            self.then(self.count)
            self.folder = folder


class Runs:
    """Runs of one command, each in a copy of one folder."""

    def __init__(self, before: Path, kept: Path, words: list[str]) -> None:
        self.before, self.kept, self.words = before, kept, words

    def all(self) -> dict[str, int]:
        """Return how each run ended."""
        # The first one is this process itself, so that the forks find everything imported.
        changes = Changes(self.copied("whole"), self.keep)
        codes = {"whole": self.run("whole")}
        changes.folder = ""
        for number in range(1, changes.count + 1, 2):
            kind = (signal.SIGTERM, signal.SIGINT)[number // 2 % 2]
            name = f"{kind.name}_{number}"
            codes[name] = ended(self.fork(name, kind, number))
        started = time.monotonic()
        codes["again"] = ended(self.fork("again"))
        whole = time.monotonic() - started
        rng = np.random.default_rng(0)
        for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) * OUTSIDE:
            name = f"outside_{len(codes)}"
            process = self.fork(name)
            time.sleep(rng.uniform(0, whole))
            os.kill(process, kind)
            codes[name] = ended(process)
        return codes

    def copied(self, name: str) -> Path:
        return Path(shutil.copytree(self.before, self.kept / name))

    def keep(self, number: int) -> None:
        """Keep the first run's folder as it is now: a kill would leave the same."""
        shutil.copytree(self.kept / "whole", self.kept / f"SIGKILL_{number}")

    def run(self, name: str) -> int:
        """Return the exit code."""
        sys.argv = ["seg3dcam", *self.words, "--out", str(self.kept / name)]
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def fork(self, name: str, kind: signal.Signals = signal.SIGTERM, last: int = 0) -> int:
        """Run in a fork, which sends itself a signal before its change number `last`.

        Returns:
            The fork's number.
        """
        folder = self.copied(name)
        if process := os.fork():
            return process
        code = 1
        try:
            # Ctrl-C is not heard by what runs in the background, as tests may.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
            Changes(folder, lambda number: number == last and os.kill(os.getpid(), kind))
            code = self.run(name)
        finally:
            os._exit(code)


def ended(process: int) -> int:
    """Wait for a fork, and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def explain_once() -> None:
    """Let every run after the first write what the first has found."""
    found: list[Any] = []
    explain_each = run.explain_each

    def explained(*args: Any, **kwargs: Any) -> Any:
        found.extend([] if found else explain_each(*args, **kwargs))
        return iter(found)

    run.explain_each = explained


if __name__ == "__main__":
    torch.set_num_threads(1)
    explain_once()
    before, kept, *words = sys.argv[1:]
    print(json.dumps(Runs(Path(before), Path(kept), words).all()))  # noqa: T201
