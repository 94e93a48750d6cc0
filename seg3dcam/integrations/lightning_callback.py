"""CAMs while a Lightning trainer fits or validates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from seg3dcam.errors import ConfigError, MissingExtraError
from seg3dcam.integrations.epoch_cams import ValidationCases, images_of
from seg3dcam.integrations.logs import add_to_mlflow, add_to_tensorboard


def _callback() -> Any:
    """Return the class `Callback` of the Lightning in use; the package has two names."""
    try:
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingExtraError(
            "the callback needs Lightning: pip install 'seg3dcam[lightning]'"
        ) from error
    return Callback


class CamCallback(_callback()):  # type: ignore[misc]
    """Explains chosen validation cases every few epochs, in `fit` and in `validate`.

    Pictures go to the trainer's TensorBoard and MLflow loggers, if there are any. In distributed
    training, the first process explains its own cases.

    Args:
        out, target_layers, cases, interval, settings: see `EpochCams`. Epochs count from 1.
        class_idx: class indices, class names or targets, one or a list; None explains every class
            that is predicted.
        network: name of the LightningModule's attribute that holds the network; None if the module
            itself is the network, whose `forward` takes an image.
        batch_transform: a function from the batch to the images, (B, C, *S) or a list of (C, *S).

    Raises:
        ConfigError: a setting is wrong.

    Example:
        Trainer(callbacks=[CamCallback(out="cams", network="net", interval=5, class_idx=1)])
    """

    def __init__(
        self,
        *,
        out: str | Path,
        target_layers: Any = "auto",
        class_idx: Any = None,
        cases: Any = (0,),
        interval: int = 1,
        network: str | None = None,
        batch_transform: Callable[[Any], Any] = images_of,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._cases = ValidationCases(
            batch_transform,
            out,
            targets=class_idx,
            target_layers=target_layers,
            cases=cases,
            interval=interval,
            **settings,
        )
        self.network = network

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the cases from 0."""
        self._cases.begin()

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Explain the chosen cases of a batch."""
        if trainer.sanity_checking:
            return
        network, epoch = _network(pl_module, self.network), trainer.current_epoch + 1
        for picture in self._cases.explain(
            network, batch, epoch=epoch, first_process=trainer.is_global_zero
        ):
            _log(trainer, picture, epoch)


def _network(module: nn.Module, name: str | None) -> nn.Module:
    found = module if name is None else getattr(module, name, None)
    if not isinstance(found, nn.Module):
        children = ", ".join(child for child, _ in module.named_children())
        raise ConfigError(
            f"network {name!r} is no network in {type(module).__name__}; it has {children}"
        )
    return found


def _log(trainer: Any, picture: Path, epoch: int) -> None:
    """Give a picture to the loggers that accept pictures."""
    for logger in trainer.loggers:
        experiment = logger.experiment
        if hasattr(experiment, "add_image"):
            add_to_tensorboard(experiment, picture, epoch)
        elif hasattr(experiment, "log_artifact") and hasattr(logger, "run_id"):
            add_to_mlflow(picture, experiment, logger.run_id)
