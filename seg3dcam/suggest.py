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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from seg3dcam.capture import Capture, capturing
from seg3dcam.ensemble import members_of
from seg3dcam.errors import LayerError
from seg3dcam.kinds import kind_of
from seg3dcam.layers import LayerRef, Layout, resolve_layers, unwrap
from seg3dcam.layouts import stride_of
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
class _Given:
    """A tensor that one module gave in the probing pass.

    Its order is that of the first module to give it: others only hand it on. Of a LayerNorm it is
    known what it read.
    """

    layer: LayerRef
    order: int
    tensor: torch.Tensor
    version: int
    read: torch.Tensor | None

    @property
    def rank(self) -> tuple:
        """Lower is better: outer modules, direct outputs, the latest."""
        return (self.layer.name.count("."), len(self.layer.element), -self.order)


@dataclass(frozen=True)
class _Seen(_Given):
    """One that has a place in the image."""

    layout: Layout
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    cancels: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape[1:])


def suggest_layers(
    model: nn.Module, input_shape: Sequence[int], *, output: OutputSelection = None
) -> list[Suggestion]:
    """List the layers that are worth explaining, the bottleneck first.

    Args:
        input_shape: shape of an input tensor, (B, C, *S); the batch size does not matter.
        output: which of several outputs are the logits.

    Raises:
        LayerError: the output depends on no layer whose activations have a place in the image.

    >>> network = nn.Sequential(
    ...     nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 2, 1))
    >>> [(s.name, s.role, s.stride) for s in suggest_layers(network, (1, 1, 16, 16))]
    [('0', 'bottleneck', (2, 2)), ('2', 'decoder', (1, 1))]
    """
    input_shape = members_of(model)[0].seen(input_shape)
    model = unwrap(model)
    with capturing(model, [], output) as capture:
        x = _random_input(capture, tuple(input_shape))
        given, logits = _probe(capture, x)
        found = _with_places(capture, given, logits, x)
        seen = [s for s in found if s.read is None]
        if not seen:
            raise LayerError(
                f"no layer of {type(model).__name__} gives activations with a place in the image "
                "that the output depends on: name a target layer"
            )
        bottleneck = _bottleneck(seen, x)
    classes = logits.shape[1]
    suggestions = [
        _suggestion(
            _as_read(bottleneck, found),
            "bottleneck",
            "the coarsest level: all evidence for the mask passes or bypasses it, and its maps "
            "echo the mask least",
        )
    ]
    for size in sorted({s.size for s in seen if s.size > bottleneck.size}):
        level = [
            s
            for s in seen
            if s.size == size and s.order > bottleneck.order and s.shape[0] > classes
        ]
        if level:
            best = _best(level)
            suggestions.append(
                _suggestion(
                    _as_read(_producer(best, level, bottleneck), found),
                    "decoder",
                    "finer, but the closer to the output, the more the map echoes the mask",
                )
            )
    return suggestions


def auto_layer(model: nn.Module, input_shape: Sequence[int], output: OutputSelection) -> LayerRef:
    """Return the layer that "auto" means: the bottleneck."""
    chosen = next(s for s in suggest_layers(model, input_shape, output=output) if s.auto)
    return resolve_layers(model, chosen.name)[0]


def _random_input(capture: Capture, input_shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.rand((1, *input_shape[1:]), generator=generator, device="cpu")
    return capture.to_model(x).requires_grad_()


def _probe(capture: Capture, x: torch.Tensor) -> tuple[list[_Given], torch.Tensor]:
    """Return what every usable module gave, and the logits."""
    found: list[_Given] = []
    orders: dict[int, int] = {}  # by identity: the tensors stay alive in `found`
    runs: Counter[str] = Counter()

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        runs[name] += 1
        read = args[0] if args and issubclass(kind_of(module), nn.LayerNorm) else None
        for path, tensor in tensors_in(output):
            if tensor.requires_grad:
                layer = LayerRef(name, path, module)
                order = orders.setdefault(id(tensor), len(orders))
                found.append(_Given(layer, order, tensor, tensor._version, read))

    with ExitStack() as stack:
        for name, module in capture.model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(partial(look, name)).remove)
        logits = capture.forward(x)
    # A LayerNorm makes all tokens equally long: the block before it says more (but see _as_read).
    normed = {id(g.tensor) for g in found if g.read is not None}
    usable = [g for g in found if g.tensor._version == g.version and runs[g.layer.name] == 1]
    kept = [
        g
        for g in usable
        if g.read is not None or not (_is_pointwise(g.layer.module) or id(g.tensor) in normed)
    ]
    return kept, logits


