"""What the commands print: tables, files, progress, warnings and errors."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from seg3dcam.errors import Seg3dcamWarning
from seg3dcam.files import shortened, visible
from seg3dcam.files.remote import Place
from seg3dcam.job.settings import Job

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

#: What to open first, and where.
_OPEN = {"report.html": "in a browser", "scene.mrml": "in 3D Slicer", "case.mrb": "in one file"}

#: What the columns of the table mean, in one line each.
_FOOTNOTE = {
    "peak": "the place where the CAM is strongest, in mm to the patient's right, front and head",
    "CAM inside": "the part of the whole CAM that lies inside the prediction; the rest is context",
    "verdict": "what may be said of the CAM; in words below",
}


def shown(text: str) -> str:
    """Return a text as it is, whatever it holds: no markup, nothing that a terminal obeys."""
    return escape(visible(text))


def say(text: str) -> None:
    """Print a sentence, which may hold anybody's names, without breaking it into lines."""
    out.print(shown(text), soft_wrap=True)


def complain(error: object, code: int) -> NoReturn:
    """Print an error and end with an exit code."""
    err.print(f"[red]error:[/red] {shown(str(error))}", soft_wrap=True)
    sys.exit(code)


def print_file(what: str, path: Place) -> None:
    """Print one file or folder behind a word for it."""
    out.print(f"{what:>12}  {shown(str(path))}", soft_wrap=True)


# --------------------------------------------------------------------------------- a case


def print_case(record: Mapping[str, Any], job: Job, folder: Path) -> None:
    """Print what was found and where every file is."""
    out.print(_table(record["explanations"], job))
    for word, meaning in _FOOTNOTE.items():
        out.print(f"{word}: {meaning}", style="dim", soft_wrap=True)
    layers = {k: v for case in record["explanations"] for k, v in case["layers"].items()}
    for name, layer in layers.items():
        size = " x ".join(f"{mm:.3g}" for mm in layer["spacing_mm"])
        say(f"resolution at layer {name}: {size} mm")
    for explained in record["explanations"]:
        for layer, said in explained["verdicts"].items():
            at = f" at {layer}" * (len(layers) > 1)
            by = f" by {explained['method']['name']}" * (len(job.methods) > 1)
            say(f"{explained['label']}{by}{at}: {said['words']}")
    for explained in record["explanations"]:
        for warning in explained["found"]["warnings"]:
            say(f"{explained['label']}: {warning}")
    _print_files(folder, [Path(name) for name in record["files"]])


def _table(cases: list[Mapping[str, Any]], job: Job) -> Table:
    """Return a row for each explanation."""
    compared = job.truth is not None
    several = len(job.methods) > 1
    table = Table(title="What the network looked at", show_lines=False)
    for name in ("class", *["method"] * several):
        table.add_column(name, overflow="fold", min_width=min(len(name), 12))
    for name in (
        "predicted",
        *["Dice"] * compared,
        "peak (R, A, S mm)",
        "CAM inside",
        "verdict",
    ):
        table.add_column(name)
    for case in cases:
        found = case["found"]
        peak, inside = found["peak_mm"], found["cam_inside_prediction"]
        ml, dice = found["predicted_ml"], found["dice"]
        table.add_row(
            shown(shortened(case["label"])),
            *[case["method"]["name"]] * several,
            "" if ml is None else f"{ml:.1f} ml",
            *["" if dice is None else f"{dice:.2f}"] * compared,
            "" if peak is None else ", ".join(f"{x:.0f}" for x in peak),
            "" if inside is None else f"{100 * inside:.0f} %",
            _verdict_in_brief(case),
        )
    return table


def _verdict_in_brief(case: Mapping[str, Any]) -> str:
    """Return what is said of an explanation's maps, each finding once, or why there is none."""
    status = {name: layer["status"] for name, layer in case["layers"].items()}
    said = {name: verdict["finding"] for name, verdict in case["verdicts"].items()}
    words = [
        said.get(name, "ok") if found == "ok" else f"no map: {found}"
        for name, found in status.items()
    ]
    return ", ".join(dict.fromkeys(words))


def _print_files(folder: Path, files: list[Path]) -> None:
    """Print what to open first; of the rest, files of a kind or of a folder on one line."""
    first = [(_where_opened(file), file) for file in files if _where_opened(file)]
    for where, file in first:
        print_file(where, folder / file)
    alike: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        kind = re.split("[_.]", file.parts[0])[0]
        pattern = f"{kind}_*{''.join(file.suffixes)}" if len(file.parts) == 1 else file.parts[0]
        if not _where_opened(file):
            alike.setdefault((kind, pattern), []).append(file)
    for (kind, pattern), found in alike.items():
        if len(found) == 1:
            print_file(kind, folder / found[0])
        else:
            print_file(f"{len(found)} files", folder / pattern)
    print_file("record", folder / "case.json")


def _where_opened(file: Path) -> str:
    """Say where a file is opened first, also where its name got a number; else nothing."""
    return _OPEN.get(re.sub(r"_\d+(?=\.)", "", file.name), "")


# ------------------------------------------------------------------- progress and warnings


class _Elapsed(ProgressColumn):
    """The time since the start of all steps: it goes on while a step has nothing to count."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()

    def render(self, task: Task) -> Text:
        """Write hours, minutes and seconds."""
        return Text(str(timedelta(seconds=int(time.monotonic() - self._started))))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (step, done, total) that draws a bar on a terminal.

    A step of one part has nothing to count: its bar moves to and fro.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        _Elapsed(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:

        def report(step: str, done: int, total: int) -> None:
            counted = total > 1
            if [task.description for task in bar.tasks] != [step]:
                for task in bar.tasks:  # a bar that has had a total never moves to and fro again
                    bar.remove_task(task.id)
                bar.add_task(step, total=None, count="")
            bar.update(
                bar.tasks[0].id,
                completed=done,
                total=total if counted else None,
                count=f"{done}/{total}" if counted else "",
            )

        yield report


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print our warnings as one line each; those of other libraries are not for the user."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        err.print(f"[yellow]warning:[/yellow] {shown(str(message))}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Seg3dcamWarning)
        warnings.showwarning = show
        yield
