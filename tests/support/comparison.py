"""Simulated results of a comparison, with known truth, that go through the real judging and reporting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from intarsia.data import CorpusOptions
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import Arm, Budget, EvaluationOptions, Figures, Tuning
from intarsia.ladder.results import (
    ArmResult,
    Baseline,
    CurvePoint,
    Decoding,
    ExamArm,
    ExamResult,
    ExamScores,
    Failure,
    Measurements,
    PositionLoss,
    Results,
    RunResult,
    Sample,
    choose_rate,
)
from intarsia.tasks import Answers

LAYOUTS = {"full": "mla mla mla mla", "gdn-hybrid": "gdn gdn gdn mla", "kimi-linear": "kda kda kda mla"}


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "arms": (
            Arm("full", preset="full-tiny", note="MLA with rotary positions in every layer"),
            Arm("gdn-hybrid", preset="gdn-hybrid-tiny", note="Gated DeltaNet ×3 : MLA"),
            Arm("kimi-linear", preset="kimi-linear-tiny", note="KDA ×3 : MLA without positions"),
        ),
        "budget": Budget(tokens=400_000),
        "tuning": Tuning(learning_rates=(2e-3, 4e-3, 8e-3), documents=40),
        "seeds": (1, 2, 3),
        "name": "simulated",
        "title": "Full attention, a Gated DeltaNet hybrid or Kimi Linear?",
        "corpus": CorpusOptions(tokenizer="bpe:1024"),
        "evaluation": EvaluationOptions(documents=120, resamples=2000),
        "figures": Figures(contexts=(256, 1024, 4096, 16384)),
    }
    return Plan(**{**values, **changes})


def make_results(
    plan: Plan,
    levels: dict[str, float] | None = None,
    *,
    seed_noise: float | dict[str, float] = 0.002,
    document_noise: float = 0.02,
    failed: dict[tuple[str, int], Failure] | None = None,
    tuning_noise: float = 0.004,
    same_taste: bool = False,
    seed: int = 0,
) -> Results:
    """Results whose true bits per byte are `levels`, with normal noise over seeds and documents.

    Args:
        seed_noise: of one run; or one for each arm.
        tuning_noise: of one tuning run's score.
        same_taste: whether no document suits one arm better than another, but for the luck of its run.
    """
    levels = levels or {"full": 1.93, "gdn-hybrid": 1.86, "kimi-linear": 1.84}
    failed = failed or {}
    rng = np.random.default_rng(seed)
    documents = plan.evaluation.documents
    text_bytes = np.exp(rng.normal(7.2, 0.8, documents)).round() + 1
    hardness = rng.normal(0, 0.3, documents)
    steps = plan.budget.steps_of(4096)
    arms = []
    for index, arm in enumerate(plan.arms):
        runs = []
        taste = rng.normal(0, 0 if same_taste else document_noise, documents)
        run_noise = seed_noise[arm.name] if isinstance(seed_noise, dict) else seed_noise
        for rate in plan.rates(arm) if len(plan.rates(arm)) > 1 else ():
            score = levels[arm.name] + 0.05 * np.log2(rate / 4e-3) ** 2 + rng.normal(0, tuning_noise)
            runs.append(
                _run(arm.name, rate, plan.tuning.seed, "tuning", levels[arm.name], steps, rng, tuning=score)
            )
        rate = choose_rate({run.learning_rate: run.tuning_score for run in runs}) or plan.rates(arm)[0]
        for seed_of_run in plan.seeds:
            level = levels[arm.name] + rng.normal(0, run_noise)
            failure = failed.get((arm.name, seed_of_run))
            noise = rng.normal(0, document_noise, documents)
            bits = text_bytes * (level + hardness + taste + noise)
            run = _run(
                arm.name, rate, seed_of_run, "judged", level, steps, rng, bits=None if failure else bits
            )
            runs.append(
                replace(run, failure=failure, training_curve=run.training_curve[: 20 if failure else None])
            )
        arms.append(
            ArmResult(
                name=arm.name,
                note=arm.note,
                layout=LAYOUTS.get(arm.name, "mla"),
                parameters=1_242_368 + 1000 * index,
                non_embedding_parameters=1_111_296 + 1000 * index,
                learning_rate=rate,
                grid=plan.rates(arm),
                steps=steps,
                tokens=steps * 4096,
                active_parameters=1_111_296 + 1000 * index,
                runs=tuple(runs),
                change="" if index == 0 else f"feed_forward.d_hidden 352 → {352 - 8 * index}",
                measurements=Measurements(
                    tuple(_decoding(c, full=index == 0) for c in plan.figures.contexts),
                    21_000 - 4000 * index,
                    (20_500 - 4000 * index, 21_200 - 4000 * index),
                ),
            )
        )
    return Results(
        arms=tuple(arms),
        text_bytes=text_bytes,
        tuning_documents=plan.tuning.documents,
        corpus=plan.corpus.source,
        tokenizer=plan.corpus.tokenizer,
        steps=steps,
        tokens_per_run=steps * 4096,
        length=128,
        training_tokens=8_000_000,
        baselines=(
            Baseline("unigram", text_bytes * (3.61 + hardness), 1024, "token frequencies"),
            Baseline("bigram", text_bytes * (2.74 + hardness), 1024**2, "frequencies after the last token"),
        ),
        samples=tuple(
            Sample(
                arm.name,
                "def read",
                f"_lines(path: str) -> list[str]:\n    # {arm.name} <b>&amp;</b>\n    return []\n",
            )
            for arm in plan.arms
        ),
        environment={"python": "3.11.7", "torch": "2.13.0", "cpu": "a test", "cores": 2, "intarsia": "0.1.0"},
        seconds=212.0,
    )


def make_exam(name: str = "mqar-32", rights: tuple[int, ...] = (9, 5, 1)) -> ExamResult:
    """An exam of 10 examples with one answer each, of which the arms have so many right with both of two seeds."""

    def answers(right: int) -> Answers:
        return Answers(tuple(int(index < right) for index in range(10)), (1,) * 10)

    arms = tuple(
        ExamArm(
            name=arm,
            parameters=100_000,
            learning_rate=2e-3,
            grid=(1e-3, 2e-3, 4e-3),
            runs=tuple(
                RunResult(
                    arm,
                    2e-3,
                    seed,
                    "judged",
                    lesson=name,
                    exam=ExamScores(answers(right), answers(right), 50),
                )
                for seed in (1, 2)
            ),
        )
        for arm, right in zip(LAYOUTS, rights, strict=True)
    )
    return ExamResult(
        name, "mqar", "Multi-query associative recall", {"length": 32, "pairs": 4}, 50, 16, 10, arms
    )


def _run(
    arm: str,
    rate: float,
    seed: int,
    role: Any,
    level: float,
    steps: int,
    rng: np.random.Generator,
    *,
    bits: Any = None,
    tuning: float | None = None,
) -> RunResult:
    points = np.unique(np.linspace(1, steps, 60).astype(int))
    curve = (
        level
        + 4.5 * np.exp(-points / steps * 9)
        + 0.5 * (1 - points / steps)
        + rng.normal(0, 0.03, points.size)
    )
    return RunResult(
        arm=arm,
        learning_rate=rate,
        seed=seed,
        role=role,
        bits=bits,
        tuning_bits_per_byte=tuning,
        batches=f"{seed:064x}",
        seconds=14.0,
        tokens=steps * 4096,
        training_curve=tuple(
            CurvePoint(int(point) * 4096, float(value)) for point, value in zip(points, curve, strict=True)
        ),
        positions=tuple(
            PositionLoss(2**octave // 2, 2**octave, 9 - 0.6 * octave + level, 900 * 2**octave)
            for octave in range(8)
        )
        if bits is not None
        else (),
        directory=f"runs/{arm}-{rate:g}-{seed}",
    )


def _decoding(context: int, *, full: bool) -> Decoding:
    layers = 4 if full else 1
    milliseconds = 1.1 + layers * context * 4e-5
    size = layers * context * 320 + (0 if full else 3 * 33_000)
    return Decoding(context, milliseconds, size, range=(0.97 * milliseconds, 1.05 * milliseconds))
