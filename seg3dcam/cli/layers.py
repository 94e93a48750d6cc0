"""`seg3dcam layers`: the layers of a network that are worth explaining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from seg3dcam.cli.options import ModelSource, Overrides, Trust, overrides
from seg3dcam.cli.printing import out, shown
from seg3dcam.errors import ConfigError

if TYPE_CHECKING:
    from seg3dcam.models import SegModel
    from seg3dcam.network.suggest import Suggestion


def layers(
    model: ModelSource,
    shape: Annotated[
        str | None, typer.Option(help="input voxels, as 96,96,96; default: the model's window")
    ] = None,
    set: Overrides = None,
    trust: Trust = False,
) -> None:
    """List the layers worth explaining."""
    changes = overrides(set)
    # What needs PyTorch is imported after the options are found to be legal.
    from seg3dcam.models import load_model
    from seg3dcam.network.suggest import suggest_layers

    loaded = load_model(model, trust=trust, overrides=changes)
    voxels = _shape(shape, loaded)
    found = suggest_layers(
        loaded.module, (1, loaded.in_channels or 1, *voxels), output=loaded.output
    )
    out.print(_table(f"Layers of {shown(loaded.name)}", found))
    for role, reason in dict.fromkeys((s.role, s.reason) for s in found):
        # Where a reason does not hold for all layers of a role, those that it holds for are named.
        alike = [s.name for s in found if s.role == role and s.reason == reason]
        every = len(alike) == sum(s.role == role for s in found)
        out.print(f"{role if every else shown(', '.join(alike))}: {reason}")


def _table(title: str, found: list[Suggestion]) -> Table:
    """Return a row for each layer."""
    table = Table(title=title)
    table.add_column("layer", overflow="fold")  # a name that is cut off cannot be used
    for column in ("level", "channels", "voxels", "stride", "MB"):
        table.add_column(column, no_wrap=True)
    for s in found:
        table.add_row(
            shown(s.name) + (" (auto)" if s.auto else ""),
            s.role,
            str(s.shape[0]),
            "x".join(map(str, s.shape[1:])),
            "x".join(map(str, s.stride)),
            f"{s.megabytes:.1f}",
        )
    return table


def _shape(text: str | None, model: SegModel) -> tuple[int, ...]:
    """Return the voxels of a model's input; ConfigError for a text that gives none."""
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
