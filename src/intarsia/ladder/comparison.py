"""A comparison from its plan to its verdict."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from intarsia.errors import ConfigError
from intarsia.files import write_json, write_text
from intarsia.jobs.locks import locked
from intarsia.jobs.pool import Machines
from intarsia.jobs.signals import terminable
from intarsia.ladder.capacity import Capacity, keep_time, possible_jobs
from intarsia.ladder.environment import environment
from intarsia.ladder.exam_trial import ExamTrial, hold_exams
from intarsia.ladder.fairness import check_batches
from intarsia.ladder.history import History, not_counted
from intarsia.ladder.measuring import measure
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import Budget, PlanError
from intarsia.ladder.record import jsonable, record_of
from intarsia.ladder.report import write_report
from intarsia.ladder.report.terminal import introduce, show_verdict
from intarsia.ladder.results import NO_TEXT, Results
from intarsia.ladder.speeds import training_speeds
from intarsia.ladder.text_trial import TextTrial
from intarsia.ladder.verdict import Verdict, judge
from intarsia.settings import toml

if TYPE_CHECKING:
    from rich.console import Console


def compare(
    plan: Plan,
    directory: str | Path,
    *,
    jobs: int | None = None,
    quick: bool = False,
    console: Console | None = None,
    machines: Machines | None = None,
) -> Verdict:
    """Train the arms of a plan, judge them and write the report.

    In `directory`: `verdict.json`, `report.html`, `plan.toml`, `history/` with all verdicts and plans, `runs/` and
    `exams/` with a directory for each training run, `data/` with the tokenizer and the tokenised corpus. What is there
    already is used: finished runs are skipped and half-finished ones go on, whatever ended them, and the numbers are
    those of an undisturbed comparison.

    Args:
        plan: what to compare.
        jobs: training runs at a time; by default as many as cores and memory allow. The cores are divided among them.
        quick: run the plan's quick form, which shows that everything works and judges nothing.
        console: where to show progress and the result; standard error and standard output by default.
        machines: where runs are made (`intarsia.jobs.ray_cluster`); on this one by default.

    Returns:
        The verdict, which is also in `verdict.json`.

    Raises:
        PlanError: the plan cannot be carried out.
        DataError: the corpus or the tokenizer cannot be had, or leaves too few documents.
        TrainingError: the arms did not see the same data, which would be a bug.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, with all running models saved.
    """
    from rich.console import Console

    console = console or Console()
    plan = plan.as_quick() if quick else plan
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    path = Path(directory)
    busy = ConfigError(f"another comparison is at work in {path}: wait for it, or choose another directory")
    with locked(path / ".lock", busy), terminable():
        return carry_out(plan, Place(path, home=path, machines=machines), jobs, console)[1]


@dataclass(frozen=True)
class Place:
    """Where a comparison is made."""

    path: Path
    """Its directory."""
    home: Path
    """Where the data are, and what all comparisons have in common that are made together: threads and speeds."""
    earlier: tuple[Path, ...] = ()
    """Directories of comparisons of the same models with smaller budgets, whose runs these may go on from."""
    machines: Machines | None = None
    """Where runs are made; None: on this one."""


def carry_out(plan: Plan, place: Place, jobs: int | None, console: Console) -> tuple[Results, Verdict]:
    """Make a comparison that nobody else is at: what `compare` does, without its locks."""
    write_text(place.path / "plan.toml", toml.dumps(plan.to_dict()))
    results = _results(plan, place, jobs, console)
    return results, _conclude(plan, results, place.path, console)


def prepare_text(plan: Plan, place: Place, jobs: int | None, console: Console) -> TextTrial | None:
    """The part of a plan that is about text, if it has one, with the data; all of it can be carried out.

    Raises:
        PlanError: it cannot.
        DataError: the corpus or the tokenizer cannot be had, or leaves too few documents.
    """
    if plan.budget is None:
        return None
    if place.machines is not None and plan.processes > 1:
        raise PlanError(
            "runs of several processes are made on this machine alone: leave out --ray", ("processes",)
        )
    data, speeds = place.home / "data", None
    if plan.budget.seconds is not None:
        rehearsal = TextTrial.prepare(plan, Budget(steps=10**9), data, console)
        possible = possible_jobs(rehearsal.runs, rehearsal.bytes_of_runs, place.machines)
        capacity = Capacity.of(place.home, jobs, possible, place.machines)
        speeds = training_speeds(rehearsal, place.home, capacity.threads, console)
    earlier = tuple(path / "runs" for path in place.earlier)
    return TextTrial.prepare(plan, plan.budget, data, console, speeds=speeds, earlier=earlier)


def _results(plan: Plan, place: Place, jobs: int | None, console: Console) -> Results:
    """Make all that is missing, and return all that there is."""
    began, path = time.monotonic(), place.path
    exams = [ExamTrial.prepare(plan, index) for index in range(len(plan.examined_on))]
    text = prepare_text(plan, place, jobs, console)
    trials: list[TextTrial | ExamTrial] = [*([] if text is None else [text]), *exams]
    capacity = Capacity.of(
        place.home,
        jobs,
        possible_jobs(
            sum(trial.runs for trial in trials),
            [need for trial in trials for need in trial.bytes_of_runs],
            place.machines,
        ),
        place.machines,
    )
    introduce(console, plan, text, exams, capacity)
    try:
        found = NO_TEXT if text is None else _read_text(text, path, capacity, console)
        examined = hold_exams(exams, path / "exams", capacity, console)
    finally:
        seconds = keep_time(path, time.monotonic() - began)
    fingerprints = {arm: one for trial in reversed(trials) for arm, one in trial.fingerprints.items()}
    machine = environment(
        fingerprints, jobs=capacity.jobs, threads=capacity.threads, data={} if text is None else text.data
    )
    return replace(found, exams=examined, environment=machine, seconds=seconds)


def _read_text(trial: TextTrial, path: Path, capacity: Capacity, console: Console) -> Results:
    """Train the arms on text, and measure them."""
    runs = trial.train(path / "runs", capacity, console)
    check_batches((run for arm in runs.values() for run in arm.runs), path / "runs")
    measurements, samples = measure(path, trial.measure_spec(runs, capacity.threads), console)
    return trial.results(runs, measurements, samples)


def _conclude(plan: Plan, results: Results, path: Path, console: Console) -> Verdict:
    """Judge, and write and show what came out."""
    report = path / "report.html"
    record = record_of(plan, results, report)
    if results.arms:
        history, left_out = History.of(path, plan, results), not_counted(path / "runs", plan, results)
        notes = history.notes(plan, left_out)
        verdict = judge(plan, results, confidence=history.confidence(plan), notes=notes)
        verdict = replace(verdict, record={**record, **history.record(left_out)})
        history.keep(plan, jsonable(verdict.to_dict()))
    else:
        verdict = replace(judge(plan, results), record=record)
    write_report(report, plan, results, verdict)
    write_json(path / "verdict.json", jsonable(verdict.to_dict()))
    show_verdict(console, results, verdict, report)
    return verdict
