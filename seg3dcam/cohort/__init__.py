"""Many scans: which cases there are, what is to be done, doing it, and what came out.

cases       which scans there are        plan        what is done and what is not
running     the run, from source to page
work        one case                     workers, on_ray  processes that do it
results     where what comes out lies, on this machine or at an address
table, page, triage, calibration         what came out
comparing   two cohorts of the same cases
group       where the maps of all lie, in one space
"""

from seg3dcam.cohort.calibration import RiskCoverage, risk_coverage
from seg3dcam.cohort.cases import CohortCase, read_cases
from seg3dcam.cohort.comparing import CohortComparison, compare_cohorts
from seg3dcam.cohort.group import GroupMap, group_map
from seg3dcam.cohort.plan import PlannedCase, planned
from seg3dcam.cohort.running import CohortResult, run

__all__ = [
    "CohortCase",
    "CohortComparison",
    "CohortResult",
    "GroupMap",
    "PlannedCase",
    "RiskCoverage",
    "compare_cohorts",
    "group_map",
    "planned",
    "read_cases",
    "risk_coverage",
    "run",
]
