"""A MONAI bundle as a model: its own config gives the network, preparation, windows and names.

Only the parts that are needed are built from a bundle's config: neither its dataset nor its engine.
A config may run any code. Without trust nothing in it is evaluated, and nothing of the bundle is
imported.

files            the bundle's files, read as plain data
config           the config, and the objects that it describes
stand_ins        what is built in place of engines and their handlers
evaluator        what the evaluator and its dataset use
readers          how images are read
transforms       which transforms there are, and for which keys
preprocessing    a scan on its way to the network
postprocessing   a prediction on its way back to the scan
weights          the network with the weights that it has when the evaluator predicts
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from monai.inferers.inferer import SlidingWindowInfererAdapt
from monai.transforms import Activationsd, AsDiscreted, LoadImaged
from pydantic import Field

from seg3dcam.checks import is_number
from seg3dcam.errors import ConfigError, ModelError, tell
from seg3dcam.files import digest_of_all, resolved
from seg3dcam.models.bundle import evaluator
from seg3dcam.models.bundle.config import IN_PYTHON, Bundle, read
from seg3dcam.models.bundle.files import Metadata, code_in
from seg3dcam.models.bundle.postprocessing import restorer
from seg3dcam.models.bundle.preprocessing import prepare
from seg3dcam.models.bundle.readers import check_readers
from seg3dcam.models.bundle.transforms import check_not_random, loaded_keys, without_truths
from seg3dcam.models.bundle.weights import loaded_network
from seg3dcam.models.seg_model import SegModel, channels_taken
from seg3dcam.models.specs import ModelSpec
from seg3dcam.targets import Activation
from seg3dcam.windows import WindowPlan


class Spec(ModelSpec):
    """A MONAI bundle; everything is read from its own config and metadata."""

    bundle: str = Field(min_length=1, description="the bundle's folder")
    config: str | None = Field(
        None, description="inference config in the folder; none: configs/inference.json or .yaml"
    )
    inputs: list[str] | None = Field(
        None, description="image keys in the order of the scan's channels; none: the only one"
    )
    classes: list[str] | None = Field(
        None, description="one name per output channel; none: the metadata's"
    )
    set: dict[str, Any] = Field(
        {}, description="values of the config by their ids, such as inferer#roi_size: [64, 64, 64]"
    )


def build(spec: Spec, path: Path, trust: bool) -> SegModel:
    """Read a bundle.

    Args:
        path: the file that holds the spec; the bundle's path is relative to it.
        trust: allow the bundle's config and its `scripts` to run code.

    Raises:
        ModelError: a file or key is missing, damaged, or of a kind that cannot be explained.
        ConfigError: a file is neither JSON nor YAML or does not fit its schema, image keys are
            given that the bundle does not read, or a value for an id that the config does not have.
    """
    if "\0" in spec.bundle + (spec.config or ""):
        raise ModelError(f"bundle {spec.bundle!r}: no path holds a NUL character")
    bundle = read(resolved(path.parent / spec.bundle), spec.config, spec.set)
    if not trust:
        raise ModelError(
            f"{bundle.place} runs code when it is read. It would run\n  {code_in(bundle.content)}\n"
            "If you know the bundle, allow it with --trust (trust=True)"
        )
    with bundle.own_code():
        bundle.parse()
        return _model(bundle, spec)


def _model(bundle: Bundle, spec: Spec) -> SegModel:
    window = _window(bundle)  # first, since it is quickly built and refuses many bundles
    evaluator.check_evaluator(bundle)
    bundle.check_network()
    preprocessing = evaluator.preprocessing(bundle)
    keys, truths = _image_keys(bundle, preprocessing, spec.inputs)
    check_readers(bundle, preprocessing)
    postprocessing = evaluator.postprocessing(bundle)
    activation = _activation(bundle, postprocessing)
    for name, transforms in (("preprocessing", preprocessing), ("postprocessing", postprocessing)):
        check_not_random(bundle, name, transforms)
        without_truths(bundle, name, transforms, truths)
    names = tuple(spec.classes) if spec.classes else _class_names(bundle.metadata)
    network, weights = loaded_network(bundle)
    scan_channels = _scan_channels(preprocessing)
    if scan_channels:
        tell(f"{bundle.place}: its network can be given clicks; it is explained without any")
    image = bundle.metadata.inputs.get("image")
    version = bundle.metadata.version
    return SegModel(
        module=network.float().eval(),
        class_names=names,
        activation=activation,
        prepare=partial(prepare, bundle, preprocessing, keys),
        restore=restorer(bundle, postprocessing, activation),
        window=window,
        in_channels=(image and image.num_channels) or channels_taken(network),
        scan_channels=scan_channels,
        name=f"bundle {bundle.name} {version or ''}".strip(),
        spec={
            "bundle": bundle.name,
            "version": version,
            "monai_version": bundle.metadata.monai_version,
            "config": bundle.config.name,
            "sha256": digest_of_all(_described_by(bundle)),
            "inputs": list(keys),
            "weights": weights,
            **({"set": dict(spec.set)} if spec.set else {}),
        },
    )


def _described_by(bundle: Bundle) -> list[Path]:
    """Return the files other than weights that determine what a bundle does."""
    return [
        *(file for file in (bundle.root / "configs").glob("*") if file.is_file()),
        *(file for file in bundle.root.rglob("*.py") if file.is_file()),
        bundle.config,
    ]


def _window(bundle: Bundle) -> WindowPlan | None:
    inferer = evaluator.inferer(bundle)
    if type(inferer) is SimpleInferer:
        return None
    if isinstance(inferer, SliceInferer):
        raise ModelError(
            f"bundle {bundle.name}: its 2D network sees a volume slice by slice (SliceInferer), "
            f"which is not read from a bundle. Explain it {IN_PYTHON} with "
            "seg3dcam.network.ensemble.Ensemble([network], slices=True)"
        )
    if type(inferer) not in (SlidingWindowInferer, SlidingWindowInfererAdapt):
        raise ModelError(
            f"bundle {bundle.name}: inferer {type(inferer).__name__} is one of its own; legal are "
            f"SimpleInferer and SlidingWindowInferer. Explain the network {IN_PYTHON}"
        )
    if inferer.with_coord:
        raise ModelError(f"bundle {bundle.name}: inferer with_coord gives the network more inputs")
    sizes = inferer.roi_size if isinstance(inferer.roi_size, list | tuple) else [inferer.roi_size]
    roi = tuple(_voxels(size) for size in sizes)
    overlap = inferer.overlap
    try:
        if not roi:
            raise ConfigError("roi_size (): voxels along each axis, such as [96, 96, 96]")
        return WindowPlan(
            roi if len(roi) != 1 else roi[0],
            overlap=tuple(overlap) if isinstance(overlap, list) else overlap,
            mode=_word(inferer.mode),  # type: ignore[arg-type]
            sw_batch_size=inferer.sw_batch_size,
            sigma_scale=inferer.sigma_scale,
            padding_mode=_word(inferer.padding_mode),  # type: ignore[arg-type]
            cval=inferer.cval,
        )
    except ConfigError as error:
        raise ConfigError(f"{bundle.place}: inferer: {error}") from error


def _voxels(size: Any) -> Any:
    """Return a size as a WindowPlan takes it. MONAI's None and 0 mean the whole axis."""
    if size is None:
        return -1
    if not is_number(size) or not math.isfinite(size) or size != int(size):
        return size  # the plan refuses it
    return int(size) if size > 0 else -1


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _activation(bundle: Bundle, postprocessing: Sequence[Any]) -> Activation:
    """Return the activation that the postprocessing applies to the logits."""
    for transform in postprocessing:
        if isinstance(transform, Activationsd):
            if any(transform.sigmoid):
                return "sigmoid"
            if any(transform.softmax):
                return "softmax"
        if isinstance(transform, AsDiscreted) and any(transform.argmax):
            return "softmax"
    if bundle.metadata.prediction.num_channels == 1:
        return "sigmoid"
    raise ModelError(
        f"bundle {bundle.name}: whether classes exclude each other is not said: postprocessing in "
        f"{bundle.config.name} has neither Activationsd nor AsDiscreted(argmax=True). Add one, or "
        "explain the network in Python: SegModel(network, activation=...)"
    )


