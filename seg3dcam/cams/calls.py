"""A call: several targets explained by several methods, which share their passes.

The input, the CAMs and the targets are checked here, and the results are put together. What happens
in between is in `steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from seg3dcam.cams.notices import tell_draws, tell_dropped, tell_map
from seg3dcam.cams.result import CamResult
from seg3dcam.cams.steps import Call, Explainer, Outcome, explain_ensemble, explain_member
from seg3dcam.checks import Activation
from seg3dcam.engine.maps import Maps
from seg3dcam.engine.run import TargetScore
from seg3dcam.errors import ConfigError, EmptyRegionError, TargetError
from seg3dcam.network.capture import begun_again
from seg3dcam.network.checked_input import as_input, on_grid_of, telling_axes
from seg3dcam.network.layers import LayerRef
from seg3dcam.targets import OwnTarget, as_targets, name_of, placed
from seg3dcam.targets.combined import AnyTarget
from seg3dcam.targets.masks import Move
from seg3dcam.windows import Windows, plan_windows

#: A class index, a target, a family of targets, or None for the original recipe.
TargetLike = int | Callable[[torch.Tensor], torch.Tensor] | Any | None

#: Several of them, or a function of the logits (B, K, *S) that returns several.
Targets = Sequence[TargetLike] | Callable[[torch.Tensor], Sequence[TargetLike]]


@dataclass(frozen=True)
class TargetResults:
    """One target, and the result of every method.

    Attributes:
        target: a function of the logits, with its masks on the input's grid.
        results: in the order of the methods.
    """

    target: AnyTarget
    results: list[CamResult]


def each_by(cams: Sequence[Explainer], x: torch.Tensor, targets: Targets) -> list[list[CamResult]]:
    """Explain several targets by several methods; for each target a list with every method's.

    Methods of activations and gradients share their forward passes.

    Args:
        cams: of one model, with the same layers, windows, output and activation.
        x, targets: as for `BaseCAM.each`.

    Raises:
        ConfigError: the CAMs differ in one of these, or the list is empty.
    """
    return [row.results for row in explain_targets(cams, x, targets)]


@begun_again
def explain_targets(
    cams: Sequence[Explainer],
    x: torch.Tensor,
    targets: Targets,
    *,
    check: Callable[[torch.Tensor], None] | None = None,
    move: Move | None = None,
    examines: bool = False,
    skip_empty: bool = False,
) -> list[TargetResults]:
    """Explain several targets by several methods, and say which targets they turned out to be.

    Args:
        cams, x, targets: as for `each_by`.
        check: called with the logits (B, K, *S) before the targets are evaluated; raises an error
            if they do not suit.
        move: brings a mask of a target, which has an affine of its own, onto the input's grid.
            None takes the mask as it is, if it lies on that grid.
        examines: whether the maps are held against those of a network whose last layer is random,
            see `LayerMap.head`.
        skip_empty: leave out targets whose region holds no voxel.

    Raises:
        ConfigError: as `each_by`.
        EmptyRegionError: a region holds no voxel; with `skip_empty`, none does.
    """
    _check_alike(cams)
    lead = next((cam for cam in cams if cam.formula.explains == "layers"), cams[0])
    x, affine = as_input(x)
    windows = plan_windows(lead.sliding_window, x.shape[2:])

    to_input = move or (lambda mask: on_grid_of(mask, affine, x.shape[2:]))

    def evaluate(logits: torch.Tensor) -> list[TargetScore]:
        if check is not None:
            check(logits)
        listed = _listed(targets, logits)
        if skip_empty:
            return list(_there(listed, logits, lead.activation, to_input))
        moved = [placed(one, to_input) for one in as_targets(listed, logits, lead.activation)]
        return [TargetScore.of(target, logits) for target in moved]

    with telling_axes(lead.members[0], x):
        layers = _settled_layers(cams, lead, x, windows)
        call = Call(lead, layers, [cam.formula for cam in cams], x, windows, evaluate, examines)
        several = len(lead.members) > 1
        outcome = explain_ensemble(call) if several else explain_member(call, lead.members[0])
    tell_dropped(outcome.dropped)
    tell_draws(outcome.draws)
    return [
        TargetResults(
            one.target,
            [
                _result(cam, windows, outcome, one, maps, affine)
                for cam, maps in zip(cams, row, strict=True)
            ],
        )
        for one, row in zip(outcome.targets, outcome.table, strict=True)
    ]


def _check_alike(cams: Sequence[Explainer]) -> None:
    """Raise ConfigError unless all explain the same network in the same way."""
    if not cams:
        raise ConfigError("no method given: name at least one")
    for cam in cams:
        pairs = {
            "models": (cam.members, cams[0].members),
            "windows": (cam.sliding_window, cams[0].sliding_window),
            "outputs": (cam.output, cams[0].output),
            "activations": (cam.activation, cams[0].activation),
        }
        for what, (own, first) in pairs.items():
            if own is not first and own != first:
                raise ConfigError(f"methods of different {what} cannot share a pass: give the same")


def _settled_layers(
    cams: Sequence[Explainer], lead: Explainer, x: torch.Tensor, windows: Windows
) -> list[LayerRef]:
    """Return the target layers, "auto" settled for every method; ConfigError if they differ."""
    auto = lead.layers is None
    layers = lead.layers_for(x, windows)
    for cam in cams:
        if cam.formula.explains == "layers":
            if auto and cam.layers is None:
                cam.layers = list(layers)
            if cam.layers_for(x, windows) != layers:
                raise ConfigError(
                    "methods of different target layers cannot share a pass: give all of them the "
                    "same layers, each map is kept"
                )
    return layers


def _listed(targets: Any, logits: torch.Tensor) -> Sequence[TargetLike]:
    """Return the targets as a list; a function of the logits returns one."""
    if callable(targets) and not isinstance(targets, OwnTarget):
        targets = targets(logits)
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TargetError(
            f"targets {targets!r}: give a list, such as [1, targets.ClassLogit(2)], or a function "
            "of the logits (B, K, *S) that returns one"
        )
    if not targets:
        raise TargetError("the list of targets is empty: give at least one")
    return targets


def _there(
    targets: Sequence[TargetLike], logits: torch.Tensor, activation: Activation, move: Move
) -> Iterator[TargetScore]:
    """Yield those of several targets whose region holds a voxel; an error where none does."""
    empty, found = None, False
    for given in targets:
        try:
            for target in as_targets([given], logits, activation):
                yield TargetScore.of(placed(target, move), logits)
                found = True
        except EmptyRegionError as error:
            empty = error
    if empty is not None and not found:
        raise empty


def _result(
    cam: Explainer,
    windows: Windows,
    outcome: Outcome,
    target: TargetScore,
    maps: Maps,
    affine: np.ndarray | None,
) -> CamResult:
    name = name_of(target.target)
    layers = {str(layer): map_ for layer, map_ in maps.items() if layer not in outcome.dropped}
    for layer, map_ in layers.items():
        tell_map(layer, map_, name)
    return CamResult(
        layers=layers,
        shape=windows.shape,
        logits=outcome.logits,
        score=target.score,
        target=name,
        method=cam.method,
        activation=cam.activation,
        affine=affine,
        windows=len(windows),
        region_voxels=target.region_voxels,
        settings=cam.settings,
        dropped={str(layer): reason for layer, reason in outcome.dropped.items()},
        members=len(cam.members),
        draws=outcome.draws,
    )
