"""What an explanation was made from: the scan, the network, the target, the method and the layers.

`explain` fills in a `Provenance`. `Explanation.provenance` and `case.json` hold it as a dictionary,
to which a user may add anything. `Explanation.origin` reads the known entries of the dictionary
back into the types of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A part of a provenance: fields with names, written as a dictionary."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by their keys; `class_` is written as "class"."""
        return {part.name.rstrip("_"): _written(getattr(self, part.name)) for part in fields(self)}


@dataclass(frozen=True)
class GridRecord(Part):
    """Where the voxels of a map lie in the network's input: voxel k at offset + stride * k."""

    shape: Sequence[int] = ()
    stride: Sequence[float] = ()
    offset: Sequence[float] = ()


@dataclass(frozen=True, eq=False)
class ScanRecord(Part):
    """The scan's own grid: voxels, mm between them, and the (4, 4) affine voxel -> RAS mm."""

    shape: Sequence[int] = ()
    spacing_mm: Sequence[float] = ()
    affine: Any = None


@dataclass(frozen=True, eq=False)
class InputRecord(Part):
    """The grid of the scan as the network took it, with its (4, 4) affine voxel -> RAS mm."""

    shape: Sequence[int] = ()
    affine: Any = None


@dataclass(frozen=True)
class ModelRecord(Part):
    """The network and how it was run.

    Attributes:
        name, weights_sha256, classes, activation: of the network; the hash says which weights.
        windows: how many windows the input was cut into.
        members: how many networks and flips were averaged.
        draws: the operation with which the network draws random numbers, "" for none.
        window: the settings of the sliding window, None for the whole scan at once.
        spec: the settings that the model was loaded from.
    """

    name: str = ""
    weights_sha256: str = "unknown"
    classes: Sequence[str] = ()
    activation: str = "softmax"
    windows: int = 1
    members: int = 1
    draws: str = ""
    window: Mapping[str, Any] | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetRecord(Part):
    """What was explained.

    Attributes:
        name: in words.
        class_, class_index: of the class that the target is about; None for a target of one's own.
        region_voxels: voxels of the network's grid that the score sums over; None if unknown.
        reduction: how the voxels of the region make one score.
        uses_truth: whether the target holds a truth, such as labels to compare with.
        score: its value.
    """

    name: str = ""
    class_: str | None = None
    class_index: int | None = None
    region_voxels: int | None = None
    reduction: str = "sum"
    uses_truth: bool = False
    score: float = 0.0


@dataclass(frozen=True)
class MethodRecord(Part):
    """By which method, with which settings."""

    name: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRecord(Part):
    """What one target layer gave.

    Attributes:
        status: see `Explanation.status`.
        shape, stride, offset: the layer's own grid within one window, as in `GridRecord`.
        offset_measured: False where the offset had to be assumed.
        map: the grid on which the windows' maps were blended.
        spacing_mm: mm between voxels of the layer's own grid.
        raw_min, raw_max, positive_fraction: of the raw map before it was brought to the scan.
        ceiling: the maximum that the raw map would have if no contributions cancelled.
        flags: what a reader of the map must know.
        missing_gradient: the part of the score's changes that the gradients do not follow.
        dtype: of the raw map.
    """

    status: str = ""
    shape: Sequence[int] = ()
    stride: Sequence[float] = ()
    offset: Sequence[float] = ()
    offset_measured: bool = True
    map: GridRecord = field(default_factory=GridRecord)
    spacing_mm: Sequence[float] = ()
    raw_min: float = 0.0
    raw_max: float = 0.0
    positive_fraction: float = 0.0
    ceiling: float = 0.0
    flags: Sequence[str] = ()
    missing_gradient: float = 0.0
    dtype: str = ""


@dataclass(frozen=True, eq=False)
class Provenance(Part):
    """Everything that is needed to make a map again.

    Attributes:
        scan, prepared: the scan's own grid, and that of the scan as the network took it.
        model, target, method: by what, of what and how.
        layers: target layer -> what it gave.
        dropped_layers: layer -> why it has no map, of many that were asked for together.
        versions: package -> version.

    >>> origin = Provenance.read({"model": {"name": "UNet"}, "target": {"class": "lesion"}})
    >>> origin.model.name, origin.target.class_, origin.layers
    ('UNet', 'lesion', {})
    >>> origin.as_dict()["target"]["class"]
    'lesion'
    """

    scan: ScanRecord = field(default_factory=ScanRecord)
    prepared: InputRecord = field(default_factory=InputRecord)
    model: ModelRecord = field(default_factory=ModelRecord)
    target: TargetRecord = field(default_factory=TargetRecord)
    method: MethodRecord = field(default_factory=MethodRecord)
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    dropped_layers: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Provenance:
        """Return the provenance that a dictionary holds; missing keys leave the defaults."""
        return cls(
            scan=_read(ScanRecord, written.get("scan")),
            prepared=_read(InputRecord, written.get("prepared")),
            model=_read(ModelRecord, written.get("model")),
            target=_read(TargetRecord, written.get("target")),
            method=_read(MethodRecord, written.get("method")),
            layers={
                name: _read(LayerRecord, {**layer, "map": _read(GridRecord, layer.get("map"))})
                for name, layer in written.get("layers", {}).items()
            },
            dropped_layers=written.get("dropped_layers", {}),
            versions=written.get("versions", {}),
        )


def _written(value: Any) -> Any:
    """Return a value in which all records, at any depth, are replaced by dictionaries."""
    if isinstance(value, Part):
        return value.as_dict()
    if isinstance(value, Mapping):
        return {key: _written(of_key) for key, of_key in value.items()}
    return value


def _read(kind: type[T], written: Mapping[str, Any] | None) -> T:
    """Return a record of a dictionary's known keys; other keys are ignored."""
    known = {part.name.rstrip("_"): part.name for part in fields(kind)}  # type: ignore[arg-type]
    found = {known[key]: value for key, value in (written or {}).items() if key in known}
    return kind(**found)
