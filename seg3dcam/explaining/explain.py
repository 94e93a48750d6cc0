"""A scan in, an explanation on the scan's own grid out.

scan = load_scan("ct.nii.gz")
model = load_model("model.yaml")
explain(scan, model, "tumour").save("cam.nii.gz")
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.calls import each_by
from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.cams.result import CamResult
from seg3dcam.engine.passes import Progress, check_resolution, silent
from seg3dcam.errors import ConfigError, ModelError, TargetError, nearest
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.placement import on_network_grid
from seg3dcam.geometry import resample, resample_labels, spacing_of
from seg3dcam.models.seg_model import SegModel
from seg3dcam.network.layers import LayerSpec
from seg3dcam.scan import Scan, load_scan
from seg3dcam.targets import (
    ClassLogOdds,
    EveryClass,
    TargetFamily,
    as_targets,
    name_of,
    placed,
    uses_truth,
)
from seg3dcam.targets.regions import (
    Component,
    FixedComponent,
    Predicted,
    RegionKind,
    Volume,
    as_region,
)
from seg3dcam.targets.use import region_of

#: What may be given as a target: a class name or index, a target, or a family of targets.
Target = Callable[[torch.Tensor], torch.Tensor]
TargetSpec = str | int | Target | TargetFamily


def explain(
    scan: Scan | str | Path | Sequence[str | Path] | torch.Tensor,
    model: SegModel,
    target: TargetSpec,
    *,
    layers: LayerSpec = "auto",
    method: str = "hires_cam",
    progress: Progress | None = None,
    **settings: Any,
) -> Explanation:
    """Explain one target of a whole scan, on the scan's own grid.

    Args:
        scan: what `load_scan` takes.
        model: what `load_model` returns, or a `SegModel` around your own network.
        target: a class name or index (its log-odds over the predicted mask), or a target. Masks
            and truths of a target may be given as `Scan`; they must lie on the scan's grid.
        layers: target layers, see `BaseCAM`.
        method: a key of `METHODS`, or of `seg3dcam.cams.attributions.ATTRIBUTIONS`.
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
            scan, model, [target], layers=layers, method=method, progress=progress, **settings
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
    method: str | Sequence[str] = "hires_cam",
    progress: Progress | None = None,
    **settings: Any,
) -> Iterator[Explanation]:
    """Explain several targets of a scan, by one method or several; the prediction is made once.

    Targets, layers and the methods that take gradients share their forward passes. Maps are
    brought to the scan's grid one by one, as the result is iterated over: target by target, and
    for each target method by method.

    Args:
        targets: class names, indices, targets and families of targets, such as
            `targets.EveryComponent`; None is every predicted foreground class.
        method: a key of `METHODS` or `ATTRIBUTIONS`, or several.
        settings: of the method; several methods take none.

    The other arguments are those of `explain`.
    """
    kinds = [_kind(key) for key in ([method] if isinstance(method, str) else method)]
    if not kinds:
        raise ConfigError(f"no method given: name one, such as 'hires_cam' ({method!r})")
    _check_model(model, settings)
    targets = _listed(targets)
    scan = load_scan(scan)
    model.check_scan(scan)
    report = progress or silent
    report("preparing", 0, 1)
    with torch.device("cpu"):  # files and transforms work there, whatever the default device
        prepared = model.prepare(scan)
    x = prepared.as_tensor()[None].contiguous()
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
    chosen: list[tuple[int | None, Target]] = []

    def choose(logits: torch.Tensor) -> list[Target]:
        model.check_logits(logits)
        check_resolution(logits, x.shape[2:])
        for index, target in _chosen(model, targets, logits):
            moved = placed(target, lambda mask: on_network_grid(mask, scan, prepared))
            chosen.append((index, moved))
        if not chosen:
            raise TargetError("the targets stand for none at this prediction: there is no target")
        return [target for _, target in chosen]

    table = each_by(cams, x, choose)
    report("resampling the prediction", 0, 1)
    prediction = _prediction_on(scan, prepared, model, table[0][0], report)
    fingerprint = model.fingerprint()
    return (
        _explanation(scan, prepared, model, prediction, index, target, result, fingerprint, report)
        for (index, target), row in zip(chosen, table, strict=True)
        for result in row
    )


