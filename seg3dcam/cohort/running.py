"""Explain many scans, one by one: what fails is written down, and stops nothing.

    result = run("imagesTs", model="liver.yaml", out="explained")
    result.failed                # name of a case -> why
    result.tables[0]             # explained/cohort.csv: a row for each case, class, layer, method

Every case is a job of its own in a folder of its own, so what is done stays, whenever the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seg3dcam.checks import check_whole_number
from seg3dcam.cohort.calibration import ClassReliability, RiskCoverage
from seg3dcam.cohort.cases import CohortCase, read_cases
from seg3dcam.cohort.on_ray import connected
from seg3dcam.cohort.plan import (
    PlannedCase,
    check_settings,
    note_ended,
    plan_in_words,
    planned,
    to_do,
)
from seg3dcam.cohort.results import Elsewhere, Here, results_at
from seg3dcam.cohort.summary import SummedUp, sum_up, undisturbed
from seg3dcam.cohort.work import BUSY, NOT_KEPT, Work, explained_at, tidy
from seg3dcam.cohort.workers import local_workers, spread
from seg3dcam.errors import ConfigError, OutputError, some
from seg3dcam.files.remote import Place, without_login
from seg3dcam.job.run import advised, check_before_loading, model_of
from seg3dcam.job.settings import Job
from seg3dcam.models import SegModel
from seg3dcam.progress import Progress, silent
from seg3dcam.settings import validate
from seg3dcam.targets.named import REGIONS, SCORES

#: Settings of a job that each case has for itself.
_OF_A_CASE = ("scan", "truth", "out", "case")

#: The formats of a case by default: those of one case take a hundred times the room of the scan.
KEPT = ("nifti", "html")


#: After so many cases whose results cannot be kept the run ends.
_IN_A_ROW = 3

#: So often tables are written again where cases of another part were done meanwhile.
_ROUNDS = 3


@dataclass(frozen=True)
class CohortResult:
    """What a run has done.

    Attributes:
        out: its folder, of this machine or at an address.
        done: names of the cases that this run has explained.
        skipped: names of those that were up to date before.
        failed: name -> why, also of those that failed before and were not tried again.
        tables: the files with a row for each case, class, layer and method.
        page: the same for a browser, with the cases to look at first on top.
        risk_coverage: class -> what the network's confidence is worth; of cases with a truth.
        reliability: class -> how true the probabilities of its voxels are; of cases with a truth in
            which the class is drawn.
    """

    out: Place
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: Mapping[str, str]
    tables: tuple[Place, ...]
    page: Place
    risk_coverage: Mapping[str, RiskCoverage]
    reliability: Mapping[str, ClassReliability]


def run(
    source: str | Path,
    *,
    model: str,
    out: str | Place,
    trust: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    num_parts: int = 1,
    part_id: int = 0,
    retry_failed: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> CohortResult:
    """Explain all scans of a cohort that are not explained yet.

    Args:
        source: see `read_cases`.
        model: see `Job.model`.
        out: a folder, or an address of a store of objects, such as s3://bucket/explained; it gets
            a folder for every case, `cohort.csv`, `cohort.parquet` and `index.html`, and the folder
            "cohort" with a log for every case.
        trust: allow the model's own Python code to run.
        workers: processes that explain cases side by side, each with a model of its own; on several
            GPUs in turns. None explains them in this process, or with `ray` in as many as fit.
        ray: the address of a Ray cluster that the workers are on, or "local", see `connected`.
        cpus, gpus: what each worker takes on a Ray cluster; 0.5 GPUs are half of one.
        num_parts, part_id: every `num_parts`-th case from number `part_id` on, counted from 0, such
            as for an array of jobs on a cluster.
        retry_failed: try cases again that failed before, with the same files and settings.
        progress: called with ("cases", done, total); the word says how many failed, if any did.
        say: called with a line about what is to be done, and for every case that failed.
        settings: more settings of a `Job`. What is written is by default "nifti" and "html".

    Raises:
        ConfigError: illegal settings, a wrong source, an output folder of other settings, a Ray
            cluster that does not answer; before any work begins.
        ModelError: the model cannot be loaded.
        OutputError: the disk is full, or the store of the results can no longer be reached. What is
            done stays.

    Example:
        >>> result = run("imagesTs", model="liver.yaml", out="explained")  # doctest: +SKIP
        >>> len(result.done), result.failed  # doctest: +SKIP
        (40, {})
    """
    template = _template(model, settings)
    _check_parts(num_parts, part_id)
    _check_workers(workers, ray, cpus, gpus)
    progress, say = progress or silent, say or _quiet
    with ExitStack() as stack:
        with _before_any_work():
            results = stack.enter_context(results_at(out))
        cases = read_cases(source, without=results.place)
        _check_job(template, cases)
        cluster = None if ray is None else stack.enter_context(connected(ray, cpus, gpus))
        in_workers = workers is not None or cluster is not None
        _check_places(results.place, cases, in_workers=in_workers)
        # Where workers have the model, this process needs only its name and its weights' hash.
        here = template.model_copy(update={"device": "cpu"}) if in_workers else template
        loaded = model_of(here, trust=trust)
        # What is recommended takes the place of "auto" before cases are known by the settings.
        template, advice = advised(template, loaded)
        if advice:
            say(advice)
        with _before_any_work():
            plan = _planned(results, cases, template, loaded)
        waiting = to_do(plan[part_id::num_parts], retry_failed=retry_failed)
        classes = len(loaded.class_names)
        say(plan_in_words(plan, waiting, classes, results.folder, results.free))
        work = Work(template, results.for_workers, trust, threads=1)
        if cluster is not None:
            most = min(cluster.workers(), workers or len(cases))
            ended = spread(waiting, cluster.opened(work), most, say)
        elif workers is not None:
            ended = spread(waiting, local_workers(work, workers), workers, say)
        else:
            ended = _in_this_process(waiting, loaded, work)
        tally = _Tally(results, say)
        progress(tally.step, 0, len(waiting))
        try:
            with closing(ended):
                for number, (one, error, died) in enumerate(ended, 1):
                    tally.note(one, error, died)
                    progress(tally.step, number, len(waiting))
        except BaseException:
            # Whatever ends the run, the tables say what there is by now.
            try:
                results.in_time(lambda: tally.sum_up(plan, template.methods[0]))
            except OutputError as error:
                say(f"the tables could not be written: {error}")
            raise
        found = tally.sum_up(plan, template.methods[0])
    _say_what_confidence_is_worth(found, say)
    return CohortResult(
        out=results.place,
        done=tuple(name for name in tally.done if name not in found.failed),
        skipped=tuple(one.name for one in plan if one.state == "done"),
        failed=found.failed,
        tables=tuple(results.place / table.name for table in found.tables),
        page=results.place / found.page.name,
        risk_coverage=found.risk_coverage,
        reliability=found.reliability,
    )


def _planned(
    results: Here | Elsewhere, cases: Sequence[CohortCase], template: Job, model: SegModel
) -> tuple[PlannedCase, ...]:
    """Return what is to be done; legal settings are kept with the results."""
    results.refresh([case.name for case in cases])
    plan = planned(cases, template, model, results.folder, results.is_whole)
    check_settings(results.folder, template, model)
    results.keep()
    return plan


@contextmanager
def _before_any_work() -> Iterator[None]:
    """Raise ConfigError for an OutputError, since nothing was begun."""
    try:
        yield
    except OutputError as error:
        raise ConfigError(str(error)) from error


def _check_places(out: Place, cases: Sequence[CohortCase], *, in_workers: bool) -> None:
    """Raise ConfigError where results would go into a scan's folder, or workers cannot see it."""
    for case in cases:
        folder = f"{out}/{case.name}/"
        for file in (file for file in case.files if not isinstance(file, Path)):
            if folder.startswith(f"{file}/"):
                raise ConfigError(
                    f"out {without_login(out)}: the case {case.name!r} would be written to the "
                    "scan's own folder; choose another one"
                )
    places = [out, *(file for case in cases for file in case.files)]
    if in_workers and any(getattr(one, "protocol", "") == "memory" for one in places):
        raise ConfigError("memory:// is seen by this process alone: leave out workers and ray")


