"""One case as a job: what is asked for, how it is run, what is written, and how it is known again.

result = run_job(Job(scan="ct.nii.gz", model="liver.yaml", target="tumour"))
load_explanation(result.folder).peak()
"""

from typing import TYPE_CHECKING

from seg3dcam.importing import lazy

if TYPE_CHECKING:  # type checkers and editors read the names here
    from seg3dcam.job.read_back import load_explanation
    from seg3dcam.job.run import JobResult, run_job
    from seg3dcam.job.settings import Job
else:  # at run time they are imported when they are first used
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Job", "JobResult", "load_explanation", "run_job"]
