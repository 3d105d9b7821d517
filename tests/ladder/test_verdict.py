"""The sentence says what was shown and no more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from intarsia.ladder.headline import headline
from intarsia.ladder.plan_tables import Arm, EvaluationOptions
from intarsia.ladder.results import Failure, choose_rate
from intarsia.ladder.verdict import Verdict, judge
from support.comparison import make_plan, make_results

TWO = (Arm("full", preset="full-tiny"), Arm("kimi-linear", preset="kimi-linear-tiny"))
EQUAL = {"full": 1.9, "gdn-hybrid": 1.9, "kimi-linear": 1.9}
NAN = Failure("diverged", "the loss of step 7 is nan")


def verdict_of(levels: dict[str, float] | None = None, **options) -> Verdict:
    changes = options.pop("plan", {})
    plan = make_plan(**changes)
    return judge(plan, make_results(plan, levels, **options))


def test_a_clear_difference_is_claimed_with_its_interval() -> None:
    verdict = verdict_of({"full": 1.93, "kimi-linear": 1.84}, plan={"arms": TWO})
    (pair,) = verdict.pairs
    assert (pair.first, pair.second, pair.outcome) == ("kimi-linear", "full", "better")
    assert verdict.sentence.startswith("kimi-linear is better than full by 0.0")
    assert "bits per byte [0.0" in verdict.sentence
    assert pair.difference.simultaneous.high < 0
    assert verdict.best == "kimi-linear"


def test_the_later_arm_can_lose() -> None:
    verdict = verdict_of({"full": 1.80, "kimi-linear": 1.90}, plan={"arms": TWO})
    assert verdict.pairs[0].outcome == "worse"
    assert verdict.sentence.startswith("full is better than kimi-linear by")


def test_no_difference_is_said_with_what_it_could_have_missed() -> None:
    verdict = verdict_of({"full": 1.9, "kimi-linear": 1.9}, plan={"arms": TWO})
    assert verdict.pairs[0].outcome == "undecided"
    assert "No difference between kimi-linear and full that this budget can show" in verdict.sentence
    three = verdict_of(EQUAL)
    assert three.sentence.startswith(
        "No difference that this budget can show between full, gdn-hybrid and kimi-linear"
    )
    assert "cannot be ruled out" in three.sentence


def test_three_arms_in_order() -> None:
    verdict = verdict_of({"full": 2.1, "gdn-hybrid": 2.0, "kimi-linear": 1.8}, seed_noise=0.0005)
    assert verdict.sentence.startswith("kimi-linear is the best of 3: better than full by")
    assert "and better than gdn-hybrid by" in verdict.sentence


def test_some_pairs_decided_and_some_not() -> None:
    verdict = verdict_of({"full": 2.1, "gdn-hybrid": 1.85, "kimi-linear": 1.85})
    assert "gdn-hybrid is better than full by" in verdict.sentence
    assert "kimi-linear is better than full by" in verdict.sentence
    assert "no difference that this budget can show between kimi-linear and gdn-hybrid" in verdict.sentence


def test_equal_within_a_margin() -> None:
    options = {"arms": TWO, "evaluation": EvaluationOptions(documents=400, margin=0.1, resamples=2000)}
    verdict = verdict_of({"full": 1.9, "kimi-linear": 1.9}, plan=options)
    assert verdict.pairs[0].outcome == "equal"
    assert "are equal within 0.1 bits per byte" in verdict.sentence


def test_one_seed_claims_nothing() -> None:
    verdict = verdict_of({"full": 3.0, "gdn-hybrid": 2.0, "kimi-linear": 1.0}, plan={"seeds": (1,)})
    assert {pair.outcome for pair in verdict.pairs} == {"unjudged"}
    assert "one seed cannot tell an architecture from its luck" in verdict.sentence
    assert any(caveat.startswith("One seed") for caveat in verdict.caveats)


def test_failed_runs_are_counted_and_named() -> None:
    verdict = verdict_of(failed={("gdn-hybrid", 2): NAN})
    pair = next(pair for pair in verdict.pairs if pair.first == "gdn-hybrid")
    assert pair.seeds == (1, 3)
    assert pair.difference.seeds == 2
    assert "gdn-hybrid failed in 1 of 3 runs" in verdict.sentence
    assert any("1 of 18 runs failed" in caveat for caveat in verdict.caveats)


def test_an_arm_without_a_finished_run_is_not_judged() -> None:
    verdict = verdict_of(failed={("gdn-hybrid", seed): NAN for seed in (1, 2, 3)})
    assert verdict.row("gdn-hybrid").estimate is None
    assert "gdn-hybrid finished no run and is not judged" in verdict.sentence
    assert [pair.outcome for pair in verdict.pairs].count("unjudged") == 2
    everything = verdict_of(failed={(arm, seed): NAN for arm in EQUAL for seed in (1, 2, 3)})
    assert everything.sentence.startswith("No verdict")
    assert everything.best is None


def test_seeds_that_only_one_arm_finished_are_left_out() -> None:
    failed = {("full", 1): NAN, ("full", 2): NAN, ("kimi-linear", 3): NAN}
    verdict = verdict_of({"full": 1.9, "kimi-linear": 1.8}, plan={"arms": TWO}, failed=failed)
    assert verdict.pairs[0].outcome == "unjudged"
    assert "no seed was finished by both full and kimi-linear" in verdict.sentence


def test_equal_arms_are_seldom_told_apart() -> None:
    """All pairs hold together: with no true difference, some claim is made in about 5 % of comparisons."""
    options = {"plan": {"evaluation": EvaluationOptions(documents=30, resamples=1000)}}
    noise = {"seed_noise": 0.01, "document_noise": 0.05}
    claims = sum(
        any(pair.better for pair in verdict_of(EQUAL, seed=seed, **noise, **options).pairs)
        for seed in range(60)
    )
    assert claims <= 8  # P(more) < 1 % at 5 %


def test_a_rate_at_the_end_of_the_losers_grid_weakens_the_headline() -> None:
    def of(rates: tuple[float, ...], arms: tuple[Arm, ...] = TWO) -> Verdict:
        plan = make_plan(arms=arms, tuning=dataclasses.replace(make_plan().tuning, learning_rates=rates))
        return judge(plan, make_results(plan, {"full": 1.95, "kimi-linear": 1.84}, tuning_noise=0.0))

    weak = of((4e-3, 8e-3))
    assert "kimi-linear is better than full by" in weak.sentence
    assert weak.sentence.endswith(
        "But full did best with the smallest rate that was tried (0.004) and may do better beyond it."
    )
    assert not weak.pairs[0].firm
    assert weak.best == "kimi-linear"
    # What the winner might gain beyond its grid changes nothing.
    own = (TWO[0], dataclasses.replace(TWO[1], learning_rates=(4e-3, 8e-3)))
    strong = of((2e-3, 4e-3, 8e-3), own)
    assert "rate that was tried" not in strong.sentence
    assert strong.pairs[0].firm


def test_a_noisy_choice_of_rates_weakens_a_small_difference() -> None:
    two = {"arms": TWO}
    flat = verdict_of({"full": 1.905, "kimi-linear": 1.9}, plan=two, seed_noise=2e-4, document_noise=1e-4)
    assert flat.pairs[0].better == "kimi-linear"
    assert flat.pairs[0].firm, "rates that are far apart by much more than the noise were no matter of luck"
    assert flat.row("full").choice_loss < 0.001
    noise = {"document_noise": 1e-4, "tuning_noise": 0.05, "seed": 5}
    noisy = verdict_of(
        {"full": 1.94, "kimi-linear": 1.9}, plan={**two, "seeds": (1, 2)}, seed_noise=0.004, **noise
    )
    (pair,) = noisy.pairs
    assert pair.better == "kimi-linear"
    loss = noisy.row("full").choice_loss
    assert loss > -pair.difference.simultaneous.high > 0
    assert "rests on one run for each, and may have cost full up to 0.0" in noisy.sentence
    assert not pair.firm


def test_the_best_is_named_when_it_is_judged_so_and_candidates_before() -> None:
    open_ = verdict_of({"full": 2.1, "gdn-hybrid": 1.8501, "kimi-linear": 1.85})
    assert open_.best is None
    assert open_.unbeaten == ("gdn-hybrid", "kimi-linear")
    assert open_.lowest in open_.unbeaten
    decided = verdict_of({"full": 2.1, "gdn-hybrid": 2.0, "kimi-linear": 1.8}, seed_noise=0.0005)
    assert (decided.best, decided.unbeaten) == ("kimi-linear", ("kimi-linear",))


def test_an_arm_that_finished_nothing_keeps_none_from_being_the_best() -> None:
    failed = {("gdn-hybrid", seed): NAN for seed in (1, 2, 3)}
    assert (
        verdict_of({"full": 2.1, "gdn-hybrid": 2.0, "kimi-linear": 1.8}, failed=failed).best == "kimi-linear"
    )
    failed |= {("full", seed): NAN for seed in (1, 2, 3)}
    assert verdict_of(failed=failed).best is None, "nobody to be better than"


def test_of_many_pairs_the_headline_names_who_is_beaten_by_none() -> None:
    arms = tuple(dataclasses.replace(TWO[0], name=f"arm-{n}") for n in range(6))
    levels = {arm.name: 1.8 + (0.1 * n if n > 1 else 0.0001 * n) for n, arm in enumerate(arms)}
    verdict = verdict_of(levels, plan={"arms": arms})
    assert verdict.unbeaten == ("arm-0", "arm-1")
    decided = sum(bool(pair.better) for pair in verdict.pairs)
    assert decided == 14
    assert verdict.sentence.startswith(
        "Of 6 architectures, arm-0 and arm-1 are beaten by none; of 15 pairs 14 are decided."
    )
    narrow = dataclasses.replace(make_plan().tuning, learning_rates=(4e-3, 8e-3))
    weak = verdict_of(levels, plan={"arms": arms, "tuning": narrow})
    doubted = sum(bool(pair.weaknesses) for pair in weak.pairs)
    assert doubted > 1
    assert weak.sentence.endswith(
        f" {doubted} of the pairs are less certain than their intervals, and say why."
    )


def test_of_many_pairs_a_single_doubt_is_counted_as_one() -> None:
    plan = make_plan(arms=tuple(dataclasses.replace(TWO[0], name=f"arm-{n}") for n in range(6)))
    results = make_results(plan, {f"arm-{n}": 1.8 + 0.1 * n for n in range(6)})
    sure = judge(plan, results).pairs
    assert not any(pair.weaknesses for pair in sure)
    one = [*sure[:-1], dataclasses.replace(sure[-1], weaknesses=("But so it is.",))]
    counted = " 1 of the pairs is less certain than its interval, and says why."
    assert headline(results, one) == headline(results, sure) + counted


def test_the_judged_context_stands_beside_the_headline() -> None:
    assert verdict_of().notes[0].startswith("Judged in pieces of 128 tokens")


def test_a_pair_gains_by_the_runs_of_other_arms() -> None:
    """Two seeds give a pair alone one degree of freedom, and three arms two."""
    two_seeds = {"seeds": (1, 2)}
    three = verdict_of(plan=two_seeds)
    alone = verdict_of(plan={**two_seeds, "arms": TWO})
    assert {pair.difference.degrees for pair in three.pairs} == {2}
    assert {pair.difference.degrees for pair in alone.pairs} == {1}
    assert len({pair.difference.seed_noise for pair in three.pairs}) == 1
    assert three.power.pooled
    assert any("would be found in 80 % of such comparisons" in caveat for caveat in three.caveats)


def test_arms_that_scatter_differently_are_not_pooled() -> None:
    noise = {"full": 0.05, "gdn-hybrid": 1e-5, "kimi-linear": 1e-5}
    verdict = verdict_of(EQUAL, plan={"seeds": (1, 2, 3, 4, 5)}, seed_noise=noise, document_noise=1e-5)
    assert not verdict.power.pooled
    assert {pair.difference.degrees for pair in verdict.pairs} == {4}
    quiet = next(p for p in verdict.pairs if {p.first, p.second} == {"gdn-hybrid", "kimi-linear"})
    assert quiet.difference.seed_noise < 1e-3
    assert any("scatter so differently" in caveat for caveat in verdict.caveats)


def test_models_behind_the_baselines_are_a_caveat() -> None:
    verdict = verdict_of({"full": 3.0, "gdn-hybrid": 3.1, "kimi-linear": 1.9})
    assert any(
        "full and gdn-hybrid are not better than counting tokens" in caveat for caveat in verdict.caveats
    )


def test_the_choice_of_a_rate() -> None:
    assert choose_rate({1e-3: (2.0,), 2e-3: (1.9,), 4e-3: None}) == 2e-3
    assert choose_rate({1e-3: (1.9,), 2e-3: (1.9,)}) == 1e-3
    assert choose_rate({1e-3: None}) is None


def test_everything_is_json() -> None:
    import json

    found = json.loads(json.dumps(verdict_of().to_dict()))
    assert found["pairs"][0]["difference"]["interval"]["confidence"] == 0.95
    assert np.isclose(found["pairs"][0]["difference"]["simultaneous"]["confidence"], 1 - 0.05 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_sentences_are_sentences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = {name: 1.9 + rng.normal(0, 0.05) for name in EQUAL}
    verdict = verdict_of(levels, seed=seed)
    for text in (verdict.sentence, *(pair.sentence for pair in verdict.pairs), *verdict.caveats):
        assert text.endswith(".")
        assert "  " not in text
        assert ".." not in text
