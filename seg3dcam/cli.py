"""The commands: demo, explain, layers, methods. The only place that prints."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seg3dcam.case import case_key, check_look, check_slice, is_done, write_case
from seg3dcam.config import Job, read_yaml, validate
from seg3dcam.errors import (
    ConfigError,
    EmptyRegionError,
    LayerError,
    Seg3dcamError,
    Seg3dcamWarning,
    TargetError,
    nearest,
)
from seg3dcam.explain import TargetSpec, explain_each
from seg3dcam.files import check_writable
from seg3dcam.methods import METHODS
from seg3dcam.models import SegModel, load_model
from seg3dcam.scan import load_scan
from seg3dcam.suggest import suggest_layers
from seg3dcam.targets import ClassLogit, ClassLogOdds, ClassProbability, MaskOutput

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Explain 3D segmentation networks: class activation maps in patient space.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

#: A step is shown with a progress bar once it has taken this many seconds.
PATIENCE = 2.0

SCORES = {"log_odds": ClassLogOdds, "logit": ClassLogit, "probability": ClassProbability}


def main() -> None:
    """Run the command line: exit code 0 done, 1 a failure, 2 wrong use."""
    try:
        with _plain_warnings():
            app()
    except EmptyRegionError as error:
        _complain(error, 1)
    except (ConfigError, LayerError, TargetError) as error:
        _complain(error, 2)
    except (Seg3dcamError, torch.OutOfMemoryError) as error:
        _complain(error, 1)


@app.command()
def explain(
    scan: Annotated[
        list[str] | None,
        typer.Argument(help="NIfTI file; several files are the channels of one scan"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="model spec, a YAML file")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="class name or index; repeatable; default: every predicted class"),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="log_odds (default), logit, probability, mask_output")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="voxels that count: predicted (default) or volume")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="target layer; repeatable; default: auto")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="default: hires_cam; `seg3dcam methods` lists them")
    ] = None,
    out: Annotated[str | None, typer.Option(help="output folder; default: seg3dcam_out")] = None,
    config: Annotated[
        Path | None, typer.Option(help="a whole job as YAML; options override it")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")] = None,
    axis: Annotated[
        str | None, typer.Option(help="plane of the PNGs: axial, coronal, sagittal")
    ] = None,
    slice: Annotated[int | None, typer.Option(help="one slice only: its voxel index")] = None,
    pictures: Annotated[bool | None, typer.Option(help="write PNGs")] = None,
    intensity_window: Annotated[
        str | None, typer.Option(help="'soft tissue', lung, bone, brain, abdomen or WIDTH,LEVEL")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="CAM below is transparent")] = None,
    colormap: Annotated[
        str | None, typer.Option(help="any matplotlib name; default inferno")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="allow the model's own Python code to run")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="do again what is done")] = False,
) -> None:
    """Explain a scan; leave CAM volumes, PNGs and case.json in a folder."""
    given = dict(locals())
    content = _job_of_file(config) if config else {}
    options = {k: v for k, v in given.items() if k in Job.model_fields and v is not None}
    if "intensity_window" in options:
        options["intensity_window"] = _window(options["intensity_window"])
    job = validate({**content, **options}, Job, str(config or "command line"))
    _run(job, force=force, trust=trust)


@app.command()
def layers(
    model: Annotated[Path, typer.Option(help="model spec, a YAML file")],
    shape: Annotated[
        str | None, typer.Option(help="input voxels, as 96,96,96; default: the model's window")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="allow the model's own code")] = False,
) -> None:
    """List the layers worth explaining."""
    loaded = load_model(model, trust=trust)
    voxels = _shape(shape, loaded)
    columns = ["layer", "level", "channels", "voxels", "stride", "MB"]
    table = Table(*columns, title=f"Layers of {escape(loaded.name)}")
    found = suggest_layers(
        loaded.module, (1, loaded.in_channels or 1, *voxels), output=loaded.output
    )
    for s in found:
        table.add_row(
            escape(s.name) + (" (auto)" if s.auto else ""),
            s.role,
            str(s.shape[0]),
            "x".join(map(str, s.shape[1:])),
            "x".join(map(str, s.stride)),
            f"{s.megabytes:.1f}",
        )
    out.print(table)
    for role in dict.fromkeys(s.role for s in found):
        out.print(f"{role}: {next(s.reason for s in found if s.role == role)}")


@app.command()
def methods() -> None:
    """List the methods."""
    from seg3dcam.cam import CAMS

    for key in METHODS:
        summary = (CAMS[key].__doc__ or "").strip().splitlines()[0]
        out.print(f"[bold]{key}[/bold]  {escape(summary)}")


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="output folder")] = "seg3dcam_demo",
    method: Annotated[str, typer.Option(help="`seg3dcam methods` lists them")] = "hires_cam",
    layer: Annotated[str, typer.Option(help="target layer")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="do again what is done")] = False,
) -> None:
    """Explain a real brain MRI with a planted lesion; no download, no GPU."""
    from seg3dcam import demo as package
    from seg3dcam.demo.scan import write_demo_scan

    check_writable(Path(out))
    with err.status("writing the scan", spinner="line") if err.is_terminal else nullcontext():
        scan, truth = write_demo_scan(out)
    job = Job(
        scan=str(scan),
        model=str(Path(package.__file__).with_name("model.yaml")),
        out=str(Path(out) / "explained"),
        method=method,
        layer=layer,
    )
    _print("scan", scan)
    _print("truth", truth)
    _run(job, force=force, truth=truth)


def _run(job: Job, *, force: bool, trust: bool = False, truth: Path | None = None) -> None:
    """Explain one scan as a job says."""
    try:
        _explain_job(job, force, trust, truth)
    except KeyboardInterrupt:
        _complain("interrupted; nothing half-written was left behind", 130)


def _explain_job(job: Job, force: bool, trust: bool, truth: Path | None) -> None:
    started = time.monotonic()
    if job.method not in METHODS:
        raise ConfigError(f"method {job.method!r}: {nearest(job.method, METHODS)}")
    check_look(job)
    sources = [job.scan] if isinstance(job.scan, str) else job.scan
    if any(Path(source).resolve().is_relative_to(Path(job.out).resolve()) for source in sources):
        raise ConfigError(f"out {job.out}: the scan itself lies in this folder; choose another")
    check_writable(Path(job.out))
    model = load_model(job.model, trust=trust)
    model.module.to(_device(job.device))
    with _progress() as progress:
        progress("reading", 0, 1)
        scan = load_scan(
            job.scan if isinstance(job.scan, str) or len(job.scan) > 1 else job.scan[0]
        )
        check_slice(scan, job)
        targets = _targets(job, model)
        key = case_key(scan, model, job)
        if is_done(job.out, key) and not force:
            out.print(
                f"{escape(job.out)} holds this case already, complete; --force does it again",
                soft_wrap=True,
            )
            return
        explanations = explain_each(
            scan, model, targets, layers=job.layers, method=job.method, progress=progress
        )
        progress("writing", 0, 1)
        record = write_case(job.out, explanations, job, key=key)
    _report(record, job, truth)
    out.print(f"{time.monotonic() - started:.0f} s")


def _targets(job: Job, model: SegModel) -> list[TargetSpec] | None:
    """Return the targets of a job; None is every predicted class."""
    if job.score == "mask_output" and job.target is not None:
        raise ConfigError("score mask_output is about no class: leave out the target")
    if job.score == "mask_output":
        return [MaskOutput(job.region or "volume", activation=model.activation)]
    if job.target is None:
        for what, given in (("score", job.score != "log_odds"), ("region", job.region)):
            if given:
                value = getattr(job, what)
                raise ConfigError(f"{what} {value!r} needs a class: name one with --target")
        return None
    names = job.target if isinstance(job.target, list) else [job.target]
    kind = SCORES[job.score]
    classes = dict.fromkeys(model.class_index(name) for name in names)
    region = job.region or "predicted"
    return [kind(index, region, activation=model.activation) for index in classes]


def _report(record: Mapping[str, Any], job: Job, truth: Path | None) -> None:
    """Print what was found and where every file is."""
    columns = ["class", "predicted", "peak (R, A, S mm)", "CAM inside", "status"]
    table = Table(*columns, title="What the network looked at", show_lines=False)
    for case in record["explanations"]:
        found, status = case["found"], {layer["status"] for layer in case["layers"].values()}
        peak, inside = found["peak_mm"], found["cam_inside_prediction"]
        ml = found["predicted_ml"]
        table.add_row(
            escape(case["target"]["class"] or case["target"]["name"]),
            "" if ml is None else f"{ml:.1f} ml",
            "" if peak is None else ", ".join(f"{x:.0f}" for x in peak),
            "" if inside is None else f"{100 * inside:.0f} %",
            ", ".join(sorted(status)),
        )
    out.print(table)
    case = record["explanations"][0]
    for name, layer in case["layers"].items():
        size = " x ".join(f"{mm:.3g}" for mm in layer["spacing_mm"])
        out.print(f"{case['method']['name']} at layer {escape(name)}: resolution {size} mm")
    if truth is not None:
        _report_truth(record, job, truth)
    folder = Path(job.out)
    slices: dict[Path, int] = {}
    for name in record["files"]:
        file = folder / name
        if file.parent == folder:
            _print(file.name.split("_")[0].removesuffix(".nii.gz"), file)
        else:
            slices[file.parent] = slices.get(file.parent, 0) + 1
    for place, count in slices.items():
        _print(f"{count} slice{'s' * (count > 1)}", place)
    _print("record", folder / "case.json")


def _report_truth(record: Mapping[str, Any], job: Job, truth: Path) -> None:
    """Compare the demo's prediction with what was planted."""
    true = load_scan(truth).data[0].numpy()
    predicted = load_scan(Path(job.out) / "prediction.nii.gz").data[0].numpy()
    names = record["explanations"][0]["model"]["classes"]
    dice = {
        name: 2
        * np.sum((true == c) & (predicted == c))
        / max(1, np.sum(true == c) + np.sum(predicted == c))
        for c, name in enumerate(names)
        if c
    }
    out.print("Dice with the truth: " + ", ".join(f"{n} {d:.2f}" for n, d in dice.items()))


