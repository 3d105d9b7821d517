"""The part of a comparison in which arms learn tasks from scratch and are examined on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from intarsia.errors import OptionError
from intarsia.jobs.board import Board
from intarsia.ladder.arms import ResolvedArm, resolve
from intarsia.ladder.capacity import Capacity, run_bytes
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import EXAM_TRAINING, ExamOptions, PlanError
from intarsia.ladder.results import ExamArm, ExamResult, RunRole
from intarsia.ladder.run_spec import RunSpec, TaskLesson
from intarsia.ladder.schedule import ArmRuns, ArmSchedule, run_all
from intarsia.model.fingerprint import Fingerprint, fingerprint
from intarsia.tasks import task
from intarsia.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class ExamTrial:
    """One exam of a plan, and the arms as they are trained for it."""

    plan: Plan
    exam: ExamOptions
    arms: tuple[ResolvedArm, ...]
    """With the task's vocabulary."""
    fingerprints: Mapping[str, Fingerprint]
    config: TrainConfig
    """The options that all runs share; learning rate and seeds are filled in for each."""

    @classmethod
    def prepare(cls, plan: Plan, index: int) -> ExamTrial:
        """Make sure that an exam can be held.

        Raises:
            PlanError: it cannot.
        """
        import torch

        exam = plan.examined_on[index]
        arms = resolve(plan, exam.made.vocab_size)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        modules = _lesson(exam).modules
        return cls(
            plan=plan,
            exam=exam,
            arms=arms,
            fingerprints={arm.name: fingerprint(arm.config, device, modules=modules) for arm in arms},
            config=_train_config(exam, ("examined_on", index)),
        )

    @property
    def runs(self) -> int:
        """How many there are, at most."""
        return sum(len(schedule.tuning) + len(self.plan.seeds) for schedule in self.schedules(threads=1))

    @property
    def bytes_of_runs(self) -> list[int]:
        """The memory that a run of each arm needs."""
        return [run_bytes(arm.parameters, arm.config, self.config) for arm in self.arms]

    def schedules(self, threads: int) -> list[ArmSchedule]:
        """The runs of each arm."""
        return [self._schedule(arm, threads) for arm in self.arms]

    def _schedule(self, arm: ResolvedArm, threads: int) -> ArmSchedule:
        plan = self.plan
        rates = plan.rates(arm.arm, self.exam)
        tried = rates if len(rates) > 1 else ()
        return ArmSchedule(
            name=self._subject(arm),
            grid=rates,
            tuning=tuple(self._spec(arm, rate, plan.tuning.seed, "tuning", threads) for rate in tried),
            judged=lambda rate: [self._spec(arm, rate, seed, "judged", threads) for seed in plan.seeds],
            tuning_at=lambda rate: self._spec(arm, rate, plan.tuning.seed, "tuning", threads),
            beyond=plan.tuning.beyond,
        )

    def _subject(self, arm: ResolvedArm) -> str:
        return f"{self.exam.name} {arm.name}"

    def _spec(self, arm: ResolvedArm, rate: float, seed: int, role: RunRole, threads: int) -> RunSpec:
        return RunSpec(
            arm=arm.name,
            learning_rate=rate,
            seed=seed,
            role=role,
            model=arm.config.to_dict(),
            train=self.config.replace(lr=rate, seed=seed, data_seed=seed).to_dict(),
            lesson=_lesson(self.exam),
            fingerprint=self.fingerprints[arm.name].to_dict(),
            threads=threads,
        )

    def result(self, runs: Mapping[str, ArmRuns]) -> ExamResult:
        """What came of it."""
        exam = self.exam
        return ExamResult(
            name=exam.name,
            task=exam.task,
            title=task(exam.task).title,
            options=dict(exam.options),
            dials=dict(exam.dials),
            mixed=dict(exam.mixed),
            steps=exam.steps,
            rows=exam.rows,
            examples=exam.examples,
            arms=tuple(
                ExamArm(
                    name=arm.name,
                    parameters=arm.non_embedding_parameters,
                    learning_rate=runs[self._subject(arm)].learning_rate,
                    grid=(*self.plan.rates(arm.arm, exam), *runs[self._subject(arm)].beyond),
                    runs=runs[self._subject(arm)].runs,
                    beyond=runs[self._subject(arm)].beyond,
                )
                for arm in self.arms
            ),
        )


def hold_exams(
    trials: list[ExamTrial], directory: Path, capacity: Capacity, console: Console
) -> tuple[ExamResult, ...]:
    """Make the runs of all exams that are missing, each in a directory of its own under `directory`."""
    if not trials:
        return ()
    schedules = [schedule for trial in trials for schedule in trial.schedules(capacity.threads)]
    runs = sum(trial.runs for trial in trials)
    steps = sum(trial.runs * trial.config.steps for trial in trials)
    with Board(console, "exams", runs, steps) as board:
        made = run_all(schedules, directory, jobs=capacity.jobs, board=board, pool=capacity.workers())
    return tuple(trial.result(made) for trial in trials)


def _lesson(exam: ExamOptions) -> TaskLesson:
    return TaskLesson(
        exam.name,
        exam.task,
        dict(exam.options),
        exam.examples,
        exam.examine_every,
        turns=tuple(exam.turns),
        mixture=tuple(exam.mixture),
    )


def _train_config(exam: ExamOptions, place: tuple[str | int, ...]) -> TrainConfig:
    shape = {"steps": exam.steps, "rows": exam.rows, "length": exam.made.length}
    try:
        return TrainConfig.from_dict(
            {"warmup_steps": exam.steps // 20, **EXAM_TRAINING, **exam.training, **shape}
        )
    except OptionError as error:
        raise PlanError(error.message, (*place, "training", *error.path)) from None
