"""Which layers are worth explaining: the bottleneck and the levels of the decoder.

A network without a bottleneck, whose layers are all as fine as its output, has the middle of its
depth instead: the last of its layers gives the mask again.

One probing pass with a random input tells what every module gives, at which resolution, and
whether the output depends on it. What is said of a layer was found in that pass.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from seg3dcam.checks import is_whole
from seg3dcam.errors import InputError, LayerError
from seg3dcam.network.capture import Capture, begun_again, capturing
from seg3dcam.network.ensemble import members_of, unwrap
from seg3dcam.network.graph import Paths, edge_of
from seg3dcam.network.layers import LayerRef, Layout, resolve_layers
from seg3dcam.network.layouts import stride_of
from seg3dcam.network.module_class import class_of, takes_hooks
from seg3dcam.network.outputs import OutputSelection, tensors_in

Role = Literal["bottleneck", "middle", "decoder"]


@dataclass(frozen=True)
class Suggestion:
    """A layer worth explaining.

    Attributes:
        name: what to pass as `target_layers`.
        role: "bottleneck", "middle" where no level is coarser than the output, or "decoder".
        shape: (C, *s) of its activations.
        stride: input voxels from one of its voxels to the next, along each axis.
        megabytes: its activations for one input of the given shape; a map needs about three
            times as much.
        auto: True for the layer that "auto" means.
        reason: why it is suggested, and what was found of it, in a sentence.
    """

    name: str
    role: Role
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
    """One that has a place in the image.

    Attributes:
        cancels: its products with the gradient sum to nothing over the channels, everywhere.
        beside: the gradient reaches it outside of the image too, at a class token.
    """

    layout: Layout
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    cancels: bool = False
    beside: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class _Facts:
    """What the probing pass found of a layer.

    Attributes:
        gives: what the network gives, see `_gives`.
        several: the network has levels of more than one resolution.
        all_pass: nothing leads from the input to the logits around the layer.
        read_by_one: a voxel of the logits reads one voxel of it, seen in the middle; False is not
            known.
        depth, height: layers up to it, and between it and the logits.
        dilated: there are dilated convolutions.
    """

    gives: str
    several: bool
    all_pass: bool
    read_by_one: bool
    depth: int
    height: int
    dilated: bool

    def reason(self, role: Role) -> str:
        """Return why a layer is suggested."""
        if role == "decoder":
            return f"finer than the bottleneck and made from it; {self._echo}"
        if role == "bottleneck":
            words = "the coarsest level" if self.several else "the network's one level"
            words += f"; {self._evidence}"
            return f"{words}; {self._echo}" if self.read_by_one else words
        words = (
            "no level is coarser than the output, so there is no bottleneck; it lies "
            f"{self.depth} of {self.depth + self.height} layers deep; {self._evidence}; "
            f"{self._echo}"
        )
        return (
            f"{words}; dilated convolutions may leave their grid on it" if self.dilated else words
        )

    @property
    def _evidence(self) -> str:
        if self.all_pass:
            return f"all evidence for the {self.gives} passes through it"
        return f"its map leaves out the evidence that reaches the {self.gives} around it"

    @property
    def _echo(self) -> str:
        if self.read_by_one:
            return (
                "each voxel of the mask reads one voxel of it, so its map shows little but the mask"
            )
        return "as a rule, the closer to the output, the more a map echoes the mask"


@begun_again
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
    _check_shape(input_shape)
    input_shape = members_of(model)[0].seen(input_shape)
    model = unwrap(model)
    with capturing(model, [], output) as capture:
        x = _random_input(capture, tuple(input_shape))
        given, logits = _probe(capture, x)
        paths = Paths(logits)
        found = _with_places(capture, given, logits, x, paths)
        seen = _of_main_path([s for s in found if s.read is None], paths)
        if not seen:
            raise LayerError(
                f"no layer of {type(model).__name__} gives activations with a place in the image, "
                "on a grid of whole strides, that the output depends on: name a target layer"
            )
        best, role = _first(seen, given, logits, x, paths)
        levels = [_level(size, best, seen, paths) for size in sorted({s.size for s in seen})]
        chosen = [(_as_read(best, found), role)]
        chosen += [(_as_read(level, found), "decoder") for level in levels if level is not None]
        facts = _facts([one for one, _ in chosen], seen, logits, x, paths)
        return [
            Suggestion(
                str(one.layer),
                of,
                one.shape,
                one.stride,
                one.tensor.numel() * one.tensor.element_size() / 1e6,
                of != "decoder",
                found_of_it.reason(of),
            )
            for (one, of), found_of_it in zip(chosen, facts, strict=True)
        ]


def _check_shape(input_shape: Any) -> None:
    """Refuse what is no shape; the batch size does not matter."""
    try:
        sizes = tuple(input_shape)
    except TypeError:
        sizes = ()
    if len(sizes) < 3 or not all(is_whole(size) and size > 0 for size in sizes[1:]):
        given = type(input_shape).__name__ if hasattr(input_shape, "shape") else repr(input_shape)
        raise InputError(
            f"input_shape {given}: give whole numbers (B, C, *S), such as (1, 1, 96, 96, 96), the "
            "x.shape of an input x"
        )


def auto_layer(model: nn.Module, input_shape: Sequence[int], output: OutputSelection) -> LayerRef:
    """Return the layer that "auto" means: the bottleneck, or the middle where there is none."""
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
                found.append(_Given(layer, order, tensor, tensor._version, read))

    with ExitStack() as stack:
        for name, module in capture.model.named_modules():
            if name and takes_hooks(module):
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
    capture: Capture,
    given: Sequence[_Given],
    logits: torch.Tensor,
    x: torch.Tensor,
    paths: Paths,
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
        replace(
            image,
            cancels=_memory(image.tensor) in read and _cancels(image, gradient),
            beside=bool(image.layout(gradient).count_nonzero() < gradient.count_nonzero()),
        )
        for image, gradient in zip(images, gradients, strict=True)
        if gradient is not None
        and image.layout(gradient).any()  # of more than a class token
        and image.tensor in paths
        and image.tensor.grad_fn is not logits.grad_fn
    ]
    # The map of what is a term of the logits is the logits again. Where nothing else is left, what
    # is shaped like them is most likely their head, before a softmax.
    features = [image for image in used if not paths.leads_to_logits(image.tensor)]
    return features or [i for i in used if i.tensor.shape != logits.shape] or used


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


def _of_main_path(seen: Sequence[_Seen], paths: Paths) -> list[_Seen]:
    """Leave out side branches that pool to a fixed size, as those of pyramid pooling and ASPP.

    Where there are such, what lies beside them is a branch too: of the coarsest level then only
    what everything passes through is kept, if there is any.
    """
    kept = [s for s in seen if paths.all_pass(s.tensor) or not paths.behind_fixed_pool(s.tensor)]
    if not kept or len(kept) == len(seen):
        return list(seen)
    smallest = min(s.size for s in kept)
    trunk = [s for s in kept if s.size == smallest and paths.all_pass(s.tensor)]
    return trunk + [s for s in kept if s.size > smallest] if trunk else kept


def _first(
    seen: Sequence[_Seen],
    given: Sequence[_Given],
    logits: torch.Tensor,
    x: torch.Tensor,
    paths: Paths,
) -> tuple[_Seen, Role]:
    """Return the layer that "auto" means, and what it is."""
    codes = [g.tensor for g in given if _is_code(g.tensor, paths)]
    placed = [s for s in seen if not any(paths.leads(s.tensor, edge_of(code)) for code in codes)]
    smallest = min(s.size for s in placed or seen)
    coarsest = [s for s in placed or seen if s.size == smallest]
    fine = smallest >= math.prod(logits.shape[2:]) or max(coarsest[0].stride) == 1
    if fine and _gives(logits, x) == "mask":
        return _middle(coarsest, paths), "middle"
    return _bottleneck(coarsest, x, paths), "bottleneck"


def _is_code(tensor: torch.Tensor, paths: Paths) -> bool:
    """Tell a vector without places that everything goes through, as an autoencoder's code.

    What is made from it has places of the output, not of the scan.
    """
    without_places = tensor.ndim == 2 or (tensor.ndim > 2 and math.prod(tensor.shape[2:]) == 1)
    return without_places and tensor in paths and paths.all_pass(tensor)


def _middle(seen: Sequence[_Seen], paths: Paths) -> _Seen:
    """Return the layer nearest to the middle of the depth; of two, the one before.

    Preferred is one that nothing passes by: of residual blocks the sums, not what is added.
    """

    def off_centre(one: _Seen) -> tuple[int, int]:
        depth = paths.depth(one.tensor)
        return abs(depth - paths.height(one.tensor)), depth

    sums = [s for s in seen if _in_middle_half(s, paths) and paths.all_pass(s.tensor)]
    least = min(off_centre(s) for s in sums or seen)
    return _best([s for s in sums or seen if off_centre(s) == least])


def _in_middle_half(one: _Seen, paths: Paths) -> bool:
    depth, height = paths.depth(one.tensor), paths.height(one.tensor)
    return 2 * abs(depth - height) <= depth + height


def _bottleneck(coarsest: Sequence[_Seen], x: torch.Tensor, paths: Paths) -> _Seen:
    best = _best(coarsest)
    others = list(coarsest)
    while not _sees_beyond_its_patch(best, x):
        others = [s for s in others if s.tensor is not best.tensor]
        if not others:  # every level is one of patches: none is better than another
            best = _best(coarsest)
            break
        best = _best(others)
    # A skip connection around the coarsest level gives (skip, level) concatenated: take the level.
    while level := _level_beside_its_skip(best, coarsest, paths):
        best = level
    return best


def _level_beside_its_skip(both: _Seen, coarsest: Sequence[_Seen], paths: Paths) -> _Seen | None:
    """Return the level in a concatenation of a skip connection and the level made from it.

    Not of what is joined in other ways: in a dense block each layer adds a few channels to many,
    and branches side by side are not made from one another.
    """
    if not type(both.tensor.grad_fn).__name__.startswith("Cat"):
        return None
    joined = paths.parts(both.tensor)
    inputs = [s for s in coarsest if edge_of(s.tensor) in joined]
    if not inputs:
        return None
    last = max(inputs, key=lambda s: s.order)
    level = _best([s for s in inputs if edge_of(s.tensor) == edge_of(last.tensor)])
    skips = [part for part in joined if part != edge_of(level.tensor)]
    made = all(paths.leads(level.tensor, skip) for skip in skips)
    return level if made and 2 * level.tensor.numel() >= both.tensor.numel() else None


def _level(size: int, bottleneck: _Seen, seen: Sequence[_Seen], paths: Paths) -> _Seen | None:
    """Return the last layer of a finer level that is made from the bottleneck.

    Not one that is the bottleneck itself, resized: some classifiers pool small images so.
    """
    start = bottleneck.tensor
    level = [
        s
        for s in seen
        if s.size == size > bottleneck.size
        and paths.leads(s.tensor, edge_of(start))
        and (paths.depth(s.tensor) > paths.depth(start) or not paths.all_pass(start, to=s.tensor))
    ]
    return _producer(_best(level), level, bottleneck) if level else None


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


def _gives(logits: torch.Tensor, x: torch.Tensor) -> str:
    """Return what a network gives: "mask", "classes" of the whole image, or "output", as boxes."""
    if math.prod(logits.shape[2:]) == 1:
        return "classes"
    return "mask" if logits.ndim == x.ndim else "output"


def _read_by_one(one: _Seen, logits: torch.Tensor) -> bool:
    """Tell whether the logits in the place of a layer's middle voxel read that voxel alone."""
    place: list[Any] = [...]
    for small, large in zip(one.shape[1:], logits.shape[2:], strict=True):
        if large % small:
            return False
        start, step = small // 2, large // small
        place.append(slice(start * step, (start + 1) * step))
    patch = logits[tuple(place)]
    weights = torch.linspace(1, 2, patch.numel(), device="cpu").view(patch.shape).to(patch)
    (gradient,) = torch.autograd.grad(
        patch, one.tensor, weights, retain_graph=True, allow_unused=True
    )
    return gradient is not None and int(one.layout(gradient).any(1).count_nonzero()) == 1


def _facts(
    chosen: Sequence[_Seen],
    seen: Sequence[_Seen],
    logits: torch.Tensor,
    x: torch.Tensor,
    paths: Paths,
) -> list[_Facts]:
    """Return what the probing pass found of the chosen layers, which come coarse to fine."""
    gives = _gives(logits, x)
    several = len({s.size for s in seen}) > 1
    facts: list[_Facts] = []
    read_by_one = gives == "mask"
    for one in reversed(chosen):  # once a level is looked around in, so are those before it
        read_by_one = read_by_one and _read_by_one(one, logits)
        all_pass = paths.all_pass(one.tensor) and not one.beside
        depth, height = paths.depth(one.tensor), paths.height(one.tensor)
        facts.append(_Facts(gives, several, all_pass, read_by_one, depth, height, paths.dilated))
    return facts[::-1]


def _is_pointwise(module: nn.Module) -> bool:
    """Tell norms, activations, dropout and the like: the layer before them is the better choice."""
    if any(module.children()):
        return False
    kind = class_of(module)
    return (
        kind.__module__.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout"))
        or issubclass(kind, nn.Identity)
        or re.search("norm|drop", kind.__name__, re.IGNORECASE) is not None
    )