def _job_of_file(path: Path) -> dict[str, Any]:
    """Return a job file's settings, with paths relative to the file."""
    content = read_yaml(path)
    for key in ("scan", "model", "out"):
        value = content.get(key)
        if isinstance(value, str):
            content[key] = str(path.parent / value)
        elif isinstance(value, list):
            content[key] = [str(path.parent / str(item)) for item in value]
    return content


def _window(text: str) -> Any:
    """Return (width, level) of 'W,L', or the name of a preset."""
    parts = text.split(",")
    try:
        return tuple(float(part) for part in parts) if len(parts) == 2 else text
    except ValueError:
        return text


def _shape(text: str | None, model: SegModel) -> tuple[int, ...]:
    if text is None:
        roi = model.window.roi_size if model.window else 96
        return (roi,) * 3 if isinstance(roi, int) else tuple(roi)
    try:
        voxels = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        voxels = ()
    if not voxels or min(voxels) < 1:
        raise ConfigError(f"--shape {text!r}: voxels along each axis, as 96,96,96")
    return voxels


def _device(name: str) -> torch.device:
    """Return the device to compute on.

    Raises:
        ConfigError: unknown, or not in this machine.
    """
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return torch.device("cuda" if here["cuda"] else "mps" if here["mps"] else "cpu")
    kind, _, number = name.partition(":")
    if kind not in here or (number and not number.isdigit()):
        raise ConfigError(f"device {name!r}: legal are auto, cpu, cuda, cuda:<number> and mps")
    if number and kind != "cuda":
        raise ConfigError(f"device {name!r}: legal are auto, cpu, cuda, cuda:<number> and mps")
    if not here[kind] or (number and kind == "cuda" and int(number) >= torch.cuda.device_count()):
        usable = ", ".join(kind for kind, usable in here.items() if usable)
        raise ConfigError(f"device {name!r} is not in this machine; usable are {usable}")
    return torch.device(name)


@contextmanager
def _progress() -> Iterator[Any]:
    """Give a function (step, done, total) that draws a bar for steps that take long."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", visible=False)
        current, since = "", time.monotonic()

        def report(step: str, done: int, total: int) -> None:
            nonlocal current, since
            if step != current:
                current, since = step, time.monotonic()
                bar.reset(task, description=step, visible=False)
            slow = time.monotonic() - since > PATIENCE or total == 1
            bar.update(task, completed=done, total=total if total > 1 else None, visible=slow)

        yield report


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print our warnings as one line each; those of other libraries are not for the user."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        err.print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Seg3dcamWarning)
        warnings.showwarning = show
        yield


def _complain(error: object, code: int) -> None:
    err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
    sys.exit(code)


def _print(what: str, path: Path) -> None:
    out.print(f"{what:>12}  {escape(str(path))}", soft_wrap=True)
