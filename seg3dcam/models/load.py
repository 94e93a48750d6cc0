"""What a user has becomes a `SegModel`: a model's YAML, a MONAI bundle, a nnU-Net folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from seg3dcam.errors import ConfigError
from seg3dcam.models.base import SegModel
from seg3dcam.models.specs import BundleSpec, ExportedSpec, ModelSpec, NnunetSpec
from seg3dcam.settings import read_yaml, validate

#: The key that tells the kind of a spec -> its settings, and the module whose `build` makes the
#: model of them.
SOURCES: dict[str, tuple[type[Any], str]] = {
    "factory": (ModelSpec, "seg3dcam.models.factory"),
    "bundle": (BundleSpec, "seg3dcam.models.bundle.load"),
    "nnunet": (NnunetSpec, "seg3dcam.models.nnunet.load"),
    "exported": (ExportedSpec, "seg3dcam.models.exported"),
}

#: Kinds that need no more settings than a path: `bundle:DIR`, `nnunet:FOLDER`.
SHORT = ("bundle", "nnunet")


def load_model(
    source: str | Path,
    *,
    trust: bool = False,
    overrides: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SegModel:
    """Build a model and load its weights.

    Args:
        source: a model's YAML file, `bundle:DIR` for a MONAI bundle, or `nnunet:FOLDER` for a
            trained nnU-Net v2 folder.
        trust: allow the model's own code to run: a factory that is not in the table of networks, or
            lies beside the YAML, arguments that fetch or read, a bundle's config, an exported
            program, a TorchScript archive that puts its weights together itself, or a nnU-Net
            checkpoint that holds more than tensors.
        overrides: values of a MONAI bundle's config by their ids, as MONAI's own, such as
            `{"inferer#roi_size": [64, 64, 64]}`; they come on top of those of the file (`set`).
        settings: more settings of the source, such as `folds=[0]` of a nnU-Net folder; they
            replace those of the file.

    Raises:
        ConfigError: the settings themselves are wrong.
        ModelError: the network or the weights cannot be used.
        MissingExtraError: the source needs an optional package that is not installed.

    Example:
        >>> load_model("nnunet:no_such_folder", mirroring="sometimes")
        Traceback (most recent call last):
            ...
        seg3dcam.errors.ConfigError: nnunet:no_such_folder:
          mirroring: Input should be a valid boolean, unable to interpret input, got 'sometimes'
    """
    kind, _, place = str(source).partition(":")
    if kind in SHORT and place:
        path, content = Path("model"), {kind: place}
    else:
        path = Path(source)
        content = read_yaml(path)
    given = {**content, **settings}
    kind = _kind(given, path)
    if "inputs" in settings and kind != "bundle":
        raise ConfigError(
            f"{source}: image keys (inputs, --input key=path) are those of a MONAI bundle; give "
            "the scan's files in the order of its channels"
        )
    settings_class, module = SOURCES[kind]
    if overrides:
        _check_overrides(source, kind, overrides)
        given["set"] = {**(given.get("set") or {}), **overrides}
    spec = validate(given, settings_class, Path(source).name)
    build: Callable[[Any, Path, bool], SegModel] = importlib.import_module(module).build
    with torch.device("cpu"):  # whatever the default device: weights and checks are on the CPU
        return build(spec, path, trust)


def _check_overrides(source: str | Path, kind: str, overrides: Mapping[str, Any]) -> None:
    """Raise ConfigError for overrides of what is no bundle, or that are no mapping."""
    if kind != "bundle":
        raise ConfigError(
            f"{source}: values by ids (overrides, --set id=value) are those of a MONAI bundle's "
            "config; change the model's YAML"
        )
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(
            f"overrides {overrides!r}: ids and their values, such as "
            "{'inferer#roi_size': [64, 64, 64]}"
        )


def relative_to(folder: Path, source: str) -> str:
    """Return a source with its path relative to a folder, as in a job file.

    >>> relative_to(Path("jobs"), "nnunet:model"), relative_to(Path("jobs"), "model.yaml")
    ('nnunet:jobs/model', 'jobs/model.yaml')
    """
    kind, _, place = source.partition(":")
    if kind in SHORT and place:
        return f"{kind}:{folder / place}"
    return str(folder / source)


def _kind(given: dict[str, Any], path: Path) -> str:
    """Return the kind of a spec; ConfigError unless exactly one key tells it."""
    kinds = [kind for kind in SOURCES if kind in given]
    if not kinds and "weights" in given:
        return "factory"  # which is then named as missing
    if len(kinds) != 1:
        found = f"it has {' and '.join(kinds)}" if kinds else "it has none"
        raise ConfigError(
            f"{path.name}: a model says where its network comes from by one key of "
            f"{', '.join(SOURCES)}; {found}"
        )
    return kinds[0]
