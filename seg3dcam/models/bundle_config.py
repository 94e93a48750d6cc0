"""What a MONAI bundle's files say: read as plain data first, then, with trust, built.

`read` turns a folder into a `Bundle` without running anything. What lies outside of the schema is
said there, with file and key. Only `Bundle.parse` and what follows it run the config's own code.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigParser, ReferenceResolver
from monai.networks import nets
from monai.transforms import Compose
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from seg3dcam.config import BundleSpec, validate
from seg3dcam.errors import ConfigError, ModelError, nearest, tell

#: Where a bundle keeps its config for inference.
CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")

#: Keys that are set here: what the bundle says of its place and device is of another machine.
_OWN_KEYS = {"bundle_root": "the bundle's own folder", "device": "an option of its own, --device"}

#: Levels and entries of a config, at most. A file can name one list in many places, so that a few
#: lines stand for billions of entries, or for one that holds itself.
_LEVELS, _ENTRIES = 64, 1_000_000

#: How the code that a config names is shown, at most: lines, and characters of each.
_LINES, _WIDTH = 12, 200

#: Arguments of readers and writers. They may want packages that nothing here needs: scans are
#: read by `load_scan`, and no transform writes.
_UNUSED = {"LoadImage": ("reader",), "SaveImage": ("writer", "output_ext", "output_format")}

#: Arguments that networks once took and that never changed what they compute.
_RETIRED = {"SwinUNETR": ("img_size",)}

#: Names of numpy before and after version 2, as they are written in checkpoints.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


class Data(_Schema):
    """What the metadata say of one input or output."""

    num_channels: int | None = Field(None, ge=1)
    channel_def: dict[str, str] | None = None
    label_def: dict[str, str] | None = None

    @property
    def names(self) -> dict[str, str]:
        """The channels' names by their numbers."""
        return self.channel_def or self.label_def or {}


class DataFormat(_Schema):
    """What goes into the network and comes out of it."""

    inputs: dict[str, Data] | None = None
    outputs: dict[str, Data] | None = None


class Metadata(_Schema):
    """What is needed of `configs/metadata.json`."""

    version: str | None = None
    monai_version: str | None = None
    network_data_format: DataFormat | None = None

    @property
    def inputs(self) -> Mapping[str, Data]:
        """What goes into the network."""
        return (self.network_data_format and self.network_data_format.inputs) or {}

    @property
    def prediction(self) -> Data:
        """What comes out of the network."""
        outputs = (self.network_data_format and self.network_data_format.outputs) or {}
        return outputs.get("pred", Data())


class _LargeFile(_Schema):
    path: str


class _LargeFiles(_Schema):
    large_files: list[_LargeFile] | None = None


def read(root: Path, spec: BundleSpec) -> Bundle:
    """Read a bundle's files as plain data; nothing of it runs.

    Raises:
        ModelError: no bundle, or no config in it.
        ConfigError: a file that is no JSON or YAML, or a key outside of the schema.
    """
    config = _config_file(root, spec)
    content = _overridden(_read_file(config), spec.set, config.name)
    about = root / "configs" / "metadata.json"
    metadata = _read_file(about) if about.is_file() else {}
    return Bundle(
        root=root,
        config=config,
        content=content,
        raw_metadata=metadata,
        metadata=validate(metadata, Metadata, str(about)),
    )


# ---------------------------------------------------------------- files


def _config_file(root: Path, spec: BundleSpec) -> Path:
    if not root.is_dir():
        raise ModelError(f"{root}: no such folder")
    wanted = [spec.config] if spec.config else CONFIGS
    found = next((root / name for name in wanted if (root / name).is_file()), None)
    if found is None:
        present = sorted(str(file.relative_to(root)) for file in root.glob("configs/*"))
        raise ModelError(
            f"bundle {root.name}: no {' or '.join(wanted)}"
            + (f"; configs holds {', '.join(present)}" if present else ", so it is no MONAI bundle")
        )
    return found


