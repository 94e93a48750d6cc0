"""Two cohorts of the same cases: where do two models, or two checkpoints, differ?

    found = compare_cohorts("explained_a", "explained_b", out="compared")
    found.pairs[0]               # the case whose masks and maps differ most

Masks and maps are read from the volumes of both, so both cohorts need the format "nifti".
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import stats

from seg3dcam.checks import check_word  # noqa: F401
from seg3dcam.cohort.plan import OWN
from seg3dcam.errors import ConfigError, InputError, some
from seg3dcam.files import atomic, check_writable
from seg3dcam.geometry import same_grid
from seg3dcam.job.read_back import load_explanation
from seg3dcam.job.record import Entry, record_of
from seg3dcam.progress import Progress, silent

#: Figures that are tested in pairs -> what they are called.
TESTED = {
    "dice": "Dice with the truth",
    "predicted_ml": "volume in ml",
    "cam_inside_prediction": "part of the map inside the mask",
    "cam_outside_body": "part of the map outside of the body",
    "peak_to_prediction_mm": "peak to the mask in mm",
    "confidence": "confidence",
}

#: With fewer pairs nothing is tested.
FEWEST = 6
