"""Many scans: which cases there are, what is to be done, and doing it."""

from seg3dcam.cohort.cases import CohortCase, read_cases
from seg3dcam.cohort.plan import PlannedCase, planned
from seg3dcam.cohort.running import CohortResult, run

__all__ = ["CohortCase", "CohortResult", "PlannedCase", "planned", "read_cases", "run"]
