"""Which layer, and which method? All combinations, ranked by context deletion and sanity.

The winner is chosen among many, so it is also held against the best of many random maps of its own
resolution: each draw makes as many as there are layers, and the winner has to beat the best of
them.

Where the best of all layers is still far from what evidence itself gets, a method that explains the
input and takes more predictions is looked at, too.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.checks import Activation, check_whole_number
from seg3dcam.errors import ConfigError, InputError, Seg3dcamError, nearest
from seg3dcam.evaluate.baselines import OF_VERDICTS, check_baseline
from seg3dcam.evaluate.comparison import Candidate, Comparison
from seg3dcam.evaluate.contest import Case, Measuring
from seg3dcam.evaluate.ranking import Keep, Ranking, entrants_of, not_measured
from seg3dcam.network.layers import resolve_layers
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.suggest import suggest_layers
from seg3dcam.progress import Progress, silent
from seg3dcam.windows import WindowPlan, plan_windows

#: What is compared by default: methods of one backward pass whose map depends on the class. Of maps
#: that are equally good, to two decimals, the first is taken.
METHODS = (
    "hires_cam",
    "grad_cam",
    "layer_cam",
    "xgrad_cam",
    "grad_cam_plus_plus",
    "grad_cam_elementwise",
)

#: What is compared, too, where neither layers nor methods are named and the best of all layers is
#: far from what evidence gets. It takes 50 backward passes, and finds what no layer shows, such as
#: evidence by absence.
FURTHER = "integrated_gradients"

#: Above this context deletion another method may be much better: evidence itself gets 0.02.
FAR = 0.05

#: The method with which "auto" is what a user gets who names neither layer nor method.
USUAL_METHOD = "hires_cam"


def compare(
    network: nn.Module,
    x: torch.Tensor | Sequence[torch.Tensor],
    class_index: int,
    *,
    layers: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    sliding_window: WindowPlan | None = None,
    activation: Activation = "softmax",
    output: OutputSelection = None,
    margin: int = 2,
    block: int = 4,
    steps: int = 25,
    baselines: Sequence[str | float] = OF_VERDICTS,
    draws: int = 20,
    spacing: Sequence[float] | None = None,
    seed: int = 0,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Rank layers and methods by context deletion, and name the best that may be trusted.

    It takes some hundreds of predictions: three to six for each candidate, 25 for each of the four
    best, and about one for each random map. Fewer layers and methods take fewer.

    The best is better than the mask alone and than nearness to it, by every baseline, with those of
    the first one and with its own; its map gets lost when all weights are random; and it is better
    than the best of as many random maps of its resolution as there are layers, in (nearly) every
    draw, since it was itself chosen among many.

    Args:
        network: any network that a CAM takes.
        x: one input (1, C, *S), or several. With several, the candidates are ranked by their means.
        class_index: the class.
        layers: names of layers, also with `*`, "all" or "auto", see `BaseCAM`; None takes all that
            `suggest_layers` names.
        methods: keys of methods; None takes `METHODS`, and `FURTHER` where the best of them gets
            more than `FAR` or none may be trusted, no layers are named, and captum is there.
            Methods that explain the input itself have "input" as their layer.
        baselines: the first one is used for everything. The others are for possible winners alone,
            which have to pass by all of them. The defaults are those of a verdict.
        draws: how often random maps are drawn; with 20 the p-value can be as low as 1/21.
        spacing: mm from voxel to voxel along every axis, None for what a MetaTensor's affine says.
        progress: called with (step, done, total).
        keep: called with the map (*S) of each candidate on the first input and the mask (*S); what
            it returns is the candidate's `kept`.
        sliding_window, activation, output, margin, block, steps, seed: as for `context_deletion`.

    Raises:
        EmptyRegionError: the class is not predicted.
        EvaluationError: the mask leaves fewer than 20 blocks, or the baseline equals the input.
        ConfigError, LayerError: illegal settings; no such layer or method.

    Example:
        >>> network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv3d(1, 2, 9, padding=4)).eval()
        >>> for parameter in network.parameters():
        ...     _ = nn.init.zeros_(parameter)
        >>> network[0].weight.data[:] = 1
        >>> network[1].weight.data[1, 0, 4, 4, 0] = 1.0  # looks 4 voxels to the left
        >>> network[1].bias.data[1] = -0.5
        >>> x = 0.1 * torch.rand(1, 1, 16, 16, 24, generator=torch.Generator().manual_seed(0))
        >>> x[..., 4:8, 4:8, 8:12] = 1
        >>> found = compare(network, x, 1, layers=["0"], margin=0, block=2)
        >>> found.best.layer, round(found.best.area, 2), round(found.controls["mask alone"], 2)
        ('0', 0.02, 0.6)
    """
    _check(methods, baselines, draws, seed)
    how = Measuring(
        network,
        class_index,
        sliding_window,
        activation,
        output,
        margin,
        block,
        steps,
        baselines[0],
        seed,
        progress or silent,
    )
    named = _named(network, layers)
    cases = list(_cases(how, x, spacing))
    roles = _roles(how, cases[0], named)
    ranking = Ranking(cases, baselines[1:], draws)
    compared = tuple(dict.fromkeys(methods or METHODS))
    entrants = (
        entrants_of(cases, ranking.counted, roles, compared, keep)
        if ranking.counted
        else not_measured(roles, compared, "not measured")
    )
    candidates = ranking.ranked(entrants)
    named_none = layers is None and methods is None and ranking.counted
    if named_none and not_good_enough(candidates) and importlib.util.find_spec("captum"):
        entrants += entrants_of(cases, ranking.counted, roles, (FURTHER,), keep)
        candidates = ranking.ranked(entrants)
    usual = (next(iter(roles)), USUAL_METHOD) if named is None else None
    return Comparison(
        candidates=candidates,
        best=next((c for c in candidates if c.won), None),
        default=next((c for c in candidates if (c.layer, c.method) == usual), None),
        controls=ranking.controls,
        left=tuple(case.left for case in cases),
        counted=ranking.counted,
        random=ranking.random,
        random_error=ranking.random_error,
        random_points=tuple(ranking.random_points),
        mask_curve=ranking.mask_curve,
        class_index=class_index,
        order=tuple((e.candidate.layer, e.candidate.method) for e in entrants),
        mask=cases[0].mask,
        cost=sum(case.cost for case in cases),
    )


