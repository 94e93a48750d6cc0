"""The commands: demo, explain, features, layers, methods. The only place that prints."""

from __future__ import annotations

import inspect
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.catalogue import ALL_METHODS, card
from seg3dcam.errors import (
    ConfigError,
    EmptyRegionError,
    LayerError,
    Seg3dcamError,
    Seg3dcamWarning,
    TargetError,
    nearest,
)
from seg3dcam.explaining.explain import explain_each
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.features import features_of_scan
from seg3dcam.files import check_writable, resolved, shortened, unique_names, visible
from seg3dcam.files.readers import FRAMES, Frame
from seg3dcam.job.case import check_formats, check_slice, write_apart, write_case
from seg3dcam.job.keys import OUT, Keys, case_folder, case_keys, look_of, scan_code
from seg3dcam.job.record import is_done, is_somebody_elses, record_of
from seg3dcam.job.settings import Job
from seg3dcam.job.targets import check_together, check_truth, targets_of
from seg3dcam.models import SegModel, load_model
from seg3dcam.models.load import relative_to
from seg3dcam.models.specs import MOST_VOXELS
from seg3dcam.network.suggest import suggest_layers
from seg3dcam.review import save_features
from seg3dcam.scan import load_labels, load_scan
from seg3dcam.settings import parse_yaml, read_yaml, validate

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Explain 3D segmentation networks: class activation maps in patient space.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_MODEL = "a YAML file, bundle:DIR (a MONAI bundle) or nnunet:FOLDER (a trained nnU-Net)"
_FRAME = "sform or qform: which says where a NIfTI scan lies; default: the sform if it has one"

#: Options of pairs -> an example.
_PAIRS = {
    "--settings": "window=4",
    "--input": "t1=t1.nii.gz",
    "--set": "inferer#roi_size=[64,64,64]",
}

#: One value of a bundle's config, as MONAI's own commands take it.
_SET = 'value of a bundle\'s config by its id, as "inferer#roi_size=[64,64,64]"; repeatable'

#: What to open first, and where.
_OPEN = {"report.html": "in a browser", "scene.mrml": "in 3D Slicer", "case.mrb": "in one file"}

#: What a command line needs at least.
_USAGE = (
    "Usage: seg3dcam explain SCAN --model MODEL, such as\n"
    "  seg3dcam explain ct.nii.gz --model liver.yaml\n"
    "or a whole job as YAML:\n"
    "  seg3dcam explain --config job.yaml\n"
    "`seg3dcam explain --help` lists all options"
)

#: What may stand behind a flag by mistake, as in `--trust true`.
_YES_OR_NO = {"true", "false", "yes", "no", "on", "off", "1", "0"}

#: What is no setting of a method, since it is asked for elsewhere.
_NO_SETTINGS = {
    *inspect.signature(BaseCAM.__init__).parameters,
    *inspect.signature(explain_each).parameters,
    *Job.model_fields,
}

#: The planes that slices are cut along.
_PLANES = ("axial", "coronal", "sagittal")

#: What the columns of the table mean, in one line each.
_FOOTNOTE = {
    "peak": "the place where the CAM is strongest, in mm to the patient's right, front and head",
    "CAM inside": "the part of the whole CAM that lies inside the prediction; the rest is context",
    "status": "ok, or why the CAM must not be read",
}


def main() -> None:
    """Run the command line: exit code 0 done, 1 a failure, 2 wrong use; 130 and 143 ended."""
    try:
        with _plain_warnings(), _ended_in_order():
            _check_flags(sys.argv[1:])
            app(prog_name="seg3dcam")
    except EmptyRegionError as error:
        _complain(error, 1)
    except (ConfigError, LayerError, TargetError) as error:
        _complain(error, 2)
    except (Seg3dcamError, torch.OutOfMemoryError, MemoryError) as error:
        _complain(error or "out of memory", 1)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "enough memory" not in str(error):
            raise
        _complain(f"out of memory: {error}", 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"seg3dcam {version('seg3dcam')}")
        raise typer.Exit


