"""Which documents choose and which judge, what is said where they are few, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import OptionError
from intarsia.ladder.documents import FEW_JUDGED, choose_documents
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import FEWEST_JUDGED, EvaluationOptions, PlanError, Tuning
from intarsia.ladder.verdict import judge
from support.comparison import make_plan, make_results

GRID, ONE_RATE = (1e-3, 2e-3), (1e-3,)


def plan_for(
    tuning: int = 20, judged: int = 20, rates: tuple[float, ...] = GRID, seeds: tuple[int, ...] = (1, 2)
) -> Plan:
    return make_plan(
        tuning=Tuning(learning_rates=rates, documents=tuning),
        evaluation=EvaluationOptions(documents=judged, resamples=1000),
        seeds=seeds,
    )


@given(
    heldout=st.integers(14, 500),
    tuning=st.integers(1, 60),
    judged=st.integers(10, 60),
    seed=st.integers(0, 5),
)
def test_no_document_is_in_both(heldout: int, tuning: int, judged: int, seed: int) -> None:
    plan = make_plan(
        tuning=Tuning(learning_rates=GRID, documents=tuning),
        evaluation=EvaluationOptions(documents=judged, seed=seed, resamples=1000),
    )
    chosen = choose_documents(plan, heldout)
    assert not set(chosen.tuning) & set(chosen.judged)
    assert {*chosen.tuning, *chosen.judged} <= set(range(heldout))
    assert len(set(chosen.judged)) == len(chosen.judged) == min(judged, heldout - len(chosen.tuning))
    assert len(set(chosen.tuning)) == len(chosen.tuning) == min(tuning, heldout // 4)
    assert chosen == choose_documents(plan, heldout), "the same ones each time"


def test_enough_documents_are_no_matter_for_warnings() -> None:
    assert choose_documents(plan_for(), 80).warnings == ()


def test_fewer_than_asked_for_are_told_before_training() -> None:
    warnings = choose_documents(plan_for(), 14).warnings
    assert "There are 11 held-out documents to judge by, where the plan asks for 20" in warnings[0]
    assert "give more text, or hold out more of it ([corpus] heldout, now 0.05)" in warnings[0]
    assert (
        "There are 3 held-out documents to choose the learning rates by, where the plan asks for 20"
        in warnings[1]
    )
    assert "From 11 documents intervals come out too narrow" in warnings[2]
    assert len(warnings) == 3


def test_few_documents_are_told_also_where_no_more_were_asked_for() -> None:
    (warning,) = choose_documents(plan_for(judged=FEW_JUDGED - 1), 200).warnings
    assert warning.startswith(f"From {FEW_JUDGED - 1} documents")
    assert choose_documents(plan_for(judged=FEW_JUDGED), 200).warnings == ()


def test_without_a_choice_no_document_is_kept_for_it() -> None:
    chosen = choose_documents(plan_for(rates=ONE_RATE), 14)
    assert chosen.tuning == ()
    assert len(chosen.judged) == 14
    assert "choose the learning rates" not in " ".join(chosen.warnings)


def test_one_seed_is_told_before_it_is_trained() -> None:
    assert "There is one seed" in choose_documents(plan_for(seeds=(1,)), 200).warnings[0]


@pytest.mark.parametrize(
    ("heldout", "rates"), [(0, GRID), (2, GRID), (12, GRID), (9, ONE_RATE), (0, ONE_RATE)]
)
def test_what_cannot_be_judged_is_refused(heldout: int, rates: tuple[float, ...]) -> None:
    with pytest.raises(
        PlanError, match=f"corpus: the corpus has {heldout} held-out documents.*; give more text"
    ):
        choose_documents(plan_for(rates=rates), heldout)


@pytest.mark.parametrize(("heldout", "rates"), [(13, GRID), (10, ONE_RATE)])
def test_what_can_just_be_judged_is_not(heldout: int, rates: tuple[float, ...]) -> None:
    assert len(choose_documents(plan_for(rates=rates), heldout).judged) == FEWEST_JUDGED


def test_a_plan_cannot_ask_for_too_few() -> None:
    with pytest.raises(OptionError, match=f"documents must be at least {FEWEST_JUDGED}"):
        EvaluationOptions(documents=FEWEST_JUDGED - 1)


def test_the_verdict_says_what_was_asked_for() -> None:
    plan = make_plan(evaluation=EvaluationOptions(documents=12, resamples=1000))
    results = make_results(plan)
    text = " ".join(judge(plan, results).caveats)
    assert "Documents: 12 held-out documents stand for all like them" in text
    assert "From 12 documents intervals come out too narrow" in text
    wanted = make_plan(
        evaluation=EvaluationOptions(documents=400, resamples=1000),
        tuning=Tuning(learning_rates=GRID, documents=90),
    )
    text = " ".join(judge(wanted, results).caveats)
    assert "12 held-out documents (the plan asks for 400) stand" in text
    assert re.search(r"on \d+ documents of their own \(the plan asks for 90\)", text)