def _with_places(
    capture: Capture, given: Sequence[_Given], logits: torch.Tensor, x: torch.Tensor
) -> list[_Seen]:
    """Return the tensors that are images of the input and that the logits depend on."""
    layouts, _ = capture.layouts_of({g.layer: g.tensor.shape for g in given}, x)
    images = []
    for one in given:
        if one.layer in layouts:
            layout = layouts[one.layer]
            shape = tuple(layout(one.tensor.detach()).shape[1:])
            stride = stride_of(shape[1:], x.shape[2:])
            # A single voxel is a classifier's pooled vector: it has no place in the image.
            if stride is not None and math.prod(shape[1:]) > 1:
                images.append(_Seen(**vars(one), layout=layout, shape=shape, stride=stride))
    generator = torch.Generator("cpu").manual_seed(1)
    weights = torch.rand(logits.shape, generator=generator, device="cpu").to(logits)
    tensors = [image.tensor for image in images]
    gradients = (
        torch.autograd.grad(logits, tensors, weights, retain_graph=True, allow_unused=True)
        if images
        else ()
    )
    read = {_memory(image.read) for image in images if image.read is not None}
    used = [
        replace(image, cancels=_memory(image.tensor) in read and _cancels(image, gradient))
        for image, gradient in zip(images, gradients, strict=True)
        if gradient is not None
        and image.layout(gradient).any()  # of more than a class token
        and image.tensor.grad_fn is not logits.grad_fn
    ]
    # What is shaped like the logits is most likely their head, before a softmax.
    return [image for image in used if image.tensor.shape != logits.shape] or used


def _cancels(image: _Seen, gradient: torch.Tensor) -> bool:
    """Tell whether activations times gradients sum to nothing over the channels, everywhere."""
    products = image.layout(image.tensor.detach() * gradient)
    return bool(products.sum(1).abs().max() < 1e-3 * products.abs().sum(1).max())


def _as_read(best: _Seen, found: Sequence[_Seen]) -> _Seen:
    """Return the LayerNorm behind a layer where the network reads it through that alone.

    How long a token is, a LayerNorm forgets, so activations and gradients before it are orthogonal:
    HiResCAM would show nothing but rounding.
    """
    memory = _memory(best.tensor) if best.cancels else None
    norms = [s for s in found if s.read is not None and _memory(s.read) == memory]
    return _best(norms) if norms else best


def _memory(tensor: torch.Tensor) -> int:
    """Return what a tensor and its views have in common."""
    return tensor.untyped_storage().data_ptr()


def _best(seen: Sequence[_Seen]) -> _Seen:
    best = min(seen, key=lambda s: s.rank)
    # Of names for one tensor, the module that gives it alone: a list's may lead to nothing.
    same = [s for s in seen if s.tensor is best.tensor]
    return min(same, key=lambda s: (len(s.layer.element), s.rank))


def _bottleneck(seen: Sequence[_Seen], x: torch.Tensor) -> _Seen:
    smallest = min(s.size for s in seen)
    coarsest = [s for s in seen if s.size == smallest]
    best = _best(coarsest)
    others = list(coarsest)
    while not _sees_beyond_its_patch(best, x):
        others = [s for s in others if s.tensor is not best.tensor]
        if not others:  # every level is one of patches: none is better than another
            best = _best(coarsest)
            break
        best = _best(others)
    # A skip connection around the coarsest level gives (skip, level) concatenated: take the level.
    while type(best.tensor.grad_fn).__name__.startswith("Cat"):
        joined = {fn for fn, _ in best.tensor.grad_fn.next_functions}  # type: ignore[union-attr]
        inputs = [s for s in coarsest if s.tensor.grad_fn in joined]
        if not inputs:
            break
        latest = max(s.order for s in inputs)
        same = next(s for s in inputs if s.order == latest).tensor.grad_fn
        best = _best([s for s in inputs if s.tensor.grad_fn is same])
    return best


def _sees_beyond_its_patch(seen: _Seen, x: torch.Tensor) -> bool:
    """Tell a level of a network from an embedding of patches, which knows nothing around them.

    The halves of an embedding have no voxel of the input in common.
    """
    activations = seen.layout(seen.tensor)
    axis = 2 + max(range(x.ndim - 2), key=lambda a: activations.shape[2 + a])
    touched = []
    for half in activations.tensor_split(2, axis):
        weights = torch.linspace(1, 2, half.numel(), device="cpu").view(half.shape).to(half)
        (gradient,) = torch.autograd.grad((half * weights).sum(), x, retain_graph=True)
        touched.append(gradient != 0)
    return bool((touched[0] & touched[1]).any())


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
    return _best(elsewhere) if spans and elsewhere else best


def _suggestion(seen: _Seen, role: Literal["bottleneck", "decoder"], reason: str) -> Suggestion:
    tensor = seen.tensor
    return Suggestion(
        str(seen.layer),
        role,
        seen.shape,
        seen.stride,
        tensor.numel() * tensor.element_size() / 1e6,
        role == "bottleneck",
        reason,
    )


def _is_pointwise(module: nn.Module) -> bool:
    """Tell norms, activations, dropout and the like: the layer before them is the better choice."""
    if any(module.children()):
        return False
    kind = kind_of(module)
    return (
        kind.__module__.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout"))
        or issubclass(kind, nn.Identity)
        or re.search("norm|drop", kind.__name__, re.IGNORECASE) is not None
    )
