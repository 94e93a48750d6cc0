"""What ITK reads, asked in a process of its own, which some damaged headers end."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own convention)


class ItkReader:
    """Reads one file after another; use as a context."""

    def __enter__(self) -> ItkReader:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def __call__(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Return voxels x, y, z and the RAS affine; None where ITK refuses the file or dies."""
        try:
            return self._pool.submit(_read, str(path)).result()
        except BrokenProcessPool:
            self.__enter__()
            return None


def _read(path: str) -> tuple[np.ndarray, np.ndarray] | None:
    sitk.ProcessObject_GlobalWarningDisplayOff()
    try:
        image = sitk.ReadImage(path)
    except RuntimeError:
        return None
    lps = np.eye(4)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        return None
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1, 1, 1]) @ lps
