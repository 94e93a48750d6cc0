"""A trained nnU-Net v2 folder as a model: its own preparation, windows, folds and way back.

nnU-Net reads a scan as (z, y, x), permutes the axes (`transpose_forward`), crops to the box of
nonzero voxels, and resamples it by shape. All of that is one affine from the prepared voxels to the
scan's, so maps go to the scan in a single interpolation; masks go back by nnU-Net's own steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import pickle
import pydoc
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from torch import nn

from seg3dcam.config import NnunetSpec, read_json
from seg3dcam.ensemble import Ensemble
from seg3dcam.errors import MissingExtraError, ModelError, ScanError, nearest
from seg3dcam.models.base import SegModel
from seg3dcam.models.state import check_finite, check_fit, without_prefix
from seg3dcam.scan import Scan
from seg3dcam.windows import WindowPlan

#: Where a plan's network and its parts may come from without being asked for trust.
TRUSTED = ("dynamic_network_architectures.", "torch.nn.")

#: Readers of 3-D files -> whether they turn the scan to RAS first.
READERS = {
    "SimpleITKIO": False,
    "NibabelIO": False,
    "SimpleITKIOWithReorient": True,
    "NibabelIOWithReorient": True,
}

#: What is asked of plans.json and of a configuration in it.
_PLAN_KEYS = ("dataset_name", "plans_name", "transpose_forward", "transpose_backward")
_CONFIGURATION_KEYS = (
    "patch_size",
    "spacing",
    "preprocessor_class",
    "normalization_schemes",
    "resampling_fn_data",
    "resampling_fn_probabilities",
    "network_arch_class_name",
)

#: What a prepared scan remembers of its preparation, in its `meta`.
_NOTES = "nnunet_properties"


def build(spec: NnunetSpec, path: Path, trust: bool) -> SegModel:
    """Read a folder that nnU-Net v2 has trained into.

    Args:
        path: the folder of the spec is relative to this file.
        trust: allow a checkpoint that holds more than tensors and numbers, and networks from
            outside of dynamic_network_architectures.

    Raises:
        ModelError: a file is missing, damaged or does not fit the others.
        ConfigError: plans.json or dataset.json is no JSON.
        MissingExtraError: nnU-Net is not installed.
    """
    folder = path.parent / spec.nnunet
    _check_folder(folder, spec.checkpoint)
    plans, dataset = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    folds = _folds(folder, spec)
    checkpoints = [_read_checkpoint(file, trust) for file in folds.values()]
    with _quietly():
        trained = _trained(folder, plans, dataset, checkpoints[0], trust)
        networks = [_network(trained, c, trust) for c in checkpoints]
    for network, checkpoint, file in zip(networks, checkpoints, folds.values(), strict=True):
        _load(network, checkpoint["network_weights"], file)
    patch = tuple(int(n) for n in trained.configuration.patch_size)
    slices = len(patch) == 2
    flips = (checkpoints[0].get("inference_allowed_mirroring_axes") or ()) if spec.mirroring else ()
    mirror_axes = [axis + slices for axis in flips]
    alone = len(networks) == 1 and not mirror_axes and not slices
    names = _class_names(trained)
    return SegModel(
        module=(networks[0] if alone else Ensemble(networks, mirror_axes, slices=slices)).eval(),
        class_names=names,
        activation="sigmoid" if trained.labels.has_regions else "softmax",
        prepare=trained.prepare,
        restore=trained.restore,
        window=WindowPlan(
            (1, *patch) if slices else patch,
            overlap=1 - spec.tile_step_size,
            convention="nnunet",
        ),
        in_channels=trained.channels,
        name=f"nnU-Net {trained.plans.dataset_name} {trained.configuration_name}",
        spec={
            "dataset": trained.plans.dataset_name,
            "plans": trained.plans.plans_name,
            "configuration": trained.configuration_name,
            "trainer": checkpoints[0]["trainer_name"],
            "folds": list(folds),
            "checkpoint": spec.checkpoint,
            "epochs": [checkpoint.get("current_epoch") for checkpoint in checkpoints],
            "mirror_axes": mirror_axes,
            "tile_step_size": spec.tile_step_size,
            "channels": dict(dataset.get("channel_names") or dataset.get("modality") or {}),
        },
    )


@dataclass(frozen=True)
class _Trained:
    """nnU-Net's own objects for one folder."""

    plans: Any
    configuration: Any
    configuration_name: str
    dataset: dict[str, Any]
    labels: Any
    trainer: Any
    channels: int
    reorients: bool

    def prepare(self, scan: Scan) -> MetaTensor:
        """Return what nnU-Net's preprocessor makes of a scan, (C, *S), and where it lies."""
        data, affine = scan.data.numpy(), scan.affine
        spacing = np.asarray(_spacing(scan))
        if self.reorients:
            turn = nib.io_orientation(affine)
            affine = affine @ nib.orientations.inv_ornt_aff(turn, scan.shape)
            data = np.stack([nib.apply_orientation(channel, turn) for channel in data])
            spacing = spacing[np.argsort(turn[:, 0])]
        properties: dict[str, Any] = {"spacing": [float(mm) for mm in spacing[::-1]]}
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        try:
            with _quietly():
                prepared, _, properties = preprocessor.run_case_npy(
                    np.ascontiguousarray(data.transpose(0, 3, 2, 1)),  # sums go in memory's order
                    None,
                    properties,
                    self.plans,
                    self.configuration,
                    self.dataset,
                )
        except Exception as error:  # whatever its code leads to
            raise ScanError(
                f"{scan.name}: nnU-Net's {type(preprocessor).__name__} fails: {error!r}. Do "
                "plans.json and dataset.json fit the installed nnU-Net?"
            ) from error
        if 0 in prepared.shape:
            raise ScanError(f"{scan.name}: nothing is left after nnU-Net's preparation")
        affine = affine @ self._to_read(properties, prepared.shape[1:])
        return MetaTensor(
            torch.from_numpy(np.ascontiguousarray(prepared, dtype=np.float32)),
            affine=torch.as_tensor(affine),
            meta={_NOTES: properties},
        )

    def _to_read(self, properties: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
        """Return the affine from prepared voxels to voxels (x, y, z) of the scan as read."""
        matrix = np.eye(4)
        cropped = properties["shape_after_cropping_and_before_resampling"]
        for new, axis in enumerate(self.plans.transpose_forward):
            # Resized by shape: the outer faces of both grids coincide.
            scale = cropped[new] / shape[new]
            first = properties["bbox_used_for_cropping"][new][0]
            matrix[2 - axis, :] = 0
            matrix[2 - axis, new] = scale
            matrix[2 - axis, 3] = first + 0.5 * scale - 0.5
        return matrix

    def restore(self, logits: torch.Tensor, scan: Scan, prepared: MetaTensor) -> torch.Tensor:
        """Return the masks (K, X, Y, Z) on the scan's grid, by nnU-Net's own steps."""
        properties = prepared.meta[_NOTES]
        spacing = [properties["spacing"][axis] for axis in self.plans.transpose_forward]
        target = list(self.configuration.spacing)
        target = target if len(target) == len(spacing) else [spacing[0], *target]
        with _quietly():
            resampled = self.configuration.resampling_fn_probabilities(
                logits, properties["shape_after_cropping_and_before_resampling"], target, spacing
            )
            resampled = torch.as_tensor(resampled)
            if self.labels.has_regions:
                masks = self.labels.apply_inference_nonlin(resampled) > 0.5
            else:
                best = resampled.argmax(0)
                masks = torch.stack([best == index for index in range(len(resampled))])
        whole = torch.zeros((len(masks), *properties["shape_before_cropping"]), dtype=torch.bool)
        if not self.labels.has_regions:
            whole[0] = True  # what was cropped away is background
        box: Any = (..., *(slice(*ends) for ends in properties["bbox_used_for_cropping"]))
        whole[box] = masks
        back = [1 + axis for axis in self.plans.transpose_backward]
        whole = whole.permute(0, *back).permute(0, 3, 2, 1)  # (z, y, x) as read -> (x, y, z)
        if self.reorients:
            turn = nib.io_orientation(scan.affine)
            undo = nib.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), turn)
            turned = [nib.apply_orientation(mask, undo) for mask in whole.numpy()]
            whole = torch.from_numpy(np.stack(turned))
        return whole.contiguous()


