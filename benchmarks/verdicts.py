"""Does a verdict claim wrongly as often as it says, and find what it says? Simulated comparisons, by the real judge.

    python benchmarks/verdicts.py --out benchmarks/results/verdicts-simulated.json

Each repeat draws what a comparison would have measured (bits of documents under runs with several seeds) from known
truth and has it judged. In an A/A comparison the arms are the same, so each claim is a false alarm: 5 % are allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common import options_parser, table, write_results
from intarsia.ladder.history import spending
from intarsia.ladder.pairs import Pairs, judge_pairs
from intarsia.ladder.plan_tables import EvaluationOptions
from intarsia.ladder.results import ArmResult, RunResult, choose_rate
from intarsia.ladder.student import detectable, power

SEEDS = (2, 3, 5)
OPTIONS = EvaluationOptions(documents=40, resamples=1000)
CONFIDENCE = OPTIONS.confidence
LOOKS = (2, 3, 4, 5, 6, 8)
"""Seeds at each look of a comparison that is looked at while it grows."""
RATES = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class World:
    """Where the numbers come from, in bits per byte: standard deviations, and what is true."""

    name: str
    levels: tuple[float, ...] = (1.9, 1.9)
    run: tuple[float, ...] = (0.004, 0.004)
    """Of one run, for each arm: the luck of its weights."""
    order: float = 0.01
    """Of what a seed's data order does to all arms."""
    taste: float = 0.0
    """Of how much better a document suits one arm than another, whatever the seed; 0 for arms that are the same."""
    both: float = 0.03
    """Of a document under one run."""
    hardness: float = 0.3
    """Of documents, for all arms."""
    rates: tuple[float, ...] = ()
    """How much worse than its best an arm is with each of `RATES`. Empty: the rate is given."""


def draw(world: World, seeds: int, rng: np.random.Generator) -> tuple[list[ArmResult], np.ndarray]:
    """The arms with their runs, and the documents' bytes [D]."""
    documents = OPTIONS.documents
    sizes = np.exp(rng.normal(7, 1, documents)).round() + 1
    hardness = world.hardness * rng.normal(size=documents)
    order = world.order * rng.normal(size=seeds + 1)
    return [
        _arm(world, index, seeds, sizes, hardness, order, rng) for index in range(len(world.levels))
    ], sizes


def _arm(
    world: World,
    index: int,
    seeds: int,
    sizes: np.ndarray,
    hardness: np.ndarray,
    order: np.ndarray,
    rng: np.random.Generator,
) -> ArmResult:
    documents, name = len(sizes), f"arm {index}"
    taste = world.taste * rng.normal(size=documents)

    def scored(level: float, seed: int) -> np.ndarray:
        noise = world.run[index] * rng.normal() + order[seed]
        return np.asarray(
            sizes * (level + noise + hardness + taste + world.both * rng.normal(size=documents))
        )

    runs, rate, loss = [], RATES[0], 0.0
    if world.rates:
        for tried, worse in zip(RATES, world.rates, strict=True):
            bits = scored(world.levels[index] + worse, 0)
            score = float(bits.sum() / sizes.sum())
            runs.append(
                RunResult(
                    name, tried, 0, "tuning", tuning_bits_per_byte=score, tuning_documents=(bits, sizes)
                )
            )
        rate = choose_rate({run.learning_rate: run.tuning_score for run in runs}) or rate
        loss = world.rates[RATES.index(rate)]
    for seed in range(1, seeds + 1):
        runs.append(RunResult(name, rate, seed, "judged", bits=scored(world.levels[index] + loss, seed)))
    return ArmResult(name, "", "", 1, 1, rate, RATES if world.rates else (rate,), tuple(runs))


def judged(
    world: World, seeds: int, repeats: int, pooled: bool = True
) -> list[tuple[Pairs, list[ArmResult]]]:
    """Repeats of a comparison. Not `pooled`: each pair is judged as if there were no other arm."""
    found = []
    for repeat in range(repeats):
        arms, sizes = draw(world, seeds, np.random.default_rng((seeds, repeat)))
        if pooled:
            found.append((judge_pairs(arms, sizes, OPTIONS, CONFIDENCE), arms))
        else:
            spent = 1 - (1 - CONFIDENCE) / 3
            one = [judge_pairs([a, b], sizes, OPTIONS, spent).verdicts[0] for a, b in _pairs(arms)]
            found.append((Pairs(tuple(one), None, {}), arms))
    return found


def _pairs(arms: Sequence[ArmResult]) -> list[tuple[ArmResult, ArmResult]]:
    return [(a, b) for index, b in enumerate(arms) for a in arms[:index]]


