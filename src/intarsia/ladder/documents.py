"""Which held-out documents choose the learning rates and which are judged by, and whether they are enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import FEWEST_JUDGED, PlanError

FEW_JUDGED = 20
"""With fewer documents, intervals are too narrow by more than a little (`FEWEST_JUDGED` says by how much)."""


@dataclass(frozen=True)
class Chosen:
    """Held-out documents by their numbers, none in both."""

    tuning: tuple[int, ...]
    judged: tuple[int, ...]
    warnings: tuple[str, ...]
    """What the corpus cannot give of what the plan asks for, in sentences; to be read before anything is trained."""


def choose_documents(plan: Plan, heldout: int) -> Chosen:
    """Draw the documents for tuning and for judging at random from `heldout` of them.

    Raises:
        PlanError: there are too few to judge by.
    """
    order = np.random.default_rng(plan.evaluation.seed).permutation(heldout)
    tunes = any(len(plan.rates(arm)) > 1 for arm in plan.arms)
    # A small corpus gives tuning a quarter at most, so that enough is left to judge by.
    tuning = min(plan.tuning.documents, heldout // 4) if tunes else 0
    judged = min(plan.evaluation.documents, heldout - tuning)
    more = f"give more text, or hold out more of it ([corpus] heldout, now {plan.corpus.heldout:g})"
    if judged < FEWEST_JUDGED:
        left = (
            f", of which {tuning} choose the learning rates and {judged} are left to judge by"
            if tuning
            else ""
        )
        raise PlanError(
            f"the corpus has {heldout} held-out documents{left}: with fewer than {FEWEST_JUDGED} nothing can be "
            f"judged; {more}",
            ("corpus",),
        )
    warnings = []
    if judged < plan.evaluation.documents:
        warnings.append(
            f"There are {judged} held-out documents to judge by, where the plan asks for "
            f"{plan.evaluation.documents}: {more}."
        )
    if tunes and tuning < plan.tuning.documents:
        warnings.append(
            f"There are {tuning} held-out documents to choose the learning rates by, where the plan asks for "
            f"{plan.tuning.documents}: {more}."
        )
    if judged < FEW_JUDGED:
        warnings.append(few_documents(judged))
    if len(plan.seeds) == 1:
        warnings.append(
            "There is one seed: no arm can be called better, since nothing is known of other training runs."
        )
    return Chosen(
        tuple(sorted(order[:tuning].tolist())),
        tuple(sorted(order[tuning : tuning + judged].tolist())),
        tuple(warnings),
    )


def few_documents(judged: int) -> str:
    """What so few documents mean for the intervals."""
    return (
        f"From {judged} documents intervals come out too narrow: where documents differ more than seeds do, one that "
        "says 95 % holds the truth in about 88 % of all cases with 10 documents, and from 20 on in 90 % and more."
    )
