"""`seg3dcam features`: pictures of what the channels of a layer hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seg3dcam.cli.options import (
    DeviceName,
    FrameName,
    ModelSource,
    Overrides,
    ScanFiles,
    Trust,
    axis_of,
    frame_of,
    overrides,
)
from seg3dcam.cli.printing import print_file, progress_bar
from seg3dcam.files import check_writable, unique_names
from seg3dcam.job.checks import check_apart


def features(
    scan: ScanFiles,
    model: ModelSource,
    frame: FrameName = None,
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
    device: DeviceName = "auto",
    set: Overrides = None,
    trust: Trust = False,
) -> None:
    """Draw what the channels of a layer hold: a PNG of each, and a mosaic."""
    check_writable(out)
    check_apart(Path(out), scan)
    cut_along, header_form, changes = axis_of(axis), frame_of(frame), overrides(set)
    # What needs PyTorch is imported after the options are found to be legal.
    from seg3dcam.explaining.features import features_of_scan
    from seg3dcam.job.case import write_apart
    from seg3dcam.job.keys import scan_code
    from seg3dcam.job.run import model_on_device
    from seg3dcam.review import save_features
    from seg3dcam.scan import load_scan

    loaded = model_on_device(device, model, trust=trust, overrides=changes)
    with progress_bar() as progress:
        loaded_scan = load_scan(scan, frame=header_form)
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
