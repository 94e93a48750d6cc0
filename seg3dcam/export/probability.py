"""The network's probabilities of every class, as volumes that lie exactly on the scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from seg3dcam.errors import ConfigError
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.files import unique_names
from seg3dcam.files.writers.nifti import placed_header, write_slabs
from seg3dcam.files.writers.volumes import slabs

#: NIfTI has no float16: probabilities are whole numbers of this step, which every program scales.
STEP = 1 / 65535


def write_probability(path: Path, probability: torch.Tensor, explanation: Explanation) -> Path:
    """Write a probability (X, Y, Z) as 16-bit numbers with a scale, two bytes for a voxel.

    Raises:
        OutputError: the file cannot be written.
    """
    affine, reference = explanation.scan.affine, explanation.scan.header
    header = placed_header(path, probability.shape, np.uint16, affine, reference)
    header.set_slope_inter(STEP, 0)
    header["cal_min"], header["cal_max"] = 0, 1
    whole = (probability.clamp(0, 1) / STEP).round().numpy().astype("<u2")
    return write_slabs(path, header, (slab.tobytes(order="F") for slab in slabs(whole)))


class ProbabilityMaps:
    """Writes the probability of every class of a scan once, whatever is explained.

    Args:
        folder: gets `probability_<class>.nii.gz` for every class.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []

    def add(self, explanation: Explanation, name: str) -> None:
        """Write the probabilities of the first explanation's scan."""
        if self._files:
            return
        if explanation.probability is None:
            raise ConfigError(
                "format probability: this explanation has none; it is written where a scan is "
                "explained, and not from a case that is read back"
            )
        for index, of_class in enumerate(unique_names(explanation.class_names)):
            file = self._folder / f"probability_{of_class}.nii.gz"
            self._files.append(write_probability(file, explanation.probability(index), explanation))

    def finish(self) -> list[Path]:
        """Return the files."""
        return self._files
