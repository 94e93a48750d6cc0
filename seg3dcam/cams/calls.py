"""The steps of a call: several targets explained by several methods, with shared passes.

predict, evaluate the targets, check the gradients, make the maps, say what must be said. The
members of an ensemble go through these steps one after another, and their maps are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from seg3dcam.cams.notices import (
    tell_draws,
    tell_dropped,
    tell_map,
    tell_unchecked,
    tell_unmeasured,
)
from seg3dcam.cams.result import CamResult
from seg3dcam.cams.tables import Table, combined, with_gaps, without_numbers
from seg3dcam.engine.gradient_check import gradient_gaps
from seg3dcam.engine.gradients import seeded_windows
from seg3dcam.engine.layer_map import added
from seg3dcam.engine.maps import Maps
from seg3dcam.engine.memory import advising
from seg3dcam.engine.passes import FirstPass, predict, predict_member
from seg3dcam.engine.run import Run, TargetScore, maps_of
from seg3dcam.errors import ConfigError, ModelError, TargetError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.methods.base import Formula
from seg3dcam.network.capture import Capture, begun_again, capturing
from seg3dcam.network.checked_input import as_input, on_grid_of, telling_axes
from seg3dcam.network.ensemble import Member
from seg3dcam.network.grids.measurement import measured_in_window
from seg3dcam.network.layers import LayerRef, moved_to
from seg3dcam.network.layouts import INPUT
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress
from seg3dcam.targets import Activation, OwnTarget, as_targets, name_of, placed
from seg3dcam.targets.combined import AnyTarget
from seg3dcam.targets.masks import Move
from seg3dcam.windows import WindowPlan, Windows, plan_windows

#: A class index, a target, a family of targets, or None for the original recipe.
TargetLike = int | Callable[[torch.Tensor], torch.Tensor] | Any | None

#: Several of them, or a function of the logits (B, K, *S) that returns several.
Targets = Sequence[TargetLike] | Callable[[torch.Tensor], Sequence[TargetLike]]


class Explainer(Protocol):
    """What a call reads of a CAM; `seg3dcam.cams.base.BaseCAM` says what it is."""

    method: ClassVar[str]
    formula: Formula
    members: list[Member]
    layers: list[LayerRef] | None
    sliding_window: WindowPlan | None
    output: OutputSelection
    activation: Activation
    progress: Progress

    @property
    def settings(self) -> dict[str, Any]: ...

    def layers_for(self, x: torch.Tensor, windows: Windows) -> list[LayerRef]: ...


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
) -> list[TargetResults]:
    """Explain several targets by several methods, and say which targets they turned out to be.

    Args:
        cams, x, targets: as for `each_by`.
        check: called with the logits (B, K, *S) before the targets are evaluated; raises an error
            if they do not suit.
        move: brings a mask of a target, which has an affine of its own, onto the input's grid.
            None takes the mask as it is, if it lies on that grid.

    Raises:
        ConfigError: as `each_by`.
    """
    _check_alike(cams)
    lead = next((cam for cam in cams if cam.formula.explains == "layers"), cams[0])
    x, affine = as_input(x)
    windows = plan_windows(lead.sliding_window, x.shape[2:])

    to_input = move or (lambda mask: on_grid_of(mask, affine, x.shape[2:]))

    def evaluate(logits: torch.Tensor) -> list[TargetScore]:
        if check is not None:
            check(logits)
        listed = as_targets(_listed(targets, logits), logits, lead.activation)
        moved = [placed(target, to_input) for target in listed]
        return [TargetScore.of(target, logits) for target in moved]

    with telling_axes(lead.members[0], x):
        layers = lead.layers_for(x, windows)
        call = _Call(lead, layers, [cam.formula for cam in cams], x, windows, evaluate)
        several = len(lead.members) > 1
        outcome = _explain_ensemble(call) if several else _explain_member(call, lead.members[0])
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


@dataclass(frozen=True)
class _Call:
    """What is explained, and how.

    Attributes:
        lead: the CAM whose model, output and progress serve for all.
        formulas: one for each method.
        evaluate: a function of the logits (B, K, *S) that gives every target with its score.
    """

    lead: Explainer
    layers: Sequence[LayerRef]
    formulas: Sequence[Formula]
    x: torch.Tensor
    windows: Windows
    evaluate: Callable[[torch.Tensor], list[TargetScore]]

    @property
    def sliding_window(self) -> WindowPlan | None:
        return self.lead.sliding_window

    @property
    def weights_are_shared(self) -> bool:
        """Whether a formula's channel weights are those of several windows."""
        ndim = self.x.ndim - 2
        return any(
            len(self.windows.groups(formula.whole_axes(ndim))) < len(self.windows)
            for formula in self.formulas
        )

    def for_network(self, capture: Capture) -> _Call:
        """Return the call with the input in the network's precision, and windows that suit it.

        Every pass of a network that draws random numbers starts from the same random state. But
        the numbers drawn for a batch differ from those drawn for single items, so its windows are
        run one at a time.
        """
        # float64 stays float64
        x = self.x.to(torch.promote_types(self.x.dtype, capture.dtype))
        windows = self.windows
        if len(windows) > 1:
            capture.find_out_whether_it_draws(
                lambda: capture.to_model(windows.cut(windows.pad(x[:1]), [0]).clone())
            )
            windows = windows.one_by_one() if capture.known.draws else windows
        return replace(self, x=x, windows=windows)


