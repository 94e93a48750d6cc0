"""The verdicts on the maps of a scan."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.result import CamResult
from seg3dcam.errors import EmptyRegionError, EvaluationError, InputError, ModelError
from seg3dcam.evaluate.baselines import OF_VERDICTS
from seg3dcam.evaluate.context import ContextEvidence, context_evidence
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.evaluate.sanity import Check, randomisation
from seg3dcam.evaluate.verdict import Verdict, full_verdict, quick_verdict, undefined_verdict
from seg3dcam.explaining.placement import Placement
from seg3dcam.geometry import spacing_of
from seg3dcam.models.seg_model import SegModel
from seg3dcam.progress import Progress
from seg3dcam.targets import region_of
from seg3dcam.targets.base import OwnTarget, as_own_target
from seg3dcam.targets.combined import AnyTarget
from seg3dcam.targets.regions import Box, Prediction

#: What is raised where a test means nothing, for a reason that is said.
UNDEFINED = (EvaluationError, EmptyRegionError, ModelError, InputError)


@dataclass(frozen=True, eq=False)
class Judge:
    """Gives a verdict on every map of a scan.

    Attributes:
        placement: the scan, and the network's input.
        model: the network.
        tests: whether maps are tested by deletion and random weights, which takes some tens of
            predictions for each of them.
        report: called with (step, done, total).
        baselines: what stands in the place of what is deleted.
    """

    placement: Placement
    model: SegModel
    tests: bool
    report: Progress
    baselines: Sequence[str | float] = OF_VERDICTS

    def verdicts(self, target: AnyTarget, result: CamResult, cam: BaseCAM) -> dict[str, Verdict]:
        """Return the verdict on every layer's map of a result."""
        found = self.quick_verdicts(target, result, cam)
        if not self.tests:
            return found
        own = as_own_target(target)
        region = region_explained(target, own, result)
        return {
            name: self._tested(verdict, name, own, region, result, cam)
            for name, verdict in found.items()
        }

    def quick_verdicts(
        self, target: AnyTarget, result: CamResult, cam: BaseCAM
    ) -> dict[str, Verdict]:
        """Return what may be said of every layer's map without running the network again."""
        own = as_own_target(target)
        region = region_explained(target, own, result)
        shaped = own.over_mask or (own.over_special_region and not isinstance(own.region_kind, Box))
        return {
            name: quick_verdict(layer, cam.formula, region, resolvable=shaped)
            for name, layer in result.layers.items()
        }

    @cached_property
    def rerun(self) -> Rerun:
        """The prediction from which all changed ones are made; one for all maps."""
        model = self.model
        return Rerun(
            model.module,
            self.placement.network_input.as_tensor(),
            sliding_window=model.window,
            output=model.output,
            progress=self.report,
        )

    def evidence(
        self, name: str, own: OwnTarget, region: torch.Tensor | None, result: CamResult
    ) -> ContextEvidence:
        """Hold one layer's map against maps that know nothing of the network.

        Raises:
            EvaluationError, EmptyRegionError: context deletion is undefined.
        """
        mask = None if own.class_index is None else class_mask(own.class_index, result)
        if own.class_index is None or mask is None:
            raise EvaluationError("the target is about no class")
        if own.over_special_region and region is not None and (region & ~mask).any():
            raise EvaluationError(
                "what is explained is not predicted, so no prediction there can change"
            )
        return context_evidence(
            result.maps[name][0],
            self.rerun.x,
            self.model.module,
            own.class_index,
            grid=result.layers[name].grid,
            sliding_window=self.model.window,
            activation=self.model.activation,
            output=self.model.output,
            baselines=self.baselines,
            spacing=spacing_of(self.placement.affine),
            region=region if own.of_component else None,
            rerun=self.rerun,
        )

    def _tested(
        self,
        quick: Verdict,
        name: str,
        own: OwnTarget,
        region: torch.Tensor | None,
        result: CamResult,
        cam: BaseCAM,
    ) -> Verdict:
        """Return the verdict on one layer's map after context deletion and random weights."""
        if quick.finding == "unusable":
            return undefined_verdict(quick, "there is no map to test")
        try:
            evidence = self.evidence(name, own, region, result)
        except UNDEFINED as error:
            return undefined_verdict(quick, error)
        verdict = full_verdict(quick, evidence, self.randomised(name, own, cam))
        return followed(verdict, own)

    def randomised(self, name: str, target: OwnTarget, cam: BaseCAM) -> Check | None:
        """Return the check by random weights; None where the network cannot be copied."""
        self.report(f"random weights, {name}", 0, 1)
        try:
            return randomisation(at_layer(cam, name), self.rerun.x, target)
        except UNDEFINED:
            return None


def at_layer(cam: BaseCAM, name: str) -> BaseCAM:
    """Return the same method at one of its layers."""
    alone = copy.copy(cam)
    alone.layers = [layer for layer in cam.layers or () if str(layer) == name]
    return alone


def region_explained(target: AnyTarget, own: OwnTarget, result: CamResult) -> torch.Tensor | None:
    """Return the region that a target sums over, or else its class's mask, (*S) bool."""
    region = region_of(target, result.logits)
    if region is not None and (own.over_mask or own.over_special_region):
        return region[0]
    return None if own.class_index is None else class_mask(own.class_index, result)


def class_mask(index: int, result: CamResult) -> torch.Tensor | None:
    """Return where a class is predicted, (*S) bool; None if the network has no such class."""
    if not 0 <= index < result.logits.shape[1]:
        return None
    overlapping = result.activation == "sigmoid" or result.logits.shape[1] == 1
    return Prediction(result.logits, index, overlapping).mask()[0]


def followed(verdict: Verdict, own: OwnTarget) -> Verdict:
    """Say that the whole class was followed where something else was explained."""
    if own.over_mask or own.of_component:
        return verdict
    words = f"{verdict.words}; followed was the whole predicted mask of the class"
    return replace(verdict, words=words)
