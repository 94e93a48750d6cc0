"""The `with` in which a network is captured, and which puts everything back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from seg3dcam.errors import LayerError
from seg3dcam.network.capture.capture import Capture
from seg3dcam.network.capture.retry import FoundLateError
from seg3dcam.network.ensemble import Member, members_of
from seg3dcam.network.facts import opened, watched
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.layout_evidence import shows_layout
from seg3dcam.network.module_class import takes_hooks
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.untouched import check_explainable, untouched


@contextlib.contextmanager
def capturing(
    model: nn.Module | Member,
    layers: Sequence[LayerRef],
    output: OutputSelection = None,
) -> Iterator[Capture]:
    """Hook the target layers of a model in eval mode; put everything back at the end.

    Inside, parameters are frozen, autocast and reduced-precision arithmetic are off, and gradients
    can be computed whatever mode the caller is in. Afterwards, also after an exception, hooks, the
    mode of every submodule, `requires_grad`, buffers, attributes, random states and precision
    settings are as they were. `.grad` is never written. Other threads that want to capture this
    network, or one that shares modules with it, wait.

    Args:
        model: any `nn.Module`; DataParallel, DistributedDataParallel and compiled wrappers are
            looked through. Of an ensemble its first member is captured; give a `Member` to choose.
        layers: from `seg3dcam.network.layers.resolve_layers` for this model.
        output: which of the network's outputs are the logits, see `seg3dcam.network.outputs`.

    Raises:
        ModelError: the network cannot be explained, for example because its parameters are lazy or
            on the meta device. It has not been touched.

    >>> network = nn.Sequential(nn.Conv1d(1, 2, 1))
    >>> with capturing(network, []) as capture:
    ...     capture.observe(torch.zeros(1, 1, 4), copy=False).shape
    torch.Size([1, 2, 4])
    """
    member = model if isinstance(model, Member) else members_of(model)[0]
    model = member.network
    with contextlib.ExitStack() as stack:
        known = stack.enter_context(opened(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        check_explainable(model)
        _check_hooks(layers)
        capture = Capture(member, layers, output, known)
        stack.enter_context(torch.autocast(capture.device.type, enabled=False))
        stack.enter_context(untouched(model, capture.overwritten))
        stack.enter_context(watched(model))
        # These hooks come before those of the layers, which replace the outputs of modules.
        for module in filter(takes_hooks, filter(shows_layout, model.modules())):
            stack.callback(module.register_forward_hook(capture.on_evidence).remove)
        for layer in layers:
            hook = partial(_call_hook, capture, layer)
            stack.callback(layer.module.register_forward_hook(hook).remove)
        stack.callback(capture.clear)
        if known.overwrites:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_copy, _unchanged))
        try:
            yield capture
        except RuntimeError as error:
            if known.overwrites or "modified by an inplace operation" not in str(error):
                raise
            known.overwrites = True
            raise FoundLateError(
                "the network overwrites, in place, a tensor that its gradient needs: explain it "
                "again, now that this is known and copies are kept"
            ) from error


def _check_hooks(layers: Sequence[LayerRef]) -> None:
    """Raise LayerError for a layer that takes no hooks."""
    for layer in layers:
        if not takes_hooks(layer.module):
            raise LayerError(
                f"layer '{layer}' is TorchScript, which takes no hooks: choose the layer before or "
                "behind it, or put the module that it was made from back in its place"
            )


def _call_hook(capture: Capture, layer: LayerRef, module: nn.Module, args: Any, output: Any) -> Any:
    return capture.on_output(layer, output)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy for the backward pass, which nothing overwrites."""
    return tensor.detach().clone()


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
