"""The DICOM elements that a scan is read by: what each of them may hold.

pydicom converts a value when it is first asked for, and gives whatever the file says: a list where
the standard has one number, a text where it has a number. `element` is the one place where a value
leaves a header; what comes out of it is of the element's kind, or absent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from seg3dcam.errors import ScanError

__all__ = ["element", "in_words", "numbers"]


def _count(value: Any) -> int:
    if isinstance(value, (bytes, list)) or int(value) != float(value) or not 0 < int(value) < 2**31:
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _slope(value: Any) -> float:
    if _number(value) == 0:
        raise ValueError
    return float(value)


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return str(value)


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(_word, [value] if isinstance(value, str) else value))


class _Kind(NamedTuple):
    read: Callable[[Any], Any]
    legal: str


_COUNT = _Kind(_count, "one whole number from 1 up")
_NUMBER = _Kind(_number, "one finite number")
_WORD = _Kind(_word, "one word")
_UID = _Kind(_word, "one UID")

_ELEMENTS = {
    "Rows": _COUNT,
    "Columns": _COUNT,
    "NumberOfFrames": _COUNT,
    "SamplesPerPixel": _COUNT,
    "BitsAllocated": _COUNT,
    "RescaleSlope": _Kind(_slope, "one finite number other than 0"),
    "RescaleIntercept": _NUMBER,
    "Modality": _WORD,
    "PhotometricInterpretation": _WORD,
    "ImageType": _Kind(_words, "words"),
    "SOPClassUID": _UID,
    "SOPInstanceUID": _UID,
    "SeriesInstanceUID": _UID,
    "TransferSyntaxUID": _UID,
    "MediaStorageSOPClassUID": _UID,
}


def element(header: Any, keyword: str, path: Path) -> Any:
    """Return an element's value as a plain number, text or tuple; None where it is absent or empty.

    Raises `ScanError`, which names the file and the element, for a value of another kind.
    """
    kind = _ELEMENTS[keyword]
    found: Any = "what cannot be decoded"
    try:
        # pydicom warns of unusual values; whether one can be used is decided below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = header.get(keyword)
        if found is None or (isinstance(found, (str, bytes, list)) and not found):
            return None
        return kind.read(found)
    except Exception as error:  # pydicom raises whatever a value makes its converters raise
        raise ScanError(
            f"{path}: the DICOM element {keyword} is {_short(found)}. Legal: {kind.legal}. Export "
            "the series again from the archive."
        ) from error


def numbers(header: Any, keyword: str, count: int) -> npt.NDArray[np.float64]:
    """Return exactly so many numbers, NaN where the element holds anything else."""
    try:
        found = np.array(header.get(keyword), dtype=np.float64)
    except Exception:  # as in `element`
        return np.full(count, np.nan)
    return found if found.shape == (count,) else np.full(count, np.nan)


def in_words(header: Any, keyword: str) -> str:
    """Return any element as a text for a message, whatever it holds; "none" where it is absent."""
    try:
        return _short(header.get(keyword, "none"))
    except Exception:  # as in `element`
        return "unreadable"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
