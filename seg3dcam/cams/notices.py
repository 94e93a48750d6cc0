"""The warnings of a call, in words: about layers, gradients and maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.errors import tell
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.layouts import INPUT


def tell_dropped(dropped: Mapping[LayerRef, str]) -> None:
    """Say which layers have no map, and why."""
    for layer, reason in dropped.items():
        tell(f"no map of layer '{layer}': {reason}")


def tell_draws(operation: str) -> None:
    """Say that the network draws random numbers.

    Args:
        operation: the operation with which it draws; "" if it draws none, and nothing is said.
    """
    if operation:
        tell(
            f"the network draws random numbers when it predicts ({operation}): prediction and "
            "maps belong to one draw, the same in every pass. Other draws, from another random "
            "seed, give others: compare several"
        )


def tell_unmeasured(grids: Mapping[LayerRef, FeatureGrid]) -> None:
    """Say which layers' places in the image are assumed."""
    for layer, grid in grids.items():
        if not grid.measured:
            stride = max(grid.stride)
            off = f"shifted by up to {(stride - 1) / 2:g} input voxels, " if stride > 1 else ""
            tell(
                f"where the voxels of layer '{layer}' lie could not be measured; the map may be "
                f"{off}stretched or in another order"
            )


def tell_unchecked(layers: Sequence[LayerRef], reason: str) -> None:
    """Say which layers' gradients could not be checked."""
    if not layers:
        return
    which = ", ".join("the input" if la is INPUT else f"layer '{la}'" for la in layers[:3])
    which += f" and {len(layers) - 3} more" * (len(layers) > 3)
    tell(
        f"the gradient at {which} could not be checked"
        + (f" ({reason})" if reason else "")
        + ": the map may miss what branches without a gradient add to the score. Compare it with a "
        "method without gradients, such as score_cam or ablation_cam, or explain smaller windows"
    )


def tell_map(name: str, layer: LayerMap, target: str) -> None:
    """Say what a reader of a layer's map must know, such as why the map is empty."""
    for flag in layer.flags:
        tell(f"layer '{name}', '{target}': {flag}")
    if caution := layer.caution:
        tell(f"layer '{name}', '{target}': {caution}; scale=\"signed\" or --signed shows both")
    if layer.status == "ok":
        return
    if layer.status == "zero" and any(layer.only_against):
        tell(
            f"layer '{name}' shows nothing for '{target}' (status \"zero\"): {layer.reason}; "
            'scale="signed" or --signed shows it'
        )
        return
    tell(
        f"layer '{name}' explains nothing of '{target}' (status \"{layer.status}\"): {layer.reason}"
    )
