"""A comparison from its plan to its verdict."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intarsia.data import TokenDataset, Tokenizer, open_corpus, open_tokenizer, prepare
from intarsia.errors import ConfigError, TrainingError
from intarsia.files import write_json, write_text
from intarsia.jobs.board import Board
from intarsia.jobs.locks import locked
from intarsia.jobs.machine import available_memory, cores, processor
from intarsia.jobs.pool import Pool, describe_exit
from intarsia.jobs.signals import terminable
from intarsia.ladder import toml
from intarsia.ladder.arms import ResolvedArm, resolve
from intarsia.ladder.documents import Chosen, choose_documents
from intarsia.ladder.environment import environment
from intarsia.ladder.measure import SPEC, MeasuredArm, MeasureSpec, read_measurements
from intarsia.ladder.plan import Plan, PlanError
from intarsia.ladder.report import write_report
from intarsia.ladder.results import ArmResult, Baseline, Measurements, Results, Role, Sample
from intarsia.ladder.run import ArmRuns, ArmSchedule, run_all
from intarsia.ladder.runs import RunFolder, RunSpec
from intarsia.ladder.table import show_verdict
from intarsia.ladder.verdict import Verdict, count, judge
from intarsia.model import ModelConfig
from intarsia.model.fingerprint import Fingerprint, fingerprint
from intarsia.training import NGrams, TrainConfig, read_metrics

if TYPE_CHECKING:
    from rich.console import Console


def compare(
    plan: Plan,
    directory: str | Path,
    *,
    jobs: int | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> Verdict:
    """Train the arms of a plan, judge them and write the report.

    In `directory`: `verdict.json`, `report.html`, `plan.toml`, `runs/` with a directory for each training run,
    `data/` with the tokenizer and the tokenised corpus. What is there already is used: finished runs are
    skipped and half-finished ones go on, whatever ended them, and the numbers are those of an undisturbed
    comparison.

    Args:
        plan: what to compare.
        jobs: training runs at a time; by default as many as cores and memory allow. The cores are divided among them.
        quick: run the plan's quick form, which shows that everything works and judges nothing.
        console: where to show progress and the result; standard error and standard output by default.

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
        return _Comparison(plan, path, jobs, console).run()


