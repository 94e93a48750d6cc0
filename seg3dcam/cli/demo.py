"""`seg3dcam demo`: a scan that comes with the package, explained."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from seg3dcam.cli.explain import run
from seg3dcam.cli.printing import err, print_file
from seg3dcam.files import check_writable
from seg3dcam.job.settings import Job


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