# ---------------------------------------------------------------- the folder


def _check_folder(folder: Path, checkpoint: str) -> None:
    """Raise ModelError unless this looks like what nnU-Net trains into."""
    if not folder.is_dir():
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


def _folds(folder: Path, spec: NnunetSpec) -> dict[int | str, Path]:
    """Return fold -> checkpoint of the folds that are asked for, or of all."""
    present: dict[int | str, Path] = {}
    others = set()
    for place in sorted(folder.glob("fold_*")):
        number = place.name.removeprefix("fold_")
        if (place / spec.checkpoint).is_file():
            present[int(number) if number.isdecimal() else number] = place / spec.checkpoint
        others |= {file.name for file in place.glob("checkpoint_*.pth")}
    if not present:
        hint = f"; there is {', '.join(sorted(others))}: set checkpoint" if others else ""
        raise ModelError(f"{folder}: no fold_*/{spec.checkpoint}{hint}")
    if spec.folds is None:
        several = len(present) > 1 and "all" in present
        return {k: v for k, v in present.items() if not (several and k == "all")}
    absent = [fold for fold in spec.folds if fold not in present]
    if absent:
        raise ModelError(
            f"{folder}: no {spec.checkpoint} of fold {', '.join(map(str, absent))}; there is one "
            f"of {', '.join(map(str, present))}"
        )
    return {fold: present[fold] for fold in spec.folds}


