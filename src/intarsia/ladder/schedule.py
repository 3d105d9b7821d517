"""Making all runs of a comparison: what is done is skipped, what is half done goes on, what fails is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from intarsia.jobs.board import Board
from intarsia.jobs.child import DONE, INTERRUPTED
from intarsia.jobs.pool import Event, Workers, describe_exit
from intarsia.ladder.rate_choice import next_rate
from intarsia.ladder.results import Failure, RunResult, choose_rate
from intarsia.ladder.run_folder import RunFolder
from intarsia.ladder.run_spec import RunSpec


@dataclass(frozen=True)
class ArmSchedule:
    """The runs of one arm: those that choose its learning rate, then those that are judged."""

    name: str
    """`RunSpec.subject` of its runs."""
    grid: tuple[float, ...]
    tuning: tuple[RunSpec, ...]
    """Empty where there is one rate and nothing to choose."""
    judged: Callable[[float], Sequence[RunSpec]]
    """The judged runs at a learning rate."""
    tuning_at: Callable[[float], RunSpec] | None = None
    """The tuning run at a rate that is not in the grid; None: none is tried."""
    beyond: int = 0
    """How many of those are tried at most, one after the other, while the best rate is at an end of what was tried."""


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm, done or failed, and the rate that was chosen."""

    learning_rate: float | None
    runs: tuple[RunResult, ...]
    beyond: tuple[float, ...] = ()
    """The rates beyond the grid that were tried since the best was at its end."""


def run_all(
    schedules: Sequence[ArmSchedule], directory: Path, *, jobs: int, board: Board, pool: Workers
) -> dict[str, ArmRuns]:
    """Make the runs of all arms, `jobs` at a time, each in a process of its own.

    Tuning runs come first; an arm's judged runs follow as soon as its learning rate is chosen, all arms' first
    seeds before their second. A run that fails is kept as failed and the others go on.

    Raises:
        KeyboardInterrupt: after the running ones were stopped with a checkpoint.
    """
    order = {schedule.name: index for index, schedule in enumerate(schedules)}
    waiting: list[tuple[tuple[int, int, int], RunSpec]] = []
    asked: list[RunSpec] = []
    """In the order of the plan: results are told in it, and not as runs happen to end, which would decide about their
    last digits."""
    finished: dict[str, RunResult] = {}
    """By the key of the spec."""
    running: dict[str, RunSpec] = {}
    chosen: dict[str, float | None] = {}
    beyond: dict[str, list[RunSpec]] = {schedule.name: [] for schedule in schedules}
    told: set[tuple[str, ...]] = set()

    def enqueue(specs: Sequence[RunSpec]) -> None:
        asked.extend(specs)
        for position, spec in enumerate(specs):
            folder = RunFolder(directory / spec.directory_name)
            changed = () if folder.spec.exists() else tuple(spec.changed_since(directory))
            if changed and changed not in told:
                told.add(changed)
                board.say(
                    f"Runs of {spec.subject} are made anew and earlier ones are not used, since they would give other "
                    f"numbers now: {'; '.join(changed)}."
                )
            folder.claim(spec)
            if folder.state == "open":
                waiting.append(((int(spec.role == "judged"), position, order[spec.subject]), spec))
            else:
                finished[spec.key] = folder.read(spec)
                board.skip(spec.steps)
        waiting.sort(key=lambda item: item[0])

    def advance(schedule: ArmSchedule) -> None:
        """Choose the learning rate and go on to the judged runs, once that is possible."""
        if schedule.name in chosen:
            return
        added = beyond[schedule.name]
        while True:
            specs = [*schedule.tuning, *added]
            if any(spec.key not in finished for spec in specs):
                return
            scores = {spec.learning_rate: finished[spec.key].tuning_score for spec in specs}
            rate = choose_rate(scores) if schedule.tuning else schedule.grid[0]
            best = next((spec for spec in specs if spec.learning_rate == rate), None)
            if best is None or finished[best.key].is_perfect or len(added) == schedule.beyond:
                break
            further = next_rate(tuple(scores), best.learning_rate)
            if further is None or schedule.tuning_at is None:
                break
            board.say(
                f"{schedule.name} did best with {best.learning_rate:g}, at the end of its grid: trying {further:g}."
            )
            added.append(schedule.tuning_at(further))
            board.add(1, added[-1].steps)
            enqueue(added[-1:])
        chosen[schedule.name] = rate
        if rate is not None:
            enqueue(schedule.judged(rate))

    def conclude(key: str, status: int) -> None:
        spec = running.pop(key)
        folder = RunFolder(directory / spec.directory_name)
        if status == DONE and folder.outcome.exists():
            run = finished[key] = folder.read(spec)
            board.finish(key, run.summary)
        else:
            failure = folder.read_failure() or _unexplained(status, folder)
            folder.write_failure(failure)
            finished[key] = folder.read(spec)
            board.finish(key, f"{failure.kind}: {failure.message}", good=False)
        advance(next(schedule for schedule in schedules if schedule.name == spec.subject))

    def happened(key: str, event: Event | int) -> None:
        if isinstance(event, int):
            conclude(key, event)
        elif event.get("event") == "begin":
            board.resumed(key, event["done"])
        elif event.get("event") == "step":
            board.step(key, event["done"], event["loss"], event["speed"])
        elif event.get("event") == "stage":
            board.stage(key, event["stage"])
        elif event.get("event") == "lost":
            board.say(f"{running[key].title}: {event['why']}; it goes on elsewhere.")

    for schedule in schedules:
        enqueue(schedule.tuning)
    for schedule in schedules:
        advance(schedule)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                _, spec = waiting.pop(0)
                folder = RunFolder(directory / spec.directory_name)
                running[spec.key] = spec
                board.start(
                    spec.key, f"{spec.title}{' (tuning)' if spec.role == 'tuning' else ''}", spec.steps
                )
                pool.start(spec.key, "intarsia.ladder.worker", folder.path, folder.log, spec.threads)
            if event := pool.wait(0.25):
                happened(*event)
    except BaseException:
        if pool.busy:
            board.say("Stopping: the running models are being saved. Ctrl-C again stops at once.")
        pool.stop()
        raise
    return {
        schedule.name: ArmRuns(
            chosen.get(schedule.name),
            tuple(finished[spec.key] for spec in asked if spec.subject == schedule.name),
            tuple(spec.learning_rate for spec in beyond[schedule.name]),
        )
        for schedule in schedules
    }


def _unexplained(status: int, folder: RunFolder) -> Failure:
    """The failure of a child that could not say what happened to it."""
    if status < 0 or status == INTERRUPTED:
        what = describe_exit(status) if status < 0 else "was stopped from outside"
        return Failure("killed", f"The process {what}.")
    return Failure(
        "crashed", f"The process {describe_exit(status)}; see {folder.log.name} in {folder.path.name}."
    )
