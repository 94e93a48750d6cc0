"""Keep track of which target layers give maps, and why others do not."""

from __future__ import annotations

from collections.abc import Sequence

from seg3dcam.errors import LayerError, some
from seg3dcam.network.layers import LayerRef


class TargetLayers:
    """The target layers of a capture; those that give no map are dropped on the way.

    A layer that is `required`, because the user named it, is never dropped. Instead, an error is
    raised.

    Attributes:
        all: every target layer.
        dropped: layer -> why it gives no map. A layer without a gradient is dropped too, but its
            activations are still returned.
    """

    def __init__(self, layers: Sequence[LayerRef]) -> None:
        self.all = list(layers)
        self.dropped: dict[LayerRef, str] = {}
        self._refused: set[LayerRef] = set()

    @property
    def accepted(self) -> list[LayerRef]:
        """The layers whose activations can be read."""
        return [layer for layer in self.all if layer not in self._refused]

    def refuse(self, layer: LayerRef, reason: str | LayerError) -> None:
        """Drop a layer whose activations cannot be read; later passes do not record it."""
        self.drop(layer, reason)
        self._refused.add(layer)

    def drop(self, layer: LayerRef, reason: str | LayerError) -> None:
        """Note why a layer gives no map.

        Raises:
            LayerError: the layer is required, or it was the last one.
        """
        if layer.required:
            raise reason if isinstance(reason, LayerError) else LayerError(reason)
        self.dropped[layer] = str(reason)
        if len(self.dropped) == len(self.all):
            reasons = [f"{name}: {why}" for name, why in self.dropped.items()]
            raise LayerError(
                f"none of the {len(self.all)} target layers gives a map. {some(reasons, 3, '; ')}"
            )


def fault_of_runs(layer: LayerRef, runs: int) -> str:
    """Return what is wrong with a layer that did not run exactly once, "" for one that did."""
    if runs == 0:
        return f"layer '{layer}' did not run in the forward pass, so it explains nothing"
    if runs > 1:
        return (
            f"layer '{layer}' ran {runs} times in one forward pass: its activations are "
            "not one map. Choose a layer that runs once, for example the block around it"
        )
    return ""
