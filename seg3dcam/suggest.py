"""Which layers are worth explaining: the bottleneck and the levels of the decoder.

One probing pass with a random input tells what every module gives, at which resolution, and
whether the output depends on it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from seg3dcam.capture import capturing
from seg3dcam.errors import LayerError
from seg3dcam.layers import LayerRef, resolve_layers, stride_of, unwrap
from seg3dcam.outputs import OutputSelection, tensors_in


@dataclass(frozen=True)
class Suggestion:
    """A layer worth explaining.

    Attributes:
        name: what to pass as `target_layers`.
        role: "bottleneck" or "decoder".
        shape: (C, *s) of its activations.
        stride: input voxels from one of its voxels to the next, along each axis.
        megabytes: its activations for one input of the given shape; a map needs about three
            times as much.
        auto: True for the layer that "auto" means.
        reason: why it is suggested, in a sentence.
    """

    name: str
    role: Literal["bottleneck", "decoder"]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    megabytes: float
    auto: bool
    reason: str


@dataclass(frozen=True)
class _Seen:
    """What one module gave in the probing pass."""

    layer: LayerRef
    order: int
    tensor: torch.Tensor
    version: int
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.tensor.shape[2:])

    @property
    def rank(self) -> tuple:
        """Lower is better: outer modules, direct outputs, the latest."""
        return (self.layer.name.count("."), len(self.layer.element), -self.order)


def suggest_layers(
    model: nn.Module, input_shape: Sequence[int], *, output: OutputSelection = None
) -> list[Suggestion]:
    """List the layers that are worth explaining, the bottleneck first.

    Args:
        input_shape: shape of an input tensor, (B, C, *S); the batch size does not matter.
        output: which of several outputs are the logits.

    Raises:
        LayerError: the network has no layer with channel-first activations (B, C, *s) of lower
            resolution on which the output depends.

    >>> network = nn.Sequential(
    ...     nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 2, 1))
    >>> [(s.name, s.role, s.stride) for s in suggest_layers(network, (1, 1, 16, 16))]
    [('0', 'bottleneck', (2, 2)), ('2', 'decoder', (1, 1))]
    """
    seen, classes = _probe(unwrap(model), tuple(input_shape), output)
    # 1x1x1 is a classifier's pooled vector: it has no place in the image.
    seen = [s for s in seen if s.size > 1]
    if not seen:
        raise LayerError(
            f"no layer of {type(model).__name__} gives channel-first activations (B, C, *s) that "
            "the output depends on: name a target layer"
        )
    bottleneck = _bottleneck(seen)
    suggestions = [
        _suggestion(
            bottleneck,
            "bottleneck",
            "the coarsest level: all evidence for the mask passes or bypasses it, and its maps "
            "echo the mask least",
        )
    ]
    for size in sorted({s.size for s in seen if s.size > bottleneck.size}):
        level = [
            s
            for s in seen
            if s.size == size and s.order > bottleneck.order and s.tensor.shape[1] > classes
        ]
        if level:
            best = min(level, key=lambda s: s.rank)
            suggestions.append(
                _suggestion(
                    _producer(best, level, bottleneck),
                    "decoder",
                    "finer, but the closer to the output, the more the map echoes the mask",
                )
            )
    return suggestions


def auto_layer(model: nn.Module, input_shape: Sequence[int], output: OutputSelection) -> LayerRef:
    """Return the layer that "auto" means: the bottleneck."""
    chosen = next(s for s in suggest_layers(model, input_shape, output=output) if s.auto)
    return resolve_layers(model, chosen.name)[0]


def _probe(
    model: nn.Module, input_shape: tuple[int, ...], output: OutputSelection
) -> tuple[list[_Seen], int]:
    """Return what every usable module gave, and the number of classes."""
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((1, *input_shape[1:]), generator=generator).to(example)
    found: list[_Seen] = []
    runs: Counter[str] = Counter()

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        runs[name] += 1
        for path, tensor in tensors_in(output):
            fits = tensor.ndim == x.ndim and tensor.requires_grad
            stride = stride_of(tensor.shape[2:], x.shape[2:]) if fits else None
            if stride is not None:
                layer = LayerRef(name, path, module)
                found.append(_Seen(layer, len(found), tensor, tensor._version, stride))

    with capturing(model, [], output) as capture, ExitStack() as stack:
        for name, module in model.named_modules():
            if name and not _is_pointwise(module):
                stack.callback(module.register_forward_hook(partial(look, name)).remove)
        logits = capture.forward(x.requires_grad_())
        weights = torch.rand(logits.shape, generator=generator).to(logits)
        kept = [s for s in found if s.tensor._version == s.version and runs[s.layer.name] == 1]
        tensors = [s.tensor for s in kept]
        gradients = torch.autograd.grad(logits, tensors, weights, allow_unused=True) if kept else ()
    used = [
        s
        for s, gradient in zip(kept, gradients, strict=True)
        if gradient is not None and gradient.any() and s.tensor.grad_fn is not logits.grad_fn
    ]
    # What is shaped like the logits is most likely their head, before a softmax.
    inner = [s for s in used if s.tensor.shape != logits.shape]
    return inner or used, logits.shape[1]


def _bottleneck(seen: Sequence[_Seen]) -> _Seen:
    smallest = min(s.size for s in seen)
    coarsest = [s for s in seen if s.size == smallest]
    best = min(coarsest, key=lambda s: s.rank)
    # A skip connection around the coarsest level gives (skip, level) concatenated: take the level.
    while type(best.tensor.grad_fn).__name__.startswith("Cat"):
        joined = {fn for fn, _ in best.tensor.grad_fn.next_functions}  # type: ignore[union-attr]
        inputs = [s for s in coarsest if s.tensor.grad_fn in joined]
        if not inputs:
            break
        latest = max(s.order for s in inputs)
        same = next(s for s in inputs if s.order == latest).tensor.grad_fn
        best = min((s for s in inputs if s.tensor.grad_fn is same), key=lambda s: s.rank)
    return best


def _producer(best: _Seen, level: Sequence[_Seen], bottleneck: _Seen) -> _Seen:
    """Return the module that made a tensor, where `best` only hands it on from another branch."""
    inner = bottleneck.layer.module
    elsewhere = [
        s
        for s in level
        if s.tensor is best.tensor
        and not s.layer.name.startswith(best.layer.name + ".")
        and all(module is not inner for module in s.layer.module.modules())
    ]
    spans = any(module is inner for module in best.layer.module.modules())
    return min(elsewhere, key=lambda s: s.rank) if spans and elsewhere else best


def _suggestion(seen: _Seen, role: Literal["bottleneck", "decoder"], reason: str) -> Suggestion:
    tensor = seen.tensor
    return Suggestion(
        str(seen.layer),
        role,
        tuple(tensor.shape[1:]),
        seen.stride,
        tensor.numel() * tensor.element_size() / 1e6,
        role == "bottleneck",
        reason,
    )


def _is_pointwise(module: nn.Module) -> bool:
    """Tell norms, activations, dropout and the like: the layer before them is the better choice."""
    if any(module.children()):
        return False
    kind = type(module)
    return (
        kind.__module__.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout"))
        or isinstance(module, nn.Identity)
        or re.search("norm|drop", kind.__name__, re.IGNORECASE) is not None
    )