@dataclass
class _Comparison:
    """A comparison at work in its directory."""

    plan: Plan
    path: Path
    jobs: int | None
    console: Console

    def run(self) -> Verdict:
        began = time.monotonic()
        plan = self.plan
        write_text(self.path / "plan.toml", toml.dumps(plan.to_dict()))
        dataset, tokenizer = self._data()
        arms = resolve(plan, tokenizer.vocab_size)
        fingerprints = _fingerprints(arms)
        configs = self._train_configs()
        documents = choose_documents(plan, dataset.heldout.documents)
        tuning, judged = documents.tuning, documents.judged
        threads = self._threads(arms, configs)
        self._introduce(arms, dataset, threads, documents)
        try:
            runs = self._train(arms, fingerprints, configs, dataset, tuning, judged, threads)
            _check_batches(runs, self.path / "runs")
            measurements, samples = self._measure(arms, fingerprints, runs, dataset, configs, threads)
        finally:
            seconds = self._keep_time(time.monotonic() - began)
        text_bytes, baselines = self._baselines(dataset, tokenizer, judged)
        results = Results(
            arms=tuple(
                self._result(arm, runs[arm.name], measurements.get(arm.name), dataset) for arm in arms
            ),
            text_bytes=text_bytes,
            tuning_documents=len(tuning),
            corpus=dataset.corpus,
            tokenizer=dataset.tokenizer,
            steps=configs.steps,
            tokens_per_run=configs.tokens,
            training_tokens=dataset.train.tokens,
            baselines=baselines,
            samples=samples,
            environment=environment(
                fingerprints,
                jobs=self.jobs,
                threads=threads,
                data={
                    "fingerprint": dataset.fingerprint,
                    "train documents": dataset.train.documents,
                    "train tokens": dataset.train.tokens,
                    "held-out documents": dataset.heldout.documents,
                    "vocabulary": dataset.vocab_size,
                },
            ),
            seconds=seconds,
        )
        verdict = judge(plan, results)
        report = self.path / "report.html"
        verdict = replace(verdict, record=_record(plan, results, report))
        write_report(report, plan, results, verdict)
        # NaN is no JSON; a number that is missing is null.
        write_json(self.path / "verdict.json", _jsonable(verdict.to_dict()))
        show_verdict(self.console, results, verdict, report)
        return verdict

    def _data(self) -> tuple[TokenDataset, Tokenizer]:
        wanted = self.plan.corpus
        corpus = open_corpus(
            wanted.source,
            limit_bytes=wanted.limit_bytes,
            text_field=wanted.text_field,
            heldout=wanted.heldout,
        )
        data = self.path / "data"
        with self.console.status("Preparing the corpus and the tokenizer"):
            tokenizer = open_tokenizer(wanted.tokenizer, corpus=corpus, directory=data)
            dataset = prepare(corpus, tokenizer, data, progress=False)
        return dataset, tokenizer

    def _train_configs(self) -> TrainConfig:
        """The options that all runs share; learning rate and seeds are filled in for each."""
        plan = self.plan
        try:
            shape = TrainConfig.from_dict({"steps": 10**9, **plan.training})
            steps = plan.budget.steps_of(shape.tokens_per_step)
            defaults: dict[str, Any] = {
                "log_every": max(1, steps // 100),
                "checkpoint_every": max(1, math.ceil(steps / 4)),
                "keep_checkpoints": 1,
            }
            if "eval_every" not in plan.training:
                # The worker scores the documents that count; training need not score others.
                defaults["eval_documents"] = 0
            return TrainConfig.from_dict({**defaults, **plan.training, "steps": steps})
        except ConfigError as error:
            raise PlanError(str(error), ("training",)) from None

    def _tuning_config(self, config: TrainConfig) -> TrainConfig:
        """The options of a tuning run, which may be shorter."""
        share = self.plan.tuning.budget_share
        steps = max(1, round(config.steps * share))
        try:
            return config.replace(steps=steps, warmup_steps=round(config.warmup_steps * share))
        except ConfigError as error:
            raise PlanError(str(error), ("tuning", "budget_share")) from None

    def _threads(self, arms: Sequence[ResolvedArm], config: TrainConfig) -> int:
        """Threads of each run. Kept for the directory's lifetime: another number rounds differently."""
        state = self._state()
        if self.jobs is None:
            self.jobs = _default_jobs(self.plan, arms, config)
            if "threads" in state:
                self.jobs = max(1, min(self.jobs, cores() // state["threads"]))
        threads = int(state.get("threads", max(1, cores() // self.jobs)))
        write_json(self.path / "comparison.json", {**state, "threads": threads})
        return threads

    def _state(self) -> dict[str, Any]:
        path = self.path / "comparison.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _keep_time(self, seconds: float) -> float:
        """Add to the time that the comparison took in all its sittings."""
        state = self._state()
        total = float(state.get("seconds", 0.0)) + seconds
        write_json(self.path / "comparison.json", {**state, "seconds": total})
        return total

    def _introduce(
        self, arms: Sequence[ResolvedArm], dataset: TokenDataset, threads: int, documents: Chosen
    ) -> None:
        from rich.markup import escape

        plan, say = self.plan, self.console.print
        say(f"[bold]{plan.title or plan.name}[/]", highlight=False)
        say(
            f"{dataset.corpus}: {count(dataset.train.tokens)} training tokens ({dataset.tokenizer}), "
            f"{len(documents.judged)} held-out documents to judge by",
            highlight=False,
        )
        for arm in arms:
            change = f"  ({arm.change})" if arm.change else ""
            say(
                f"  {arm.name:<16} {count(arm.non_embedding_parameters)} + "
                f"{count(arm.parameters - arm.non_embedding_parameters)} parameters  "
                f"{arm.config.layout}{change}",
                highlight=False,
                markup=False,
            )
        for warning in documents.warnings:
            say(f"[yellow]Warning:[/] {escape(warning)}", highlight=False)
        several = f"{self.jobs} runs at a time, {threads} thread{'s' * (threads > 1)} each"
        say(f"[dim]{several}. Ctrl-C stops; the same command goes on.[/]", highlight=False)

    def _train(
        self,
        arms: Sequence[ResolvedArm],
        fingerprints: Mapping[str, Fingerprint],
        config: TrainConfig,
        dataset: TokenDataset,
        tuning: tuple[int, ...],
        judged: tuple[int, ...],
        threads: int,
    ) -> dict[str, ArmRuns]:
        plan = self.plan
        bytes_per_token = float(dataset.train.text_bytes.sum() / dataset.train.tokens)
        options: dict[Role, TrainConfig] = {"tuning": self._tuning_config(config), "judged": config}

        def spec(arm: ResolvedArm, rate: float, seed: int, role: Role) -> RunSpec:
            return RunSpec(
                arm=arm.name,
                learning_rate=rate,
                seed=seed,
                role=role,
                model=arm.config.to_dict(),
                train=options[role].replace(lr=rate, seed=seed, data_seed=seed).to_dict(),
                dataset=str(dataset.directory.resolve()),
                data_fingerprint=dataset.fingerprint,
                documents=tuning if role == "tuning" else judged,
                tokens_per_document=plan.evaluation.tokens_per_document,
                bytes_per_token=bytes_per_token,
                fingerprint=fingerprints[arm.name].to_dict(),
                threads=threads,
            )

        def schedule(arm: ResolvedArm) -> ArmSchedule:
            rates = plan.rates(arm.arm)
            tried = rates if len(rates) > 1 else ()
            return ArmSchedule(
                name=arm.name,
                grid=rates,
                tuning=tuple(spec(arm, rate, plan.tuning.seed, "tuning") for rate in tried),
                judged=lambda rate: [spec(arm, rate, seed, "judged") for seed in plan.seeds],
            )

        schedules = [schedule(arm) for arm in arms]
        total = sum(len(item.tuning) + len(plan.seeds) for item in schedules)
        steps = sum(
            len(item.tuning) * options["tuning"].steps + len(plan.seeds) * config.steps for item in schedules
        )
        assert self.jobs is not None
        with Board(self.console, plan.name, total, steps) as board:
            return run_all(schedules, self.path / "runs", jobs=self.jobs, board=board, pool=Pool())

    def _measure(
        self,
        arms: Sequence[ResolvedArm],
        fingerprints: Mapping[str, Fingerprint],
        runs: Mapping[str, ArmRuns],
        dataset: TokenDataset,
        config: TrainConfig,
        threads: int,
    ) -> tuple[dict[str, Measurements], tuple[Sample, ...]]:
        figures = self.plan.figures

        def measured(arm: ResolvedArm) -> MeasuredArm:
            finished = [run for run in runs[arm.name].runs if run.role == "judged" and run.failure is None]
            first = min(finished, key=lambda run: self.plan.seeds.index(run.seed), default=None)
            rate = runs[arm.name].learning_rate or self.plan.rates(arm.arm)[0]
            train = config.replace(lr=rate).to_dict()
            directory = first.directory if first else None
            decisive = fingerprints[arm.name].decisive
            return MeasuredArm(arm.name, arm.config.to_dict(), train, directory, decisive)

        spec = MeasureSpec(
            arms=tuple(measured(arm) for arm in arms),
            dataset=str(dataset.directory.resolve()),
            data_fingerprint=dataset.fingerprint,
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
        known = read_measurements(self.path, spec, complete=True)
        if known is None and spec.rounds:
            write_json(self.path / SPEC, asdict(spec))
            self._run_measuring(spec)
            known = read_measurements(self.path, spec, complete=False)
        return known or ({}, ())

    def _run_measuring(self, spec: MeasureSpec) -> None:
        pool = Pool(grace=1.0)
        key, log = "measure", self.path / "measure.log"
        with Board(self.console, "measuring", 1, spec.rounds) as board:
            board.start(key, "speed, memory and samples, one model at a time", spec.rounds)
            pool.start(key, "intarsia.ladder.measure", self.path, log, spec.threads)
            try:
                while pool.children:
                    happened = pool.wait(0.25)
                    if happened is None:
                        continue
                    event = happened[1]
                    if not isinstance(event, int):
                        if event.get("event") == "step":
                            board.step(key, event["done"], None, None)
                    elif event == 0:
                        board.finish(key, "done")
                    else:
                        board.finish(key, f"{describe_exit(event)}; see {log}", good=False)
            except BaseException:
                pool.stop()
                raise

    def _baselines(
        self, dataset: TokenDataset, tokenizer: Tokenizer, judged: Sequence[int]
    ) -> tuple[np.ndarray[Any, np.dtype[np.float64]], tuple[Baseline, ...]]:
        """The bytes of the judged documents, and what counting alone makes of them."""
        limit = self.plan.evaluation.tokens_per_document
        counts = NGrams.count(dataset.train)
        unigram = counts.unigram(dataset.heldout, judged, tokens_per_document=limit, tokenizer=tokenizer)
        text_bytes = unigram.text_bytes.astype(np.float64)
        if self.plan.baselines == "none":
            return text_bytes, ()
        bigram = counts.bigram(dataset.heldout, judged, tokens_per_document=limit, tokenizer=tokenizer)
        return text_bytes, (
            Baseline("unigram", unigram.nll / math.log(2), len(counts.counts), "how often each token comes"),
            Baseline(
                "bigram", bigram.nll / math.log(2), len(counts.pairs), "and after which token, smoothed"
            ),
        )

    def _result(
        self, arm: ResolvedArm, runs: ArmRuns, measurements: Measurements | None, dataset: TokenDataset
    ) -> ArmResult:
        from intarsia.model.language_model import cost_of

        length = int(self.plan.training.get("length", TrainConfig(steps=1).length))
        return ArmResult(
            name=arm.name,
            note=arm.arm.note,
            layout=" ".join(arm.config.layers),
            parameters=arm.parameters,
            non_embedding_parameters=arm.non_embedding_parameters,
            learning_rate=runs.learning_rate,
            grid=self.plan.rates(arm.arm),
            runs=runs.runs,
            training_flops_per_token=cost_of(arm.config).training_flops_per_token(length),
            change=arm.change,
            model=arm.config.to_dict(),
            measurements=measurements or Measurements(),
        )


def _fingerprints(arms: Sequence[ResolvedArm]) -> dict[str, Fingerprint]:
    """What decides the numbers of each arm's runs beside the plan."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {arm.name: fingerprint(arm.config, device) for arm in arms}


def _default_jobs(plan: Plan, arms: Sequence[ResolvedArm], config: TrainConfig) -> int:
    """As many runs at a time as there are cores and memory for; one on a GPU."""
    import torch

    if torch.cuda.is_available():
        return 1
    total = sum(len(plan.rates(arm)) * (len(plan.rates(arm)) > 1) + len(plan.seeds) for arm in plan.arms)
    need = max(run_bytes(arm.parameters, arm.config, config) for arm in arms)
    return max(1, min(total, cores(), int(available_memory() * 0.7 // need)))


def run_bytes(parameters: int, model: ModelConfig, config: TrainConfig) -> int:
    """The memory that a run takes at most: a guess that errs on the large side.

    Float32 weights, gradients, two moments and a checkpoint's copy. What the backward pass needs: 20 to 72 numbers of
    the model's width for each token of a forward pass and each layer, by its mixer, and some for what is being
    computed. The interpreter with PyTorch.
    """
    tokens = (config.micro_rows or config.rows) * config.length
    return 20 * parameters + 4 * 80 * tokens * model.depth * model.d_model + 400 * 2**20


def _check_batches(runs: Mapping[str, ArmRuns], directory: Path) -> None:
    """Assert that runs with the same seed saw the same batches, at every step that was logged.

    The training loop chains the digests of all batches, so that equal digests at a step mean equal batches up
    to it. Failed runs are checked as far as they came.
    """
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for run in (run for arm in runs.values() for run in arm.runs):
        for line in read_metrics(RunFolder(directory / run.directory).train / "metrics.jsonl"):
            if line["kind"] != "train":
                continue
            name, digest = seen.setdefault((run.seed, line["step"]), (run.name, line["batches"]))
            if digest != line["batches"]:
                raise TrainingError(
                    f"{run.name} and {name} saw different batches up to step {line['step']}: the comparison is not "
                    "fair. This is a bug, or a file in the directory was changed."
                )


def _record(plan: Plan, results: Results, report: Path) -> dict[str, Any]:
    """What verdict.json holds besides the verdict."""
    return {
        "plan": plan.to_dict(),
        "corpus": results.corpus,
        "tokenizer": results.tokenizer,
        "documents": len(results.text_bytes),
        "text_bytes": float(results.text_bytes.sum()),
        "steps": results.steps,
        "tokens_per_run": results.tokens_per_run,
        "arms": [
            {
                "name": arm.name,
                "layout": arm.layout,
                "parameters": arm.parameters,
                "non_embedding_parameters": arm.non_embedding_parameters,
                "change": arm.change,
                "learning_rate": arm.learning_rate,
                "tuning": {f"{rate:g}": score for rate, score in arm.tuning_scores.items()},
                "training_flops_per_token": arm.training_flops_per_token,
                "measurements": asdict(arm.measurements),
                "runs": [
                    {
                        "learning_rate": run.learning_rate,
                        "seed": run.seed,
                        "role": run.role,
                        "directory": run.directory,
                        "bits_per_byte": run.tuning_bits_per_byte
                        if run.bits is None
                        else float(run.bits.sum() / results.text_bytes.sum()),
                        "failure": asdict(run.failure) if run.failure else None,
                        "batches": run.batches,
                        "seconds": run.seconds,
                    }
                    for run in sorted(
                        arm.runs, key=lambda run: (run.role != "tuning", run.learning_rate, run.seed)
                    )
                ],
                "model": dict(arm.model),
            }
            for arm in results.arms
        ],
        "samples": [asdict(sample) for sample in results.samples],
        "environment": dict(results.environment),
        "seconds": results.seconds,
        "report": str(report),
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