def summary(world: World, seeds: int, repeats: int, pooled: bool = True) -> dict[str, Any]:
    """Shares over the repeats."""
    cases = judged(world, seeds, repeats, pooled)
    truth = {f"arm {index}": level for index, level in enumerate(world.levels)}
    verdicts = [pair for pairs, _ in cases for pair in pairs.verdicts]
    intervals = [
        (pair.difference.simultaneous, truth[pair.first] - truth[pair.second])
        for pair in verdicts
        if pair.difference
    ]
    return {
        "world": world.name,
        "arms": len(world.levels),
        "seeds": seeds,
        "repeats": repeats,
        "pooled": pooled,
        "any_claim": float(np.mean([any(pair.better for pair in pairs.verdicts) for pairs, _ in cases])),
        "any_firm_claim": float(np.mean([any(pair.firm for pair in pairs.verdicts) for pairs, _ in cases])),
        "coverage_each": float(
            np.mean(
                [
                    pair.difference.interval.contains(truth[pair.first] - truth[pair.second])
                    for pair in verdicts
                    if pair.difference
                ]
            )
        ),
        "coverage_all": float(
            np.mean(np.reshape([i.contains(t) for i, t in intervals], (repeats, -1)).all(axis=1))
        ),
        "median_half_width": float(np.median([i.half_width for i, _ in intervals])),
    }


def injected(seeds: int, arms: int, repeats: int) -> dict[str, Any]:
    """How often the first arm, worse by what should be found in 80 % of all cases, is found worse than the second."""
    world = World("a true difference", levels=(1.9,) * arms, run=(0.004,) * arms)
    # A run's own luck, and that of its documents, which a mean over documents leaves: see `World.both`.
    effective = _effective_documents()
    noise = float(np.sqrt(2 * (world.run[0] ** 2 + world.both**2 / effective)))
    degrees, spent = (seeds - 1) * (arms - 1), 1 - (1 - CONFIDENCE) / (arms * (arms - 1) // 2)
    effect = detectable(noise, seeds, degrees, spent)
    shifted = replace(world, levels=(world.levels[0] + effect, *world.levels[1:]))
    found = [
        pair.better == "arm 1"
        for pairs, _ in judged(shifted, seeds, repeats)
        for pair in pairs.verdicts
        if {pair.first, pair.second} == {"arm 0", "arm 1"}
    ]
    return {
        "arms": arms,
        "seeds": seeds,
        "repeats": repeats,
        "difference": effect,
        "in_noise_of_a_run": effect / (noise / np.sqrt(2)),
        "stated_power": power(effect, noise, seeds, degrees, spent),
        "found": float(np.mean(found)),
    }


def looked_at(sequential: bool, repeats: int) -> dict[str, Any]:
    """An A/A comparison of two arms that gets a seed more until it claims something or has `LOOKS[-1]` seeds."""
    first, claims = 0, 0
    for repeat in range(repeats):
        arms, sizes = draw(World("A/A"), LOOKS[-1], np.random.default_rng((99, repeat)))
        for look, seeds in enumerate(LOOKS, 1):
            some = [replace(arm, runs=tuple(run for run in arm.runs if run.seed <= seeds)) for arm in arms]
            spent = 1 - (1 - CONFIDENCE) * (spending(look) if sequential else 1)
            if judge_pairs(some, sizes, OPTIONS, spent).verdicts[0].better:
                claims += 1
                first += look == 1
                break
    return {
        "sequential": sequential,
        "seeds": f"{LOOKS[0]} to {LOOKS[-1]}",
        "repeats": repeats,
        "claims_at_first_look": first / repeats,
        "claims_at_any_look": claims / repeats,
    }


def _effective_documents() -> float:
    """How many documents of one size are worth those of `draw`, on average over draws."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(7, 1, (20_000, OPTIONS.documents)))
    return float(1 / ((sizes**2).sum(1) / sizes.sum(1) ** 2).mean())


def main() -> int:
    parser = options_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=400)
    options = parser.parse_args()
    repeats = options.repeats
    three = {"levels": (1.9,) * 3, "run": (0.004,) * 3}
    worlds = [
        World("A/A"),
        World("A/A, documents of one run scatter most", run=(1e-4, 1e-4), both=0.1),
        World("A/A, seeds scatter most", both=0.001),
        World("A/A", **three),  # type: ignore[arg-type]
        World(
            "A/A, one arm scatters twice as much",
            levels=three["levels"],
            run=(0.004, 0.004, 0.008),
            both=0.001,
        ),
        World(
            "A/A, one arm scatters five times as much",
            levels=three["levels"],
            run=(0.004, 0.004, 0.02),
            both=0.001,
        ),
        World("three arms that suit other documents", taste=0.05, **three),  # type: ignore[arg-type]
        World("A/A, each tuned by one run a rate", rates=(0.006, 0.0, 0.003)),
    ]
    rows = [summary(world, seeds, repeats) for world in worlds for seeds in SEEDS]
    rows += [summary(worlds[3], seeds, repeats, pooled=False) for seeds in SEEDS]
    found = [injected(seeds, arms, repeats) for arms in (2, 3) for seeds in SEEDS]
    table(rows)
    table(found)
    looks = [looked_at(sequential, repeats) for sequential in (False, True)]
    table(looks)
    if options.out:
        write_results(options.out, {"comparisons": rows, "injected": found, "looks": looks})
    return 0


if __name__ == "__main__":
    sys.exit(main())
