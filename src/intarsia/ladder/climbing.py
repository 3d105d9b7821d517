"""A ladder from its plan to its findings: a comparison for each rung, and a gate behind each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from intarsia.errors import ConfigError
from intarsia.files import write_json, write_text
from intarsia.jobs.locks import locked
from intarsia.jobs.pool import Machines
from intarsia.jobs.signals import terminable
from intarsia.ladder.arms import mixers_of
from intarsia.ladder.capacity import keep_time
from intarsia.ladder.comparison import Place, carry_out, prepare_text
from intarsia.ladder.gates import GateDecision, decide, keep_decisions
from intarsia.ladder.ladder_record import record_of_ladder
from intarsia.ladder.ladder_results import Ascent, RungResult
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import PlanError
from intarsia.ladder.record import jsonable
from intarsia.ladder.report.ladder_page import write_ladder_report
from intarsia.ladder.report.ladder_terminal import show_ascent
from intarsia.ladder.rungs import LadderPlan, Rung
from intarsia.settings import toml

if TYPE_CHECKING:
    from rich.console import Console


def climb(
    ladder: LadderPlan,
    directory: str | Path,
    *,
    jobs: int | None = None,
    console: Console | None = None,
    machines: Machines | None = None,
) -> Ascent:
    """Climb a ladder: make the comparison of each rung with the arms that the gates let through, and find what all
    rungs show together.

    In `directory`: `verdict.json`, `report.html`, `plan.toml`, `data/`, and `rungs/NAME/` with the directory of each
    rung's comparison and its `gates.json`. What is there already is used, whatever ended it, and the numbers are those
    of an undisturbed climb; so a plan may get further sizes, budgets, arms or seeds and be climbed again.

    Args:
        ladder: what to climb.
        jobs: training runs at a time; by default as many as cores and memory allow.
        console: where to show progress and the result; standard output by default.
        machines: where runs are made (`intarsia.jobs.ray_cluster`); on this one by default.

    Raises:
        PlanError: some rung cannot be carried out, or its arms not matched; before anything is trained.
        DataError: the corpus or the tokenizer cannot be had, or leaves too few documents.
        TrainingError: the arms of a rung did not see the same data, which would be a bug.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, with all running models saved.
    """
    from rich.console import Console

    console = console or Console()
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    path = Path(directory)
    busy = ConfigError(f"another ladder is at work in {path}: wait for it, or choose another directory")
    with locked(path / ".lock", busy), terminable():
        return _Climber(ladder, path, jobs, console, machines).climb()


@dataclass(frozen=True)
class _Climber:
    ladder: LadderPlan
    path: Path
    jobs: int | None
    console: Console
    machines: Machines | None = None

    def climb(self) -> Ascent:
        """All rungs, and what they show."""
        began = time.monotonic()
        rungs = self.ladder.rungs
        self._check(rungs)
        write_text(self.path / "plan.toml", toml.dumps(self.ladder.to_dict()))
        results: list[RungResult] = []
        standing, ended = self.ladder.arms, ""
        try:
            for rung in rungs:
                if ended:
                    break
                results.append(self._rung(rung, standing))
                standing = [decision.arm for decision in results[-1].decisions if decision.climbs]
                ended = self._end(standing) if rung != rungs[-1] else ""
        finally:
            seconds = keep_time(self.path, time.monotonic() - began)
        ascent = Ascent.of(self.ladder, results, ended, seconds)
        report = self.path / "report.html"
        write_ladder_report(report, ascent)
        write_json(self.path / "verdict.json", jsonable(record_of_ladder(ascent, report)))
        show_ascent(self.console, ascent, report)
        return ascent

    def _place(self, rung: Rung) -> Place:
        """Where a rung's comparison is made, and which are those of its size with smaller budgets."""
        smaller: list[Path] = []
        for other in self.ladder.rungs:
            if other == rung:
                break
            if other.size == rung.size and self.ladder.branch:
                smaller.append(self._directory(other))
        return Place(self._directory(rung), home=self.path, earlier=tuple(smaller), machines=self.machines)

    def _directory(self, rung: Rung) -> Path:
        return self.path / "rungs" / rung.name

    def _check(self, rungs: Sequence[Rung]) -> None:
        """Make sure that every rung can be climbed.

        Raises:
            PlanError: one cannot; with its name.
        """
        for rung in rungs:
            try:
                prepare_text(rung.plan, self._place(rung), self.jobs, self.console)
            except PlanError as error:
                index = [size.name for size in self.ladder.sizes].index(rung.size)
                placed = self.ladder.placed(error, index)
                raise PlanError(f"at the rung {rung.name}: {placed.message}", placed.path) from None

    def _rung(self, rung: Rung, standing: Sequence[str]) -> RungResult:
        place = self._place(rung)
        self.console.rule(f"[bold]rung {rung.name}", align="left")
        plan = _with_arms(rung.plan, standing)
        results, verdict = carry_out(plan, place, self.jobs, self.console)
        decisions = decide(results, verdict, self.ladder.gates, self.ladder.baseline)
        keep_decisions(place.path, rung.name, self.ladder.gates, self.ladder.baseline, decisions)
        self._tell(decisions)
        return RungResult(rung, place.path, results, verdict, decisions)

    def _tell(self, decisions: Sequence[GateDecision]) -> None:
        for decision in decisions:
            if decision.arm != self.ladder.baseline or not decision.climbs:
                mark = "climbs" if decision.climbs else "stops"
                self.console.print(f"{decision.arm} {mark}. {decision.reason}", highlight=False, markup=False)

    def _end(self, standing: Sequence[str]) -> str:
        """Why no further rung is climbed; empty if there is one."""
        if self.ladder.baseline not in standing:
            return f"{self.ladder.baseline}, the baseline, finished no run: there is nothing to hold arms against."
        return "" if len(standing) > 1 else "No arm but the baseline climbs."


def _with_arms(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan with these arms of it alone."""
    arms = tuple(arm for arm in plan.arms if arm.name in names)
    if len(arms) == len(plan.arms):
        return plan
    # A change to a mixer is for the arms that have it, and somebody has to.
    have = mixers_of(plan, names)
    shared = dict(plan.model)
    if "mixers" in shared:
        shared["mixers"] = {name: change for name, change in shared["mixers"].items() if name in have}
    return replace(plan, arms=arms, model=shared)
