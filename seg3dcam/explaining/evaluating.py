"""Scans in, all figures of their maps out: is a map true, where is it, and how sure is that?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.result import CamResult
from seg3dcam.errors import TargetError
from seg3dcam.evaluate.baselines import OF_VERDICTS, check_baseline
from seg3dcam.evaluate.blocks import Curve
from seg3dcam.evaluate.evaluation import Measurement, Subjects, measurements
from seg3dcam.evaluate.verdict import Verdict, full_verdict, undefined_verdict
from seg3dcam.explaining.explain import TargetSpec, explained
from seg3dcam.explaining.judging import UNDEFINED, Judge, at_layer, followed, region_explained
from seg3dcam.geometry import spacing_of
from seg3dcam.models.seg_model import SegModel
from seg3dcam.network.layers import LayerSpec
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan
from seg3dcam.targets.base import as_own_target
from seg3dcam.targets.combined import AnyTarget


@dataclass(frozen=True, eq=False)
class MapEvaluation:
    """All that is known of one map of a scan.

    Attributes:
        target, class_name, layer, method: what was explained, where and how.
        verdict: the full one.
        measurements: all figures.
        curves: name -> curve of deletion or insertion.
    """

    target: str
    class_name: str
    layer: str
    method: str
    verdict: Verdict
    measurements: Sequence[Measurement]
    curves: Mapping[str, Curve]


def evaluate_scan(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    targets: Sequence[TargetSpec] | None = None,
    *,
    layers: LayerSpec = "auto",
    method: str | Sequence[str] | None = None,
    truth: Mapping[int, Scan] | None = None,
    baseline: str | float = "mean",
    progress: Progress | None = None,
    **settings: Any,
) -> Iterator[MapEvaluation]:
    """Yield all figures of every map of a scan: target by target, method by method.

    Args:
        truth: class index -> where it really is, a mask on the scan's grid.
        baseline: what stands in the place of what is deleted, see `context_deletion`.
        scan, model, targets, layers, method, progress, settings: as for `explain_each`.

    Raises:
        TargetError: a target is about no class.
        ScanError, ModelError, LayerError: see `explain`.
    """
    check_baseline(baseline)
    report = progress or silent
    found = explained(
        scan, model, targets, layers=layers, method=method, progress=progress, **settings
    )
    others = tuple(name for name in OF_VERDICTS if name != baseline)
    judge = Judge(found.placement, model, True, report, (baseline, *others))
    for target, result, cam in found.each():
        for name in result.layers:
            yield _evaluated(judge, target, result, cam, name, truth or {}, baseline)


def _evaluated(
    judge: Judge,
    target: AnyTarget,
    result: CamResult,
    cam: BaseCAM,
    name: str,
    truth: Mapping[int, Scan],
    baseline: str | float,
) -> MapEvaluation:
    own, model, placement = as_own_target(target), judge.model, judge.placement
    if own.class_index is None:
        raise TargetError(f"{own.name} is about no class, so no mask can change: name a class")
    region = region_explained(target, own, result)
    regions = {} if region is None else {"the prediction": region}
    if own.class_index in truth:
        regions["the truth"] = placement.mask_to_network(truth[own.class_index]) > 0
    quick = judge.quick_verdicts(target, result, cam)[name]
    randomised = judge.randomised(name, own, cam)
    context: dict[str, Curve] = {}
    try:
        evidence = judge.evidence(name, own, region, result)
        context["context deletion"] = evidence.curve
        verdict = followed(full_verdict(quick, evidence, randomised), own)
    except UNDEFINED as error:
        verdict = undefined_verdict(quick, error)
    subjects = Subjects(
        cam=at_layer(cam, name),
        class_index=own.class_index,
        values=result.maps[name][0],
        grid=result.layers[name].grid,
        regions=regions,
        rerun=judge.rerun,
        randomised=randomised,
        activation=model.activation,
        spacing=tuple(spacing_of(placement.affine)),
        baseline=baseline,
        progress=judge.report,
    )
    found, curves = measurements(subjects)
    return MapEvaluation(
        target=result.target,
        class_name=model.class_name(own.class_index),
        layer=name,
        method=result.method,
        verdict=verdict,
        measurements=found,
        curves=context | curves,
    )
