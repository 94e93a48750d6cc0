"""The other commands: demo, features, layers, methods.

What needs PyTorch is imported where a command has read its options, so that `methods`, and
whatever is wrong with the options of others, is said at once.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.table import Table

from seg3dcam.cams.method_cards import method_cards
from seg3dcam.cli.explain import run
from seg3dcam.cli.options import axis_of, help_of, overrides
from seg3dcam.cli.printing import err, out, print_file, progress_bar, shown
from seg3dcam.errors import ConfigError
from seg3dcam.files import check_writable, unique_names
from seg3dcam.job.checks import check_apart
from seg3dcam.job.settings import Job

if TYPE_CHECKING:
    from seg3dcam.files.readers import Frame
    from seg3dcam.models import SegModel

_MODEL, _FRAME, _SET, _DEVICE = map(help_of, ("model", "frame", "set", "device"))


def layers(
    model: Annotated[str, typer.Option(help=_MODEL)],
    shape: Annotated[
        str | None, typer.Option(help="input voxels, as 96,96,96; default: the model's window")
    ] = None,
    set: Annotated[list[str] | None, typer.Option(help=_SET)] = None,
    trust: Annotated[bool, typer.Option("--trust", help="allow the model's own code")] = False,
) -> None:
    """List the layers worth explaining."""
    changes = overrides(set)
    from seg3dcam.models import load_model
    from seg3dcam.network.suggest import suggest_layers

    loaded = load_model(model, trust=trust, overrides=changes)
    voxels = _shape(shape, loaded)
    table = Table(title=f"Layers of {shown(loaded.name)}")
    table.add_column("layer", overflow="fold")  # a name that is cut off cannot be used
    for column in ("level", "channels", "voxels", "stride", "MB"):
        table.add_column(column, no_wrap=True)
    found = suggest_layers(
        loaded.module, (1, loaded.in_channels or 1, *voxels), output=loaded.output
    )
    for s in found:
        table.add_row(
            shown(s.name) + (" (auto)" if s.auto else ""),
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
        out.print(f"{role if every else shown(', '.join(alike))}: {reason}")


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
    device: Annotated[str, typer.Option(help=_DEVICE)] = "auto",
    set: Annotated[list[str] | None, typer.Option(help=_SET)] = None,
    trust: Annotated[bool, typer.Option("--trust", help="allow the model's own code")] = False,
) -> None:
    """Draw what the channels of a layer hold: a PNG of each, and a mosaic."""
    check_writable(out)
    check_apart(Path(out), scan)
    cut_along, changes = axis_of(axis), overrides(set)
    from seg3dcam.explaining.features import features_of_scan
    from seg3dcam.job.case import write_apart
    from seg3dcam.job.keys import scan_code
    from seg3dcam.job.run import device_of
    from seg3dcam.models import load_model
    from seg3dcam.review import save_features
    from seg3dcam.scan import load_scan

    loaded = load_model(model, trust=trust, overrides=changes)
    loaded.module.to(device_of(device))
    with progress_bar() as progress:
        loaded_scan = load_scan(scan if len(scan) > 1 else scan[0], frame=_frame(frame))
        found = features_of_scan(
            loaded_scan,
            loaded,
            layer,
            target=target,
            index=slice,
            axis=cut_along,
            progress=progress,
        )
        progress("writing", 0, 1)

        def write(folder: Path) -> None:
            save_features(folder, found, scale=scale, colormap=colormap, top=top)  # type: ignore[arg-type]

        name = f"scan {scan_code(loaded_scan)[:8]} {found.layer}"
        files = write_apart(Path(out), unique_names([name])[0], write)
    pages = [file for file in files if file.name.startswith("mosaic")]
    print_file(f"{len(files) - len(pages)} channels", files[0].parent)
    for page in pages:
        print_file("mosaic", page)


def methods() -> None:
    """List the methods: formula, paper, cost, what is class-specific, what is undefined."""
    for key, card in method_cards().items():
        out.print(f"[bold]{key}[/bold]  {shown(card['Summary'])}")
        for name, text in card.items():
            if name != "Summary":
                style = "dim" if name == "Paper" else "none"
                line = Padding(f"{name}: {shown(text)}", (0, 0, 0, 4), style=style, expand=False)
                out.print(line)


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
    print_file("scan", scan)
    print_file("truth", truth)
    run(job, force=force)


def _shape(text: str | None, model: SegModel) -> tuple[int, ...]:
    """Return the voxels of a model's input; ConfigError for what is none."""
    from seg3dcam.models.specs import MOST_VOXELS

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
    from seg3dcam.files.readers import FRAMES

    for frame in FRAMES:
        if name == frame:
            return frame
    if name is None:
        return None
    raise ConfigError(f"--frame {name!r}: legal are {', '.join(FRAMES)}")
