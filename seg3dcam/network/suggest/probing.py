"""Run a network on a random input, and record what each of its modules gives."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from seg3dcam.network.capture import Capture
from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.layouts import stride_of
from seg3dcam.network.module_class import class_of, takes_hooks
from seg3dcam.network.outputs import tensors_in
from seg3dcam.network.suggest.graph import Paths


@dataclass(frozen=True)
class ModuleOutput:
    """A tensor that a module gave in the probing pass.

    Attributes:
        layer: the module, and which of its outputs this is.
        order: number of the tensor, in the order in which tensors were made. A module that only
            passes a tensor on has the same number as the one that made it.
        tensor: the tensor.
        version: its version when it was given, which counts in-place operations.
        read: the input of a LayerNorm; None for other modules.
    """

    layer: LayerRef
    order: int
    tensor: torch.Tensor
    version: int
    read: torch.Tensor | None

    @property
    def rank(self) -> tuple:
        """Lower is better: outer modules first, then direct outputs, then the latest."""
        return (self.layer.name.count("."), len(self.layer.element), -self.order)


@dataclass(frozen=True)
class Candidate(ModuleOutput):
    """A tensor that is an image of the input, and on which the logits depend.

    Attributes:
        layout: how it becomes (B, C, *s).
        shape: (C, *s).
        stride: distance between its voxels, in voxels of the input.
        cancels: whether its products with the gradient sum to zero over the channels at every
            voxel.
        beside: whether the gradient is also non-zero in parts of the tensor outside of the image,
            such as a class token.
    """

    layout: Layout
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    cancels: bool = False
    beside: bool = False

    @property
    def size(self) -> int:
        """Number of its voxels."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class ProbingPass:
    """The result of a pass with a random input.

    Attributes:
        x: the input (1, C, *S).
        logits: the network's output.
        outputs: what every usable module gave.
        paths: the paths from the input to the logits.
    """

    x: torch.Tensor
    logits: torch.Tensor
    outputs: list[ModuleOutput]
    paths: Paths

    @property
    def gives(self) -> str:
        """What the network gives: "mask", "classes" of the image, or "output", such as boxes."""
        if math.prod(self.logits.shape[2:]) == 1:
            return "classes"
        return "mask" if self.logits.ndim == self.x.ndim else "output"


def probe(capture: Capture, input_shape: tuple[int, ...]) -> ProbingPass:
    """Run a network on a random input of a shape, and note what its modules give."""
    x = _random_input(capture, input_shape)
    found: list[ModuleOutput] = []
    orders: dict[int, int] = {}  # by the ids of tensors, which stay alive in `found`
    runs: Counter[str] = Counter()
    me = threading.get_ident()

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != me:  # somebody else predicts with the network meanwhile
            return
        runs[name] += 1
        read = args[0] if args and issubclass(class_of(module), nn.LayerNorm) else None
        for path, tensor in tensors_in(output):
            if tensor.requires_grad:
                layer = LayerRef(name, path, module)
                order = orders.setdefault(id(tensor), len(orders))
                found.append(ModuleOutput(layer, order, tensor, tensor._version, read))

    with ExitStack() as stack:
        for name, module in capture.model.named_modules():
            if name and takes_hooks(module):
                stack.callback(module.register_forward_hook(partial(look, name)).remove)
        logits = capture.forward(x)
    once = [o for o in found if o.tensor._version == o.version and runs[o.layer.name] == 1]
    return ProbingPass(x, logits, _usable(once, found), Paths(logits))


def _random_input(capture: Capture, input_shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.rand((1, *input_shape[1:]), generator=generator, device="cpu")
    return capture.to_model(x).requires_grad_()


def _usable(once: Iterable[ModuleOutput], found: Iterable[ModuleOutput]) -> list[ModuleOutput]:
    """Leave out norms, activations and the like, since the layer before them is more informative.

    This is also true for a LayerNorm, which makes all tokens equally long. It is kept all the same,
    since `choice.norm_that_reads` may need it.
    """
    normed = {id(o.tensor) for o in found if o.read is not None}
    return [
        o
        for o in once
        if o.read is not None or not (_is_pointwise(o.layer.module) or id(o.tensor) in normed)
    ]


def _is_pointwise(module: nn.Module) -> bool:
    """Tell whether a module is a norm, an activation, dropout or the like, without submodules."""
    if any(module.children()):
        return False
    kind = class_of(module)
    return (
        kind.__module__.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout"))
        or issubclass(kind, nn.Identity)
        or re.search("norm|drop", kind.__name__, re.IGNORECASE) is not None
    )


def candidates_in(capture: Capture, probed: ProbingPass) -> list[Candidate]:
    """Return the tensors that are images of the input and on which the logits depend."""
    images, logits = _images(capture, probed), probed.logits
    generator = torch.Generator("cpu").manual_seed(1)
    weights = torch.rand(logits.shape, generator=generator, device="cpu").to(logits)
    tensors = [image.tensor for image in images]
    gradients = (
        torch.autograd.grad(logits, tensors, weights, retain_graph=True, allow_unused=True)
        if images
        else ()
    )
    read = {memory_of_views(image.read) for image in images if image.read is not None}
    used = [
        replace(
            image,
            cancels=memory_of_views(image.tensor) in read and _cancels(image, gradient),
            beside=bool(image.layout(gradient).count_nonzero() < gradient.count_nonzero()),
        )
        for image, gradient in zip(images, gradients, strict=True)
        if gradient is not None
        and image.layout(gradient).any()  # not of a class token alone
        and image.tensor in probed.paths
        and image.tensor.grad_fn is not logits.grad_fn
    ]
    # The map of a term of the logits is only the logits again. If there are nothing but terms,
    # those with the shape of the logits are most likely the network's head, before a softmax.
    features = [image for image in used if not probed.paths.leads_to_logits(image.tensor)]
    return features or [i for i in used if i.tensor.shape != logits.shape] or used


def _images(capture: Capture, probed: ProbingPass) -> list[Candidate]:
    """Return the tensors whose voxels have places in the input, on a grid of whole strides."""
    layouts, _ = capture.layouts_of({o.layer: o.tensor.shape for o in probed.outputs}, probed.x)
    images = []
    for one in probed.outputs:
        if one.layer in layouts:
            layout = layouts[one.layer]
            shape = tuple(layout(one.tensor.detach()).shape[1:])
            stride = stride_of(shape[1:], probed.x.shape[2:])
            # A single voxel is a classifier's pooled vector, which has no place in the image.
            if stride is not None and math.prod(shape[1:]) > 1:
                images.append(Candidate(**vars(one), layout=layout, shape=shape, stride=stride))
    return images


def _cancels(image: Candidate, gradient: torch.Tensor) -> bool:
    """Tell whether activations times gradients sum to zero over the channels at every voxel."""
    products = image.layout(image.tensor.detach() * gradient)
    return bool(products.sum(1).abs().max() < 1e-3 * products.abs().sum(1).max())


def memory_of_views(tensor: torch.Tensor) -> int:
    """Return a number that a tensor and its views have in common."""
    return tensor.untyped_storage().data_ptr()
