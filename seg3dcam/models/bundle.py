"""A MONAI bundle as a model: network, preparation, inferer and names from its own config.

Only what is needed is built of a bundle's config: neither its dataset nor its engine. A config may
run any code, so nothing of it is evaluated, and nothing of the bundle imported, without trust.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from monai.inferers.inferer import SlidingWindowInfererAdapt
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    RandomizableTrait,
    apply_transform,
)
from monai.transforms.utility.array import Lambda
from monai.transforms.utility.dictionary import Lambdad
from torch import nn
from torch.nn.modules.conv import _ConvNd

from seg3dcam.config import BundleSpec, read_json, read_yaml
from seg3dcam.errors import ConfigError, ModelError, ScanError, Seg3dcamWarning, nearest
from seg3dcam.models.base import SegModel
from seg3dcam.models.state import check_finite, check_fit, read_state, without_prefix
from seg3dcam.scan import Scan
from seg3dcam.targets import Activation
from seg3dcam.windows import WindowPlan

#: Where a bundle keeps its config for inference.
CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")

#: Where a bundle keeps its weights, where its config does not say.
WEIGHTS = ("models/model.pt", "models/model.safetensors", "models/model.ts")

#: How the code that a config names is shown, at most.
_SHOWN = 12


def build(spec: BundleSpec, path: Path, trust: bool) -> SegModel:
    """Read a bundle.

    Args:
        path: the folder of the spec is relative to this file.
        trust: allow the bundle's config and its `scripts` to run code.

    Raises:
        ModelError: a file or key is missing, damaged or of a kind that cannot be explained.
        ConfigError: a file that is no JSON or YAML, image keys that the bundle does not read.
    """
    root = (path.parent / spec.bundle).resolve()
    config = _config_file(root, spec)
    content = _read(config)
    if not trust:
        raise ModelError(
            f"bundle {root.name}: {config.name} runs code when it is read. It would run\n  "
            + "\n  ".join(_code_in(content) or ["nothing that is visible"])
            + "\nIf you know the bundle, allow it with --trust (trust=True)"
        )
    bundle = _Bundle(root, config, _metadata(root))
    with bundle.own_code():
        bundle.read()
        return _model(bundle, content, spec)


def _model(bundle: _Bundle, content: Mapping[str, Any], spec: BundleSpec) -> SegModel:
    network = _network(bundle, content)
    window = _window(bundle)
    activation = _activation(bundle)
    keys = _image_keys(bundle, spec.inputs)
    names = tuple(spec.classes) if spec.classes else _class_names(bundle.metadata)
    inverts = any(isinstance(t, Invertd) for t in bundle.postprocessing)
    inputs = _format(bundle.metadata, "inputs").get("image", {})
    first = next((m.in_channels for m in network.modules() if isinstance(m, _ConvNd)), None)
    return SegModel(
        module=network.float().eval(),
        class_names=names,
        activation=activation,
        prepare=lambda scan: _prepare(bundle, keys, scan),
        restore=_restorer(bundle, activation) if inverts else None,
        window=window,
        in_channels=inputs.get("num_channels") or first,
        name=f"bundle {bundle.name} {bundle.metadata.get('version', '')}".strip(),
        spec={
            "bundle": bundle.name,
            "version": bundle.metadata.get("version"),
            "monai_version": bundle.metadata.get("monai_version"),
            "config": bundle.config.name,
            "inputs": list(keys),
        },
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


def _read(file: Path) -> dict[str, Any]:
    """Read a config as plain data."""
    return read_json(file) if file.suffix == ".json" else read_yaml(file)


def _metadata(root: Path) -> dict[str, Any]:
    file = root / "configs" / "metadata.json"
    return _read(file) if file.is_file() else {}


def _format(metadata: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return what the metadata say of the network's inputs or outputs."""
    found = (metadata.get("network_data_format") or {}).get(side) or {}
    return found if isinstance(found, dict) else {}


