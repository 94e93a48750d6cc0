"""A trained nnU-Net v2 folder as a model, with its own preparation, windows, folds and way back.

schemas     what plans.json, dataset.json and a checkpoint may contain
files       the files in the folder, found and read
parts       nnU-Net's own classes that they name, put together
pipeline    a scan on its way to the network, and its prediction on the way back
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from seg3dcam.errors import ModelError
from seg3dcam.files import digest_of_all
from seg3dcam.models.nnunet.files import (
    check_channels,
    check_folder,
    folds_of,
    read_checkpoint,
    read_dataset,
    read_plans,
)
from seg3dcam.models.nnunet.parts import assemble, load_network, quietly
from seg3dcam.models.nnunet.pipeline import Pipeline
from seg3dcam.models.nnunet.schemas import Checkpoint, Dataset
from seg3dcam.models.seg_model import SegModel
from seg3dcam.models.specs import ModelSpec
from seg3dcam.network.ensemble import Ensemble
from seg3dcam.windows import WindowPlan


class Spec(ModelSpec):
    """A trained nnU-Net v2 model folder; everything is read from its plans and dataset.json."""

    nnunet: str = Field(min_length=1, description="the folder <trainer>__<plans>__<configuration>")
    folds: list[int | Literal["all"]] | None = Field(
        None, min_length=1, description="none: every fold that has the checkpoint"
    )
    checkpoint: str = "checkpoint_final.pth"
    tile_step_size: float = Field(0.5, gt=0, le=1, description="nnU-Net's own name and default")
    mirroring: bool = Field(True, description="average over the flips of the training, if any")


def build(spec: Spec, path: Path, trust: bool) -> SegModel:
    """Read a folder in which nnU-Net v2 has trained a model.

    Args:
        path: the file that holds the spec; the folder's path is relative to it.
        trust: allow a checkpoint that holds more than tensors and numbers, and networks from
            outside of dynamic_network_architectures.

    Raises:
        ModelError: a file is missing, damaged or does not fit the others.
        ConfigError: plans.json or dataset.json has illegal content; the message names the keys.
        MissingExtraError: nnU-Net is not installed.
    """
    folder = path.parent / spec.nnunet
    check_folder(folder, spec.checkpoint)
    folds = folds_of(folder, spec.checkpoint, spec.folds)
    checkpoints = [read_checkpoint(file, trust) for file in folds.values()]
    first, plans_file = checkpoints[0], folder / "plans.json"
    dataset = read_dataset(folder / "dataset.json")
    plans, configuration = read_plans(plans_file, first.init_args.configuration)
    _check_stage(configuration.previous_stage, folder)
    check_channels(plans, configuration, dataset, plans_file)
    with quietly():
        parts = assemble(plans_file, plans, configuration, dataset, first, trust)
        networks = [
            load_network(
                parts, checkpoint, len(dataset.channels), f"{file.parent.name}/{file.name}", trust
            )
            for checkpoint, file in zip(checkpoints, folds.values(), strict=True)
        ]
    pipeline = Pipeline(parts, dataset.model_dump(exclude_unset=True), plans.image_reader_writer)
    patch = tuple(configuration.patch_size)
    slices = len(patch) == 2
    flips = _flips(first, len(patch), folder) if spec.mirroring else ()
    mirror_axes = [axis + slices for axis in flips]
    alone = len(networks) == 1 and not mirror_axes and not slices
    return SegModel(
        module=(networks[0] if alone else Ensemble(networks, mirror_axes, slices=slices)).eval(),
        class_names=_class_names(dataset),
        activation="sigmoid" if dataset.has_regions else "softmax",
        prepare=pipeline.prepare,
        restore=pipeline.restore,
        window=WindowPlan(
            (1, *patch) if slices else patch,
            overlap=1 - spec.tile_step_size,
            convention="nnunet",
        ),
        in_channels=len(dataset.channels),
        name=f"nnU-Net {plans.dataset_name} {first.init_args.configuration}",
        spec={
            "dataset": plans.dataset_name,
            "sha256": digest_of_all([plans_file, folder / "dataset.json"]),
            "plans": plans.plans_name,
            "configuration": first.init_args.configuration,
            "trainer": first.trainer_name,
            "folds": list(folds),
            "checkpoint": spec.checkpoint,
            "epochs": [checkpoint.current_epoch for checkpoint in checkpoints],
            "mirror_axes": mirror_axes,
            "tile_step_size": spec.tile_step_size,
            "channels": {str(number): name for number, name in dataset.channels.items()},
        },
    )


def _check_stage(previous: str | None, folder: Path) -> None:
    if previous is not None:
        raise ModelError(
            f"{folder}: this configuration is the second stage of a cascade, which sees the "
            f"prediction of {previous} too: explain that one, or a 3d_fullres model"
        )


def _flips(checkpoint: Checkpoint, axes: int, folder: Path) -> tuple[int, ...]:
    """Return the axes of the patch along which the prediction is averaged over flips."""
    flips = checkpoint.inference_allowed_mirroring_axes
    if flips and max(flips) >= axes:
        raise ModelError(
            f"{folder}: inference_allowed_mirroring_axes {flips} of the checkpoint name more axes "
            f"than the {axes} of patch_size in plans.json"
        )
    return flips


def _class_names(dataset: Dataset) -> tuple[str, ...]:
    """Return a name for each output channel: labels in the order of their values, or regions."""
    if dataset.has_regions:
        return tuple(dataset.regions)
    of_label: dict[int, list[str]] = {}
    for name, labels in dataset.classes.items():
        of_label.setdefault(labels[0], []).append(name)
    return tuple(" or ".join(of_label[label]) for label in sorted(of_label))