def _chosen(
    model: SegModel, targets: Sequence[TargetSpec] | None, logits: torch.Tensor
) -> list[tuple[int | None, Target]]:
    """Return (class index or None, target) for everything that is to be explained."""
    named = [
        ClassLogOdds(model.class_index(int(t) if isinstance(t, np.integer) else t))
        if isinstance(t, str | int | np.integer)
        else t
        for t in ([EveryClass()] if targets is None else targets)
    ]
    return [(_class_of(t), t) for t in as_targets(named, logits, model.activation)]


def _class_of(target: Target) -> int | None:
    """Return the class that a target is about, None for a target of the user's own."""
    index = getattr(target, "index", None)
    return int(index) if isinstance(index, int | np.integer) else None


def _label(model: SegModel, index: int | None, target: Target) -> str:
    """Return class and region in a few words, such as "lesion component 0"."""
    if index is None:
        return name_of(target)
    against = getattr(target, "against", None)
    region: Any = getattr(target, "region", "predicted")
    over = "" if isinstance(region, str) and region == "predicted" else as_region(region).name
    words = [
        model.class_name(index),
        "" if against is None else f"against {model.class_name(against)}",
        over.removeprefix("the ").removesuffix(" of the predicted mask"),
    ]
    return " ".join(word for word in words if word)


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


def _kind(key: str) -> type[BaseCAM]:
    if key not in ALL_METHODS:
        raise ConfigError(f"method {key!r}: {nearest(key, ALL_METHODS)}")
    return ALL_METHODS[key]


def _prediction_on(
    scan: Scan, prepared: MetaTensor, model: SegModel, result: CamResult, report: Progress
) -> torch.Tensor:
    """Return the masks of all classes on the scan's grid, as the model's framework makes them.

    Where it does not say how, logits are moved, then compared.
    """
    with torch.device("cpu"):
        own = model.restore and model.restore(result.logits[0].cpu().float(), scan, prepared)
    if own is not None:
        if own.dtype != torch.bool or tuple(own.shape[1:]) != scan.shape:
            raise ModelError(
                f"{model.name}: its way back to the scan gave {own.dtype} {tuple(own.shape)}; "
                f"masks (K, *{scan.shape}) of dtype bool are wanted"
            )
        return own
    affine = prepared.affine.numpy()
    masks = torch.zeros((result.logits.shape[1], *scan.shape), dtype=torch.bool, device="cpu")
    best = None
    for index, logits in enumerate(result.logits[0].cpu().float()):
        report("resampling the prediction", index, len(masks))
        moved = resample(logits, affine, scan.affine, scan.shape)
        if result.activation == "sigmoid" or len(masks) == 1:
            masks[index] = moved > 0
        elif best is None:
            best, masks[0] = moved, True
        else:
            wins = moved > best
            masks[:index] &= ~wins
            masks[index] = wins
            best = torch.maximum(best, moved)
    return masks


def _region_on(
    scan: Scan, prepared: MetaTensor, target: Target, logits: torch.Tensor
) -> torch.Tensor | None:
    """Return the voxels of a target on the scan's grid, where they are a region of its own."""
    if isinstance(_region_of(target), Predicted | Volume):
        return None
    found = region_of(target, logits)
    if found is None:
        return None
    affine = prepared.affine.numpy().astype(np.float64)
    return resample_labels(found[0].cpu(), affine, scan.affine, scan.shape).bool()


def _region_of(target: Target) -> RegionKind:
    """Return the region that a target's score sums over."""
    region: Any = getattr(target, "region", "predicted")
    return as_region(region)


def _is_component(target: Target) -> bool:
    """Tell whether a target's region is one connected component of the predicted mask."""
    region = _region_of(target)
    return isinstance(getattr(region, "origin", region), Component | FixedComponent)


