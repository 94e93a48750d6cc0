"""A MONAI bundle's config: first read as plain data, then, if it is trusted, built.

`read` turns a folder into a `Bundle` without running anything, and says with file and key what does
not fit the schema. Only `Bundle.parse` and the methods that come after it run the config's code.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigParser, ReferenceResolver
from monai.networks import nets
from monai.transforms import Compose
from torch import nn

from seg3dcam.errors import ModelError, Seg3dcamError, Seg3dcamWarning, nearest, tell
from seg3dcam.models.bundle.files import (
    Metadata,
    check_size,
    config_file,
    large_files,
    overridden,
    read_file,
)
from seg3dcam.models.bundle.stand_ins import stand_in
from seg3dcam.settings import validate

#: How to explain the network of a bundle that cannot be read, ready for the end of a message.
IN_PYTHON = "in Python: SegModel(network, prepare=..., window=...)"

#: Arguments that name readers and writers. They are left out, since these may need packages that
#: are not used here: scans are read by `load_scan`, and no transform writes.
_UNUSED = {"LoadImage": ("reader",), "SaveImage": ("writer", "output_ext", "output_format")}

#: Arguments that networks once accepted and that never changed their result.
_RETIRED = {"SwinUNETR": ("img_size",)}

#: Names of a module of numpy in checkpoints, before and since version 2.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")

#: An entry of a config that only refers to another entry.
_REFERENCE = re.compile(r"@\w+((::|#)\w+)*")


def read(root: Path, name: str | None, values: Mapping[str, Any]) -> Bundle:
    """Read a bundle's files as plain data. None of their code runs.

    Args:
        root: the bundle's folder.
        name: the config's path in the folder, or None for the usual one.
        values: the user's own values for the config, by their ids.

    Raises:
        ModelError: the folder is no bundle, or has no such config.
        ConfigError: a file is neither JSON nor YAML, or does not fit the schema.
    """
    config = config_file(root, name)
    content = overridden(read_file(config), values, config.name)
    about = root / "configs" / "metadata.json"
    metadata = read_file(about) if about.is_file() else {}
    return Bundle(
        root=root,
        config=config,
        content=content,
        raw_metadata=metadata,
        metadata=validate(metadata, Metadata, str(about)),
    )


# ---------------------------------------------------------------- the config, trusted


@dataclass
class Bundle:
    """A bundle's config and, once it is trusted and parsed, the objects that it describes.

    Attributes:
        content: the config as plain data, with the user's own values.
        resolved: the same after MONAI has replaced macros (`%`) and relative ids.
        itk: whether the config reads images with ITK.
        readers: the image readers that the config names, as they are written in it.
        modules: the bundle's own Python modules. They are kept apart from those of other bundles,
            which often have the same names.
    """

    root: Path
    config: Path
    content: dict[str, Any]
    raw_metadata: dict[str, Any]
    metadata: Metadata
    resolved: dict[str, Any] = field(default_factory=dict)
    itk: bool = False
    readers: list[Any] = field(default_factory=list)
    modules: dict[str, ModuleType] = field(default_factory=dict)
    _parser: ConfigParser = field(default_factory=ConfigParser)

    @property
    def name(self) -> str:
        """The name of the bundle's folder."""
        return self.root.name

    @property
    def place(self) -> str:
        """The names of the bundle and its config, for the beginning of a message."""
        return f"bundle {self.name}: {self.config.name}"

    def download(self) -> str:
        """Return how to download large files that are missing, ready to end a message."""
        absent = [name for name in large_files(self.root) if not (self.root / name).is_file()]
        if not absent:
            return ""
        return (
            f". large_files.yml lists {', '.join(absent)}: download with python -m monai.bundle "
            f"download_large_files --bundle_path {self.root}"
        )

    @contextmanager
    def own_code(self) -> Iterator[None]:
        """Let the bundle's own packages be imported; `sys.modules` is afterwards as it was."""
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
        """Resolve the config as MONAI does. Objects are built later, when they are asked for."""
        try:
            with _quiet():
                self._parser.set({**copy.deepcopy(self.content), "_meta_": self.raw_metadata})
                self._parser.resolve_macro_and_relative_ids()
        except Exception as error:
            raise ModelError(f"{self.place}: {_root_cause(error)}") from error
        self.resolved = self._parser.get()
        check_size(self.resolved, str(self.config))
        self.resolved.update(bundle_root=str(self.root), device="$torch.device('cpu')")
        self._parser = self._new_parser()

    def _new_parser(self) -> ConfigParser:
        return ConfigParser(self._to_build(copy.deepcopy(self.resolved)))

    def _to_build(self, value: Any) -> Any:
        """Return a config that can be built here: on the CPU, without readers and writers."""
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
                self._note_reader(unused.get("reader"))
        for argument in _RETIRED.get(target, ()):
            if argument in value and argument not in _accepted(target):
                del value[argument]
                tell(
                    f"{self.place}: {target} no longer takes {argument} (MONAI "
                    f"{monai.__version__}), which never changed what it computes: left out"
                )
        return {key: self._to_build(entry) for key, entry in stand_in(value, self.place).items()}

    def _note_reader(self, reader: Any) -> None:
        if isinstance(reader, str) and reader.startswith("@"):
            reader = self.get(self.followed(reader[1:]))
        self.readers.append(reader)
        self.itk |= "itk" in str(reader).lower()

    def get(self, identity: str) -> Any:
        """Return the entry of the resolved config at an id, or None if there is none."""
        value: Any = self.resolved
        for part in ReferenceResolver.split_id(identity):
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return None
        return value

    def followed(self, identity: str) -> str:
        """Return the id to which a chain of plain references (`@id`) leads in the end."""
        seen: set[str] = set()
        while identity not in seen:
            seen.add(identity)
            value = self.get(identity)
            if not isinstance(value, str) or not _REFERENCE.fullmatch(value):
                break
            identity = ReferenceResolver.normalize_id(value[1:])
        return identity

    def evaluator(self) -> dict[str, Any] | None:
        """Return the config's entry for the evaluator that it runs, or None if it has none."""
        found = self.get(self.followed("evaluator"))
        if isinstance(found, str) and found.startswith("$"):
            raise ModelError(
                f"{self.place}: evaluator is an expression, so what it uses is not seen; write it "
                "as _target_: SupervisedEvaluator with its arguments"
            )
        return found if isinstance(found, dict) and "_target_" in found else None

    def used(self, argument: str, name: str | None = None) -> str | None:
        """Return the id of the entry that the evaluator has as an argument, or None.

        Args:
            name: the id to take where the config has no evaluator; by default the argument's name.
        """
        evaluator = self.evaluator()
        if evaluator is None:
            return self.followed(name or argument)
        if evaluator.get(argument) is None:
            return None
        return self.followed(f"{self.followed('evaluator')}::{argument}")

    def again(self) -> Bundle:
        """Return the same bundle with none of its objects built yet."""
        return replace(self, _parser=self._new_parser())

    def check_network(self) -> None:
        """Raise ModelError if the network cannot be built."""
        self._module(self._own_network())

    def network(self) -> nn.Module:
        """Return the network that the evaluator runs, with the weights that it has now."""
        network = self._module(self.used("network") or self._own_network())
        return unwrapped(network)

    def _own_network(self) -> str:
        own = "network_def" if self.get("network_def") is not None else "network"
        return own if self.get(own) is not None else self.used("network") or own

    def _module(self, key: str) -> nn.Module:
        network = self.parsed(key)
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"{self.place}: {key} is a {type(network).__name__}, not a torch.nn.Module"
            )
        return network

    def transforms(self, key: str) -> list[Any]:
        """Return the transforms under a key in their order; none if the key is missing."""
        return self._flat(self.parsed(key)) if self.get(key) is not None else []

    def _flat(self, transform: Any) -> list[Any]:
        """Return the transforms in a Compose or a list, also in those inside it, as one list.

        Only MONAI's own Compose is taken apart: its subclasses choose some of their transforms, or
        change their order.
        """
        self._check_eager(transform)
        if type(transform) is Compose:
            transform = transform.transforms
        if not isinstance(transform, list | tuple):
            return [transform] if transform is not None else []
        return [inner for outer in transform for inner in self._flat(outer)]

    def _check_eager(self, transform: Any) -> None:
        """Raise ModelError for lazy resampling, which joins several steps into one."""
        if getattr(transform, "lazy", False):
            raise ModelError(
                f"{self.place}: {type(transform).__name__} resamples lazily (lazy: true), which "
                "gives other voxels than one transform after the other. Set it to false, such as "
                "--set preprocessing#lazy=false, if the network was trained so; or explain the "
                "network in Python: SegModel(network, prepare=...)"
            )

    def parsed(self, key: str) -> Any:
        """Return the object that the entry under a key of the config describes."""
        if self.get(key) is None:
            known = [str(k) for k in self.resolved if not str(k).startswith("_")]
            raise ModelError(f"{self.place} has no {key}: {nearest(key, known)}")
        try:
            # Building a network draws random weights; the caller's random numbers must not change.
            with torch.random.fork_rng(devices=[]), _quiet(), _arrays_from_files():
                return self._parser.get_parsed_content(key)
        except (Exception, SystemExit) as error:
            cause = _root_cause(error)
            if isinstance(cause, Seg3dcamError):
                raise cause from None
            shown = key.replace("::", "#")
            made = self.metadata.monai_version or "unknown"
            if isinstance(cause, FileNotFoundError):
                raise ModelError(
                    f"{self.place}: {shown} cannot be built: {cause}{self.download()}"
                ) from error
            raise ModelError(
                f"{self.place}: {shown} cannot be built: {cause}{_mend(cause)}. The bundle was "
                f"made with MONAI {made}, {monai.__version__} is installed"
            ) from error


