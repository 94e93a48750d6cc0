"""The record of what the target layers gave in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.layout_evidence import LayoutEvidence


class LayersReached(BaseException):
    """Ends a forward pass as soon as every target layer has run.

    It is no `Exception`, so that a network which catches exceptions does not catch it.
    """


class PassRecord:
    """Collects what the target layers give in one forward pass.

    Args:
        layers: the target layers to record.
        input_shape: (B, C, *S) of what the network takes.
        copies: whether kept tensors must be copies, because later operations overwrite them.
        stops: whether the pass ends as soon as every layer has run.

    Attributes:
        runs: layer -> number of times that it ran.
        shapes: layer -> shape of the tensor that it gave.
        tensors: layer -> the tensor that is kept, in the layer's own layout.
        layouts: layer -> how that tensor becomes (B, C, *s); filled after the pass.
        evidence: the evidence of layouts that the network's modules give.
    """

    def __init__(
        self,
        layers: Iterable[LayerRef] = (),
        input_shape: Sequence[int] = (),
        *,
        copies: bool = False,
        stops: bool = False,
    ) -> None:
        self.input_shape = tuple(input_shape)
        self.copies = copies
        self.runs: dict[LayerRef, int] = dict.fromkeys(layers, 0)
        self.shapes: dict[LayerRef, torch.Size] = {}
        self.tensors: dict[LayerRef, torch.Tensor] = {}
        self.layouts: dict[LayerRef, Layout] = {}
        self.evidence = LayoutEvidence(input_shape)
        self._stops = stops
        self._versions: dict[LayerRef, int] = {}

    def note(self, layer: LayerRef, tensor: torch.Tensor) -> None:
        """Note that a layer ran and gave a tensor."""
        self.runs[layer] += 1
        self.shapes[layer] = tensor.shape
        self.evidence.gave(layer, tensor)

    def keep(self, layer: LayerRef, tensor: torch.Tensor) -> None:
        """Keep a layer's tensor; raise LayersReached if the pass may end here."""
        self.tensors[layer], self._versions[layer] = tensor, tensor._version
        if self._stops and len(self.tensors) == len(self.runs):
            raise LayersReached

    def forget(self, layer: LayerRef) -> None:
        """Remove a layer that gives no map."""
        for of_layer in (self.tensors, self.shapes, self.layouts):
            of_layer.pop(layer, None)

    def was_overwritten(self) -> bool:
        """Tell whether an operation after a layer has worked in place on a kept tensor."""
        return any(t._version != self._versions[layer] for layer, t in self.tensors.items())