@app.callback()
def _before_every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Explain 3D segmentation networks: class activation maps in patient space."""


@app.command()
def explain(
    scan: Annotated[
        list[str] | None,
        typer.Argument(
            help="NIfTI file or folder of a DICOM series; several files are one scan's channels"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL)] = None,
    frame: Annotated[str | None, typer.Option(help=_FRAME)] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(help="image key of a bundle and its file, as t1=t1.nii.gz; repeatable"),
    ] = None,
    set: Annotated[list[str] | None, typer.Option(help=_SET)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="class name or index; repeatable; default: every predicted class"),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="log_odds (default), logit, probability, contrast, finer, soft_dice, mask_output"
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            help="voxels that count: predicted (default), volume, boundary, components (each "
            "lesion by itself), false_negatives, false_positives, true_positives"
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="the other class of --score contrast")] = None,
    truth: Annotated[
        str | None,
        typer.Option(help="label map on the scan's grid: drawn, measured; regions, soft_dice"),
    ] = None,
    label: Annotated[
        int | None, typer.Option(help="the class's label in the truth; default: its index")
    ] = None,
    min_voxels: Annotated[
        int | None, typer.Option(help="leave out smaller components, in the network's voxels")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="target layer, also with *, auto or all; repeatable; default: auto"),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="repeatable; default: hires_cam; `seg3dcam methods` lists them"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option(help="one setting of the method, as window=4; repeatable")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="output folder; default: one for the case in seg3dcam_out")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="a whole job as YAML; options override it")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")] = None,
    case: Annotated[
        str | None,
        typer.Option(help="the scan's name in pictures and reports; default: a code, no file name"),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="what is written: nifti, png, html, slicer (these four by default), cine, nrrd, "
            "fused, dicom; repeatable"
        ),
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="axial (default), coronal, sagittal: planes of the slices' PNGs, the first also "
            "of montage and film; repeatable"
        ),
    ] = None,
    slice: Annotated[
        str | None,
        typer.Option(
            help="PNG of one slice only, by its voxel index along --axis (axial); or all: of every "
            "slice; default: those that matter"
        ),
    ] = None,
    intensity_window: Annotated[
        str | None,
        typer.Option(
            help="grey values: 'soft tissue', lung, bone, brain, abdomen or WIDTH,LEVEL; default: "
            "soft tissue for a CT, else percentiles"
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="CAM below is not drawn; default: 0.2")
    ] = None,
    colormap: Annotated[
        str | None, typer.Option(help="any name of matplotlib or OpenCV; default: inferno")
    ] = None,
    signed: Annotated[
        bool | None,
        typer.Option(
            "--signed", help="show evidence against the target too, in colours of its own"
        ),
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="allow the model's own Python code to run")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="do again what is done")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="look into every file of what is done; do it again if "
            "one is not as it was written",
        ),
    ] = False,
) -> None:
    """Explain a scan: CAM volumes, PNGs, a page for the browser and a scene for 3D Slicer."""
    given = dict(locals())
    content = _job_of_file(config) if config else {}
    options = {k: v for k, v in given.items() if k in Job.model_fields and v is not None}
    if slice is not None:
        options["slice"] = _slice(slice)
    if "intensity_window" in options:
        options["intensity_window"] = _window(options["intensity_window"])
    if input:
        if scan:
            raise ConfigError("--input names the scan's files: leave out the others")
        options["scan"] = _pairs("--input", input)
    if settings:
        of_file = content.get("settings", {})
        # What is no mapping is left as it is, for `validate` to refuse.
        merged = {**of_file, **_settings(settings)} if isinstance(of_file, dict) else of_file
        options["settings"] = merged
    if set:
        of_file = content.get("set", {})
        options["set"] = {**of_file, **_overrides(set)} if isinstance(of_file, dict) else of_file
    _run(_job({**content, **options}, config), force=force, trust=trust, verify=verify)


@app.command()
def layers(
    model: Annotated[str, typer.Option(help=_MODEL)],
    shape: Annotated[
        str | None, typer.Option(help="input voxels, as 96,96,96; default: the model's window")
    ] = None,
    set: Annotated[list[str] | None, typer.Option(help=_SET)] = None,
    trust: Annotated[bool, typer.Option("--trust", help="allow the model's own code")] = False,
) -> None:
    """List the layers worth explaining."""
    loaded = load_model(model, trust=trust, overrides=_overrides(set))
    voxels = _shape(shape, loaded)
    table = Table(title=f"Layers of {_shown(loaded.name)}")
    table.add_column("layer", overflow="fold")  # a name that is cut off cannot be used
    for column in ("level", "channels", "voxels", "stride", "MB"):
        table.add_column(column, no_wrap=True)
    found = suggest_layers(
        loaded.module, (1, loaded.in_channels or 1, *voxels), output=loaded.output
    )
    for s in found:
        table.add_row(
            _shown(s.name) + (" (auto)" if s.auto else ""),
            s.role,
            str(s.shape[0]),
            "x".join(map(str, s.shape[1:])),
            "x".join(map(str, s.stride)),
            f"{s.megabytes:.1f}",
        )
    out.print(table)
    for role, reason in dict.fromkeys((s.role, s.reason) for s in found):
        # What is not true of all layers of a role is said of those that it is true of.
        alike = [s.name for s in found if s.role == role and s.reason == reason]
        every = len(alike) == sum(s.role == role for s in found)
        out.print(f"{role if every else _shown(', '.join(alike))}: {reason}")


@app.command()
def features(
    scan: Annotated[list[str], typer.Argument(help="NIfTI file; several are its channels")],
    model: Annotated[str, typer.Option(help=_MODEL)],
    frame: Annotated[str | None, typer.Option(help=_FRAME)] = None,
    layer: Annotated[str, typer.Option(help="one layer; default: the bottleneck")] = "auto",
    target: Annotated[
        str | None, typer.Option(help="class name or index: ranks channels by Grad-CAM's weights")
    ] = None,
    slice: Annotated[
        int | None, typer.Option(help="in the layer's voxels; default: the target's peak or middle")
    ] = None,
    axis: Annotated[
        str,
        typer.Option(help="axial, coronal, sagittal, or 0, 1, 2: an axis of the network's array"),
    ] = "0",
    scale: Annotated[str, typer.Option(help="channel: each its own; layer: one")] = "channel",
    colormap: Annotated[str, typer.Option(help="any matplotlib name")] = "viridis",
    top: Annotated[int | None, typer.Option(help="only the first so many channels")] = None,
    out: Annotated[
        str, typer.Option(help="gets a folder for each scan and layer")
    ] = "seg3dcam_features",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")] = "auto",
    set: Annotated[list[str] | None, typer.Option(help=_SET)] = None,
    trust: Annotated[bool, typer.Option("--trust", help="allow the model's own code")] = False,
) -> None:
    """Draw what the channels of a layer hold: a PNG of each, and a mosaic."""
    check_writable(out)
    _check_apart(Path(out), scan)
    _axis(axis)
    loaded = load_model(model, trust=trust, overrides=_overrides(set))
    loaded.module.to(_device(device))
    with _progress() as progress:
        loaded_scan = load_scan(scan if len(scan) > 1 else scan[0], frame=_frame(frame))
        found = features_of_scan(
            loaded_scan,
            loaded,
            layer,
            target=target,
            index=slice,
            axis=_axis(axis),
            progress=progress,
        )
        progress("writing", 0, 1)

        def write(folder: Path) -> None:
            save_features(folder, found, scale=scale, colormap=colormap, top=top)  # type: ignore[arg-type]

        name = f"scan {scan_code(loaded_scan)[:8]} {found.layer}"
        files = write_apart(Path(out), unique_names([name])[0], write)
    pages = [file for file in files if file.name.startswith("mosaic")]
    _print(f"{len(files) - len(pages)} channels", files[0].parent)
    for page in pages:
        _print("mosaic", page)


@app.command()
def methods() -> None:
    """List the methods: formula, paper, cost, what is class-specific, what is undefined."""
    for key, cam in ALL_METHODS.items():
        entries = card(cam)
        out.print(f"[bold]{key}[/bold]  {_shown(entries.pop('Summary'))}")
        for name, text in entries.items():
            style = "dim" if name == "Paper" else "none"
            out.print(Padding(f"{name}: {_shown(text)}", (0, 0, 0, 4), style=style, expand=False))


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
        target=["lesion", "grey matter", "white matter"],
        truth=str(truth),
        case="demo",
        method=method,
        layer=layer,
    )
    _print("scan", scan)
    _print("truth", truth)
    _run(job, force=force)


def _run(job: Job, *, force: bool, trust: bool = False, verify: bool = False) -> None:
    """Explain one scan as a job says."""
    try:
        _explain_job(job, force, trust, verify)
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, _Terminated) else 130
        _complain("interrupted; nothing half-written was left behind", code)


def _explain_job(job: Job, force: bool, trust: bool, verify: bool) -> None:
    started = time.monotonic()
    _check_methods(job)
    _check_places(job)
    check_together(job)
    look_of(job)
    inputs = {} if job.image_keys is None else {"inputs": job.image_keys}
    model = load_model(job.model, trust=trust, overrides=job.set, **inputs)
    model.module.to(_device(job.device))
    with _progress() as progress:
        progress("reading", 0, 1)
        scan = load_scan(job.scans if len(job.scans) > 1 else job.scans[0], frame=job.frame)
        check_slice(scan, job)
        check_formats(scan, job)
        truth = None if job.truth is None else load_labels(job.truth, frame=job.frame)
        if truth is not None:
            check_truth(truth, scan, job, model)
        targets = targets_of(job, model, truth)
        keys = case_keys(scan, model, job, truth)
        folder = case_folder(scan, job, keys)
        if is_done(folder, keys.all, verify=verify) and not force:
            out.print(
                f"{_shown(str(folder))} holds this case already, complete; --force does it again",
                soft_wrap=True,
            )
            return
        _say_where(folder, job, keys)

        def explanations() -> Iterator[Explanation]:
            """Explain only when the folder is locked: two runs at once would both work in vain."""
            for explanation in explain_each(
                scan,
                model,
                targets,
                layers=job.layers,
                method=job.methods,
                progress=progress,
                **job.settings,
            ):
                yield explanation if truth is None else explanation.with_truth(truth, job.label)

        record = write_case(folder, explanations(), job, keys=keys, progress=progress)
    _report(record, job, folder)
    out.print(f"done in {time.monotonic() - started:.0f} s")


def _say_where(folder: Path, job: Job, keys: Keys) -> None:
    """Say where a case goes if it is not where it was asked for, and what it replaces."""
    if job.out is not None and folder != Path(job.out):
        what = "another scan's case"
        if is_somebody_elses(Path(job.out)):
            what = "a case.json that is none of seg3dcam, or damaged"
        out.print(
            f"{_shown(job.out)} holds {what}: this one goes to {_shown(str(folder))}",
            soft_wrap=True,
        )
    before = record_of(folder)
    if before is not None and any(run.job_key == keys.job for run in before.runs):
        out.print(
            f"{_shown(str(folder))} holds this job from before: it is done again, and replaced",
            soft_wrap=True,
        )


def _check_places(job: Job) -> None:
    """Raise ConfigError where results would lie among the scan's files, or the other way."""
    out = resolved(job.out or OUT)
    scans = [resolved(scan) for scan in job.scans]
    truth = [resolved(job.truth)] if job.truth else []
    if any(source.is_relative_to(out) for source in [*scans, *truth]):
        raise ConfigError(
            f"out {job.out or OUT}: the scan or the truth lies in this folder; choose another"
        )
    _check_apart(Path(job.out or OUT), job.scans)


