"""From the result of a CAM on the network's grid to an `Explanation` on the scan's own grid."""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

import torch

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.result import CamResult
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.explaining.certainty import Probabilities, lesion_confidence, soft_dice_confidence
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.judging import Judge
from seg3dcam.explaining.placement import Placement
from seg3dcam.explaining.provenance import (
    GridRecord,
    InputRecord,
    LayerRecord,
    MethodRecord,
    ModelRecord,
    Provenance,
    ScanRecord,
    TargetRecord,
)
from seg3dcam.geometry import spacing_of
from seg3dcam.models.seg_model import SegModel
from seg3dcam.progress import Progress
from seg3dcam.targets import OwnTarget, region_of
from seg3dcam.targets.base import as_own_target
from seg3dcam.targets.combined import AnyTarget

#: Packages whose version may change a map.
PACKAGES = ("seg3dcam", "torch", "monai", "nibabel")


@dataclass(frozen=True, eq=False)
class Assembly:
    """Puts together the explanations of one scan by one network, and holds what they share.

    Attributes:
        placement: where scan and network lie to each other.
        model: the network.
        judge: gives a verdict on every map.
        prediction: the masks of all classes on the scan's grid, (K, X, Y, Z) bool.
        weights_sha256: the hash of the network's weights.
        report: called with (step, done, total).
    """

    placement: Placement
    model: SegModel
    judge: Judge
    prediction: torch.Tensor
    weights_sha256: str
    report: Progress
    _of_logits: list[Probabilities] = field(default_factory=list)

    def explanation(self, target: AnyTarget, result: CamResult, cam: BaseCAM) -> Explanation:
        """Return one result as an explanation on the scan's grid.

        Args:
            target: what was explained, with its masks on the network's grid.
            result: the maps of that target, for a batch of one.
            cam: the method that made them.
        """
        own = as_own_target(target)
        label = _label(self.model, own)
        name = _with_class_names(self.model, result.target)
        return Explanation(
            scan=self.placement.scan,
            maps=self._maps_on_scan(result, label),
            status=result.status,
            prediction=self.prediction,
            class_names=[self.model.class_name(index) for index in range(len(self.prediction))],
            target=name,
            method=result.method,
            class_index=own.class_index,
            score=float(result.score[0]),
            native_spacing=result.native_spacing,
            label=label,
            region=self._region_on_scan(target, result) if own.over_special_region else None,
            over_mask=own.over_mask,
            of_component=own.of_component,
            only_against=[name for name, layer in result.layers.items() if any(layer.only_against)],
            has_background=result.activation == "softmax" and len(self.prediction) > 1,
            provenance=self._provenance(own, name, result).as_dict(),
            verdicts=self.judge.verdicts(target, result, cam),
            confidence=self._confidence(own, target, result),
            probability=_OnScan(self.placement, self._probabilities(result)),
        )

    def _probabilities(self, result: CamResult) -> Probabilities:
        """Return the probabilities of the scan; all its results have the same logits."""
        if not self._of_logits:
            made = Probabilities(result.logits[0], result.activation, self.model.temperature)
            self._of_logits.append(made)
        return self._of_logits[0]

    def _confidence(self, own: OwnTarget, target: AnyTarget, result: CamResult) -> float | None:
        """Return how sure the network is of a class, or of one lesion; None for another target."""
        logits, drawn = result.logits[0], result.prediction[0]
        # The index that a function of your own carries may be none of the network's.
        if own.class_index is None or own.class_index >= len(logits):
            return None
        probability = self._probabilities(result).of(own.class_index)
        mask = drawn[own.class_index] if drawn.ndim == logits.ndim else drawn == own.class_index
        region = region_of(target, result.logits) if own.of_component else None
        if region is not None:
            return lesion_confidence(probability, mask, region[0].to(mask.device))
        return soft_dice_confidence(probability, mask)

    def _maps_on_scan(self, result: CamResult, label: str) -> dict[str, torch.Tensor]:
        """Return every layer's raw map on the scan's grid."""
        maps = {}
        for number, (name, layer) in enumerate(result.layers.items()):
            self.report(f"resampling {label}", number, len(result.layers))
            maps[name] = self.placement.map_to_scan(layer)
        return maps

    def _region_on_scan(self, target: AnyTarget, result: CamResult) -> torch.Tensor | None:
        """Return the target's voxels on the scan's grid; None if it does not tell them."""
        region = region_of(target, result.logits)
        return None if region is None else self.placement.region_to_scan(region[0])

    def _provenance(self, target: OwnTarget, name: str, result: CamResult) -> Provenance:
        """Return everything that is needed to make the maps again."""
        class_index = target.class_index
        place, voxels = self.placement, result.region_voxels
        spacing = result.native_spacing
        return Provenance(
            scan=ScanRecord(
                shape=place.scan.shape,
                spacing_mm=spacing_of(place.scan.affine),
                affine=place.scan.affine,
            ),
            prepared=InputRecord(shape=place.shape, affine=place.affine),
            model=self._model_record(result),
            target=TargetRecord(
                name=name,
                class_=None if class_index is None else self.model.class_name(class_index),
                class_index=class_index,
                region_voxels=None if voxels is None else int(voxels[0]),
                uses_truth=target.uses_truth,
                score=float(result.score[0]),
            ),
            method=MethodRecord(name=result.method, settings=result.settings),
            layers={
                name: _layer_record(layer, spacing[name]) for name, layer in result.layers.items()
            },
            dropped_layers=dict(result.dropped),
            versions={
                "python": platform.python_version(),
                **{package: version(package) for package in PACKAGES},
            },
        )

    def _model_record(self, result: CamResult) -> ModelRecord:
        model = self.model
        return ModelRecord(
            name=model.name,
            weights_sha256=self.weights_sha256,
            classes=list(model.class_names),
            activation=model.activation,
            windows=result.windows,
            members=result.members,
            draws=result.draws,
            window=None if model.window is None else asdict(model.window),
            spec={**model.spec, **_temperature_of(model)},
        )


