"""Models from a Python factory, its weights, and how it is used."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from seg3dcam.errors import ModelError, Seg3dcamWarning, nearest
from seg3dcam.files import digest_of_all
from seg3dcam.models.base import SegModel
from seg3dcam.models.beside import modules_beside
from seg3dcam.models.networks import check_arguments, imported, network_class
from seg3dcam.models.prepare import build_preparation
from seg3dcam.models.specs import ModelSpec
from seg3dcam.models.state import check_finite, check_fit, read_state, without_prefix


def build(spec: ModelSpec, path: Path, trust: bool) -> SegModel:
    """Build the network of a spec and load its weights.

    Args:
        path: the file that holds the spec; weights are relative to it.
        trust: allow any factory, also from a module beside the file, with any arguments: importing
            and calling it runs its code. Without it, `networks` tells what may be built.

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
        window=spec.window.plan() if spec.window else None,
        output=spec.output,
        in_channels=_in_channels(module, spec),
        name=f"{spec.factory} ({path.stem})",
        spec={
            **spec.model_dump(mode="json", exclude={"weights"}, exclude_none=True),
            **({"code_sha256": digest_of_all(code)} if code else {}),
        },
    )


def _build(spec: ModelSpec, path: Path, trust: bool) -> tuple[nn.Module, list[Path]]:
    """Return the network, and the files of the user's own code that made it."""
    if not trust:
        network = network_class(spec.factory, path.name)
        check_arguments(network, spec.arguments, path.name)
        return _called(network, spec, path), []
    with modules_beside(path.parent) as code:
        factory = _factory(spec, path)
        module = _called(factory, spec, path)
        own = getattr(sys.modules.get(spec.factory.split(":")[0]), "__file__", None)
    return module, sorted({*code, *([Path(own)] if own else [])})


def _factory(spec: ModelSpec, path: Path) -> Any:
    """Return whatever a trusted spec names, from beside its file or from what is installed."""
    place, name = spec.factory.split(":")
    factory = imported(place, f"{path.name}: factory {spec.factory}")
    for part in name.split("."):
        if not hasattr(factory, part):
            known = [n for n in dir(factory) if isinstance(getattr(factory, n, None), type)]
            raise ModelError(f"{path.name}: no {part!r} in {place}: {nearest(part, known)}")
        factory = getattr(factory, part)
    return factory


def _called(factory: Any, spec: ModelSpec, path: Path) -> nn.Module:
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


def _load_weights(module: nn.Module, spec: ModelSpec, path: Path, trust: bool) -> None:
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


def _in_channels(module: nn.Module, spec: ModelSpec) -> int | None:
    given = spec.arguments.get("in_channels")
    if isinstance(given, int):
        return given
    return next((m.in_channels for m in module.modules() if isinstance(m, _ConvNd)), None)
