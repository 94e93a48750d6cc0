"""What stands for the engines of a MONAI bundle's config and for their handlers.

They are not built, since they want data and write files. What counts is what happens to the
network until the evaluator predicts: its handlers that load weights run as it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from monai import handlers as monai_handlers
from monai.handlers import CheckpointLoader
from monai.utils import ensure_tuple

from seg3dcam.errors import ModelError

#: What of an engine's arguments is built: what it does to a network and with it.
_KEPT = (
    *("_requires_", "_disabled_", "network", "inferer", "postprocessing"),
    *("val_handlers", "train_handlers"),
    *("prepare_batch", "iteration_update", "mode", "decollate", "to_kwargs"),
)

#: Handlers of MONAI that change what an evaluator gives; the others report.
_CHANGING = ("PostProcessing", "DecollateBatch")


class Predicts(BaseException):
    """Ends a bundle's run where its evaluator begins to predict.

    No Exception, so that neither MONAI nor the bundle's own code takes it for a failure.
    """


class Handler:
    """Stands for a handler of MONAI, which may write files as soon as it is built."""

    def __init__(self, name: str) -> None:
        self.name = name


class Engine:
    """Stands for an evaluator: it attaches its handlers and calls them as it starts."""

    def __init__(
        self, place: str, network: Any = None, val_handlers: Any = None, **unused: Any
    ) -> None:
        self.place = place
        self.network = network
        self.logger = logging.getLogger(__name__)
        self.state = SimpleNamespace(epoch=0, iteration=0, max_epochs=1)
        self._at_start: list[Callable[[], Any]] = []
        for handler in ensure_tuple(val_handlers) if val_handlers is not None else ():
            self._attach(handler)

    def _attach(self, handler: Any) -> None:
        name = handler.name if isinstance(handler, Handler) else type(handler).__name__
        if name in _CHANGING:
            raise ModelError(
                f"{self.place}: the handler {name} changes what the evaluator gives, which is not "
                "followed; give its transforms to the evaluator as postprocessing"
            )
        reports = isinstance(handler, Handler) or type(handler).__module__.startswith("monai.")
        if isinstance(handler, CheckpointLoader) or not reports:
            handler.attach(self)

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        """Note what is to be called as the evaluator starts."""
        event = str(getattr(event_name, "value", event_name))
        if event != "started":
            raise ModelError(
                f"{self.place}: a handler of its own is attached to the event {event}: what it "
                "does to the prediction is not seen. Take it out of the evaluator's handlers, if "
                "it only reports"
            )
        self._at_start.append(lambda: handler(self, *args, **kwargs))

    def run(self) -> None:
        """Do what an evaluator does before it predicts, and end there."""
        for call in self._at_start:
            call()
        raise Predicts


class Trainer(Engine):
    """Stands for a trainer, whose handlers run with it alone."""

    def __init__(self, place: str, network: Any = None, **unused: Any) -> None:
        super().__init__(place, network)

    def run(self) -> None:
        """Refuse: what training makes of a network is no file."""
        raise ModelError(
            f"{self.place}: a trainer runs before the evaluator; have the trained weights saved, "
            "and loaded by a CheckpointLoader"
        )


def is_engine(value: Any) -> bool:
    """Tell whether a config's value is an evaluator or a trainer."""
    return isinstance(value, dict) and str(value.get("_target_")).endswith(("Evaluator", "Trainer"))


def stand_in(value: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a component of a config, or what stands for it.

    Args:
        place: the bundle and its config, for messages.
    """
    target = str(value.get("_target_", ""))
    if is_engine(value):
        kept = {key: entry for key, entry in value.items() if key in _KEPT}
        kept |= {"val_data_loader": _transform_alone(value.get("val_data_loader"))}
        return {
            "_target_": Trainer if target.endswith("Trainer") else Engine,
            "place": place,
            **kept,
        }
    if _is_monais_handler(target):
        kept = {key: value[key] for key in ("_requires_", "_disabled_") if key in value}
        return {"_target_": Handler, "name": target.rpartition(".")[2], **kept}
    return value


def _is_monais_handler(target: str) -> bool:
    """Tell whether a target is a handler of MONAI that loads no weights."""
    module, _, name = target.rpartition(".")
    kind = getattr(monai_handlers, name, None) if module in ("", "monai.handlers") else None
    return isinstance(kind, type) and hasattr(kind, "attach") and kind is not CheckpointLoader


def _transform_alone(loader: Any) -> Any:
    """Return a data loader that is written inside of its engine, without classes and data."""
    dataset = loader.get("dataset") if isinstance(loader, dict) else None
    return {"dataset": {"transform": dataset.get("transform")}} if isinstance(dataset, dict) else {}