def _check_apart(out: Path, scans: Iterable[str]) -> None:
    """Raise ConfigError where results would lie in the folder that is a scan."""
    for scan in map(resolved, scans):
        if scan.is_dir() and resolved(out).is_relative_to(scan):
            raise ConfigError(f"out {out}: it lies in the scan's own folder; choose another")


def _check_methods(job: Job) -> None:
    """Raise ConfigError early for an unknown method, or settings that are no method's."""
    for method in job.methods:
        if method not in ALL_METHODS:
            raise ConfigError(f"method {method!r}: {nearest(method, ALL_METHODS)}")
    if job.settings and len(job.methods) > 1:
        raise ConfigError("settings are those of one method, and several are named")
    for name in job.settings:
        if name in _NO_SETTINGS:
            raise ConfigError(f"setting {name!r} is none of a method: it has an option of its own")


def _report(record: Mapping[str, Any], job: Job, folder: Path) -> None:
    """Print what was found and where every file is."""
    compared = job.truth is not None
    several = len(job.methods) > 1
    table = Table(title="What the network looked at", show_lines=False)
    for name in ("class", *["method"] * several):
        table.add_column(name, overflow="fold", min_width=min(len(name), 12))
    for name in ("predicted", *["Dice"] * compared, "peak (R, A, S mm)", "CAM inside", "status"):
        table.add_column(name)
    for case in record["explanations"]:
        found, status = case["found"], {layer["status"] for layer in case["layers"].values()}
        peak, inside = found["peak_mm"], found["cam_inside_prediction"]
        ml, dice = found["predicted_ml"], found["dice"]
        table.add_row(
            _shown(shortened(case["label"])),
            *[case["method"]["name"]] * several,
            "" if ml is None else f"{ml:.1f} ml",
            *["" if dice is None else f"{dice:.2f}"] * compared,
            "" if peak is None else ", ".join(f"{x:.0f}" for x in peak),
            "" if inside is None else f"{100 * inside:.0f} %",
            ", ".join(sorted(status)),
        )
    out.print(table)
    for word, meaning in _FOOTNOTE.items():
        out.print(f"{word}: {meaning}", style="dim", soft_wrap=True)
    layers = {k: v for case in record["explanations"] for k, v in case["layers"].items()}
    for name, layer in layers.items():
        size = " x ".join(f"{mm:.3g}" for mm in layer["spacing_mm"])
        out.print(f"resolution at layer {_shown(name)}: {size} mm", soft_wrap=True)
    for explained in record["explanations"]:
        for warning in explained["found"]["warnings"]:
            out.print(f"{_shown(explained['label'])}: {_shown(warning)}", soft_wrap=True)
    _print_files(folder, [Path(name) for name in record["files"]])


