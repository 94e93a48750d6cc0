"""Many scans: which cases there are."""

from seg3dcam.cohort.cases import CohortCase, read_cases

__all__ = ["CohortCase", "read_cases"]