def _read_file(file: Path) -> dict[str, Any]:
    """Read a file as MONAI reads it: as plain data, and no key twice."""
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        content = ConfigParser.load_config_file(file)
    except RecursionError as error:
        raise ConfigError(f"{file}: cannot be read as {kind}: it is nested too deep") from error
    except Exception as error:  # whatever the two parsers make of a damaged file
        raise ConfigError(f"{file}: cannot be read as {kind}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file}: expected keys and values, a {kind} object; found a {type(content).__name__}"
        )
    _check_size(content, str(file))
    return content


def _check_size(content: Any, source: str) -> None:
    """Raise ConfigError for a config that is nested too deep or too large to be a bundle's."""
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
    """Return the files that a bundle lists to be downloaded."""
    for name in ("large_files.yml", "large_files.yaml", "large_files.json"):
        if (root / name).is_file():
            listed = validate(_read_file(root / name), _LargeFiles, str(root / name))
            return [entry.path for entry in listed.large_files or []]
    return []


def _overridden(content: dict[str, Any], values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return a config with the user's own values, each at its id, such as `inferer#roi_size`."""
    content = copy.deepcopy(content)
    for identity, value in values.items():
        *path, last = ReferenceResolver.split_id(identity)
        if not path and last in _OWN_KEYS:
            raise ConfigError(f"set {identity}: this is {_OWN_KEYS[last]}; leave it out")
        parent: Any = content
        for number, part in enumerate(path):
            parent = parent[_key(parent, part, identity, path[:number], file)]
        key = _key(parent, last, identity, path, file, new=bool(path))
        parent[key] = copy.deepcopy(value)
    return content


def _key(
    parent: Any, part: str, identity: str, path: Sequence[str], file: str, *, new: bool = False
) -> str | int:
    """Return the key or position that a part of an id names; `new`: it may be a new key."""
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


def code_in(content: Any) -> list[str]:
    """List the code that a config would run, what comes from elsewhere first."""
    expressions: list[str] = []
    foreign: list[str] = []
    known: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            target = value.get("_target_")
            if isinstance(target, str):
                ours = "." not in target or target.startswith(("monai.", "torch.", "ignite."))
                (known if ours else foreign).append(f"_target_: {target}")
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
    more = len(found) - _LINES
    return [*found[:_LINES], *([f"and {more} more"] if more > 0 else [])]


# ---------------------------------------------------------------- the config, trusted


class Engine:
    """Stands for the evaluators and trainers of a config, which are not built."""

    def __init__(self, network: Any = None, **unused: Any) -> None:
        self.network = network


class Loader:
    """Stands for a CheckpointLoader of a config: it notes that it is called, and loads nothing."""

    def __init__(
        self, load_path: Any = None, load_dict: Any = None, strict: Any = True, **unused: Any
    ) -> None:
        self.load_path = load_path
        self.load_dict = load_dict
        self.strict = bool(strict)
        self.called = False

    def __call__(self, engine: Any = None) -> None:
        self.called = True

    attach = __call__


@dataclass
class Bundle:
    """A bundle's config and, once it is trusted and parsed, what it stands for.

    Attributes:
        content: the config as plain data, with the user's own values.
        resolved: the same after MONAI has put in what macros (`%`) and relative ids stand for.
        itk: whether the config reads images with ITK.
        modules: the bundle's own Python modules, kept apart from those of other bundles, which
            mostly have the same names.
    """

    root: Path
    config: Path
    content: dict[str, Any]
    raw_metadata: dict[str, Any]
    metadata: Metadata
    resolved: dict[str, Any] = field(default_factory=dict)
    itk: bool = False
    modules: dict[str, ModuleType] = field(default_factory=dict)
    _parser: ConfigParser = field(default_factory=ConfigParser)

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def place(self) -> str:
        """The bundle and its config, as messages begin."""
        return f"bundle {self.name}: {self.config.name}"

    def download(self) -> str:
        """Return how to get the large files that are missing, ready to end a message."""
        absent = [name for name in large_files(self.root) if not (self.root / name).is_file()]
        if not absent:
            return ""
        return (
            f". large_files.yml lists {', '.join(absent)}: download with python -m monai.bundle "
            f"download_large_files --bundle_path {self.root}"
        )

    @contextmanager
    def own_code(self) -> Iterator[None]:
        """Let the bundle's own packages be imported; afterwards nothing of them is to be seen."""
        names = {p.stem for p in self.root.iterdir() if p.is_dir() or p.suffix == ".py"}

        def taken() -> dict[str, ModuleType]:
            found = [name for name in sys.modules if name.partition(".")[0] in names]
            return {name: sys.modules.pop(name) for name in found}

        others = taken()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.root))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            self.modules = taken()
            sys.modules.update(others)
            sys.path.remove(str(self.root))

    def parse(self) -> None:
        """Resolve the config as MONAI does; only what is asked for later is built."""
        try:
            with _quiet():
                self._parser.set({**copy.deepcopy(self.content), "_meta_": self.raw_metadata})
                self._parser.resolve_macro_and_relative_ids()
        except Exception as error:
            raise ModelError(f"{self.place}: {_root_cause(error)}") from error
        self.resolved = self._parser.get()
        _check_size(self.resolved, str(self.config))
        self.resolved.update(bundle_root=str(self.root), device="$torch.device('cpu')")
        self._parser = self._new_parser()

    def _new_parser(self) -> ConfigParser:
        return ConfigParser(self._to_build(copy.deepcopy(self.resolved)))

    def _to_build(self, value: Any) -> Any:
        """Return a config that builds here: on the CPU, without readers, writers and engines."""
        if isinstance(value, list):
            return [self._to_build(entry) for entry in value]
        if isinstance(value, str):
            return _on_cpu(value)
        if not isinstance(value, dict):
            return value
        target = str(value.get("_target_", "")).rpartition(".")[2]
        if value.get("_mode_") == "debug" or value.get("_debug_"):
            raise ModelError(f"{self.place}: {target} opens a debugger (_mode_: debug): remove it")
        for start, arguments in _UNUSED.items():
            if target.startswith(start):
                unused = {name: value.pop(name) for name in arguments if name in value}
                self.itk |= "itk" in self._text(unused.get("reader")).lower()
        for argument in _RETIRED.get(target, ()):
            if argument in value and argument not in _accepted(target):
                del value[argument]
                tell(
                    f"{self.place}: {target} no longer takes {argument} (MONAI "
                    f"{monai.__version__}), which never changed what it computes: left out"
                )
        if target.endswith(("Evaluator", "Trainer")):
            value = {"_target_": Engine, **_of_engine(value)}
        if is_loader(value):
            value = {**value, "_target_": Loader}
        return {key: self._to_build(entry) for key, entry in value.items()}

    def _text(self, value: Any) -> str:
        """Return a value as text; a reference as what it refers to."""
        if isinstance(value, str) and value.startswith("@"):
            value = self.get(value[1:])
        return str(value)

    def get(self, identity: str) -> Any:
        """Return what the resolved config says at an id, None where nothing is there."""
        value: Any = self.resolved
        for part in ReferenceResolver.split_id(identity):
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return None
        return value

    def fresh_network(self) -> nn.Module:
        """Return the network once more, built anew."""
        return self._network_of(self._new_parser())

    def network(self) -> nn.Module:
        """Return the network, as the config builds it before any weights are loaded."""
        return self._network_of(self._parser)

    def _network_of(self, parser: ConfigParser) -> nn.Module:
        key = "network_def" if self.get("network_def") is not None else "network"
        network = self._content(key, parser)
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"{self.place}: {key} is a {type(network).__name__}, not a torch.nn.Module"
            )
        return network

    def transforms(self, key: str) -> list[Any]:
        """Return the transforms of a key, one after the other; none where the key is missing."""
        return _flat(self.parsed(key)) if self.get(key) is not None else []

    def parsed(self, key: str) -> Any:
        """Return what a key of the config stands for."""
        return self._content(key, self._parser)

    def _content(self, key: str, parser: ConfigParser) -> Any:
        if self.get(key) is None:
            known = [str(k) for k in self.resolved if not str(k).startswith("_")]
            raise ModelError(f"{self.place} has no {key}: {nearest(key, known)}")
        try:
            # The random numbers of a network's first weights are nobody else's.
            with torch.random.fork_rng(devices=[]), _quiet(), _arrays_from_files():
                return parser.get_parsed_content(key)
        except (Exception, SystemExit) as error:
            cause = _root_cause(error)
            made = self.metadata.monai_version or "unknown"
            if isinstance(cause, FileNotFoundError):
                raise ModelError(
                    f"{self.place}: {key} cannot be built: {cause}{self.download()}"
                ) from error
            raise ModelError(
                f"{self.place}: {key} cannot be built: {cause}{_mend(cause)}. The bundle was made "
                f"with MONAI {made}, {monai.__version__} is installed"
            ) from error