def _code_in(content: Any) -> list[str]:
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
    found = list(dict.fromkeys([*foreign, *expressions, *known]))
    more = len(found) - _SHOWN
    return [*found[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]


# ---------------------------------------------------------------- the config, trusted


@dataclass
class _Bundle:
    """A trusted bundle: what was built of its config, and the code of its own.

    Attributes:
        modules: the bundle's own Python modules, kept apart from those of other bundles, which
            mostly have the same names.
    """

    root: Path
    config: Path
    metadata: dict[str, Any]
    network: nn.Module = field(default_factory=nn.Identity)
    preprocessing: list[Any] = field(default_factory=list)
    postprocessing: list[Any] = field(default_factory=list)
    inferer: Any = None
    modules: dict[str, ModuleType] = field(default_factory=dict)
    _parser: ConfigParser = field(default_factory=ConfigParser)

    @property
    def name(self) -> str:
        return self.root.name

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

    def read(self) -> None:
        """Build what is needed of the config."""
        try:
            self._parser.read_config(str(self.config))
            self._parser.read_meta(self.metadata)
        except Exception as error:
            raise ModelError(f"bundle {self.name}: {self.config.name}: {error}") from error
        self._parser.set(_on_cpu(self._parser.get()))
        self._parser.update({"bundle_root": str(self.root), "device": "$torch.device('cpu')"})
        self.network = self.fresh_network()
        self.inferer = self.parsed("inferer")
        self.preprocessing = _flat(self.parsed("preprocessing"))
        present = self._parser.get("postprocessing") is not None
        self.postprocessing = _flat(self.parsed("postprocessing")) if present else []

    def fresh_network(self) -> nn.Module:
        key = "network_def" if self._parser.get("network_def") is not None else "network"
        network = self.parsed(key, fresh=True)
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"bundle {self.name}: {self.config.name}: {key} is a {type(network).__name__}, not "
                "a torch.nn.Module"
            )
        return network

    def parsed(self, key: str, *, fresh: bool = False) -> Any:
        """Return what a key of the config stands for."""
        if self._parser.get(key) is None:
            raise ModelError(
                f"bundle {self.name}: {self.config.name} has no {key}: "
                + nearest(key, [k for k in self._parser.get() if not k.startswith("_")])
            )
        if fresh:
            self._parser.parse(True)
        try:
            # The random numbers of a network's first weights are nobody else's; warnings are of
            # readers that are not used.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._parser.get_parsed_content(key)
        except Exception as error:
            cause = error.__cause__ or error
            made = self.metadata.get("monai_version", "unknown")
            raise ModelError(
                f"bundle {self.name}: {self.config.name}: {key} cannot be built: {cause}. The "
                f"bundle was made with MONAI {made}, {monai.__version__} is installed"
            ) from error


