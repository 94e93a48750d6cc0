"""The steps of a call: predict, evaluate the targets, check the gradients, and make the maps.

The members of an ensemble go through these steps one after another, and their maps are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from seg3dcam.cams.notices import tell_unchecked, tell_unmeasured
from seg3dcam.cams.tables import Table, combined, with_gaps, with_heads, without_numbers
from seg3dcam.engine.gradient_check import gradient_gaps
from seg3dcam.engine.gradients import seeded_windows
from seg3dcam.engine.head_check import Similarities, head_similarity
from seg3dcam.engine.layer_map import added
from seg3dcam.engine.memory import advising
from seg3dcam.engine.passes import FirstPass, predict, predict_member, suited
from seg3dcam.engine.run import Run, TargetScore, maps_of
from seg3dcam.errors import ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.methods.base import Formula
from seg3dcam.network.capture import Capture, capturing
from seg3dcam.network.ensemble import Member
from seg3dcam.network.grids.measurement import measured_in_window
from seg3dcam.network.layers import LayerRef, moved_to
from seg3dcam.network.layouts import INPUT
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress
from seg3dcam.targets import Activation
from seg3dcam.targets.base import UserTarget, as_own_target
from seg3dcam.windows import WindowPlan, Windows


class Explainer(Protocol):
    """What a call needs to know of a CAM; the names are explained in `BaseCAM`."""

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
class Call:
    """What is explained, and how.

    Attributes:
        layers: the target layers.
        x: the input (B, C, *S).
        windows: the windows that it is cut into.
        lead: the CAM whose model, output and progress serve for all.
        formulas: one for each method.
        evaluate: a function of the logits (B, K, *S) that gives every target with its score.
        examines: whether the maps are held against those of a network whose last layer is random.
    """

    lead: Explainer
    layers: Sequence[LayerRef]
    formulas: Sequence[Formula]
    x: torch.Tensor
    windows: Windows
    evaluate: Callable[[torch.Tensor], list[TargetScore]]
    examines: bool = False

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

    def for_network(self, capture: Capture) -> Call:
        """Return the call with the input and the windows that suit a network."""
        x, windows = suited(capture, self.x, self.windows)
        return replace(self, x=x, windows=windows)


@dataclass(frozen=True)
class Outcome:
    """The result for one network, or for an ensemble.

    Attributes:
        logits: (B, K, *S).
        targets: the targets, with their scores at these logits.
        table: the maps of all targets and methods.
        dropped: layers without a map, and why they have none.
        draws: the operation with which the network draws random numbers, "" for none.
    """

    logits: torch.Tensor
    targets: list[TargetScore]
    table: Table
    dropped: Mapping[LayerRef, str]
    draws: str


@advising
def explain_member(
    call: Call, member: Member, ensemble_logits: torch.Tensor | None = None
) -> Outcome:
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
        if call.examines:
            table = with_heads(table, _heads(first, targets, formulas, lead.output))
        unchecked = [la for la in checked if la not in gaps and la not in capture.dropped]
        tell_unchecked(unchecked, reason)
    table = with_gaps(without_numbers(table, targets), formulas, gaps, reason)
    return Outcome(first.logits, targets, table, capture.dropped, capture.known.draws or "")


@advising
def explain_ensemble(call: Call) -> Outcome:
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
        outcome = explain_member(own, member, logits)
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
    return Outcome(logits, targets, mean, dropped, draws)


def _mean_logits(call: Call) -> torch.Tensor:
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


def _first_pass(call: Call, capture: Capture, ensemble_logits: torch.Tensor | None) -> FirstPass:
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


def _heads(
    first: FirstPass,
    targets: Sequence[TargetScore],
    formulas: Sequence[Formula],
    output: OutputSelection,
) -> list[Similarities]:
    """Return, for every target, how like its maps are to those of a random last layer.

    Targets that differ in their region alone, such as a class's lesions, share one answer.
    """
    known: dict[tuple[object, ...], Similarities] = {}
    found = []
    for one in targets:
        own = as_own_target(one.target)
        activation = getattr(own, "activation", None)
        key = (type(own), own.class_index, own.other_class_index, activation)
        if own.class_index is None or isinstance(own, UserTarget) or key not in known:
            known[key] = head_similarity(first, one.seed, formulas, output)
        found.append(known[key])
    return found


def _check_draws(capture: Capture, formulas: Sequence[Formula], items: int) -> None:
    """Raise ModelError if a second pass over single items would draw other random numbers."""
    one_by_one = any(formula.gradients_at != "layers" for formula in formulas)
    if capture.known.draws and items > 1 and one_by_one:
        raise ModelError(
            f"the network draws random numbers ({capture.known.draws}), others for a batch than "
            f"for its items, which this method looks at one by one: explain the {items} items in "
            "calls of their own"
        )
