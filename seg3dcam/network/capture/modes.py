"""The six modes of a forward pass, which say what is done with the output of a target layer.

| mode      | what the network continues with | what is kept         | used for                    |
|-----------|---------------------------------|----------------------|-----------------------------|
| `OFF`     | the same tensor                 | nothing              | trial runs                  |
| `COUNT`   | the same tensor                 | its shape            | logits alone                |
| `OBSERVE` | the same tensor                 | its shape and values | activations                 |
| `LEAF`    | a clone of a leaf of the graph  | its shape, the leaf  | gradients                   |
| `REPLAY`  | a clone of a leaf of the graph  | nothing              | checkpoints, run once again |
| `change`  | a changed tensor                | nothing              | occlusion of channels       |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from seg3dcam.network.capture.record import PassRecord
from seg3dcam.network.layers import LayerRef

#: A function from the record of the pass, a layer and its tensor to the tensor with which the
#: network continues; None for the same tensor.
Action = Callable[[PassRecord, LayerRef, torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Mode:
    """What is done with the tensors of the target layers.

    Attributes:
        act: what is done with one of them.
        listens: whether anything is done at all.
        records: whether shapes, numbers of runs and evidence of layouts are noted.
        every_thread: whether this also applies to other threads than the one that captures.
            Autograd runs checkpoints again in threads of its own.
    """

    act: Action
    listens: bool = True
    records: bool = False
    every_thread: bool = False


def change(changes: Mapping[LayerRef, Callable[[torch.Tensor], torch.Tensor]]) -> Mode:
    """Return the mode in which the outputs of some layers are changed.

    Args:
        changes: layer -> function from its output to the changed output.
    """

    def changed(record: PassRecord, layer: LayerRef, tensor: torch.Tensor) -> torch.Tensor | None:
        return changes[layer](tensor) if layer in changes else None

    return Mode(changed)


def _leave(record: PassRecord, layer: LayerRef, tensor: torch.Tensor) -> None:
    """Change nothing and keep nothing."""


def _observe(record: PassRecord, layer: LayerRef, tensor: torch.Tensor) -> None:
    record.keep(layer, tensor.detach().clone() if record.copies else tensor.detach())


def _cut(record: PassRecord, layer: LayerRef, tensor: torch.Tensor) -> torch.Tensor:
    leaf = _leaf(tensor)
    passed_on = leaf.clone()
    record.evidence.alike(tensor, passed_on)
    record.keep(layer, leaf)
    return passed_on


def _cut_again(record: PassRecord, layer: LayerRef, tensor: torch.Tensor) -> torch.Tensor:
    return _leaf(tensor).clone()


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor at which the graph starts.

    If another target layer lies before this one, the tensor must be part of its graph, and so it
    cannot be a leaf.
    """
    return tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()


OFF = Mode(_leave, listens=False)
COUNT = Mode(_leave, records=True)
OBSERVE = Mode(_observe, records=True)
LEAF = Mode(_cut, records=True)
REPLAY = Mode(_cut_again, every_thread=True)
