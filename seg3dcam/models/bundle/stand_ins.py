"""Stand-ins for the engines in a MONAI bundle's config (evaluator, trainer) and their handlers.

The engines themselves are not built, since they need data and write files. Only one thing about
them matters here: what happens to the network before the evaluator predicts. Handlers that load
weights do so when the evaluator starts.
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

#: The arguments of an engine that are built: those that concern the network and its output.
_KEPT = (
    *("_requires_", "_disabled_", "network", "inferer", "postprocessing"),
    *("val_handlers", "train_handlers"),
    *("prepare_batch", "iteration_update", "mode", "decollate", "to_kwargs"),
)

#: MONAI's handlers that change the evaluator's output; its other handlers only report.
_CHANGING = ("PostProcessing", "DecollateBatch")


class PredictionStart(BaseException):
    """Ends a bundle's run at the moment when its evaluator begins to predict.

    It does not derive from Exception, so that neither MONAI nor the bundle's own code catches it.
    """


class Handler:
    """Stands for one of MONAI's handlers, which may write files as soon as they are built."""

    def __init__(self, name: str) -> None:
        self.name = name


class Engine:
    """Stands for an evaluator: attaches the handlers, and calls them when it starts."""

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
        """Note a function that is called when the evaluator starts."""
        event = str(getattr(event_name, "value", event_name))
        if event != "started":
            raise ModelError(
                f"{self.place}: a handler of its own is attached to the event {event}: what it "
                "does to the prediction is not seen. Take it out of the evaluator's handlers, if "
                "it only reports"
            )
        self._at_start.append(lambda: handler(self, *args, **kwargs))

    def run(self) -> None:
        """Do what an evaluator does before it predicts, then raise `PredictionStart`."""
        for call in self._at_start:
            call()
        raise PredictionStart


class Trainer(Engine):
    """Stands for a trainer; its handlers are left out, as they run only in training."""

    def __init__(self, place: str, network: Any = None, **unused: Any) -> None:
        super().__init__(place, network)

    def run(self) -> None:
        """Raise ModelError: weights that come from training are in no file yet."""
        raise ModelError(
            f"{self.place}: a trainer runs before the evaluator; have the trained weights saved, "
            "and loaded by a CheckpointLoader"
        )


def is_engine(value: Any) -> bool:
    """Tell whether an entry of a config is an evaluator or a trainer."""
    return isinstance(value, dict) and str(value.get("_target_")).endswith(("Evaluator", "Trainer"))


def stand_in(value: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a component of a config, replaced by its stand-in where it has one.

    Args:
        place: names the bundle and its config, for messages.
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
    """Tell whether a `_target_` is one of MONAI's handlers, but not CheckpointLoader."""
    module, _, name = target.rpartition(".")
    kind = getattr(monai_handlers, name, None) if module in ("", "monai.handlers") else None
    return isinstance(kind, type) and hasattr(kind, "attach") and kind is not CheckpointLoader


def _transform_alone(loader: Any) -> Any:
    """Return a data loader that an engine contains, reduced to the transform of its dataset."""
    dataset = loader.get("dataset") if isinstance(loader, dict) else None
    return {"dataset": {"transform": dataset.get("transform")}} if isinstance(dataset, dict) else {}
