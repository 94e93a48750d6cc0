"""The DICOM elements that are needed to read a scan, and what each of them may hold.

pydicom converts a value when it is first asked for, and returns whatever the file holds. That may
be a list or a text where the standard wants one number. `element` is the one place where values are
taken from a header. It returns a value of the right kind, or None if there is none.
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
    """Return an element's value as a plain number, text or tuple; None if it is absent or empty.

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
    except Exception as error:  # pydicom's converters may raise anything
        raise ScanError(
            f"{path}: the DICOM element {keyword} is {_short(found)}. Legal: {kind.legal}. Export "
            "the series again from the archive."
        ) from error


def numbers(header: Any, keyword: str, count: int) -> npt.NDArray[np.float64]:
    """Return an element's numbers, (count,); all are NaN if it does not hold that many numbers."""
    try:
        found = np.array(header.get(keyword), dtype=np.float64)
    except Exception:  # as in `element`
        return np.full(count, np.nan)
    return found if found.shape == (count,) else np.full(count, np.nan)


def in_words(header: Any, keyword: str) -> str:
    """Return any element as a text for a message; "none" if it is absent."""
    try:
        return _short(header.get(keyword, "none"))
    except Exception:  # as in `element`
        return "unreadable"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