def _read_checkpoint(file: Path, trust: bool) -> dict[str, Any]:
    """Return what is needed of a checkpoint."""
    try:
        content = _unpickled(file, trust)
    except ModelError:
        raise
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise ModelError(f"{file}: cannot be read as a checkpoint: {error}") from error
    kinds = {"network_weights": Mapping, "trainer_name": str, "init_args": Mapping}
    held = content if isinstance(content, dict) else {}
    missing = [key for key, kind in kinds.items() if not isinstance(held.get(key), kind)]
    if missing:
        raise ModelError(f"{file}: no checkpoint of nnU-Net v2: {', '.join(missing)} missing")
    kept = (*kinds, "inference_allowed_mirroring_axes", "current_epoch")
    return {key: held[key] for key in kept if key in held}  # not the optimizer's state


def _unpickled(file: Path, trust: bool) -> Any:
    """Read a checkpoint without running code, unless trusted; nnU-Net itself would run it."""
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
    """Return what numpy's scalars are pickled as: nnU-Net logs some."""
    core = getattr(np, "_core", None) or np.core
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    return [core.multiarray.scalar, np.dtype, *dtypes]


# ---------------------------------------------------------------- nnU-Net's own objects


def _trained(
    folder: Path,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    checkpoint: dict[str, Any],
    trust: bool,
) -> _Trained:
    try:
        from nnunetv2.utilities.label_handling import label_handling
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"a nnU-Net folder needs nnU-Net: pip install 'seg3dcam[nnunet]' ({error})"
        ) from error
    name = checkpoint["init_args"].get("configuration")
    known = plans.get("configurations", {})
    if name not in known:
        raise ModelError(
            f"{folder / 'plans.json'}: no configuration {name!r}, which the checkpoint was trained "
            f"with: {nearest(str(name), known)}"
        )
    reader = plans.get("image_reader_writer")
    if reader not in READERS:
        raise ModelError(
            f"{folder / 'plans.json'}: image_reader_writer {reader!r} reads no volumes that lie "
            f"in a patient; legal are {', '.join(READERS)}"
        )
    try:
        manager = PlansManager(plans)
        configuration = manager.get_configuration(name)
        labels = manager.get_label_manager(dataset)
        if configuration.previous_stage_name is not None:
            raise ModelError(
                f"{folder}: configuration {name} is the second stage of a cascade, which sees the "
                f"prediction of {configuration.previous_stage_name} too: explain that one, or a "
                "3d_fullres model"
            )
        channels = label_handling.determine_num_input_channels(manager, configuration, dataset)
        for plan, keys in ((manager, _PLAN_KEYS), (configuration, _CONFIGURATION_KEYS)):
            for key in keys:  # what is missing is noticed now
                if getattr(plan, key) is None:
                    raise KeyError(key)
    except (LookupError, AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{folder}: plans.json and dataset.json cannot be used: {error!r}"
        ) from error
    return _Trained(
        plans=manager,
        configuration=configuration,
        configuration_name=name,
        dataset=dataset,
        labels=labels,
        trainer=_trainer(checkpoint["trainer_name"], trust),
        channels=int(channels),
        reorients=READERS[reader],
    )


