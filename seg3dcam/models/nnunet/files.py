"""The files in a trained nnU-Net v2 folder: found, read and checked against their schemas."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from seg3dcam.errors import ConfigError, ModelError, nearest, tell
from seg3dcam.models.nnunet.schemas import (
    Checkpoint,
    Configuration,
    Dataset,
    OldConfiguration,
    PlannedConfiguration,
    Plans,
)
from seg3dcam.settings import read_json, validate

# ---------------------------------------------------------------- the folder


def check_folder(folder: Path, checkpoint: str) -> None:
    """Raise ModelError unless this looks like a folder in which nnU-Net has trained a model."""
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # such as a name that is too long
        raise ModelError(f"{folder}: cannot be looked at: {error.strerror}") from error
    if not is_folder:
        hint = " is no folder: unzip it first" if folder.is_file() else ": no such folder"
        raise ModelError(f"{folder}{hint}")
    if (folder / "plans.json").is_file() and (folder / "dataset.json").is_file():
        return
    if folder.name.startswith("fold_") and (folder.parent / "plans.json").is_file():
        fold = folder.name.removeprefix("fold_")
        raise ModelError(
            f"{folder} is one fold of a model: give nnunet:{folder.parent}, and folds: [{fold}]"
        )
    inner = sorted(
        str(f.parent) for depth in ("*", "*/*") for f in folder.glob(f"{depth}/plans.json")
    )
    if inner and not (folder / "plans.json").is_file():
        raise ModelError(
            f"{folder} is no trained model, but holds some; name one of them: "
            + ", ".join(f"nnunet:{place}" for place in inner)
        )
    missing = [n for n in ("plans.json", "dataset.json") if not (folder / n).is_file()]
    raise ModelError(
        f"{folder}: {' and '.join(missing)} missing. A trained nnU-Net is a folder such as "
        "Dataset009_Spleen/nnUNetTrainer__nnUNetPlans__3d_fullres, with plans.json, dataset.json "
        f"and fold_0/{checkpoint}"
    )


def folds_of(
    folder: Path, checkpoint: str, folds: Sequence[int | Literal["all"]] | None
) -> dict[int | str, Path]:
    """Return fold -> checkpoint file.

    Args:
        checkpoint: the file's name.
        folds: the folds to take, or None for every fold that has the file.

    Raises:
        ModelError: a fold does not have the file, or no fold has it.
    """
    present: dict[int | str, Path] = {}
    others, strange = set(), []
    for place in sorted(folder.glob("fold_*"), key=lambda place: (len(place.name), place.name)):
        fold = place.name.removeprefix("fold_")
        if not re.fullmatch("0|[1-9][0-9]*|all", fold):
            strange += [place.name] if place.is_dir() else []
            continue
        if (place / checkpoint).is_file():
            present[fold if fold == "all" else int(fold)] = place / checkpoint
        others |= {file.name for file in place.glob("checkpoint_*.pth")}
    if not present:
        hint = f"; there is {', '.join(sorted(others))}: set checkpoint" if others else ""
        raise ModelError(f"{folder}: no fold_*/{checkpoint}{hint}")
    if folds is None:
        if strange:
            tell(f"{folder}: {', '.join(strange)} left out: a fold is fold_ and its number, or all")
        several = len(present) > 1 and "all" in present
        return {k: v for k, v in present.items() if not (several and k == "all")}
    absent = [fold for fold in folds if fold not in present]
    if absent:
        raise ModelError(
            f"{folder}: no {checkpoint} of fold {', '.join(map(str, absent))}; there is one "
            f"of {', '.join(map(str, present))}"
        )
    return {fold: present[fold] for fold in folds}


# ---------------------------------------------------------------- plans.json and dataset.json


def read_dataset(file: Path) -> Dataset:
    """Read and check dataset.json.

    Raises:
        ConfigError: its content is illegal; the message names the keys.
    """
    return validate(read_json(file), Dataset, str(file))


def read_plans(file: Path, name: str) -> tuple[Plans, Configuration]:
    """Read and check plans.json and its configuration of a name.

    Raises:
        ConfigError: its content is illegal; the message names the keys.
        ModelError: it does not have this configuration.
    """
    plans = validate(read_json(file), Plans, str(file))
    if name not in plans.configurations:
        raise ModelError(
            f"{file}: no configuration {name!r}, which the checkpoint was trained with: "
            f"{nearest(name, plans.configurations)}"
        )
    content = _inherited(plans.configurations, name, file)
    kind = PlannedConfiguration if "architecture" in content else OldConfiguration
    return plans, validate(content, kind, f"{file}: configurations.{name}")


def check_channels(
    plans: Plans, configuration: Configuration, dataset: Dataset, file: Path
) -> None:
    """Raise ConfigError unless plans.json says how to normalize every channel."""
    problems = []
    for index in range(len(dataset.channels)):
        known = plans.intensities().get(str(index))
        if known is None:
            problems.append(f"foreground_intensity_properties_per_channel.{index}: missing")
        for key in ("normalization_schemes", "use_mask_for_norm"):
            if index >= len(getattr(configuration, key)):
                problems.append(f"{key}: missing for channel {index}")
        if "CTNormalization" in configuration.normalization_schemes[index : index + 1]:
            problems += [
                f"foreground_intensity_properties_per_channel.{index}.{key}: a finite number is "
                "needed for CTNormalization"
                for key in ("mean", "std", "percentile_00_5", "percentile_99_5")
                if not _is_finite((known or {}).get(key))
            ]
    if problems:
        raise ConfigError(
            f"{file}: dataset.json has {len(dataset.channels)} channel(s):\n  "
            + "\n  ".join(problems[:12])
        )


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _inherited(configurations: dict[str, dict[str, Any]], name: str, file: Path) -> dict[str, Any]:
    """Return a configuration together with the keys that it inherits from others."""
    line: list[str] = []
    merged: dict[str, Any] = {}
    following: Any = name
    while True:
        line.append(following)
        merged = {**configurations[following], **merged}
        if "inherits_from" not in configurations[following]:
            return {key: value for key, value in merged.items() if key != "inherits_from"}
        following = configurations[following]["inherits_from"]
        if following in line or not isinstance(following, str) or following not in configurations:
            raise ConfigError(
                f"{file}: configurations.{line[-1]}.inherits_from: another configuration, and "
                f"none that inherits from this one; got {following!r}"
            )


# ---------------------------------------------------------------- checkpoints


def read_checkpoint(file: Path, trust: bool) -> Checkpoint:
    """Read and check the part of a checkpoint that is needed.

    Raises:
        ModelError: it is damaged or no checkpoint of nnU-Net v2, or it is not trusted and holds
            code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that the file is old
            content = _unpickled(file, trust)
    except ModelError:
        raise
    except Exception as error:  # the unpickler raises anything for a damaged file
        raise ModelError(f"{file}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{file}: no checkpoint of nnU-Net v2: it holds one {type(content).__name__}"
        )
    held = {key: content[key] for key in Checkpoint.model_fields if key in content}
    return validate(held, Checkpoint, f"{file}: no checkpoint of nnU-Net v2", ModelError)


def _unpickled(file: Path, trust: bool) -> Any:
    """Read a checkpoint. Its code runs only with trust, unlike in nnU-Net itself."""
    try:
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if trust:
            return torch.load(file, map_location="cpu", weights_only=False)
        foreign = re.search(r"(?:GLOBAL|class|global) ([\w.]+)", str(error))
        found = f" ({foreign[1]})" if foreign else ""
        raise ModelError(
            f"{file}: it holds more than tensors and numbers{found}, and reading that could run "
            "code. If you know where it comes from, allow it with --trust (trust=True)"
        ) from error


def _numbers() -> list[Any]:
    """Return the names under which numpy's scalars are pickled; nnU-Net saves some in its log."""
    core = getattr(np, "_core", None) or np.core
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    return [core.multiarray.scalar, np.dtype, *dtypes]