def _say_what_confidence_is_worth(found: SummedUp, say: Callable[[str], None]) -> None:
    for label, curve in found.risk_coverage.items():
        say(
            f"{label}: area under risk (1 - Dice) by coverage {curve.area:.3f} in the order of the "
            f"confidence; by chance {curve.by_chance:.3f}, at best {curve.at_best:.3f}, p = "
            f"{curve.p_value:.3f}"
        )
    for label, one in found.reliability.items():
        say(f"{label}: {one.words}; see `seg3dcam calibrate`")


@dataclass(frozen=True)
class _Tally:
    """How the cases of a run have ended so far.

    Attributes:
        results: of the cohort.
        say: see `run`.
        done, failed: see `CohortResult`.
        not_kept: the errors of the last cases, all of which the results' store did not take.
    """

    results: Here | Elsewhere
    say: Callable[[str], None]
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    not_kept: list[str] = field(default_factory=list)

    @property
    def step(self) -> str:
        """What progress is of."""
        return f"cases, {len(self.failed)} failed" if self.failed else "cases"

    def note(self, one: PlannedCase, error: str | None, died: bool) -> None:
        """Keep how a case has ended; raise OutputError where nothing more can be kept."""
        if error is None:
            self.done.append(one.name)
        elif error.startswith(BUSY):
            self.say(f"{one.name} is {error}")
        else:
            self.failed[one.name] = error
            self.say(f"{one.name} failed: {error}")
        if error is not None and died:
            note_ended(self.results.folder, one, error)
            tidy(self.results.folder / one.name)
            try:
                self.results.keep()
            except OutputError as raised:
                self.say(str(raised))
        if error is None or not error.startswith(NOT_KEPT):
            self.not_kept.clear()
            return
        self.not_kept.append(error)
        if len(self.not_kept) == _IN_A_ROW:
            raise OutputError(f"{_IN_A_ROW} cases in a row: {error}")

    def sum_up(self, plan: Sequence[PlannedCase], method: str) -> SummedUp:
        """Write the tables and the page of all cases, as they are now."""
        results, names = self.results, [one.name for one in plan]
        results.refresh(names)
        for _ in range(_ROUNDS):
            with undisturbed(), results.writing():
                found = sum_up(
                    results.folder, plan, self.done, self.failed, method, results.is_whole
                )
            results.keep()
            # At an address another part may have ended meanwhile, whose tables these replace.
            if not results.refresh(names):
                break
        return found


