"""A scan in, an explanation on the scan's own grid out.

scan = load_scan("ct.nii.gz")
model = load_model("model.yaml")
explain(scan, model, "tumour").save("cam.nii.gz")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.calls import TargetResults, explain_targets
from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.cams.result import CamResult
from seg3dcam.checks import check_word
from seg3dcam.engine.passes import check_resolution
from seg3dcam.errors import ConfigError, ModelError, TargetError, nearest, tell
from seg3dcam.explaining.assembly import Assembly
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.judging import Judge
from seg3dcam.explaining.placement import Placement, place_scan
from seg3dcam.models.recommended import USUAL_METHOD, advice_for
from seg3dcam.models.seg_model import SegModel
from seg3dcam.network.layers import LayerSpec
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan, load_scan
from seg3dcam.targets import ClassLogOdds, EveryClass, TargetFamily
from seg3dcam.targets.base import as_own_target
from seg3dcam.targets.combined import AnyTarget
from seg3dcam.targets.families import is_family

#: How much is tried before something is said of a map.
VerdictLevel = Literal["quick", "full"]

#: What may be given as a target: a class name or index, a target, or a family of targets.
TargetSpec = str | int | AnyTarget | TargetFamily


def explain(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    target: TargetSpec,
    *,
    layers: LayerSpec = "auto",
    method: str | None = None,
    verdict: VerdictLevel = "quick",
    progress: Progress | None = None,
    **settings: Any,
) -> Explanation:
    """Explain one target of a whole scan, on the scan's own grid.

    Args:
        scan: what `load_scan` takes.
        model: what `load_model` returns, or a `SegModel` around your own network.
        target: a class name or index (its log-odds over the predicted mask), or a target. Masks
            and truths of a target may be given as `Scan`; they must lie on the scan's grid.
        layers: target layers, see `BaseCAM`. "auto" is the layer that a comparison recommends for
            the class, where there is a file beside the model that says so; a warning tells of it.
        method: a key of `METHODS`, or of `seg3dcam.cams.attributions.ATTRIBUTIONS`; None is what is
            recommended together with the layer, else HiResCAM.
        verdict: "quick" says of each map what can be said at little cost; "full" tests it by
            context deletion and random weights, which takes some tens of predictions.
        progress: called with (step, done, total).
        settings: more arguments of the method's class, such as `window=` of `XResCAM`.

    Raises:
        ScanError, ModelError, LayerError, TargetError: see `seg3dcam.errors`.

    Example:
        >>> from seg3dcam.targets import ClassLogit
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Conv3d(1, 2, 3, stride=2, padding=1), torch.nn.ReLU(),
        ...     torch.nn.Upsample(scale_factor=2))
        >>> _ = torch.nn.init.ones_(network[0].weight)
        >>> scan = load_scan(np.random.default_rng(0).random((8, 8, 8)), affine=np.eye(4))
        >>> found = explain(scan, SegModel(network), ClassLogit(0, "volume"), layers="0")
        >>> found.maps["0"].shape
        torch.Size([8, 8, 8])
    """
    found = list(
        explain_each(
            scan,
            model,
            [target],
            layers=layers,
            method=method,
            verdict=verdict,
            progress=progress,
            **settings,
        )
    )
    if len(found) != 1:
        raise TargetError(
            f"{target!r} stands for {len(found)} targets: explain_each() explains them all"
        )
    return found[0]


def explain_each(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    targets: Sequence[TargetSpec] | None = None,
    *,
    layers: LayerSpec = "auto",
    method: str | Sequence[str] | None = None,
    verdict: VerdictLevel = "quick",
    skip_empty: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Iterator[Explanation]:
    """Explain several targets of a scan, by one method or several; the prediction is made once.

    All targets, all layers and all methods that take gradients share their forward passes. The maps
    are brought to the scan's grid one by one while the result is iterated over: target by target,
    and for each target method by method.

    Args:
        targets: class names, indices, targets and families of targets, such as
            `targets.EveryComponent`; None explains every predicted foreground class.
        method: a key of `METHODS` or `ATTRIBUTIONS`, several keys, or None as for `explain`.
        skip_empty: leave out targets whose region holds no voxel in this scan, such as a class that
            is not predicted. Where none is left it is an error, as without.
        settings: of the method, where there is one alone; several methods take no settings.

    The other arguments are those of `explain`.
    """
    check_word("verdict", verdict, VerdictLevel)
    found = explained(
        scan,
        model,
        targets,
        layers=layers,
        method=method,
        skip_empty=skip_empty,
        progress=progress,
        **settings,
    )
    report = progress or silent
    report("resampling the prediction", 0, 1)
    prediction = found.placement.prediction_on_scan(model, found.rows[0].results[0], report)
    judge = Judge(found.placement, model, verdict == "full", report)
    assembly = Assembly(found.placement, model, judge, prediction, model.fingerprint(), report)
    return (assembly.explanation(target, result, cam) for target, result, cam in found.each())


@dataclass(frozen=True, eq=False)
class Explained:
    """What was explained of a scan, on the network's grid.

    Attributes:
        placement: where scan and network lie to each other.
        cams: the methods.
        rows: for each target the results of all methods.
    """

    placement: Placement
    cams: Sequence[BaseCAM]
    rows: Sequence[TargetResults]

    def each(self) -> Iterator[tuple[AnyTarget, CamResult, BaseCAM]]:
        """Yield target, result and method, target by target."""
        for row in self.rows:
            for result, cam in zip(row.results, self.cams, strict=True):
                yield row.target, result, cam


def explained(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    targets: Sequence[TargetSpec] | None,
    *,
    layers: LayerSpec = "auto",
    method: str | Sequence[str] | None = None,
    skip_empty: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Explained:
    """Explain targets of a scan, and stay on the network's grid; as `explain_each`."""
    _check_model(model, settings)
    targets = _listed(targets)
    layers, methods = _advised(model, targets, layers, method)
    kinds = [_class_of_method(key) for key in methods]
    if not kinds:
        raise ConfigError(f"no method given: name one, such as 'hires_cam' ({method!r})")
    report = progress or silent
    placement = place_scan(load_scan(scan), model, report)
    cams = [
        kind(
            model.module,
            layers,
            sliding_window=model.window,
            output=model.output,
            activation=model.activation,
            progress=progress,
            **settings,
        )
        for kind in kinds
    ]

    def check(logits: torch.Tensor) -> None:
        model.check_logits(logits)
        check_resolution(logits, placement.shape)

    rows = explain_targets(
        cams,
        placement.network_input,
        _named_targets(model, targets),
        check=check,
        move=placement.mask_to_network,
        examines=True,
        skip_empty=skip_empty,
    )
    if not rows:
        raise TargetError("the targets stand for none at this prediction: there is no target")
    return Explained(placement, cams, rows)