def _over_mask(target: Target) -> bool:
    """Tell whether a target's score sums over the predicted mask of its class."""
    region: Any = getattr(target, "region", None)
    return region is not None and isinstance(as_region(region), Predicted)


def _explanation(
    scan: Scan,
    prepared: MetaTensor,
    model: SegModel,
    prediction: torch.Tensor,
    class_index: int | None,
    target: Target,
    result: CamResult,
    fingerprint: str,
    report: Progress,
) -> Explanation:
    affine = prepared.affine.numpy().astype(np.float64)
    result = replace(result, affine=affine)
    named = re.sub(r"\bclass (\d+)", lambda m: model.class_name(int(m[1])), result.target)
    result = replace(result, target=named)
    label = _label(model, class_index, target)
    maps = {}
    for number, (name, layer) in enumerate(result.layers.items()):
        report(f"resampling {label}", number, len(result.layers))
        maps[name] = resample(
            layer.values[0].cpu(),
            layer.grid.affine(affine),
            scan.affine,
            scan.shape,
            seen_affine=affine,
            seen_shape=tuple(prepared.shape[1:]),
        )
    return Explanation(
        scan=scan,
        maps=maps,
        status=result.status,
        prediction=prediction,
        class_names=[model.class_name(index) for index in range(len(prediction))],
        target=result.target,
        method=result.method,
        class_index=class_index,
        score=float(result.score[0]),
        native_spacing=result.native_spacing,
        label=label,
        region=_region_on(scan, prepared, target, result.logits),
        over_mask=_over_mask(target),
        of_component=_is_component(target),
        only_against=[name for name, layer in result.layers.items() if any(layer.only_against)],
        has_background=result.activation == "softmax" and len(prediction) > 1,
        provenance=_provenance(scan, prepared, model, class_index, target, result, fingerprint),
    )


def _provenance(
    scan: Scan,
    prepared: MetaTensor,
    model: SegModel,
    class_index: int | None,
    target: Target,
    result: CamResult,
    fingerprint: str,
) -> dict[str, Any]:
    plan = model.window
    return {
        "scan": {
            "shape": scan.shape,
            "spacing_mm": spacing_of(scan.affine),
            "affine": scan.affine,
        },
        "prepared": {
            "shape": tuple(prepared.shape[1:]),
            "affine": prepared.affine.numpy(),
        },
        "model": {
            "name": model.name,
            "weights_sha256": fingerprint,
            "classes": list(model.class_names),
            "activation": model.activation,
            "windows": result.windows,
            "members": result.members,
            "draws": result.draws,
            "window": None if plan is None else asdict(plan),
            "spec": dict(model.spec),
        },
        "target": {
            "name": result.target,
            "class": None if class_index is None else model.class_name(class_index),
            "class_index": class_index,
            "region_voxels": None if result.region_voxels is None else int(result.region_voxels[0]),
            "reduction": "sum",
            "uses_truth": uses_truth(target),
            "score": float(result.score[0]),
        },
        "method": {"name": result.method, "settings": result.settings},
        "layers": {
            name: {
                "status": layer.status,
                "shape": layer.window_grid.shape,
                "stride": layer.window_grid.stride,
                "offset": layer.window_grid.offset,
                "offset_measured": layer.window_grid.measured,
                "map": {
                    "shape": layer.grid.shape,
                    "stride": layer.grid.stride,
                    "offset": layer.grid.offset,
                },
                "spacing_mm": result.native_spacing[name],
                "raw_min": float(layer.values.min()),
                "raw_max": float(layer.values.max()),
                "positive_fraction": float((layer.values > 0).float().mean()),
                "ceiling": float(layer.ceiling[0]),
                "flags": list(layer.flags),
                "missing_gradient": layer.missing,
                "dtype": str(layer.values.dtype).removeprefix("torch."),
            }
            for name, layer in result.layers.items()
        },
        "dropped_layers": dict(result.dropped),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("seg3dcam", "torch", "monai", "nibabel")},
        },
    }
