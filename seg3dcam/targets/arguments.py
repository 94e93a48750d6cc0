"""Checks of what a target is made with; every error is a TargetError."""

from __future__ import annotations

import math
from typing import Any

import torch

from seg3dcam.checks import Activation, check_word, is_number, is_whole
from seg3dcam.errors import TargetError


def check_activation(activation: Activation | None) -> None:
    """Refuse anything but "softmax", "sigmoid" and None."""
    if activation is not None:
        check_word("activation", activation, Activation, TargetError)


def check_index(index: Any) -> None:
    """Refuse what is not a class index."""
    if not is_whole(index):
        raise TargetError(f"a class is given by its index, a whole number; got {index!r}")


def check_exists(index: int, logits: torch.Tensor) -> None:
    """Refuse a class that logits (B, K, *S) do not have."""
    classes = logits.shape[1]
    if not 0 <= index < classes:
        raise TargetError(
            f"class {index} does not exist: the network's output has {classes} "
            f"channel{'s' * (classes > 1)}, so classes 0 to {classes - 1} are legal"
        )


def check_has_others(index: int, logits: torch.Tensor, what: str) -> None:
    """Refuse logits (B, 1, *S): there is no class to compare with."""
    if logits.shape[1] == 1:
        raise TargetError(
            f"{what} compares class {index} with another one, and the network's output has one "
            "channel. Its logit is the log-odds against everything else: use ClassLogOdds(0)"
        )


def check_whole(what: str, value: Any, least: int | None = None) -> None:
    """Refuse anything but a whole number, and one that is smaller than `least`."""
    if not is_whole(value) or (least is not None and value < least):
        legal = "a whole number" + ("" if least is None else f" from {least}")
        raise TargetError(f"{what} is {legal}; got {value!r}")


def check_number(what: str, value: Any) -> None:
    """Refuse anything but a finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise TargetError(f"{what} is a finite number; got {value!r}")
