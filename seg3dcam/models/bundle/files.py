"""The files of a MONAI bundle, read as plain data without running any of their code.

Content that does not fit the schema is an error that names the file and the key.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ReferenceResolver
from pydantic import BaseModel, ConfigDict, Field

from seg3dcam.errors import ConfigError, ModelError, nearest, some
from seg3dcam.settings import validate

#: The places where a bundle may keep its config for inference.
CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")

#: Keys that a user cannot set, since they are set here: the bundle's values come from another
#: machine.
_OWN_KEYS = {"bundle_root": "the bundle's own folder", "device": "an option of its own, --device"}

#: Most levels and entries in a config. A YAML file can use one list in many places, so that a few
#: lines stand for billions of entries, or for a list that holds itself.
_LEVELS, _ENTRIES = 64, 1_000_000

#: Most lines that are shown of the code in a config, and most characters in each of them.
_LINES, _WIDTH = 12, 200


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


class Data(_Schema):
    """What the metadata say about one input or output."""

    num_channels: int | None = Field(None, ge=1)
    channel_def: dict[str, str] | None = None
    label_def: dict[str, str] | None = None

    @property
    def names(self) -> dict[str, str]:
        """Channel number -> name of the channel."""
        return self.channel_def or self.label_def or {}


class DataFormat(_Schema):
    """What goes into the network and comes out of it."""

    inputs: dict[str, Data] | None = None
    outputs: dict[str, Data] | None = None


class Metadata(_Schema):
    """The part of `configs/metadata.json` that is needed here."""

    version: str | None = None
    monai_version: str | None = None
    network_data_format: DataFormat | None = None

    @property
    def inputs(self) -> Mapping[str, Data]:
        """The network's inputs by their names."""
        return (self.network_data_format and self.network_data_format.inputs) or {}

    @property
    def prediction(self) -> Data:
        """The network's output `pred`."""
        outputs = (self.network_data_format and self.network_data_format.outputs) or {}
        return outputs.get("pred", Data())


class _LargeFile(_Schema):
    path: str


class _LargeFiles(_Schema):
    large_files: list[_LargeFile] | None = None


def config_file(root: Path, given: str | None) -> Path:
    """Return the bundle's config for inference.

    Args:
        given: its path in the bundle's folder, or None for one of the usual places.

    Raises:
        ModelError: there is no such folder, or no such file in it.
    """
    if not root.is_dir():
        raise ModelError(f"{root}: no such folder")
    wanted = [given] if given else CONFIGS
    found = next((root / name for name in wanted if (root / name).is_file()), None)
    if found is None:
        present = sorted(str(file.relative_to(root)) for file in root.glob("configs/*"))
        raise ModelError(
            f"bundle {root.name}: no {' or '.join(wanted)}"
            + (f"; configs holds {', '.join(present)}" if present else ", so it is no MONAI bundle")
        )
    return found


def read_file(file: Path) -> dict[str, Any]:
    """Read a file by MONAI's own parser: it returns plain data and refuses a key given twice."""
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        content = ConfigParser.load_config_file(file)
    except RecursionError as error:
        raise ConfigError(f"{file}: cannot be read as {kind}: it is nested too deep") from error
    except Exception as error:  # the parsers raise anything for a damaged file
        raise ConfigError(f"{file}: cannot be read as {kind}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file}: expected keys and values, a {kind} object; found a {type(content).__name__}"
        )
    check_size(content, str(file))
    return content


def check_size(content: Any, source: str) -> None:
    """Raise ConfigError for a config that is too large or too deeply nested to be a bundle's."""
    waiting, entries = [(content, 0)], 0
    while waiting:
        value, level = waiting.pop()
        entries += 1
        if level > _LEVELS or entries > _ENTRIES:
            raise ConfigError(
                f"{source}: nested more than {_LEVELS} levels deep, or more than {_ENTRIES} "
                "entries; no bundle's config is"
            )
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            waiting += [(entry, level + 1) for entry in inner]


def large_files(root: Path) -> list[str]:
    """Return the paths of the files that a bundle lists for download."""
    for name in ("large_files.yml", "large_files.yaml", "large_files.json"):
        if (root / name).is_file():
            listed = validate(read_file(root / name), _LargeFiles, str(root / name))
            return [entry.path for entry in listed.large_files or []]
    return []


def overridden(content: dict[str, Any], values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return a config with the user's values at their ids, such as `inferer#roi_size`."""
    content = copy.deepcopy(content)
    for identity, value in values.items():
        *path, last = ReferenceResolver.split_id(identity)
        if not path and last in _OWN_KEYS:
            raise ConfigError(f"set {identity}: this is {_OWN_KEYS[last]}; leave it out")
        parent: Any = content
        for number, part in enumerate(path):
            parent = parent[_position(parent, part, identity, path[:number], file)]
        key = _position(parent, last, identity, path, file, new=bool(path))
        parent[key] = copy.deepcopy(value)
    return content


def _position(
    parent: Any, part: str, identity: str, path: Sequence[str], file: str, *, new: bool = False
) -> str | int:
    """Return the key or position that a part of an id names; with `new`, it may be a new key."""
    place = f"{file}: {'#'.join(path)}" if path else file
    if isinstance(parent, dict):
        if part in parent or (new and part):
            return part
        raise ConfigError(f"set {identity}: no {part!r} in {place}: {nearest(part, parent)}")
    if isinstance(parent, list):
        if part.isdecimal() and int(part) < len(parent):
            return int(part)
        raise ConfigError(
            f"set {identity}: no {part!r} in {place}; legal are 0 to {len(parent) - 1}"
        )
    raise ConfigError(
        f"set {identity}: {place} is {parent!r}, which has nothing inside. Set {'#'.join(path)} as "
        "a whole, or the id that it stands for"
    )


def code_in(content: Any) -> str:
    """Return the code that a config would run, in lines of a message.

    Code that does not come from a library is at the beginning.
    """
    expressions: list[str] = []
    foreign: list[str] = []
    known: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            target = value.get("_target_")
            if isinstance(target, str):
                of_libraries = "." not in target or target.startswith(
                    ("monai.", "torch.", "ignite.")
                )
                (known if of_libraries else foreign).append(f"_target_: {target}")
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)
        elif isinstance(value, str) and value.startswith(("$", "%")):
            imports = re.match(r"\$\s*(import|from)\b", value)
            (foreign if imports else expressions).append(value)

    look(content)
    found = [line[:_WIDTH] for line in dict.fromkeys([*foreign, *expressions, *known])]
    return some(found, _LINES, "\n  ") or "nothing that is visible"