def not_good_enough(candidates: Sequence[Candidate]) -> bool:
    """Tell whether the best candidate is still far from what evidence itself gets, or none won."""
    best = candidates[0]
    return not best.won or best.worth > FAR


def _check(methods: Sequence[str] | None, baselines: Sequence[Any], draws: int, seed: int) -> None:
    """Raise ConfigError for methods, baselines, draws or a seed that make no comparison."""
    check_whole_number("draws", draws, least=19)  # fewer cannot give a p-value of 0.05
    check_whole_number("seed", seed, least=0)
    if isinstance(baselines, str) or not baselines:
        raise ConfigError(f"baselines {baselines!r}: give a list, such as {list(OF_VERDICTS)}")
    for baseline in baselines:
        check_baseline(baseline)
    if isinstance(methods, str) or (methods is not None and not methods):
        raise ConfigError(f"methods {methods!r}: give a list of keys, such as {list(METHODS)}")
    for method in methods or ():
        if method not in ALL_METHODS:
            raise ConfigError(f"method {method!r} does not exist: {nearest(method, ALL_METHODS)}")


def _cases(
    how: Measuring, x: torch.Tensor | Sequence[torch.Tensor], spacing: Sequence[float] | None
) -> Iterator[Case]:
    """Yield a case for every input; an error says of which it is."""
    inputs = [x] if isinstance(x, torch.Tensor) else list(x)
    if not inputs:
        raise InputError("no input given: give one (1, C, *S), or several")
    if other := [type(one).__name__ for one in inputs if not isinstance(one, torch.Tensor)]:
        raise InputError(f"inputs are tensors (1, C, *S), one or several; got {other[0]}")
    check_whole_number("margin", how.margin, least=0)
    for one in inputs if spacing is not None else ():
        _check_spacing(spacing, one.ndim - 2)
    for number, one in enumerate(inputs):
        try:
            yield Case(how, one, spacing=spacing, kept_gb=4.0 / len(inputs))
        except Seg3dcamError as error:
            if len(inputs) == 1:
                raise
            raise type(error)(f"input {number + 1} of {len(inputs)}: {error}") from error


def _check_spacing(spacing: Sequence[float] | None, axes: int) -> None:
    given = [] if spacing is None else [float(length) for length in spacing]
    if len(given) != axes or not all(0 < length < math.inf for length in given):
        raise ConfigError(f"spacing {spacing!r}: give {axes} numbers above 0, in mm")


def _named(network: nn.Module, layers: Sequence[str] | None) -> list[str] | None:
    """Return the layers that a user named, each by its full name; None for those suggested."""
    given = [layers] if isinstance(layers, str) else layers
    if given is None:
        return None
    if not given:
        raise ConfigError("no layer given: name one or more, or None for all that are suggested")
    found = [
        [layer] if layer == "auto" else [str(ref) for ref in resolve_layers(network, layer)]
        for layer in given
    ]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _roles(how: Measuring, case: Case, named: Sequence[str] | None) -> dict[str, str]:
    """Return layer -> its role; of all that are suggested the one that "auto" means first."""
    window = plan_windows(how.sliding_window, case.shape).roi
    shape = (1, case.x.shape[1], *window)
    suggested = suggest_layers(how.network, shape, output=how.output)
    roles: dict[str, str] = {s.name: s.role for s in suggested}
    if named is None:
        return roles
    layers = [suggested[0].name if layer == "auto" else layer for layer in named]
    return {layer: roles.get(layer, "") for layer in layers}
