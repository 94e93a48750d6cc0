"""Models from a Python factory, its weights, and how it is used."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from seg3dcam.config import ModelSpec
from seg3dcam.errors import ModelError, Seg3dcamWarning, nearest
from seg3dcam.models.base import SegModel
from seg3dcam.models.prepare import build_preparation
from seg3dcam.models.state import check_finite, check_fit, read_state, without_prefix

#: Networks from here are built without being asked for trust; anything else is foreign code.
TRUSTED = ("monai.networks.nets", "dynamic_network_architectures", "torchvision.models")


def build(spec: ModelSpec, path: Path, trust: bool) -> SegModel:
    """Build the network of a spec and load its weights.

    Args:
        path: the file that holds the spec; weights are relative to it.
        trust: allow a factory from outside of MONAI, dynamic_network_architectures and
            torchvision: importing and calling it runs its code.

    Raises:
        ModelError: the factory or the weights cannot be used.
    """
    module = _build(spec, path, trust)
    _load_weights(module, spec, path)
    return SegModel(
        module=module.eval(),
        class_names=tuple(spec.classes),
        activation=spec.activation,
        prepare=build_preparation(spec.prepare),
        window=spec.window.plan() if spec.window else None,
        output=spec.output,
        in_channels=_in_channels(module, spec),
        name=f"{spec.factory} ({path.stem})",
        spec=spec.model_dump(mode="json", exclude={"weights"}, exclude_none=True),
    )


def _build(spec: ModelSpec, path: Path, trust: bool) -> nn.Module:
    place, name = spec.factory.split(":")
    if not trust and not any(place == t or place.startswith(t + ".") for t in TRUSTED):
        raise ModelError(
            f"{path.name}: factory {spec.factory} is not from {', '.join(TRUSTED)}; importing it "
            "would run its code. If you know it, allow it with --trust (trust=True)"
        )
    try:
        factory: Any = importlib.import_module(place)
    except ImportError as error:
        raise ModelError(f"{path.name}: factory {spec.factory}: {error}") from error
    for part in name.split("."):
        if not hasattr(factory, part):
            known = [n for n in dir(factory) if isinstance(getattr(factory, n), type)]
            raise ModelError(f"{path.name}: no {part!r} in {place}: {nearest(part, known)}")
        factory = getattr(factory, part)
    if not trust and not (isinstance(factory, type) and issubclass(factory, nn.Module)):
        raise ModelError(
            f"{path.name}: factory {spec.factory} is no torch.nn.Module class; to call it all the "
            "same, allow it with --trust (trust=True)"
        )
    try:
        module = factory(**spec.arguments)
    except Exception as error:
        raise ModelError(
            f"{path.name}: {spec.factory} does not accept these arguments: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{path.name}: {spec.factory} returned {type(module).__name__}, not a torch.nn.Module"
        )
    return module


def _load_weights(module: nn.Module, spec: ModelSpec, path: Path) -> None:
    if spec.weights == "random":
        warnings.warn(
            f"{path.name}: the network has random weights, as asked; its maps mean nothing",
            Seg3dcamWarning,
            stacklevel=4,
        )
        return
    file = path.parent / spec.weights
    state = without_prefix(read_state(file))
    check_fit(module, state, file.name, f"{spec.factory} as {path.name} builds it")
    check_finite(state, file.name)
    module.load_state_dict(state)


def _in_channels(module: nn.Module, spec: ModelSpec) -> int | None:
    given = spec.arguments.get("in_channels")
    if isinstance(given, int):
        return given
    return next((m.in_channels for m in module.modules() if isinstance(m, _ConvNd)), None)
