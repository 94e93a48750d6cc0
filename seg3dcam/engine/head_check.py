"""Whether a map depends on the last weights of the network: the same map, with others there.

The last weights turn features into classes. A map that is the same whatever they are shows the
features themselves, and nothing of the class. Both maps are made of a part of the input, which is
small beside what the map itself costs; what the network has elsewhere does not change.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import nn

from seg3dcam.engine.passes import FirstPass, wide
from seg3dcam.engine.seed import Seed
from seg3dcam.errors import ModelError
from seg3dcam.methods.base import Formula, StepwiseFormula
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.layers import LayerRef
from seg3dcam.network.module_class import takes_hooks
from seg3dcam.network.outputs import OutputSelection

#: Maps whose ranks correlate by at least this are the same.
SAME = 0.95

#: Voxels along each axis of the part of the input that is looked at, the smallest that serves.
PARTS = (32, 48, 64)

#: The part has at most this fraction of all windows' voxels, so that two passes cost little.
PART = 1 / 8

#: A layer with fewer voxels in the part has too few to compare.
FEWEST = 27

#: Modules that are tried as the last one: what ran last may belong to another output, or may leave
#: the gradient at the layer as it is, as a bias does, or a scale.
TRIED = 3

#: Gradients whose cosine is at least this are the same but for their size.
SAME_GRADIENT = 0.99

#: Number of the formula, layer -> rank correlation of its map with that of a random last layer.
Similarities = dict[tuple[int, LayerRef], float]


def head_similarity(
    first: FirstPass, seed: Seed, formulas: Sequence[Formula], output: OutputSelection
) -> Similarities:
    """Return how much each map is like that of a network whose last weights are random.

    Maps that cannot be compared at little cost are left out: those of methods that perturb the
    network or explain its input, and those of networks that take one size of input alone.

    Args:
        first: the results of the prediction.
        seed: dS/dlogits of the target.
        formulas: of all methods; those of gradients are looked at.
        output: which of the network's outputs are the logits.
    """
    wanted = {
        number: formula
        for number, formula in enumerate(formulas)
        if isinstance(formula, StepwiseFormula) and formula.route == "gradients" and formula.order
    }
    layers = [replace(layer, required=False) for layer in first.shapes]
    if not wanted or not layers or not seed.values.numel():
        return {}
    for x, part in _parts(first, seed):
        try:
            with capturing(first.capture.member, layers, output) as capture:
                found = _compared(capture, x, part, wanted)
        except Exception:
            # Some networks take one size only, or cannot be changed in this way. A check that is
            # not made is said by its absence, and must not stop an explanation.
            continue
        if found:
            return found
    return {}


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return Spearman's correlation of two maps of one shape; 0 if it is not defined.

    >>> round(rank_correlation(torch.tensor([1.0, 2, 4]), torch.tensor([0.0, 3, 5])), 6)
    1.0
    """
    a, b = (values.double().cpu().flatten().numpy() for values in (one, other))
    defined = all(np.isfinite(values).all() and values.min() < values.max() for values in (a, b))
    return float(stats.spearmanr(a, b).statistic) if defined else 0.0


def modules_from_the_end(
    capture: Capture, x: torch.Tensor, layer: nn.Module | None = None
) -> tuple[list[str], int]:
    """Return the names of the modules that own parameters, those that ran last first.

    Also returns how many of them ran after a layer was done; 0 if there is none, or it did not run.

    Args:
        x: an input (B, C, *S) as the network takes it.
        layer: one of the network's modules.
    """
    names = {
        module: name
        for name, module in capture.model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and takes_hooks(module)
    }
    ran: dict[str, None] = {}
    when_done: list[str] = []  # what had run when the layer was done

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if module is layer:
            when_done[:] = [*ran, names.get(module, "")]
        if module in names:
            ran.pop(names[module], None)
            ran[names[module]] = None

    noted = {*names, layer} if layer is not None and takes_hooks(layer) else set(names)
    hooks = [module.register_forward_hook(note) for module in noted]
    try:
        capture.observe(x, copy=False)
    finally:
        for hook in hooks:
            hook.remove()
    behind = sum(name not in when_done for name in ran) if when_done else 0
    return list(ran)[::-1], behind


