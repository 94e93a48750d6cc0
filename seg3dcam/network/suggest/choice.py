"""Choose bottleneck or middle, and the levels around it, among the layers of a probing pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from seg3dcam.network.suggest.graph import Paths, edge_of
from seg3dcam.network.suggest.probing import Candidate, ProbingPass, memory_of_views

Role = Literal["bottleneck", "middle", "decoder", "encoder", "early", "late"]

#: Where layers are taken in a network of one resolution besides its middle: at its first layer, at
#: a quarter and at three quarters of its depth.
_DEPTHS: tuple[tuple[float, Role], ...] = ((0.0, "early"), (0.25, "early"), (0.75, "late"))


def on_main_path(candidates: Sequence[Candidate], paths: Paths) -> list[Candidate]:
    """Leave out side branches that pool to a fixed size, such as those of pyramid pooling and ASPP.

    If there are such branches, the layers parallel to them are branches, too. So of the coarsest
    level only those layers are kept through which everything passes, if there are any.
    """
    kept = [
        c for c in candidates if paths.all_pass(c.tensor) or not paths.behind_fixed_pool(c.tensor)
    ]
    if not kept or len(kept) == len(candidates):
        return list(candidates)
    smallest = min(c.size for c in kept)
    trunk = [c for c in kept if c.size == smallest and paths.all_pass(c.tensor)]
    return trunk + [c for c in kept if c.size > smallest] if trunk else kept


def auto_choice(candidates: Sequence[Candidate], probed: ProbingPass) -> tuple[Candidate, Role]:
    """Return the layer that "auto" means, and its role."""
    paths = probed.paths
    codes = [o.tensor for o in probed.outputs if _is_code(o.tensor, paths)]
    placed = [
        c for c in candidates if not any(paths.leads(c.tensor, edge_of(code)) for code in codes)
    ]
    smallest = min(c.size for c in placed or candidates)
    coarsest = [c for c in placed or candidates if c.size == smallest]
    fine = smallest >= math.prod(probed.logits.shape[2:]) or max(coarsest[0].stride) == 1
    if fine and probed.gives == "mask":
        return _middle(coarsest, paths), "middle"
    return _bottleneck(coarsest, probed.x, paths), "bottleneck"


def _is_code(tensor: torch.Tensor, paths: Paths) -> bool:
    """Tell whether a tensor is a vector through which everything passes, such as a code.

    Layers after it have places in the output, but not in the scan.
    """
    without_places = tensor.ndim == 2 or (tensor.ndim > 2 and math.prod(tensor.shape[2:]) == 1)
    return without_places and tensor in paths and paths.all_pass(tensor)


def _middle(candidates: Sequence[Candidate], paths: Paths) -> Candidate:
    """Return the layer nearest to the middle of the network's depth; of two, the earlier one.

    Layers through which everything passes are preferred, such as the sums of residual blocks over
    their summands.
    """

    def off_centre(one: Candidate) -> tuple[int, int]:
        depth = paths.depth(one.tensor)
        return abs(depth - paths.height(one.tensor)), depth

    sums = [c for c in candidates if _in_middle_half(c, paths) and paths.all_pass(c.tensor)]
    least = min(off_centre(c) for c in sums or candidates)
    return _best([c for c in sums or candidates if off_centre(c) == least])


def _in_middle_half(one: Candidate, paths: Paths) -> bool:
    """Tell whether a layer lies between one and three quarters of the network's depth."""
    depth, height = paths.depth(one.tensor), paths.height(one.tensor)
    return 2 * abs(depth - height) <= depth + height


def _bottleneck(coarsest: Sequence[Candidate], x: torch.Tensor, paths: Paths) -> Candidate:
    """Return the best layer of the coarsest level that sees more than a patch of the input."""
    best = _best(coarsest)
    others = list(coarsest)
    while not _sees_beyond_its_patch(best, x):
        others = [c for c in others if c.tensor is not best.tensor]
        if not others:  # all see only patches, so none is better than another
            best = _best(coarsest)
            break
        best = _best(others)
    # If a skip connection around the coarsest level is concatenated with it, take the level.
    while level := _level_beside_its_skip(best, coarsest, paths):
        best = level
    return best


def _level_beside_its_skip(
    both: Candidate, coarsest: Sequence[Candidate], paths: Paths
) -> Candidate | None:
    """Return the level in a concatenation of a skip connection and the level made from it.

    Return None if the tensor is another concatenation. In a dense block, each layer adds a few
    channels to many others, and parallel branches are not made from one another.
    """
    if not type(both.tensor.grad_fn).__name__.startswith("Cat"):
        return None
    joined = paths.parts(both.tensor)
    inputs = [c for c in coarsest if edge_of(c.tensor) in joined]
    if not inputs:
        return None
    last = max(inputs, key=lambda c: c.order)
    level = _best([c for c in inputs if edge_of(c.tensor) == edge_of(last.tensor)])
    skips = [part for part in joined if part != edge_of(level.tensor)]
    made = all(paths.leads(level.tensor, skip) for skip in skips)
    return level if made and 2 * level.tensor.numel() >= both.tensor.numel() else None


def decoder_levels(
    bottleneck: Candidate, candidates: Sequence[Candidate], paths: Paths
) -> list[Candidate]:
    """Return the last layer of each finer level made from the bottleneck, coarse to fine."""
    levels = [
        _level(size, bottleneck, candidates, paths) for size in sorted({c.size for c in candidates})
    ]
    return [level for level in levels if level is not None]