def _check_job(template: Job, cases: Sequence[CohortCase]) -> None:
    """Raise ConfigError for settings that do not go together, or need truths that are missing."""
    needs = SCORES[template.score].needs_truth or REGIONS[template.region_name].needs_truth
    without = [case.name for case in cases if case.truth is None]
    if needs and without:
        raise ConfigError(
            f"score {template.score} with region {template.region_name} needs a truth for every "
            f"case: name them in a table with a column 'truth'; none has {some(without)}"
        )
    truth = "its truth" if len(without) < len(cases) else None
    check_before_loading(template.model_copy(update={"truth": truth}))


def _template(model: str, settings: Mapping[str, Any]) -> Job:
    """Return a job with the settings of every case; ConfigError for illegal ones."""
    if own := [name for name in _OF_A_CASE if name in settings]:
        raise ConfigError(f"{own[0]}: every case of a cohort has its own")
    given = {"format": list(KEPT)} | {"scan": "of the case", "model": model, **settings}
    template = validate(given, Job, "cohort")
    # The page shows a small picture of every case.
    return template.model_copy(update={"format": [*template.formats, "thumb"]})


def _check_parts(num_parts: int, part_id: int) -> None:
    check_whole_number("num_parts", num_parts)
    check_whole_number("part_id", part_id, least=0)
    if part_id >= num_parts:
        raise ConfigError(f"part_id {part_id}: legal are 0 to {num_parts - 1}")


def _check_workers(
    workers: int | None, ray: str | None, cpus: float | None, gpus: float | None
) -> None:
    if workers is not None:
        check_whole_number("workers", workers)
    for name, value in {"cpus": cpus, "gpus": gpus}.items():
        if value is None:
            continue
        if ray is None:
            raise ConfigError(f"{name} is what a worker takes on a Ray cluster: give ray, too")
        if isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ConfigError(f"{name} {value!r}: a number from 0 on, such as 0.5")


def _in_this_process(
    waiting: Sequence[PlannedCase], model: SegModel, work: Work
) -> Generator[tuple[PlannedCase, str | None, bool]]:
    """Yield each case when it is done, as `spread` does."""
    for one in waiting:
        yield one, explained_at(one, model, work.out), False


def _quiet(line: str) -> None:
    """Say nothing."""
