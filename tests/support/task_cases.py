"""Tasks with all their options, drawn by hypothesis, and an ordinary one of each."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from intarsia.tasks import Task
from intarsia.tasks.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
)
from intarsia.tasks.multihop import Chains, FactsTask, KHop, Order, Relations, Variables
from intarsia.tasks.regression import Regression
from intarsia.tasks.retrieval import Copying, MultiRound, Needle
from intarsia.tasks.state_tracking import GroupName, ModularCounting, Parity, WordProblem
from intarsia.tasks.zoology import ZoologyMQAR

EXAMPLE: dict[str, dict[str, Any]] = {
    "palindrome": {"length": 15, "symbols": 8},
    "mqar": {"length": 16, "values": 8},
    "stack": {"length": 64, "stacks": 2, "elements": 8},
    "zoology-mqar": {"length": 32, "pairs": 4, "vocabulary": 32},
    "mad-recall": {"length": 32},
    "mad-fuzzy-recall": {"length": 48},
    "mad-noisy-recall": {"length": 48},
    "mad-selective-copying": {"length": 24, "copies": 4},
    "mad-compression": {"length": 24},
    "mad-memorization": {"length": 32},
    "copying": {"length": 16, "symbols": 8},
    "needle": {"length": 32, "symbols": 8},
    "multi-round": {"length": 64, "values": 8},
    "regression": {"length": 64},
    "parity": {"length": 16},
    "modular-counting": {"length": 16},
    "word-problem": {"length": 16},
    "k-hop": {"length": 100},
    "chains": {"length": 32, "symbols": 16},
    "variables": {"length": 32, "values": 8},
    "relations": {"length": 32, "symbols": 16},
}


def _facts(kind: type[FactsTask]) -> st.SearchStrategy[Task]:
    @st.composite
    def made(draw: st.DrawFn) -> Task:
        dials = {
            "hops": draw(st.integers(1, 5)),
            "chains": draw(st.integers(1, 3)),
            "distractors": draw(st.integers(0, 6)),
            "distance": draw(st.integers(0, 3)),
            "order": draw(st.sampled_from(get_args(Order))),
        }
        least = kind(1000, **dials).least_length
        return kind(least + draw(st.integers(0, 9)), **dials)

    return made()


@st.composite
def _needles(draw: st.DrawFn) -> Task:
    needles, values = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    least = needles * (2 + values) + 1 + values
    depth = draw(st.none() | st.integers(0, 100))
    return Needle(least + draw(st.integers(0, 30)), needles=needles, values=values, depth=depth)


tasks: st.SearchStrategy[Task] = st.one_of(
    st.builds(ZoologyMQAR, st.integers(16, 60), pairs=st.integers(1, 4), vocabulary=st.integers(10, 40)),
    st.builds(InContextRecall, st.integers(4, 60), keys=st.integers(1, 9), values=st.integers(2, 9)),
    st.builds(NoisyRecall, st.integers(4, 60), noise=st.integers(0, 60)),
    st.builds(FuzzyRecall, st.integers(20, 80), most=st.integers(1, 5)),
    st.builds(SelectiveCopying, st.integers(20, 60), copies=st.integers(1, 10)),
    st.builds(Compression, st.integers(20, 60), questions=st.integers(1, 9)),
    st.builds(Memorization, st.integers(1, 60)),
    st.builds(Copying, st.integers(3, 60), symbols=st.integers(2, 9)),
    _needles(),
    st.builds(
        MultiRound,
        st.integers(60, 120),
        pairs=st.integers(1, 6),
        questions=st.integers(1, 3),
        back=st.none() | st.integers(0, 1),
        keys=st.integers(6, 12),
    ),
    st.builds(Regression, st.integers(16, 80), dimensions=st.integers(1, 6), largest=st.integers(1, 3)),
    st.builds(Parity, st.integers(1, 60)),
    st.builds(ModularCounting, st.integers(1, 60)),
    st.builds(
        WordProblem,
        st.integers(1, 60),
        group=st.sampled_from(get_args(GroupName)),
        generators=st.booleans(),
    ),
    st.builds(KHop, st.integers(2, 60), hops=st.none() | st.integers(0, 5), letters=st.integers(2, 5)),
    _facts(Chains),
    _facts(Variables),
    _facts(Relations),
)