def is_loader(value: Any) -> bool:
    """Tell whether a config's value is a CheckpointLoader."""
    return isinstance(value, dict) and str(value.get("_target_")).endswith("CheckpointLoader")


def _of_engine(value: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's network, and what it loads at the places where it stood."""
    lists = {key: entries for key, entries in value.items() if isinstance(entries, list)}
    loaders = {
        key: [entry if is_loader(entry) else None for entry in entries]
        for key, entries in lists.items()
    }
    return {**loaders, **{key: entry for key, entry in value.items() if key == "network"}}


def _on_cpu(text: str) -> str:
    """Return an entry that builds on the CPU, also where it names a GPU."""
    text = re.sub(r"^cuda(:\d+)?$|(?<=['\"])cuda(:\d+)?(?=['\"])", "cpu", text)
    return re.sub(r"\.cuda\([^()]*\)", ".cpu()", text) if text.startswith("$") else text


def _accepted(network: str) -> list[str]:
    """Return the arguments of a network of MONAI."""
    kind = getattr(nets, network, None)
    return list(inspect.signature(kind).parameters) if isinstance(kind, type) else []


def _flat(transform: Any) -> list[Any]:
    """Return the transforms of a Compose, of one in it, or of a list."""
    if isinstance(transform, Compose):
        transform = transform.transforms
    if not isinstance(transform, list | tuple):
        return [transform] if transform is not None else []
    return [inner for outer in transform for inner in _flat(outer)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence MONAI's warnings, which are of what is not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _arrays_from_files() -> Iterator[None]:
    """Let a config's `torch.load` read numpy arrays too; what would run code is still refused."""
    rebuild, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    safe: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    for module in _NUMPY:
        safe += [(rebuild, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    with torch.serialization.safe_globals(safe):
        yield


def _root_cause(error: BaseException) -> BaseException:
    """Return the error that MONAI wraps into others, which say only where it happened."""
    wrappers = ("Failed to ", "applying transform")
    while error.__cause__ is not None and str(error).startswith(wrappers):
        error = error.__cause__
    return error


def _mend(cause: BaseException) -> str:
    """Return what to do about a known cause, ready to end a message."""
    text = str(cause)
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if unknown:
        taken = _accepted(unknown[1])
        hint = f"; {nearest(unknown[2], taken)}" if taken else ""
        return f". Remove or rename {unknown[2]} in the config{hint}"
    if "weights_only" in text.lower() or "Weights only load failed" in text:
        return (
            ". The file holds more than tensors and arrays, and reading it could run code. If you "
            "know it, write torch.load(..., weights_only=False) in the config"
        )
    return ""
