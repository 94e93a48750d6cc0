"""Models from a Python factory, its weights, and how it is used."""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.conv import _ConvNd

from seg3dcam.config import ModelSpec
from seg3dcam.errors import ModelError, Seg3dcamWarning, nearest
from seg3dcam.models.base import SegModel
from seg3dcam.models.prepare import build_preparation

#: Networks from here are built without being asked for trust; anything else is foreign code.
TRUSTED = ("monai.networks.nets", "dynamic_network_architectures", "torchvision.models")

#: Where a checkpoint keeps its state dict.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "network_weights", "net", "network")


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
    state = _without_prefix(_read_state(file))
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} is {tuple(state[key].shape)}, the network has {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or reshaped:
        problems = [
            f"{title}: {_some(keys)}"
            for title, keys in [
                ("missing in the file", missing),
                ("unknown to the network", unexpected),
                ("of another shape", reshaped),
            ]
            if keys
        ]
        raise ModelError(
            f"{file.name}: the weights do not fit {spec.factory} as {path.name} builds it. "
            + "; ".join(problems)
        )
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise ModelError(
            f"{file.name}: the weights hold NaN or infinite values, in {_some(broken)}: did the "
            "training diverge? Take an earlier checkpoint"
        )
    module.load_state_dict(state)


def _read_state(file: Path) -> Mapping[str, torch.Tensor]:
    if not file.is_file():
        raise ModelError(f"{file}: no such weights file (paths are relative to the model's YAML)")
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        more = isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(
            error
        )
        reason = "it holds more than tensors, and reading that could run code" if more else error
        first_line = (str(reason).strip().splitlines() or [repr(error)])[0]
        raise ModelError(
            f"{file.name}: cannot be read as weights ({first_line}). Legal are "
            ".safetensors and files that torch.load(weights_only=True) reads: a state dict of "
            "tensors"
        ) from error
    for key in CHECKPOINT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        found = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise ModelError(
            f"{file.name}: no state dict of tensors found. It holds {found}; looked for one under "
            + ", ".join(CHECKPOINT_KEYS)
        )
    return content


def _without_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the prefix that DataParallel or torch.compile puts before every key."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _in_channels(module: nn.Module, spec: ModelSpec) -> int | None:
    given = spec.arguments.get("in_channels")
    if isinstance(given, int):
        return given
    return next((m.in_channels for m in module.modules() if isinstance(m, _ConvNd)), None)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
