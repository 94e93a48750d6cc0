"""CAMs while a MONAI or ignite engine runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from seg3dcam.errors import ConfigError, MissingExtraError
from seg3dcam.integrations.epoch_cams import ValidationCases, images_of
from seg3dcam.integrations.logs import add_to_mlflow, add_to_tensorboard

if TYPE_CHECKING:
    from ignite.engine import Engine


class CamHandler:
    """Explains chosen validation cases every few epochs.

    Attach it to the evaluator. For a MONAI evaluator, it explains the network's input before any
    post-processing, whether batches are decollated or not. CAMs are computed in full precision,
    with AMP as well. In distributed training, the first process explains its own cases.

    Args:
        network: the network that the engine evaluates.
        out, target_layers, cases, interval, settings: see `EpochCams`.
        class_idx: class indices, class names or targets, one or a list; None explains every class
            that is predicted.
        global_epoch_transform: a function from the engine's epoch to the epoch of the training. An
            ignite evaluator, whose own epoch is always 1, needs `lambda _: trainer.state.epoch`. A
            MONAI evaluator that is run by a `ValidationHandler` knows the epoch.
        batch_transform: a function from the batch to the images, (B, C, *S) or a list of (C, *S).
        summary_writer: a TensorBoard `SummaryWriter` that gets the pictures.
        mlflow: whether the pictures become artifacts of the active MLflow run.

    Raises:
        ConfigError: a setting is wrong.
        MissingExtraError: ignite is not installed.

    Example:
        handler = CamHandler(network, out="cams", interval=10, cases=[0, 3], class_idx=1)
        handler.attach(evaluator)
    """

    def __init__(
        self,
        network: nn.Module,
        target_layers: Any = "auto",
        *,
        out: str | Path,
        class_idx: Any = None,
        cases: Any = (0,),
        interval: int = 1,
        global_epoch_transform: Callable[[int], int] = int,
        batch_transform: Callable[[Any], Any] = images_of,
        summary_writer: Any = None,
        mlflow: bool = False,
        **settings: Any,
    ) -> None:
        self._cases = ValidationCases(
            batch_transform,
            out,
            targets=class_idx,
            target_layers=target_layers,
            cases=cases,
            interval=interval,
            **settings,
        )
        if summary_writer is not None and not hasattr(summary_writer, "add_image"):
            raise ConfigError(
                f"summary_writer {type(summary_writer).__name__} has no add_image: give a "
                "torch.utils.tensorboard.SummaryWriter"
            )
        self.network = network
        self.global_epoch_transform = global_epoch_transform
        self.summary_writer = summary_writer
        self.mlflow = mlflow

    def attach(self, engine: Engine) -> None:
        """Explain the chosen cases whenever this engine runs an epoch."""
        try:
            from ignite.engine import Events
            from monai.engines import Evaluator
            from monai.engines.utils import IterationEvents
        except ImportError as error:
            raise MissingExtraError(
                "handlers need ignite: pip install 'seg3dcam[ignite]'"
            ) from error
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        if isinstance(engine, Evaluator):
            engine.add_event_handler(
                IterationEvents.FORWARD_COMPLETED, lambda e: self(e, e.state.output)
            )
        else:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self(e, e.state.batch))

    def _begin(self, engine: Engine) -> None:
        self._cases.begin()

    def __call__(self, engine: Engine, batch: Any) -> None:
        """Explain the chosen cases of a batch."""
        epoch = self.global_epoch_transform(engine.state.epoch)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = not distributed or torch.distributed.get_rank() == 0
        for picture in self._cases.explain(self.network, batch, epoch=epoch, first_process=first):
            if self.summary_writer is not None:
                add_to_tensorboard(self.summary_writer, picture, epoch)
            if self.mlflow:
                add_to_mlflow(picture)
