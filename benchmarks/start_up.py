"""Seconds from the call of a command, or of Python with an import, to the end of its process.

    python benchmarks/start_up.py       # 7 rounds
    python benchmarks/start_up.py 3     # fewer

Every run is a process of its own, and the runs take turns. Beside the seconds stand those of the
processor, which are nearly the same on an idle machine and tell more on a busy one. The goals: what
needs no network in less than a second, and `from seg3dcam import GradCAM` within 0.3 s of
`import torch`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

from measure import machine, summary, take_turns

ROOT = Path(__file__).parents[1]

COMMANDS = {
    "seg3dcam --help": "--help",
    "seg3dcam explain --help": "explain --help",
    "seg3dcam --version": "--version",
    "seg3dcam methods": "methods",
    "unknown option": "explain --nope",
    "unknown score": "explain ct.nii.gz --model model.yaml --score odds",
    "unknown method": "explain ct.nii.gz --model model.yaml --method gradcam",
}
IMPORTS = ["import torch", "import seg3dcam", "from seg3dcam import GradCAM", "import monai.data"]


def cases():
    """Return name -> command line; that of an empty Python for comparison."""
    python = [sys.executable]
    code = "from seg3dcam.cli.commands import main; main()"
    return (
        {"python, nothing else": [*python, "-c", ""]}
        | {name: [*python, "-c", code, *words.split()] for name, words in COMMANDS.items()}
        | {line: [*python, "-c", line] for line in IMPORTS}
    )


def run(command, spent):
    """Run a process, and add the processor's seconds that it took."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run(command, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    spent = {name: [] for name in cases()}
    ways = {name: partial(run, command, spent[name]) for name, command in cases().items()}
    taken = take_turns(ways, rounds)
    print(machine())
    print("\n| | seconds | of the processor |\n|---|---|---|")
    for name, times in taken.items():
        print(f"| {name} | {summary(times)} | {summary(spent[name][1:])} |")


if __name__ == "__main__":
    main()
