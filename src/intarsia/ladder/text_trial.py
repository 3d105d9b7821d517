"""The part of a comparison in which models learn text and are judged by it: data, options, runs, baselines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intarsia.data import TokenDataset, Tokenizer
from intarsia.errors import ConfigError
from intarsia.jobs.board import Board
from intarsia.jobs.machine import processor
from intarsia.ladder.arms import ResolvedArm, resolve
from intarsia.ladder.branches import stable_phase
from intarsia.ladder.capacity import Capacity, run_bytes
from intarsia.ladder.documents import Chosen, choose_documents
from intarsia.ladder.measuring import MeasuredArm, MeasureSpec
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import Budget, PlanError
from intarsia.ladder.results import ArmResult, Baseline, Measurements, Results, RunRole, Sample
from intarsia.ladder.run_spec import RunSpec, TextLesson
from intarsia.ladder.schedule import ArmRuns, ArmSchedule, run_all
from intarsia.ladder.student import Array
from intarsia.model.fingerprint import Fingerprint, fingerprint
from intarsia.model.language_model import cost_of
from intarsia.training import NGrams, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TextTrial:
    """What the runs of a plan have in common, and the arms as they are trained."""

    plan: Plan
    dataset: TokenDataset
    tokenizer: Tokenizer
    documents: Chosen
    arms: tuple[ResolvedArm, ...]
    fingerprints: Mapping[str, Fingerprint]
    """What decides the numbers of each arm's runs beside the plan."""
    configs: Mapping[str, Mapping[RunRole, TrainConfig]]
    """The options of each arm's runs; learning rate and seeds are filled in for each. All arms share them, but for the
    number of steps where the budget is one of FLOPs or seconds."""
    earlier: tuple[Path, ...] = ()
    """Directories of runs with the same models and smaller budgets, whose stable phase these may go on from."""

    @classmethod
    def prepare(
        cls,
        plan: Plan,
        budget: Budget,
        directory: Path,
        console: Console,
        *,
        speeds: Mapping[str, float] | None = None,
        earlier: tuple[Path, ...] = (),
    ) -> TextTrial:
        """Prepare the data in `directory`, and make sure that all of the plan can be carried out.

        Args:
            speeds: tokens per second with which each arm trains, for a budget of seconds.

        Raises:
            PlanError: it cannot.
            DataError: the corpus or the tokenizer cannot be had, or leaves too few documents.
        """
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
        if gpus is not None and plan.processes > gpus:
            raise PlanError(
                f"{plan.processes} processes take a GPU each, and this machine has {gpus}", ("processes",)
            )
        with console.status("Preparing the corpus and the tokenizer"):
            dataset, tokenizer = plan.corpus.prepare(directory, progress=False)
        arms = resolve(plan, tokenizer.vocab_size)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        judged = _judged_configs(plan, budget, arms, speeds or {})
        return cls(
            plan=plan,
            dataset=dataset,
            tokenizer=tokenizer,
            documents=choose_documents(plan, dataset.heldout.documents),
            arms=arms,
            fingerprints={arm.name: fingerprint(arm.config, device) for arm in arms},
            configs={
                name: {"judged": config, "tuning": _tuning_config(plan, config)}
                for name, config in judged.items()
            },
            earlier=earlier,
        )

    @property
    def runs(self) -> int:
        """How many there are, at most."""
        rates = [len(self.plan.rates(arm)) for arm in self.plan.arms]
        return sum(count * (count > 1) + len(self.plan.seeds) for count in rates)

    @property
    def bytes_of_runs(self) -> list[int]:
        """The memory that a run of each arm needs."""
        return [
            self.plan.processes * run_bytes(arm.parameters, arm.config, self.configs[arm.name]["judged"])
            for arm in self.arms
        ]

    def train(self, directory: Path, capacity: Capacity, console: Console) -> dict[str, ArmRuns]:
        """Make all runs, each in a directory of its own under `directory`."""
        schedules = [self._schedule(arm, capacity.threads) for arm in self.arms]
        seeds = len(self.plan.seeds)
        steps = sum(
            len(item.tuning) * self.configs[item.name]["tuning"].steps
            + seeds * self.configs[item.name]["judged"].steps
            for item in schedules
        )
        with Board(console, self.plan.name, self.runs, steps) as board:
            return run_all(schedules, directory, jobs=capacity.jobs, board=board, pool=capacity.workers())

    def _schedule(self, arm: ResolvedArm, threads: int) -> ArmSchedule:
        plan = self.plan
        rates = plan.rates(arm.arm)
        tried = rates if len(rates) > 1 else ()
        return ArmSchedule(
            name=arm.name,
            grid=rates,
            tuning=tuple(self._spec(arm, rate, plan.tuning.seed, "tuning", threads) for rate in tried),
            judged=lambda rate: [self._spec(arm, rate, seed, "judged", threads) for seed in plan.seeds],
            tuning_at=lambda rate: self._spec(arm, rate, plan.tuning.seed, "tuning", threads),
            beyond=plan.tuning.beyond,
        )

    def _spec(self, arm: ResolvedArm, rate: float, seed: int, role: RunRole, threads: int) -> RunSpec:
        train = self.dataset.train
        spec = RunSpec(
            arm=arm.name,
            learning_rate=rate,
            seed=seed,
            role=role,
            model=arm.config.to_dict(),
            train=self.configs[arm.name][role].replace(lr=rate, seed=seed, data_seed=seed).to_dict(),
            lesson=TextLesson(
                dataset=str(self.dataset.directory.resolve()),
                data_fingerprint=self.dataset.fingerprint,
                documents=self.documents.tuning if role == "tuning" else self.documents.judged,
                tokens_per_document=self.plan.evaluation.tokens_per_document,
                bytes_per_token=float(train.text_bytes.sum() / train.tokens),
            ),
            fingerprint=self.fingerprints[arm.name].to_dict(),
            threads=max(1, threads // self.plan.processes),
            processes=self.plan.processes,
        )
        return dataclasses.replace(spec, branches_from=stable_phase(spec, self.earlier))

    def measure_spec(self, runs: Mapping[str, ArmRuns], threads: int) -> MeasureSpec:
        """What is to be measured of the arms, with the models of their first judged runs."""
        figures = self.plan.figures
        return MeasureSpec(
            arms=tuple(self._measured(arm, runs.get(arm.name)) for arm in self.arms),
            dataset=str(self.dataset.directory.resolve()),
            data_fingerprint=self.dataset.fingerprint,
            contexts=figures.contexts,
            decode_tokens=figures.decode_tokens,
            repeats=figures.repeats,
            throughput_steps=figures.throughput_steps,
            prompts=figures.prompts,
            sample_tokens=figures.sample_tokens,
            temperature=figures.temperature,
            top_p=figures.top_p,
            threads=threads,
            machine=processor(),
        )

    def _measured(self, arm: ResolvedArm, runs: ArmRuns | None) -> MeasuredArm:
        runs = runs or ArmRuns(None, ())
        finished = [run for run in runs.runs if run.role == "judged" and run.failure is None]
        first = min(finished, key=lambda run: self.plan.seeds.index(run.seed), default=None)
        rate = runs.learning_rate or self.plan.rates(arm.arm)[0]
        return MeasuredArm(
            name=arm.name,
            model=arm.config.to_dict(),
            train=self.configs[arm.name]["judged"].replace(lr=rate).to_dict(),
            run=first.directory if first else None,
            fingerprint=self.fingerprints[arm.name].decisive,
        )

    def baselines(self) -> tuple[Array, tuple[Baseline, ...]]:
        """The bytes of the judged documents [D], and what counting alone makes of them."""
        heldout, judged = self.dataset.heldout, self.documents.judged
        limit = self.plan.evaluation.tokens_per_document
        counts = NGrams.count(self.dataset.train)
        unigram = counts.unigram(heldout, judged, tokens_per_document=limit, tokenizer=self.tokenizer)
        text_bytes = unigram.text_bytes.astype(np.float64)
        if self.plan.baselines == "none":
            return text_bytes, ()
        bigram = counts.bigram(heldout, judged, tokens_per_document=limit, tokenizer=self.tokenizer)
        return text_bytes, (
            Baseline("unigram", unigram.nll / math.log(2), len(counts.counts), "how often each token comes"),
            Baseline(
                "bigram", bigram.nll / math.log(2), len(counts.pairs), "and after which token, smoothed"
            ),
        )

    def results(
        self,
        runs: Mapping[str, ArmRuns],
        measurements: Mapping[str, Measurements],
        samples: tuple[Sample, ...],
    ) -> Results:
        """What came of all arms."""
        text_bytes, baselines = self.baselines()
        return Results(
            arms=tuple(self._result(arm, runs[arm.name], measurements.get(arm.name)) for arm in self.arms),
            text_bytes=text_bytes,
            tuning_documents=len(self.documents.tuning),
            corpus=self.dataset.corpus,
            tokenizer=self.dataset.tokenizer,
            steps=max(each["judged"].steps for each in self.configs.values()),
            tokens_per_run=max(each["judged"].tokens for each in self.configs.values()),
            length=self.configs[self.arms[0].name]["judged"].length,
            training_tokens=self.dataset.train.tokens,
            baselines=baselines,
            samples=samples,
        )

    @property
    def data(self) -> dict[str, Any]:
        """What the data are, for the record."""
        dataset = self.dataset
        return {
            "fingerprint": dataset.fingerprint,
            "train documents": dataset.train.documents,
            "train tokens": dataset.train.tokens,
            "held-out documents": dataset.heldout.documents,
            "vocabulary": dataset.vocab_size,
        }

    def _result(self, arm: ResolvedArm, runs: ArmRuns, measurements: Measurements | None) -> ArmResult:
        """What came of an arm."""
        cost, config = cost_of(arm.config), self.configs[arm.name]["judged"]
        return ArmResult(
            name=arm.name,
            note=arm.arm.note,
            layout=" ".join(arm.config.layers),
            parameters=arm.parameters,
            non_embedding_parameters=arm.non_embedding_parameters,
            learning_rate=runs.learning_rate,
            grid=(*self.plan.rates(arm.arm), *runs.beyond),
            runs=runs.runs,
            beyond=runs.beyond,
            steps=config.steps,
            tokens=config.tokens,
            active_parameters=cost.active_non_embedding_parameters,
            training_flops_per_token=cost.training_flops_per_token(config.length),
            change=arm.change,
            model=arm.config.to_dict(),
            measurements=measurements or Measurements(),
        )


def _judged_configs(
    plan: Plan, budget: Budget, arms: Sequence[ResolvedArm], speeds: Mapping[str, float]
) -> dict[str, TrainConfig]:
    """The options of each arm's judged runs."""
    try:
        shape = TrainConfig.from_dict({"steps": 10**9, **plan.training})
    except ConfigError as error:
        raise PlanError(str(error), ("training",)) from None
    steps = {}
    for arm in arms:
        flops = cost_of(arm.config).training_flops_per_token(shape.length)
        try:
            steps[arm.name] = budget.steps_of(
                shape.tokens_per_step, flops_per_token=flops, tokens_per_second=speeds.get(arm.name, 0.0)
            )
        except PlanError as error:
            raise PlanError(f"for {arm.name} it {error.message}", ("budget", budget.unit)) from None
    # The same steps are logged for all arms, so that their batches can be compared.
    most = max(steps.values())
    defaults: dict[str, Any] = {
        "log_every": max(1, most // 100),
        "checkpoint_every": max(1, math.ceil(most / 4)),
        "keep_checkpoints": 1,
    }
    if "eval_every" not in plan.training:
        # The worker scores the documents that count; training need not score others.
        defaults["eval_documents"] = 0
    try:
        return {
            name: TrainConfig.from_dict({**defaults, **plan.training, "steps": count})
            for name, count in steps.items()
        }
    except ConfigError as error:
        raise PlanError(str(error), ("training",)) from None


def _tuning_config(plan: Plan, config: TrainConfig) -> TrainConfig:
    """The options of a tuning run, which may be shorter."""
    share = plan.tuning.budget_share
    steps = max(1, round(config.steps * share))
    try:
        return config.replace(steps=steps, warmup_steps=round(config.warmup_steps * share))
    except ConfigError as error:
        raise PlanError(str(error), ("tuning", "budget_share")) from None