def target_of_class(model: SegModel, name: str | int | np.integer) -> ClassLogOdds:
    """Return what a class named alone means as a target: its log-odds over the predicted mask.

    Raises:
        TargetError: no such class; the legal ones are named.
    """
    return ClassLogOdds(model.class_index(name if isinstance(name, str) else int(name)))


def _advised(
    model: SegModel,
    targets: Sequence[TargetSpec] | None,
    layers: LayerSpec,
    method: str | Sequence[str] | None,
) -> tuple[LayerSpec, Sequence[str]]:
    """Return layers and methods, with what is recommended beside the model in place of "auto"."""
    named = [method] if isinstance(method, str) else method
    if not (isinstance(layers, str) and layers == "auto"):
        return layers, [USUAL_METHOD] if named is None else named
    advice = advice_for(model, _classes(model, targets), methods=named)
    if advice.words:
        tell(advice.words)
    return advice.layer or layers, named or [advice.method or USUAL_METHOD]


def _classes(model: SegModel, targets: Sequence[TargetSpec] | None) -> list[int] | None:
    """Return the classes that targets are about; None if one is about none, or not yet known."""
    found: list[int] = []
    for target in _named_targets(model, targets):
        # A family that is about one class has an index, too.
        index = (
            getattr(target, "index", None)
            if is_family(target)
            else as_own_target(target).class_index
        )
        if index is None:
            return None
        found.append(int(index))
    return found


def _named_targets(model: SegModel, targets: Sequence[TargetSpec] | None) -> list[Any]:
    """Return targets and families of targets in place of names and indices of classes."""
    return [
        target_of_class(model, target) if isinstance(target, str | int | np.integer) else target
        for target in ([EveryClass()] if targets is None else targets)
    ]


#: Settings of a call on tensors, and where a whole scan's are given.
_ELSEWHERE = {
    "activation": "SegModel(network, activation=...)",
    "output": "SegModel(network, output=...)",
    "sliding_window": "SegModel(network, window=...)",
    "target_layers": "explain(..., layers=...)",
}


def _check_model(model: Any, settings: Mapping[str, Any]) -> None:
    """Refuse what is no `SegModel`, and settings that belong to it."""
    if not isinstance(model, SegModel):
        raise ModelError(
            f"the model is a {type(model).__name__}; a scan needs a SegModel, which says how scans "
            "are prepared and what classes there are. Wrap your network: SegModel(network, "
            "class_names=[...]), or load_model('model.yaml')"
        )
    for name in settings:
        if name in _ELSEWHERE:
            raise ConfigError(f"{name} is no setting of a method: give it by {_ELSEWHERE[name]}")


def _listed(targets: Any) -> list[TargetSpec] | None:
    """Return the targets as a list, None for every predicted class."""
    if targets is None:
        return None
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise TargetError(
            f"targets {targets!r}: give a list, such as [{targets!r}]; explain() takes one alone"
        )
    listed = list(targets)
    if not listed:
        raise TargetError(
            "the list of targets is empty: name at least one, or give None for every predicted "
            "class"
        )
    return listed


def _class_of_method(key: str) -> type[BaseCAM]:
    if key not in ALL_METHODS:
        raise ConfigError(f"method {key!r}: {nearest(key, ALL_METHODS)}")
    return ALL_METHODS[key]
