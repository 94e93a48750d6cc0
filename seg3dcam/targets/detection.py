"""Detectors: the score of a class in a YOLO-like head, and its map.

A head holds raw numbers (no sigmoid yet) for every prediction: 4 for the box, 1 objectness and one
per class. Two layouts are read:

| layout                                | predictions                                         |
|---------------------------------------|-----------------------------------------------------|
| (B, anchors * (5 + classes), h, w)    | one per anchor and cell: one detection scale        |
| (B, n, 5 + classes)                   | n of them, whatever cell and scale they came from   |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from seg3dcam.errors import TargetError, nearest
from seg3dcam.targets.arguments import check_whole
from seg3dcam.targets.base import OwnTarget

#: Numbers of a prediction before those of the classes: the box's 4 and the objectness.
BOX, BEFORE_CLASSES = 4, 5

#: The classes' names in the order of the head's channels, or how many there are.
Classes = Sequence[str] | int


def detection_map(
    head: torch.Tensor, index: int | str, classes: Classes, *, anchors: int | None = None
) -> torch.Tensor:
    """Return objectness times class probability, (B, h, w): the largest of a cell's anchors.

    One detection scale's own class activation map, as it is drawn for YOLO. It needs no gradient.

    Args:
        head: (B, anchors * (5 + classes), h, w), before any sigmoid.
        index: the class, by index or by name.
        classes: their names, or how many there are.
        anchors: how many, to have it checked.

    Raises:
        TargetError: the head does not fit the classes, or there is no such class.

    >>> detection_map(torch.zeros(1, 14, 2, 3), "car", ["car", "dog"]).unique()  # 2 anchors
    tensor([0.2500])
    """
    if head.ndim != 4:
        raise TargetError(
            f"a map needs a head (B, anchors * (5 + classes), h, w); this has the shape "
            f"{tuple(head.shape)}"
        )
    return _scores(head, class_index(index, classes), class_count(classes), anchors).amax(1)


def class_count(classes: Classes) -> int:
    """Return how many classes there are."""
    if isinstance(classes, str) or not isinstance(classes, int | np.integer | Sequence):
        raise TargetError(f"classes {classes!r}: give the list of their names, or their number")
    if isinstance(classes, Sequence):
        check_whole("the number of classes", len(classes), 1)
        return len(classes)
    check_whole("the number of classes", classes, 1)
    return int(classes)


def class_index(given: int | str, classes: Classes) -> int:
    """Return the index of a class that is given by index or by name.

    >>> class_index("dog", ["car", "dog"])
    1
    """
    count = class_count(classes)
    names = [] if isinstance(classes, int | np.integer) else [str(name) for name in classes]
    if isinstance(given, str):
        if not names:
            raise TargetError(
                f"class {given!r} by name, and the {count} classes have none: give a number from 0 "
                f"to {count - 1}, or the names as classes"
            )
        if given not in names:
            raise TargetError(f"class {given!r}: {nearest(given, names)}")
        return names.index(given)
    check_whole("a class's index", given)
    if not 0 <= given < count:
        shown = ", ".join(f"{i} ({name})" for i, name in enumerate(names[:12]))
        more = f" and {count - 12} more" if len(names) > 12 else ""
        raise TargetError(
            f"class {given} does not exist: there are {count} classes, so 0 to {count - 1} are "
            "legal" + (f": {shown}{more}" if names else "")
        )
    return int(given)


def _scores(head: torch.Tensor, index: int, count: int, anchors: int | None) -> torch.Tensor:
    """Return objectness times class probability, (B, anchors, h, w) or (B, n)."""
    width = BEFORE_CLASSES + count
    if head.ndim == 3:
        if head.shape[2] != width:
            raise TargetError(
                f"the head has {head.shape[2]} numbers per prediction; {count} classes need "
                f"{width} (4 for the box, 1 objectness, {count} classes). "
                + (
                    f"{head.shape[2]} would mean {head.shape[2] - BEFORE_CLASSES} classes"
                    if head.shape[2] > BEFORE_CLASSES
                    else "Is its layout (B, n, 5 + classes)?"
                )
            )
        objectness, of_class = head[..., BOX], head[..., BEFORE_CLASSES + index]
    elif head.ndim == 4:
        if head.shape[1] % width or anchors not in (None, head.shape[1] // width):
            raise TargetError(_misfit(head.shape[1], count, anchors))
        split = head.unflatten(1, (-1, width))
        objectness, of_class = split[:, :, BOX], split[:, :, BEFORE_CLASSES + index]
    else:
        raise TargetError(
            f"a head of shape {tuple(head.shape)}: legal are (B, anchors * (5 + classes), h, w) "
            "and (B, n, 5 + classes); (B, anchors, h, w, 5 + classes) becomes the latter by "
            "head.flatten(1, 3)"
        )
    return objectness.sigmoid() * of_class.sigmoid()


def _misfit(channels: int, count: int, anchors: int | None) -> str:
    width = BEFORE_CLASSES + count
    wanted = "a multiple of" if anchors is None else f"{anchors} times"
    meanings = [
        f"{channels // a - BEFORE_CLASSES} classes with {a} anchor{'s' * (a > 1)}"
        for a in range(1, 10)
        if channels % a == 0 and channels // a > BEFORE_CLASSES
    ]
    return (
        f"the head has {channels} channels, and {count} classes need {wanted} {width} (4 for the "
        f"box, 1 objectness, {count} classes). {channels} would mean "
        + (" or ".join(meanings) or "no class with any number of anchors")
    )


@dataclass(frozen=True, eq=False)
class DetectionClass(OwnTarget):
    """A detector's score of a class: sigmoid(objectness) * sigmoid(class), over its predictions.

    Args:
        index: the class, by index or by name.
        classes: their names in the order of the head's channels, or how many there are.
        reduce: "sum" over the predictions, or "max": the best one alone.
        top: with "sum", only so many of the best.
        anchors: how many, to have it checked; a wrong number of classes may fit by chance.

    It is called with a head, (B, anchors * (5 + classes), h, w) or (B, n, 5 + classes), before any
    sigmoid. Of a detector with several scales choose one as the model's output, or join them in
    the second layout.

    Raises:
        TargetError: the head does not fit the classes, or there is no such class.

    >>> head = torch.zeros(1, 7, 2, 2)  # one anchor, two classes, four cells
    >>> DetectionClass("dog", ["car", "dog"])(head), DetectionClass(0, 2, reduce="max")(head)
    (tensor([1.]), tensor([0.2500]))
    """

    index: int | str
    classes: Classes
    reduce: Literal["sum", "max"] = "sum"
    top: int | None = None
    anchors: int | None = None
    _kept: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        class_index(self.index, self.classes)
        if self.reduce not in ("sum", "max"):
            raise TargetError(f"reduce {self.reduce!r}: legal are 'sum' and 'max'")
        if self.top is not None:
            check_whole("top", self.top, 1)
            if self.reduce == "max":
                raise TargetError("reduce='max' keeps one prediction: top goes with reduce='sum'")
        if self.anchors is not None:
            check_whole("anchors", self.anchors, 1)

    @property
    def name(self) -> str:
        """What is explained, in words."""
        number = class_index(self.index, self.classes)
        named = "" if isinstance(self.classes, int | np.integer) else f"({self.classes[number]}) "
        kept = self._count()
        over = {None: "all predictions", 1: "the best prediction"}.get(
            kept, f"the {kept} best predictions"
        )
        return f"detection of class {number} {named}over {over}"

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the score (B,) of a head."""
        scores = self._scores(logits).flatten(1)
        kept = self._indices(scores)
        return (scores if kept is None else scores.gather(1, kept)).sum(1)

    def regions(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the cells (B, h, w) bool, or the predictions (B, n), that are summed over."""
        scores = self._scores(logits.detach())
        kept = self._indices(scores.flatten(1))
        if kept is None:
            mask = torch.ones_like(scores, dtype=torch.bool)
        else:
            mask = torch.zeros_like(scores.flatten(1), dtype=torch.bool)
            mask = mask.scatter(1, kept, True).reshape(scores.shape)
        return mask.any(1) if scores.ndim == 4 else mask

    def fixed(self, logits: torch.Tensor) -> DetectionClass:
        """Return the score of the predictions that are the best in this head."""
        return replace(self, _kept=self._indices(self._scores(logits.detach()).flatten(1)))

    def _scores(self, head: torch.Tensor) -> torch.Tensor:
        index, count = class_index(self.index, self.classes), class_count(self.classes)
        return _scores(head, index, count, self.anchors)

    def _count(self) -> int | None:
        return 1 if self.reduce == "max" else self.top

    def _indices(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Return which of the scores (B, n) are kept, (B, k); None for all."""
        count = self._count()
        if count is None or self._kept is not None:
            return self._kept
        if count > scores.shape[1]:
            raise TargetError(
                f"top {count}: the head has {scores.shape[1]} predictions, so 1 to "
                f"{scores.shape[1]} are legal"
            )
        return scores.detach().topk(count, dim=1).indices
