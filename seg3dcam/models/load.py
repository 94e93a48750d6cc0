"""The table of model sources, and `load_model`, which turns any of them into a `SegModel`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from seg3dcam.errors import ConfigError
from seg3dcam.settings import read_yaml, validate

if TYPE_CHECKING:
    from seg3dcam.models.seg_model import SegModel


class Source(NamedTuple):
    """One kind of model.

    Attributes:
        module: the module that reads this kind. It is imported when a model of this kind is loaded,
            and holds two names: `Spec`, the settings that a YAML may give, and
            `build(spec, path, trust)`, which makes the `SegModel`.
        path_is_enough: whether `KIND:PATH` says all that has to be said, so that a user needs no
            YAML file.
    """

    module: str
    path_is_enough: bool = False


#: The key in a model's YAML that tells its kind -> where that kind is read.
SOURCES = {
    "factory": Source("seg3dcam.models.factory"),
    "bundle": Source("seg3dcam.models.bundle.load", path_is_enough=True),
    "nnunet": Source("seg3dcam.models.nnunet.load", path_is_enough=True),
    "exported": Source("seg3dcam.models.exported"),
}


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
        trust: allow the model's own code to run. That is needed for a factory that is not in the
            table of networks or lies beside the YAML, for arguments that download or read files,
            for a bundle's config, for an exported program, for a TorchScript archive whose weights
            only its own code can put together, and for an nnU-Net checkpoint that holds more than
            tensors.
        overrides: values for a MONAI bundle's config by their ids, as in MONAI itself, such as
            `{"inferer#roi_size": [64, 64, 64]}`. They win over those in the file (`set`).
        settings: more settings of the source, such as `folds=[0]` of an nnU-Net folder. They
            replace those in the file.

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
    import torch

    content, path = _content(source)
    given = {**content, **settings}
    kind = _kind(given, path)
    if "inputs" in settings and kind != "bundle":
        raise ConfigError(
            f"{source}: image keys (inputs, --input key=path) are those of a MONAI bundle; give "
            "the scan's files in the order of its channels"
        )
    if overrides:
        _check_overrides(source, kind, overrides)
        given["set"] = {**(given.get("set") or {}), **overrides}
    module = importlib.import_module(SOURCES[kind].module)
    spec = validate(given, module.Spec, Path(source).name)
    with torch.device("cpu"):  # weights and checks are on the CPU, whatever the default device is
        model: SegModel = module.build(spec, path, trust)
    # A source whose YAML has no such key has none.
    temperature = getattr(spec, "temperature", None) or 1.0
    return replace(model, recommended=recommended_beside(source), temperature=temperature)


def recommended_beside(source: str | Path) -> Path:
    """Return the file beside a model in which a layer and a method are recommended for it.

    >>> recommended_beside("models/liver.yaml").as_posix()
    'models/liver.recommended.json'
    >>> recommended_beside("nnunet:liver/fold").as_posix()
    'liver/fold/recommended.json'
    """
    kind, place = _kind_and_place(str(source))
    if kind:
        return Path(place) / "recommended.json"
    return Path(source).with_suffix(".recommended.json")


def relative_to(folder: Path, source: str) -> str:
    """Return a source whose path is relative to a folder, such as the folder of a job file.

    >>> relative_to(Path("jobs"), "nnunet:model"), relative_to(Path("jobs"), "model.yaml")
    ('nnunet:jobs/model', 'jobs/model.yaml')
    """
    kind, place = _kind_and_place(source)
    return f"{kind}:{folder / place}" if kind else str(folder / source)


def _kind_and_place(source: str) -> tuple[str | None, str]:
    """Split `KIND:PATH`; the kind is None where the source is the path of a YAML file."""
    kind, _, place = source.partition(":")
    if kind in SOURCES and SOURCES[kind].path_is_enough and place:
        return kind, place
    return None, source


def _content(source: str | Path) -> tuple[dict[str, Any], Path]:
    """Return a source's settings, and the file to which paths in them are relative."""
    kind, place = _kind_and_place(str(source))
    if kind:
        return {kind: place}, Path("model")
    return read_yaml(source), Path(source)


def _check_overrides(source: str | Path, kind: str, overrides: Mapping[str, Any]) -> None:
    """Raise ConfigError unless overrides are a mapping and the model is a bundle."""
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


def _kind(given: Mapping[str, Any], path: Path) -> str:
    """Return the kind of a model; ConfigError unless exactly one key tells it."""
    kinds = [kind for kind in SOURCES if kind in given]
    if not kinds and "weights" in given:
        return "factory"  # so that the next error names the factory as missing
    if len(kinds) != 1:
        found = f"it has {' and '.join(kinds)}" if kinds else "it has none"
        raise ConfigError(
            f"{path.name}: a model says where its network comes from by one key of "
            f"{', '.join(SOURCES)}; {found}"
        )
    return kinds[0]