@dataclass(frozen=True, eq=False)
class _OnScan:
    """Probabilities on the scan's grid, see `ClassProbability`."""

    placement: Placement
    on_network: Probabilities

    def __call__(self, class_index: int) -> torch.Tensor:
        return self.placement.probability_to_scan(self.on_network.of(class_index))

    def seen(self) -> torch.Tensor:
        return self.placement.region_to_scan(torch.ones(self.placement.shape))


def _layer_record(layer: LayerMap, spacing_mm: tuple[float, ...]) -> LayerRecord:
    """Return what one target layer gave; `spacing_mm` is that of its own grid."""
    own, blended = layer.window_grid, layer.grid
    return LayerRecord(
        status=layer.status,
        shape=own.shape,
        stride=own.stride,
        offset=own.offset,
        offset_measured=own.measured,
        map=GridRecord(blended.shape, blended.stride, blended.offset),
        spacing_mm=spacing_mm,
        raw_min=float(layer.values.min()),
        raw_max=float(layer.values.max()),
        positive_fraction=float((layer.values > 0).float().mean()),
        ceiling=float(layer.ceiling[0]),
        flags=list(layer.flags),
        missing_gradient=layer.missing,
        dtype=str(layer.values.dtype).removeprefix("torch."),
    )


def _temperature_of(model: SegModel) -> dict[str, float]:
    """Return what a record says of the temperature: nothing, where there is none."""
    return {} if model.temperature == 1 else {"temperature": model.temperature}


# ------------------------------------------------------------------------------- words of a target


def _label(model: SegModel, target: OwnTarget) -> str:
    """Return class and region in a few words, such as "lesion component 0"."""
    if target.class_index is None:
        return target.name
    other, region = target.other_class_index, target.region_kind
    over = "" if region is None or target.over_mask else region.name
    words = [
        model.class_name(target.class_index),
        "" if other is None else f"against {model.class_name(other)}",
        over.removeprefix("the ").removesuffix(" of the predicted mask"),
    ]
    return " ".join(word for word in words if word)


def _with_class_names(model: SegModel, target: str) -> str:
    """Return a target's name with "class 2" replaced by the class's name, "lesion"."""
    return re.sub(r"\bclass (\d+)", lambda found: model.class_name(int(found[1])), target)