def _print_files(folder: Path, files: list[Path]) -> None:
    """Print what to open first; of the rest, files of a kind or of a folder on one line."""
    first = [(_where_opened(file), file) for file in files if _where_opened(file)]
    for where, file in first:
        _print(where, folder / file)
    alike: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        kind = re.split("[_.]", file.parts[0])[0]
        pattern = f"{kind}_*{''.join(file.suffixes)}" if len(file.parts) == 1 else file.parts[0]
        if not _where_opened(file):
            alike.setdefault((kind, pattern), []).append(file)
    for (kind, pattern), found in alike.items():
        if len(found) == 1:
            _print(kind, folder / found[0])
        else:
            _print(f"{len(found)} files", folder / pattern)
    _print("record", folder / "case.json")


def _where_opened(file: Path) -> str:
    """Say where a file is opened first, also where its name got a number; else nothing."""
    return _OPEN.get(re.sub(r"_\d+(?=\.)", "", file.name), "")


def _check_flags(words: list[str]) -> None:
    """Raise ConfigError where a flag is given a value: it would be taken for a scan."""
    group = typer.main.get_command(app)
    commands = [group, *getattr(group, "commands", {}).values()]
    parameters = [parameter for command in commands for parameter in command.params]
    flags = {name for p in parameters if getattr(p, "is_flag", False) for name in p.opts}
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        given = value if equals else following
        no_scan = given.lower() in _YES_OR_NO and not Path(given).exists()
        if flag in flags and (equals or no_scan):
            raise ConfigError(
                f"{flag} {given}: {flag} is a flag, which takes no value. Write {flag} alone for "
                "yes, and leave it out for no"
            )