def _on_cpu(config: Any) -> Any:
    """Return a config that builds on the CPU, also where it names a GPU."""
    if isinstance(config, dict):
        return {key: _on_cpu(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_on_cpu(value) for value in config]
    if not isinstance(config, str):
        return config
    config = re.sub(r"^cuda(:\d+)?$|(?<=['\"])cuda(:\d+)?(?=['\"])", "cpu", config)
    return re.sub(r"\.cuda\([^()]*\)", ".cpu()", config) if config.startswith("$") else config


def _flat(transform: Any) -> list[Any]:
    """Return the transforms of a Compose, of one in it, or of a list."""
    if isinstance(transform, Compose):
        transform = transform.transforms
    if not isinstance(transform, list | tuple):
        return [transform]
    return [inner for outer in transform for inner in _flat(outer)]


# ---------------------------------------------------------------- weights


def _network(bundle: _Bundle, content: Mapping[str, Any]) -> nn.Module:
    """Return the network with its weights; never a random one."""
    network = bundle.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    place, key = _checkpoint(bundle, content)
    if place is None:
        if _loads_itself(bundle):
            return network
        place = next((bundle.root / n for n in WEIGHTS if (bundle.root / n).is_file()), None)
    if place is None:
        listed = _large_files(bundle.root)
        raise ModelError(
            f"bundle {bundle.name}: no weights. {bundle.config.name} has no CheckpointLoader in "
            f"handlers, and there is no {' or '.join(WEIGHTS)}" + _download(bundle, listed)
        )
    state = _state(bundle, place, key)
    name = f"bundle {bundle.name}: {place.name}"
    check_fit(network, state, name, f"the network of {bundle.config.name}")
    check_finite(state, name)
    network.load_state_dict(state)
    after = network.state_dict()
    if all(torch.equal(value, after[key]) for key, value in before.items()):
        raise ModelError(
            f"{name}: these weights are the ones that the network has before any are loaded: the "
            "file holds an untrained network"
        )
    return network


def _checkpoint(bundle: _Bundle, content: Mapping[str, Any]) -> tuple[Path | None, str | None]:
    """Return the file that the config's CheckpointLoader loads, and the network's key in it."""
    handlers = content.get("handlers")
    listed = handlers.get("handlers") if isinstance(handlers, dict) else handlers
    for number, handler in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(handler, dict):
            continue
        if str(handler.get("_target_", "")).rpartition(".")[2] != "CheckpointLoader":
            continue
        place = bundle.parsed(f"handlers#{number}#load_path")
        of_network = [
            key
            for key, value in dict(handler.get("load_dict") or {}).items()
            if re.match(r"[@$]+.*net", str(value))
        ]
        return bundle.root / str(place), of_network[0] if of_network else None
    return None, None


def _loads_itself(bundle: _Bundle) -> bool:
    """Tell whether a network has the same weights whatever the random numbers are."""
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            states.append(bundle.fresh_network().state_dict())
    one, other = states
    return all(torch.equal(value, other[key]) for key, value in one.items())


def _state(bundle: _Bundle, place: Path, key: str | None) -> dict[str, torch.Tensor]:
    name = f"bundle {bundle.name}: {place.name}"
    if not place.is_file():
        present = ", ".join(sorted(p.name for p in place.parent.glob("*"))) or "nothing"
        raise ModelError(
            f"bundle {bundle.name}: the weights {place} are missing; {place.parent.name} holds "
            f"{present}" + _download(bundle, _large_files(bundle.root))
        )
    with place.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise ModelError(f"{name} is a pointer of Git LFS, not the weights: run git lfs pull")
    state = read_state(place, key)
    if not state:
        raise ModelError(f"{name}: holds no weights")
    return without_prefix(state)


def _large_files(root: Path) -> list[str]:
    """Return the files that a bundle lists to be downloaded."""
    for name in ("large_files.yml", "large_files.yaml", "large_files.json"):
        if (root / name).is_file():
            entries = _read(root / name).get("large_files") or []
            return [str(entry.get("path")) for entry in entries if isinstance(entry, dict)]
    return []


def _download(bundle: _Bundle, listed: Sequence[str]) -> str:
    absent = [name for name in listed if not (bundle.root / name).is_file()]
    if not absent:
        return ""
    return (
        f". large_files.yml lists {', '.join(absent)}: download with python -m monai.bundle "
        f"download_large_files --bundle_path {bundle.root}"
    )


# ---------------------------------------------------------------- how it is used


def _window(bundle: _Bundle) -> WindowPlan | None:
    inferer = bundle.inferer
    if type(inferer) is SimpleInferer:
        return None
    wrap = "in Python: SegModel(network, prepare=..., window=...)"
    if isinstance(inferer, SliceInferer):
        raise ModelError(
            f"bundle {bundle.name}: its 2D network sees a volume slice by slice (SliceInferer), "
            f"which is not read from a bundle. Explain it {wrap} with "
            "seg3dcam.ensemble.Ensemble([network], slices=True)"
        )
    if type(inferer) not in (SlidingWindowInferer, SlidingWindowInfererAdapt):
        raise ModelError(
            f"bundle {bundle.name}: inferer {type(inferer).__name__} is one of its own; legal are "
            f"SimpleInferer and SlidingWindowInferer. Explain the network {wrap}"
        )
    if inferer.with_coord:
        raise ModelError(f"bundle {bundle.name}: inferer with_coord gives the network more inputs")
    sizes = inferer.roi_size if isinstance(inferer.roi_size, list | tuple) else [inferer.roi_size]
    roi = tuple(-1 if n is None or n <= 0 else int(n) for n in sizes)
    overlap = inferer.overlap
    return WindowPlan(
        roi if len(roi) > 1 else roi[0],
        overlap=tuple(overlap) if isinstance(overlap, list | tuple) else float(overlap),
        mode=_word(inferer.mode),  # type: ignore[arg-type]
        sw_batch_size=int(inferer.sw_batch_size),
        sigma_scale=float(inferer.sigma_scale),
        padding_mode=_word(inferer.padding_mode),  # type: ignore[arg-type]
        cval=float(inferer.cval),
    )


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _activation(bundle: _Bundle) -> Activation:
    """Return what the postprocessing does with the logits."""
    for transform in bundle.postprocessing:
        if isinstance(transform, Activationsd):
            if any(transform.sigmoid):
                return "sigmoid"
            if any(transform.softmax):
                return "softmax"
        if isinstance(transform, AsDiscreted) and any(transform.argmax):
            return "softmax"
    channels = _format(bundle.metadata, "outputs").get("pred", {}).get("num_channels")
    if channels == 1:
        return "sigmoid"
    raise ModelError(
        f"bundle {bundle.name}: whether classes exclude each other is not said: postprocessing in "
        f"{bundle.config.name} has neither Activationsd nor AsDiscreted(argmax=True). Add one, or "
        "explain the network in Python: SegModel(network, activation=...)"
    )


def _class_names(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    defined = _format(metadata, "outputs").get("pred", {}).get("channel_def") or {}
    if sorted(defined) != sorted(str(n) for n in range(len(defined))):
        raise ModelError(
            "metadata.json: network_data_format.outputs.pred.channel_def must name the channels "
            f"0, 1, 2, ...; it has {', '.join(map(str, defined))}. Name them with classes: [...] "
            "in a model's YAML"
        )
    return tuple(str(defined[str(n)]) for n in range(len(defined)))


def _image_keys(bundle: _Bundle, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the keys that the preprocessing loads images for, in the order of the channels."""
    loaded = [str(k) for t in bundle.preprocessing if isinstance(t, LoadImaged) for k in t.keys]
    loaded = list(dict.fromkeys(loaded))
    if not loaded:
        raise ModelError(
            f"bundle {bundle.name}: preprocessing in {bundle.config.name} has no LoadImaged, so "
            "where the scan goes in is unknown"
        )
    guided = [type(t).__name__ for t in bundle.preprocessing if "Guidance" in type(t).__name__]
    others = set(_format(bundle.metadata, "inputs")) - {*loaded, "image"}
    if guided or others:
        found = ", ".join([*sorted(others), *guided])
        raise ModelError(
            f"bundle {bundle.name}: its network wants more than a scan ({found}), such as clicks; "
            "there is no way to give them here"
        )
    if given is None and len(loaded) > 1:
        pairs = " ".join(f"--input {key}=<file>" for key in loaded)
        raise ModelError(
            f"bundle {bundle.name}: it reads several images, {', '.join(loaded)}. Say which file "
            f"is which: {pairs} (inputs: {loaded} in a model's YAML)"
        )
    if given is not None and sorted(given) != sorted(loaded):
        raise ConfigError(
            f"bundle {bundle.name}: inputs {', '.join(given)}; the bundle reads {', '.join(loaded)}"
        )
    return tuple(given or loaded)


def _prepare(bundle: _Bundle, keys: Sequence[str], scan: Scan) -> MetaTensor:
    """Return what the bundle's own preprocessing makes of a scan, (C, *S)."""
    if len(keys) > 1 and len(keys) != len(scan.data):
        raise ScanError(
            f"{scan.title} has {len(scan.data)} channels, the bundle reads {len(keys)} images: "
            f"{', '.join(keys)}"
        )
    parts = [scan.data] if len(keys) == 1 else list(scan.data.split(1))
    data: Any = {key: _as_loaded(part, scan) for key, part in zip(keys, parts, strict=True)}
    with bundle.own_code():
        for transform in bundle.preprocessing:
            if isinstance(transform, LoadImaged):
                continue  # it is loaded, and its channels come first
            if isinstance(transform, EnsureChannelFirstd) and set(transform.keys) <= set(keys):
                continue
            data = _applied(bundle, transform, data)
    prepared = data.get("image", data.get(keys[0]))
    if not isinstance(prepared, MetaTensor):
        raise ModelError(
            f"bundle {bundle.name}: preprocessing gives no 'image' that knows where it lies; it "
            f"gives {', '.join(f'{k} ({type(v).__name__})' for k, v in data.items())}"
        )
    if 0 in prepared.shape:
        raise ScanError(f"{scan.name}: nothing is left after the bundle's preprocessing")
    return prepared


def _as_loaded(voxels: torch.Tensor, scan: Scan) -> MetaTensor:
    """Return voxels (C, X, Y, Z) as LoadImaged and EnsureChannelFirstd give them."""
    affine = torch.as_tensor(scan.affine, dtype=torch.float64)
    meta = {
        "original_affine": affine.clone(),
        "spatial_shape": np.asarray(scan.shape),
        "original_channel_dim": 0,
        "space": "RAS",
        "filename_or_obj": scan.name,
    }
    return MetaTensor(voxels.clone(), affine=affine, meta=meta)


def _applied(bundle: _Bundle, transform: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Apply one transform of the preprocessing, and see that voxels do not move unnoticed."""
    name = type(transform).__name__
    if isinstance(transform, RandomizableTrait):
        raise ModelError(
            f"bundle {bundle.name}: preprocessing has {name}, which is random: a prediction would "
            "be another one each time"
        )
    foreign = isinstance(transform, Lambda | Lambdad) or not type(transform).__module__.startswith(
        "monai."
    )
    before = {k: v for k, v in data.items() if isinstance(v, MetaTensor)} if foreign else {}
    shapes = {k: (v.shape[1:], v.affine.clone()) for k, v in before.items()}
    try:
        data = apply_transform(transform, data)
    except Exception as error:
        cause = error.__cause__ or error
        raise ModelError(
            f"bundle {bundle.name}: preprocessing {name} failed on this scan: {cause}"
        ) from error
    for key, (shape, affine) in shapes.items():
        after = data.get(key)
        if after is None or tuple(after.shape[1:]) == tuple(shape):
            continue
        if torch.equal(torch.as_tensor(getattr(after, "affine", affine)), affine):
            raise ModelError(
                f"bundle {bundle.name}: preprocessing {name} turns {tuple(shape)} voxels of {key} "
                f"into {tuple(after.shape[1:])} and does not say where they lie (the affine is as "
                "before), so nothing can be brought back to the scan"
            )
    return data


def _restorer(
    bundle: _Bundle, activation: Activation
) -> Callable[[torch.Tensor, Scan, MetaTensor], torch.Tensor | None]:
    """Return the way of the bundle's own postprocessing, from logits to masks on the scan."""
    transforms = [t for t in bundle.postprocessing if not type(t).__name__.startswith("Save")]
    activated = any(isinstance(t, Activationsd) for t in transforms)

    def restore(logits: torch.Tensor, scan: Scan, prepared: MetaTensor) -> torch.Tensor | None:
        def placed(values: torch.Tensor) -> MetaTensor:
            # Invertd takes the operations off the list.
            operations = copy.deepcopy(prepared.applied_operations)
            meta = copy.deepcopy(prepared.meta)
            return MetaTensor(values, meta=meta, applied_operations=operations)

        failed: tuple[Any, BaseException] | None = None
        data: Any = {"image": placed(prepared.as_tensor()), "pred": placed(logits.clone())}
        with bundle.own_code(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "inverse has been called but no invertible")
            for transform in transforms:
                try:
                    data = apply_transform(transform, data)
                except Exception as error:
                    failed = (transform, error.__cause__ or error)
                    break
        if failed is not None:
            warnings.warn(
                f"bundle {bundle.name}: postprocessing {type(failed[0]).__name__} failed "
                f"({failed[1]}); the prediction is brought to the scan without it, linearly",
                Seg3dcamWarning,
                stacklevel=2,
            )
            return None
        found = torch.as_tensor(data["pred"]).as_subclass(torch.Tensor)
        if tuple(found.shape[1:]) != scan.shape:
            return None
        if activation == "sigmoid":
            # Several channels made into one label map cannot be taken apart again.
            return found > (0.5 if activated else 0) if len(found) == len(logits) else None
        labels = found.argmax(0) if len(found) == len(logits) > 1 else found[0]
        return torch.stack([labels == index for index in range(len(logits))])

    return restore