@dataclass(frozen=True)
class _Outcome:
    """What a network, or an ensemble, gave.

    Attributes:
        logits: (B, K, *S).
        targets: the targets, with their scores at these logits.
        table: their maps.
        dropped: layers without a map, and why.
        draws: the operation with which it draws random numbers, "" for none.
    """

    logits: torch.Tensor
    targets: list[TargetScore]
    table: Table
    dropped: Mapping[LayerRef, str]
    draws: str


@advising
def _explain_member(
    call: _Call, member: Member, ensemble_logits: torch.Tensor | None = None
) -> _Outcome:
    """Explain one network.

    Args:
        ensemble_logits: the logits of the ensemble that it belongs to, which are explained; None
            for a network by itself.
    """
    lead, formulas = call.lead, call.formulas
    with capturing(member, call.layers, lead.output) as capture:
        call = call.for_network(capture)
        first = _first_pass(call, capture, ensemble_logits)
        _check_draws(capture, formulas, len(call.x))
        grids = _grids(first)
        tell_unmeasured(grids)
        targets = call.evaluate(first.logits)
        checked = _layers_with_gradients(first, formulas)
        gaps, reason = _gaps(first, targets, checked, lead.output)
        table = maps_of(Run(first, grids, lead.output, lead.progress), targets, formulas)
        unchecked = [la for la in checked if la not in gaps and la not in capture.dropped]
        tell_unchecked(unchecked, reason)
    table = with_gaps(without_numbers(table, targets), formulas, gaps)
    return _Outcome(first.logits, targets, table, capture.dropped, capture.known.draws or "")


@advising
def _explain_ensemble(call: _Call) -> _Outcome:
    """Explain the mean logits of several networks and flips, one member after another."""
    members = call.lead.members
    logits = _mean_logits(call)
    targets = call.evaluate(logits)
    dropped: dict[LayerRef, str] = {}
    draws = ""
    total: Table | None = None
    for member in members:
        layers = moved_to(member.network, call.layers)
        own = replace(call, layers=layers, evaluate=lambda _: targets)
        outcome = _explain_member(own, member, logits)
        dropped |= outcome.dropped
        draws = draws or outcome.draws
        if total is None:
            total = outcome.table
        else:
            total = combined(lambda a, b: added(a, b, call.windows.shape), total, outcome.table)
    count = len(members)
    mean = combined(
        lambda m: replace(m, values=m.values / count, ceiling=m.ceiling / count), total or []
    )
    return _Outcome(logits, targets, mean, dropped, draws)


def _mean_logits(call: _Call) -> torch.Tensor:
    """Return the logits (B, K, *S) of an ensemble."""
    total: Any = 0
    for member in call.lead.members:
        with capturing(member, [], call.lead.output) as capture:
            call = call.for_network(capture)
            first = predict(
                capture, call.x, call.windows, graph=False, keep=False, progress=call.lead.progress
            )
            total = total + first.logits
    return total / len(call.lead.members)


def _first_pass(call: _Call, capture: Capture, ensemble_logits: torch.Tensor | None) -> FirstPass:
    """Predict, and store what the formulas will need."""
    graph = any(formula.gradients_at == "layers" for formula in call.formulas)
    shared = call.weights_are_shared
    keep = any(formula.needs_activations(shared) for formula in call.formulas)
    progress = call.lead.progress
    if ensemble_logits is None:
        return predict(capture, call.x, call.windows, graph=graph, keep=keep, progress=progress)
    return predict_member(
        capture,
        call.x,
        call.windows,
        ensemble_logits,
        graph=graph,
        keep=keep,
        own=any(formula.own_logits for formula in call.formulas),
        progress=progress,
    )


def _grids(first: FirstPass) -> dict[LayerRef, FeatureGrid]:
    """Return the grid of every layer in one window."""
    if not first.shapes:
        return {}
    window = first.x.new_empty(1, first.x.shape[1], *first.windows.roi)
    return measured_in_window(first.capture, first.capture.to_model(window), first.shapes)


def _layers_with_gradients(first: FirstPass, formulas: Sequence[Formula]) -> list[LayerRef]:
    """Return the layers whose gradients the maps are made of; `INPUT` may be among them."""
    needed = {formula.gradients_at for formula in formulas}
    return [*(first.shapes if "layers" in needed else ()), *[INPUT] * ("input" in needed)]


def _gaps(
    first: FirstPass,
    targets: Sequence[TargetScore],
    layers: Sequence[LayerRef],
    output: OutputSelection,
) -> tuple[dict[LayerRef, float], str]:
    """Find the layers whose gradient misses a branch of the network.

    Returns:
        Layer -> the part of the score's changes that it misses, and why some layers could not be
        checked, "" if all were.
    """
    if not layers:
        return {}, ""
    seeded = [w for one in targets for w in seeded_windows(first, [0], one.seed)]
    window = first.cut([0], seeded[:1] or [0])
    return gradient_gaps(first.capture, window, layers, output)


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
    layers = [cam.layers for cam in cams if cam.formula.explains == "layers"]
    if any(own != layers[0] for own in layers):
        raise ConfigError(
            "methods of different target layers cannot share a pass: give all of them the same "
            "layers, each map is kept"
        )


def _check_draws(capture: Capture, formulas: Sequence[Formula], items: int) -> None:
    """Raise ModelError if a second pass over single items would draw other random numbers."""
    one_by_one = any(formula.gradients_at != "layers" for formula in formulas)
    if capture.known.draws and items > 1 and one_by_one:
        raise ModelError(
            f"the network draws random numbers ({capture.known.draws}), others for a batch than "
            f"for its items, which this method looks at one by one: explain the {items} items in "
            "calls of their own"
        )


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


def _result(
    cam: Explainer,
    windows: Windows,
    outcome: _Outcome,
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