def _level(
    size: int, bottleneck: Candidate, candidates: Sequence[Candidate], paths: Paths
) -> Candidate | None:
    """Return the last layer of a finer level that is made from the bottleneck, None without one.

    The bottleneck itself, resized, does not count: some classifiers resize small images before they
    pool them.
    """
    start = bottleneck.tensor
    level = [
        c
        for c in candidates
        if c.size == size > bottleneck.size
        and paths.leads(c.tensor, edge_of(start))
        and (paths.depth(c.tensor) > paths.depth(start) or not paths.all_pass(start, to=c.tensor))
    ]
    return _producer(_best(level), level, bottleneck) if level else None


def encoder_levels(
    bottleneck: Candidate, candidates: Sequence[Candidate], paths: Paths
) -> list[Candidate]:
    """Return the last layer of each finer level before the bottleneck, coarse to fine.

    Where no layer of a level leads to the bottleneck, as in UNETR, whose tokens are coarse from the
    start, the level's branch beside it is taken.
    """
    start = edge_of(bottleneck.tensor)
    before = [
        c for c in candidates if c.size > bottleneck.size and not paths.leads(c.tensor, start)
    ]
    levels = []
    for size in sorted({c.size for c in before}):
        level = [c for c in before if c.size == size]
        main = [c for c in level if paths.leads(bottleneck.tensor, edge_of(c.tensor))]
        # Of residual blocks the sums, through which all passes, and not the summands.
        sums = [c for c in main if paths.all_pass(c.tensor, to=bottleneck.tensor)]
        levels.append(_deepest(sums or main or level, paths))
    return levels


def beside_middle(
    middle: Candidate, candidates: Sequence[Candidate], paths: Paths
) -> list[tuple[Candidate, Role]]:
    """Return layers spread over the depth of a network of one resolution, in their order."""
    others = [c for c in candidates if c.size == middle.size]
    found: list[tuple[Candidate, Role]] = []
    for wanted, role in _DEPTHS:
        taken = {paths.depth(c.tensor) for c in (middle, *(one for one, _ in found))}
        side = [
            c
            for c in others
            if paths.depth(c.tensor) not in taken
            and (paths.depth(c.tensor) > paths.depth(middle.tensor)) == (role == "late")
        ]
        side = [c for c in side if paths.all_pass(c.tensor)] or side
        if side:
            off = {id(c): abs(_depth_of(c, paths) - wanted) for c in side}
            least = min(off.values())
            found.append((_best([c for c in side if off[id(c)] == least]), role))
    return found


def _depth_of(one: Candidate, paths: Paths) -> float:
    """Return how deep a layer lies, from 0 to 1."""
    depth, height = paths.depth(one.tensor), paths.height(one.tensor)
    return depth / max(depth + height, 1)


def _deepest(candidates: Sequence[Candidate], paths: Paths) -> Candidate:
    """Return the layer with the most layers before it; of several the best."""
    most = max(paths.depth(c.tensor) for c in candidates)
    return _best([c for c in candidates if paths.depth(c.tensor) == most])


def _sees_beyond_its_patch(layer: Candidate, x: torch.Tensor) -> bool:
    """Tell whether a layer sees more than an embedding of patches does.

    The two halves of such an embedding have no voxel of the input in common.
    """
    activations = layer.layout(layer.tensor)
    axis = 2 + max(range(x.ndim - 2), key=lambda a: activations.shape[2 + a])
    touched = []
    for half in activations.tensor_split(2, axis):
        weights = torch.linspace(1, 2, half.numel(), device="cpu").view(half.shape).to(half)
        (gradient,) = torch.autograd.grad((half * weights).sum(), x, retain_graph=True)
        touched.append(gradient != 0)
    return bool((touched[0] & touched[1]).any())


def _producer(best: Candidate, level: Sequence[Candidate], bottleneck: Candidate) -> Candidate:
    """Return the module that made a tensor, if `best` only passes it on from another branch."""
    inner = bottleneck.layer.module
    elsewhere = [
        c
        for c in level
        if c.tensor is best.tensor
        and not c.layer.name.startswith(best.layer.name + ".")
        and all(module is not inner for module in c.layer.module.modules())
    ]
    spans = any(module is inner for module in best.layer.module.modules())
    return _best(elsewhere) if spans and elsewhere else best


def norm_that_reads(best: Candidate, found: Sequence[Candidate]) -> Candidate:
    """Return the LayerNorm after a layer, if the network reads the layer only through it.

    A LayerNorm ignores the length of a token. So before it, activations and gradients are
    orthogonal, and HiResCAM would show nothing but rounding errors.
    """
    memory = memory_of_views(best.tensor) if best.cancels else None
    norms = [c for c in found if c.read is not None and memory_of_views(c.read) == memory]
    return _best(norms) if norms else best


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate of the lowest rank."""
    best = min(candidates, key=lambda c: c.rank)
    # If several modules give this tensor, take one that gives nothing else. Another one may give it
    # in a list, and if the tensor were replaced there, the network might not use that list.
    same = [c for c in candidates if c.tensor is best.tensor]
    return min(same, key=lambda c: (len(c.layer.element), c.rank))