def unwrapped(network: nn.Module) -> nn.Module:
    """Return a network without the wrapper that spreads it over several devices."""
    while isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module
    return network


def _on_cpu(text: str) -> str:
    """Return a text of the config with the CPU in place of any GPU."""
    text = re.sub(r"^cuda(:\d+)?$|(?<=['\"])cuda(:\d+)?(?=['\"])", "cpu", text)
    return re.sub(r"\.cuda\([^()]*\)", ".cpu()", text) if text.startswith("$") else text


def _accepted(network: str) -> list[str]:
    """Return the arguments that a network of MONAI accepts."""
    kind = getattr(nets, network, None)
    return list(inspect.signature(kind).parameters) if isinstance(kind, type) else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence MONAI's warnings, which concern parts that are not used here, but not our own."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for said in caught:
            if issubclass(said.category, Seg3dcamWarning):
                warnings.warn_explicit(said.message, said.category, said.filename, said.lineno)


@contextmanager
def _arrays_from_files() -> Iterator[None]:
    """Let a config's `torch.load` read numpy arrays too. A pickle's code is still refused."""
    rebuild, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    safe: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    for module in _NUMPY:
        safe += [(rebuild, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    with torch.serialization.safe_globals(safe):
        yield


def _root_cause(error: BaseException) -> BaseException:
    """Return the error inside MONAI's own errors, which say only where it happened."""
    wrappers = ("Failed to ", "applying transform")
    while error.__cause__ is not None and str(error).startswith(wrappers):
        error = error.__cause__
    return error


def _mend(cause: BaseException) -> str:
    """Return what to do about an error that is well known, ready to end a message."""
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