def _job(settings: dict[str, Any], config: Path | None) -> Job:
    """Return the job of all settings; where scan or model are missing, say what to write."""
    try:
        return validate(settings, Job, str(config or "command line"))
    except ConfigError as error:
        if all(settings.get(key) is not None for key in ("scan", "model")):
            raise
        raise ConfigError(f"{error}\n{_USAGE}") from None


def _job_of_file(path: Path) -> dict[str, Any]:
    """Return a job file's settings, with paths relative to the file."""
    content = read_yaml(path)
    for key in ("scan", "out", "truth"):
        value = content.get(key)
        if isinstance(value, str):
            content[key] = _beside(path, value)
        elif isinstance(value, list):
            content[key] = [_beside(path, item) for item in value]
        elif isinstance(value, dict):
            content[key] = {name: _beside(path, item) for name, item in value.items()}
    if isinstance(content.get("model"), str):
        content["model"] = relative_to(path.parent, content["model"])
    return content


def _beside(path: Path, name: Any) -> Any:
    """Return the path of a file named in a job file; what is no name is left to be refused."""
    return str(path.parent / name) if isinstance(name, str) and name else name


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Return the settings of ['name=value', ...]; values are read as YAML."""
    found = _pairs("--settings", pairs)
    return {name: _value("--settings", name, value) for name, value in found.items()}


def _overrides(pairs: list[str] | None) -> dict[str, Any]:
    """Return the values of ['id=value', ...]; MONAI's own words stay words: $code, @id, %file."""
    found = _pairs("--set", pairs or [])
    return {
        name: value if value[0] in "$@%" else _value("--set", name, value)
        for name, value in found.items()
    }