def _trainer(name: str, trust: bool) -> Any:
    """Return the trainer's class, which says how its network is built."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    place = str(Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer")
    try:
        found = recursive_find_python_class(place, name, "nnunetv2.training.nnUNetTrainer")
        if found is None and trust and importlib.util.find_spec("nnunetv2.utilities.find_objects"):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            found = recursive_find_trainer_class_by_name(name)
    except RuntimeError:  # what nnU-Net raises where it finds nothing
        found = None
    except Exception as error:  # it imports every module on its way
        raise ModelError(f"trainer {name!r}: nnU-Net fails to look for it: {error!r}") from error
    if not hasattr(found, "build_network_architecture"):
        raise ModelError(
            f"trainer {name!r} is not in the installed nnU-Net. A trainer of your own lies where "
            "nnU-Net finds it for prediction: in nnunetv2/training/nnUNetTrainer, or since nnU-Net "
            "2.8 in a folder of nnUNet_extTrainer, which is looked at with --trust (trust=True)"
        )
    return found


def _network(trained: _Trained, checkpoint: Mapping[str, Any], trust: bool) -> nn.Module:
    configuration = trained.configuration
    if not trust:
        _check_parts(configuration)
    build_network = trained.trainer.build_network_architecture
    heads = trained.labels.num_segmentation_heads
    if "plans_manager" in inspect.signature(build_network).parameters:
        given: tuple[Any, ...] = (trained.plans, configuration)
    else:  # before nnU-Net 2.8
        given = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
    try:
        return build_network(*given, trained.channels, heads, enable_deep_supervision=False)
    except Exception as error:
        raise ModelError(
            f"plans.json: {configuration.network_arch_class_name} cannot be built as "
            f"{checkpoint['trainer_name']} does it: {error!r}. Was the model trained with another "
            "version of nnU-Net?"
        ) from error


def _check_parts(configuration: Any) -> None:
    """Raise ModelError unless a plan's network and what it names are known classes of networks."""
    named = {"network_class_name": configuration.network_arch_class_name}
    for key in configuration.network_arch_init_kwargs_req_import:
        named[key] = configuration.network_arch_init_kwargs.get(key)
    for key, name in named.items():
        known = name is None or (
            str(name).startswith(TRUSTED)
            and inspect.isclass(part := pydoc.locate(name))
            and issubclass(part, nn.Module)
        )
        if not known:
            raise ModelError(
                f"plans.json: architecture {key} {name!r} is no network of "
                "dynamic_network_architectures or torch.nn; importing and calling it would run its "
                "code. If you know it, allow it with --trust (trust=True)"
            )


def _load(network: nn.Module, weights: Mapping[str, torch.Tensor], file: Path) -> None:
    state = without_prefix(weights)
    place = f"{file.parent.name}/{file.name}"
    check_fit(network, state, place, "the network of plans.json")
    check_finite(state, place)
    network.load_state_dict(state)


def _class_names(trained: _Trained) -> tuple[str, ...]:
    """Return one name for each output channel: labels by value, regions in their order."""
    labels = {k: v for k, v in trained.dataset["labels"].items() if k != "ignore"}
    if trained.labels.has_regions:
        return tuple(name for name, value in labels.items() if np.any(np.asarray(value) != 0))
    of_value = {int(np.ravel(value)[0]): name for name, value in labels.items()}
    return tuple(of_value[int(value)] for value in trained.labels.all_labels)


def _spacing(scan: Scan) -> tuple[float, ...]:
    """Return the voxel size as nnU-Net's readers do: the file's own float32 numbers, if any."""
    if scan.header is not None:
        zooms = tuple(float(mm) for mm in scan.header.get_zooms()[:3])
        if np.allclose(zooms, scan.spacing, rtol=1e-4, atol=0):
            return zooms
    return scan.spacing


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what nnU-Net prints from the user; it cannot be told not to."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected old nnU-Net plans format")
        yield
