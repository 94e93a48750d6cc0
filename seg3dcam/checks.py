"""Checks of what a user gives: words, numbers, and tensors that know where they lie."""

from __future__ import annotations

import math
import operator
import sys
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import numpy as np

from seg3dcam.errors import ConfigError, InputError

if TYPE_CHECKING:
    from monai.data import MetaTensor

# The legal words of settings that several rooms have. They stand here, where nothing imports
# PyTorch, so that YAML files and the command line are checked by the same words.
Activation = Literal["softmax", "sigmoid"]
Frame = Literal["sform", "qform"]
WindowMode = Literal["gaussian", "constant"]
PaddingMode = Literal["constant", "reflect", "replicate", "circular"]
WindowConvention = Literal["monai", "nnunet"]


def check_word(
    what: str, value: Any, words: Any, error_class: type[InputError] = ConfigError
) -> None:
    """Raise ConfigError unless `value` is one of the words of a Literal.

    Args:
        error_class: what is raised instead.

    >>> check_word("window mode", "hann", WindowMode)
    Traceback (most recent call last):
        ...
    seg3dcam.errors.ConfigError: window mode 'hann': legal are 'gaussian' and 'constant'
    """
    if value not in get_args(words):
        *first, last = map(repr, get_args(words))
        raise error_class(f"{what} {value!r}: legal are {', '.join(first)} and {last}")


def check_whole_number(what: str, value: Any, least: int = 1) -> None:
    """Raise ConfigError unless `value` is a whole number from `least` up.

    >>> check_whole_number("steps", 0)
    Traceback (most recent call last):
        ...
    seg3dcam.errors.ConfigError: steps 0: a whole number from 1 up
    """
    if not is_whole(value) or value < least:
        raise ConfigError(f"{what} {value!r}: a whole number from {least} up")


def checked_index(what: str, value: Any, count: int, of: str = "") -> int:
    """Return an index, 0 <= index < count; InputError for anything else.

    Args:
        of: what it counts in, such as " along axis 0".

    >>> checked_index("slice", 1.5, 8)
    Traceback (most recent call last):
        ...
    seg3dcam.errors.InputError: slice 1.5: legal are 0 to 7
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < count:
        raise InputError(f"{what} {value!r}{of}: legal are 0 to {count - 1}")
    return number


def check_number(
    what: str, value: Any, *, above: float | None = None, least: float | None = None, of: str = ""
) -> None:
    """Raise ConfigError unless `value` is a finite number, above or from a bound up.

    Args:
        of: what is counted, such as "GB".

    >>> check_number("memory_gb", -1, above=0, of="GB")
    Traceback (most recent call last):
        ...
    seg3dcam.errors.ConfigError: memory_gb -1: a finite number of GB above 0
    """
    legal = is_number(value) and math.isfinite(value)
    if legal and (above is None or value > above) and (least is None or value >= least):
        return
    bound = "" if above is None else f" above {above:g}"
    bound += "" if least is None else f" from {least:g} up"
    raise ConfigError(f"{what} {value!r}: a finite number{' of ' * bool(of)}{of}{bound}")


def is_whole(value: Any) -> bool:
    """Return whether something is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether something is a number; True and False are not."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_meta_tensor(value: Any) -> TypeGuard[MetaTensor]:
    """Return whether something is a MONAI MetaTensor.

    It does not import MONAI, which takes seconds: nobody holds a MetaTensor who has not imported
    `monai.data` before.

    >>> import torch
    >>> from monai.data import MetaTensor
    >>> is_meta_tensor(MetaTensor(torch.zeros(1, 2, 2))), is_meta_tensor(torch.zeros(1, 2, 2))
    (True, False)
    """
    kind = getattr(sys.modules.get("monai.data"), "MetaTensor", None)
    return kind is not None and isinstance(value, kind)