def randomised(parameters: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Return parameters drawn anew, with the mean and the standard deviation of each."""
    found = dict(parameters)
    for name, given in parameters.items():
        if given is not None and given.is_floating_point():
            values = given.detach()
            drawn = torch.randn(values.shape, generator=generator, device="cpu").to(values)
            spread = values.std(correction=0) if values.numel() > 1 else values.abs().mean()
            found[name] = nn.Parameter(values.mean() + spread * drawn, requires_grad=False)
    return found


def _parts(first: FirstPass, seed: Seed) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of the input around the seed's largest value, with the seed there."""
    windows = first.windows
    most = PART * len(windows) * math.prod(windows.roi)
    peak = seed.values[0].abs().amax(0)
    at = torch.unravel_index(peak.argmax(), peak.shape)
    for length in PARTS:
        size = [min(n, length + n % 32) for n in windows.roi]
        if math.prod(size) > most:
            return
        # The part lies within the padded input; `start` counts in voxels of the input itself.
        places = zip(at, seed.start[2:], size, windows.before, windows.padded_shape, strict=True)
        start = [
            max(-before, min(int(i) + low - n // 2, whole - before - n))
            for i, low, n, before, whole in places
        ]
        box = tuple(
            slice(s + before, s + before + n)
            for s, before, n in zip(start, windows.before, size, strict=True)
        )
        x = first.padded[(slice(0, 1), slice(None), *box)].clone()
        yield first.capture.to_model(x), seed.cut([0], start, size)


def _compared(
    capture: Capture, x: torch.Tensor, seed: torch.Tensor, formulas: Mapping[int, StepwiseFormula]
) -> Similarities:
    before = _maps(capture, x, seed, formulas)
    wanted = {place for place, map_ in before.items() if map_.values.numel() >= FEWEST}
    found: Similarities = {}
    modules = dict(capture.model.named_modules())
    for name in modules_from_the_end(capture, x)[0][:TRIED] if wanted else ():
        with _random(modules[name], sign=1):
            after = _maps(capture, x, seed, formulas)
        moved = {
            place
            for place in wanted & after.keys()
            if _cosine(before[place].gradient, after[place].gradient) < SAME_GRADIENT
        }
        now = {
            place: rank_correlation(before[place].values, after[place].values) for place in moved
        }
        if any(value >= SAME for value in now.values()):
            # A map of few features may come out alike by chance. It then turns over with the signs
            # of the weights, while one that does not look at them stays as it is.
            with _random(modules[name], sign=-1):
                again = _maps(capture, x, seed, formulas)
            now = {
                place: min(value, rank_correlation(before[place].values, again[place].values))
                for place, value in now.items()
                if place in again
            }
        found |= now
        wanted -= found.keys()
        if not wanted:
            break
    return found


class _Made(NamedTuple):
    """A map on its layer's own grid, and the gradient that it was made of."""

    values: torch.Tensor
    gradient: torch.Tensor


def _maps(
    capture: Capture, x: torch.Tensor, seed: torch.Tensor, formulas: Mapping[int, StepwiseFormula]
) -> dict[tuple[int, LayerRef], _Made]:
    """Return every map."""
    logits = capture.forward(x.clone())
    if logits.shape != seed.shape:
        raise ModelError("the logits of a part do not have its size")
    gradients = capture.gradients(logits, seed.to(logits))
    activations = capture.activations
    return {
        (number, layer): _Made(formula(wide(activations[layer]), wide(gradient)), gradient)
        for number, formula in formulas.items()
        for layer, gradient in gradients.items()
    }


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the cosine between two gradients; 1 if it is not defined."""
    a, b = one.double().flatten(), other.double().flatten()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if 0 < length < math.inf else 1.0


@contextlib.contextmanager
def _random(module: nn.Module, *, sign: int) -> Iterator[None]:
    """Let this thread see a module with random weights; the module itself is not changed.

    Args:
        sign: -1 for the same random weights with the opposite sign.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = randomised(module._parameters, generator)
    parameters = {
        name: value if value is None else nn.Parameter(sign * value, requires_grad=False)
        for name, value in drawn.items()
    }
    # Not by copy.copy(), which classes may refuse or do in their own way.
    double = object.__new__(type(module))
    double.__dict__ = {**module.__dict__, "_parameters": parameters}
    thread = threading.get_ident()

    def replaced(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        # forward() itself, so that no hook of the module runs a second time.
        return double.forward(*args, **kwargs) if threading.get_ident() == thread else None

    hook = module.register_forward_hook(replaced, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