def _class_names(metadata: Metadata) -> tuple[str, ...]:
    defined = metadata.prediction.names
    if sorted(defined) != sorted(str(n) for n in range(len(defined))):
        raise ModelError(
            "metadata.json: network_data_format.outputs.pred.channel_def must name the channels "
            f"0, 1, 2, ...; it has {', '.join(defined)}. Name them with classes: [...] in a "
            "model's YAML"
        )
    return tuple(defined[str(n)] for n in range(len(defined)))


def _image_keys(
    bundle: Bundle, preprocessing: Sequence[Any], given: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Return the keys of the network's images in the channels' order, and the keys of truths."""
    every = [str(k) for t in preprocessing if isinstance(t, LoadImaged) for k in t.keys]
    loaded, truths = loaded_keys(preprocessing)
    if not loaded:
        raise ModelError(
            f"bundle {bundle.name}: preprocessing in {bundle.config.name} has no LoadImaged, so "
            "where the scan goes in is unknown"
        )
    clicks = [t for t in preprocessing if "Guidance" in type(t).__name__]
    guided = [] if _scan_channels(preprocessing) else [type(t).__name__ for t in clicks]
    others = set(bundle.metadata.inputs) - {*every, "image"}
    if guided or others:
        raise ModelError(
            f"bundle {bundle.name}: its network wants more than a scan "
            f"({', '.join([*sorted(others), *guided])}), such as clicks; there is no way to give "
            "them here"
        )
    if given is not None and sorted(given) == sorted(set(every)):
        return list(given), []
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
    return list(given or loaded), truths


def _scan_channels(preprocessing: Sequence[Any]) -> int | None:
    """Return the channels of a scan if the preprocessing adds channels for clicks, else None."""
    for transform in preprocessing:
        if type(transform).__name__.startswith("AddGuidanceSignalDeepEdit"):
            return int(transform.number_intensity_ch)
    return None