def _value(option: str, name: str, text: str) -> Any:
    """Return what a text says as YAML."""
    try:
        return parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{option} {name}={text}: {text!r} cannot be read as a value") from error


def _pairs(option: str, pairs: list[str]) -> dict[str, str]:
    """Return the values of ['name=value', ...] by their names."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{option} {pair!r}: write name=value, such as {_PAIRS[option]}")
        if name in found:
            raise ConfigError(f"{option} {pair!r}: {name} is given twice")
        found[name] = value
    return found


def _window(text: str) -> Any:
    """Return (width, level) of 'W,L', or the name of a preset."""
    parts = text.split(",")
    try:
        return tuple(float(part) for part in parts) if len(parts) == 2 else text
    except ValueError:
        return text


def _slice(text: str) -> int | str:
    """Return a slice's index, or "all"; ConfigError for anything else."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--slice {text!r}: a voxel index, such as 80, or all") from None


def _axis(text: str) -> int | str:
    """Return the number of an axis, or a plane; ConfigError for anything else."""
    if text in ("0", "1", "2"):
        return int(text)
    if text in _PLANES:
        return text
    raise ConfigError(f"--axis {text!r}: legal are {', '.join(_PLANES)}, and 0, 1, 2")


def _shape(text: str | None, model: SegModel) -> tuple[int, ...]:
    if text is None:
        roi = model.window.roi_size if model.window else 96
        return (roi,) * 3 if isinstance(roi, int) else tuple(roi)
    try:
        voxels = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        voxels = ()
    if not voxels or min(voxels) < 1 or max(voxels) > MOST_VOXELS:
        raise ConfigError(
            f"--shape {text!r}: voxels along each axis, from 1 to {MOST_VOXELS}, as 96,96,96"
        )
    return voxels


def _frame(name: str | None) -> Frame | None:
    """Return a form of a NIfTI header; ConfigError for another word."""
    for frame in FRAMES:
        if name == frame:
            return frame
    if name is None:
        return None
    raise ConfigError(f"--frame {name!r}: legal are {', '.join(FRAMES)}")


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


class _Elapsed(ProgressColumn):
    """The time since the start of all steps: it goes on while a step has nothing to count."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()

    def render(self, task: Task) -> Text:
        """Write hours, minutes and seconds."""
        return Text(str(timedelta(seconds=int(time.monotonic() - self._started))))


@contextmanager
def _progress() -> Iterator[Any]:
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


class _Terminated(KeyboardInterrupt):
    """The system or a cluster asks the process to end."""


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Clean up where the process is asked to end, as after Ctrl-C."""

    def end(*_: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print our warnings as one line each; those of other libraries are not for the user."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        err.print(f"[yellow]warning:[/yellow] {_shown(str(message))}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Seg3dcamWarning)
        warnings.showwarning = show
        yield


def _shown(text: str) -> str:
    """Return a text as it is, whatever it holds: no markup, nothing that a terminal obeys."""
    return escape(visible(text))


def _complain(error: object, code: int) -> None:
    err.print(f"[red]error:[/red] {_shown(str(error))}", soft_wrap=True)
    sys.exit(code)


def _print(what: str, path: Path) -> None:
    out.print(f"{what:>12}  {_shown(str(path))}", soft_wrap=True)
