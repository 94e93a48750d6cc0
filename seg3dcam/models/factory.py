"""A model from a Python factory, that is a class or function that returns the network."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from torch import nn

from seg3dcam.errors import ModelError, Seg3dcamWarning, nearest
from seg3dcam.files import digest_of_all
from seg3dcam.models.local_modules import local_modules
from seg3dcam.models.networks import check_arguments, imported, network_class
from seg3dcam.models.preparation import build_preparation
from seg3dcam.models.seg_model import SegModel, channels_taken
from seg3dcam.models.specs import NetworkUse
from seg3dcam.models.weights import check_finite, check_fit, read_state, without_prefix


class Spec(NetworkUse):
    """A network made by a Python factory, with its weights and how it is used."""

    factory: str = Field(pattern=r"^\w+(\.\w+)*:\w+(\.\w+)*$", description="package.module:Class")
    arguments: dict[str, Any] = Field({})
    weights: str = Field(description=".safetensors, a PyTorch state dict, or 'random'")

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: list[str]) -> list[str]:
        twice = sorted({name for name in classes if classes.count(name) > 1})
        if twice:
            raise ValueError(f"every class needs a name of its own; {twice} is there twice")
        return classes


def build(spec: Spec, path: Path, trust: bool) -> SegModel:
    """Build the network and load its weights.

    Args:
        path: the file that holds the spec; the weights' path is relative to it.
        trust: allow any factory with any arguments, also one from a module beside the file.
            Importing and calling it runs its code. Without trust only the networks listed in
            `seg3dcam.models.networks` are built.

    Raises:
        ModelError: the factory or the weights cannot be used.
    """
    module, code = _build(spec, path, trust)
    _load_weights(module, spec, path, trust)
    return SegModel(
        module=module.eval(),
        class_names=tuple(spec.classes),
        activation=spec.activation,
        prepare=build_preparation(spec.prepare),
        window=spec.window_plan(),
        output=spec.output,
        in_channels=_in_channels(module, spec),
        name=f"{spec.factory} ({path.stem})",
        spec={
            **spec.model_dump(mode="json", exclude={"weights", "temperature"}, exclude_none=True),
            **({"code_sha256": digest_of_all(code)} if code else {}),
        },
    )


def _build(spec: Spec, path: Path, trust: bool) -> tuple[nn.Module, list[Path]]:
    """Return the network, and the files of the user's own code that took part in making it."""
    if not trust:
        network = network_class(spec.factory, path.name)
        check_arguments(network, spec.arguments, path.name)
        return _called(network, spec, path), []
    with local_modules(path.parent) as code:
        factory = _factory(spec, path)
        module = _called(factory, spec, path)
        own = getattr(sys.modules.get(spec.factory.split(":")[0]), "__file__", None)
    return module, sorted({*code, *([Path(own)] if own else [])})


def _factory(spec: Spec, path: Path) -> Any:
    """Return what a trusted spec names; it lies beside the file or in an installed package."""
    place, name = spec.factory.split(":")
    factory = imported(place, f"{path.name}: factory {spec.factory}")
    for part in name.split("."):
        if not hasattr(factory, part):
            known = [n for n in dir(factory) if isinstance(getattr(factory, n, None), type)]
            raise ModelError(f"{path.name}: no {part!r} in {place}: {nearest(part, known)}")
        factory = getattr(factory, part)
    return factory


def _called(factory: Any, spec: Spec, path: Path) -> nn.Module:
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


def _load_weights(module: nn.Module, spec: Spec, path: Path, trust: bool) -> None:
    if spec.weights == "random":
        warnings.warn(
            f"{path.name}: the network has random weights, as asked; its maps mean nothing",
            Seg3dcamWarning,
            stacklevel=4,
        )
        return
    file = path.parent / spec.weights
    state = without_prefix(read_state(file, trust=trust))
    check_fit(module, state, file.name, f"{spec.factory} as {path.name} builds it")
    check_finite(state, file.name)
    module.load_state_dict(state)


def _in_channels(module: nn.Module, spec: Spec) -> int | None:
    given = spec.arguments.get("in_channels")
    if isinstance(given, int):
        return given
    return channels_taken(module)
