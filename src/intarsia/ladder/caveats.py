"""What a comparison cannot show, from what it is and from what happened in it."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.ladder.documents import FEW_JUDGED, few_documents
from intarsia.ladder.plan import Plan
from intarsia.ladder.power import Power
from intarsia.ladder.results import Results
from intarsia.ladder.words import UNIT, amount, count, listed


def caveats_of(plan: Plan, results: Results, behind: Sequence[str], power: Power | None) -> list[str]:
    """What this comparison cannot show, in sentences.

    Args:
        behind: the arms that counting tokens beats.
        power: what its seeds can find; None where that is not known.
    """
    return [*(_of_text(plan, results, behind, power) if results.arms else ()), *(_of_exams(results))]


def _of_exams(results: Results) -> list[str]:
    if not results.exams:
        return []
    return [
        "Exams: each model learned the task from scratch, in at most so many steps; one that had not may learn it with "
        "more, or with another rate. The ranges are of the seeds that were tried, and no test of a difference: models "
        "often learn such tasks all at once or not at all."
    ]


def _of_text(plan: Plan, results: Results, behind: Sequence[str], power: Power | None) -> list[str]:
    seeds = len(plan.seeds)
    smallest, largest = (f(arm.non_embedding_parameters for arm in results.arms) for f in (min, max))
    size = " to ".join(dict.fromkeys((count(smallest), count(largest))))
    epochs = results.tokens_per_run / results.training_tokens if results.training_tokens else 0
    caveats = [
        f"Scale: {size} parameters without embeddings, "
        f"{count(results.tokens_per_run)} tokens a run"
        + (f" ({epochs:.2g} passes over the training text)" if epochs else "")
        + f", on {results.corpus}. Architectures can change places with more parameters, more tokens or other text; "
        "nothing here speaks of that.",
    ]
    if seeds == 1:
        caveats.append(
            "One seed: the intervals cover other documents and not other training runs, so no arm is called better."
        )
    else:
        caveats.append(_of_seeds(seeds, power))
    judged, asked = len(results.text_bytes), plan.evaluation.documents
    wanted = f" (the plan asks for {asked})" if judged < asked else ""
    caveats.append(
        f"Documents: {judged} held-out documents{wanted} stand for all like them. Files of one "
        "project resemble each other, so they are worth fewer independent ones."
        + (f" {few_documents(judged)}" if judged < FEW_JUDGED else "")
    )
    share = plan.tuning.budget_share
    shorter = f", in runs of {share:.0%} of the budget" if share < 1 else ""
    if all(len(plan.rates(arm)) == 1 for arm in plan.arms):
        caveats.append("Learning rates were given and not tuned here: an arm may do better with another.")
    elif any(len(plan.rates(arm)) > 1 for arm in plan.arms):
        asked = plan.tuning.documents
        fewer = f" (the plan asks for {asked})" if results.tuning_documents < asked else ""
        caveats.append(
            f"Learning rates were chosen with one seed ({plan.tuning.seed}) on {results.tuning_documents} documents "
            f"of their own{fewer}{shorter}: a fair choice, and a noisy one."
        )
    if results.failed:
        caveats.append(
            f"{len(results.failed)} of {len(results.runs)} runs failed. Differences rest on the seeds that both arms "
            "finished; an arm that fails often is worse than its finished runs say."
        )
    if behind:
        caveats.append(
            f"{listed(behind)} {'is' if len(behind) == 1 else 'are'} not better than counting "
            "tokens (the best baseline): "
            "such a budget judges the first steps of training and little else."
        )
    return caveats


def _of_seeds(seeds: int, power: Power | None) -> str:
    """How much so many seeds can say."""
    text = f"{seeds} seeds: the intervals allow for other seeds by Student's distribution"
    if power is None:
        return f"{text}, which assumes that runs scatter about normally, which so few cannot show."
    degrees = f"{power.degrees} degree{'s' * (power.degrees > 1)} of freedom"
    if power.pooled:
        text += f" with {degrees}: one noise of runs ({amount(power.run_noise)} {UNIT}) is estimated from all arms"
    else:
        text += (
            f" with {seeds - 1} degree{'s' * (seeds > 2)} of freedom: the arms' runs scatter so differently that each "
            "pair goes by its own"
        )
    return (
        f"{text}. A true difference of {amount(power.detectable)} {UNIT} would be found in 80 % of such comparisons, "
        "smaller ones less often. That runs scatter about normally is assumed; so few cannot show it."
    )
