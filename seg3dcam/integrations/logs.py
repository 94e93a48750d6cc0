"""Log pictures to TensorBoard and MLflow, under names that are the same in every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seg3dcam.errors import MissingExtraError


def tag_of(picture: Path) -> str:
    """Return the name of a picture, which is the same in every epoch.

    >>> tag_of(Path("cams/epoch_0005/case_0/cam_lesion.png"))
    'case_0/cam_lesion'
    """
    return f"{picture.parent.name}/{picture.stem}"


def add_to_tensorboard(writer: Any, picture: Path, epoch: int) -> None:
    """Show a picture in TensorBoard, at this epoch."""
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    writer.add_image(tag_of(picture), pixels, epoch, dataformats="HWC")


def add_to_mlflow(picture: Path, client: Any = None, run_id: str | None = None) -> None:
    """Log a picture as an artifact.

    Args:
        client, run_id: an `MlflowClient` and its run; None for the active run.
    """
    place = f"cams/{picture.parents[1].name}/{picture.parent.name}"
    if client is not None:
        client.log_artifact(run_id, str(picture), place)
        return
    try:
        import mlflow
    except ImportError as error:
        raise MissingExtraError("mlflow=True needs MLflow: pip install mlflow") from error
    mlflow.log_artifact(str(picture), place)
