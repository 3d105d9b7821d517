"""What a run may spend, and what arms have in common: before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from intarsia.ladder.arms import resolve
from intarsia.ladder.plan_tables import Arm, Budget, Matching, PlanError
from intarsia.ladder.rate_choice import next_rate
from intarsia.model import cost_of
from support.comparison import make_plan


def test_budgets_are_spent_and_not_overspent() -> None:
    assert Budget(tokens=1001).steps_of(500) == 3
    assert Budget(flops=1e6).steps_of(100, flops_per_token=3000.0) == 3, "3.3 steps"
    assert Budget(seconds=10).steps_of(100, tokens_per_second=45.0) == 4, "4.5 steps"
    with pytest.raises(PlanError, match=r"allows no step: it is 1e\+05 FLOPs, and a step takes 3e\+05"):
        Budget(flops=1e5).steps_of(100, flops_per_token=3000.0)
    with pytest.raises(PlanError, match=r"allows no step: it is 2 seconds, and a step takes 2\.2"):
        Budget(seconds=2).steps_of(100, tokens_per_second=45.0)
    for given in ({}, {"tokens": 1, "flops": 1.0}):
        with pytest.raises(PlanError, match="give one of tokens, steps, flops or seconds"):
            Budget(**given)


@pytest.mark.parametrize(
    ("tried", "best", "following"),
    [
        ([2e-3, 4e-3, 8e-3], 8e-3, 1.6e-2),
        ([8e-3, 2e-3, 4e-3], 2e-3, 1e-3),
        ([1e-3, 3e-3], 3e-3, 9e-3),
        ([2e-3, 4e-3, 8e-3], 4e-3, None),
        ([4e-3], 4e-3, None),
    ],
)
def test_the_next_rate(tried: list[float], best: float, following: float | None) -> None:
    assert next_rate(tried, best) == following


WINDOW = {"type": "window", "num_heads": 4, "head_dim": 32, "window": 64}


def test_a_window_is_chosen_for_equal_states() -> None:
    plan = make_plan(
        arms=(
            Arm("kda", preset="kimi-linear-tiny", model={"layout": "kda"}),
            Arm("window", preset="full-tiny", model={"layout": "window", "mixers": {"window": WINDOW}}),
        ),
        matching=Matching(state_at=4096),
    )
    kda, window = (cost_of(arm.config) for arm in resolve(plan, 1024))
    assert abs(window.state_bytes(4096) / kda.state_bytes(4096) - 1) <= 0.05
    assert abs(window.non_embedding_parameters / kda.non_embedding_parameters - 1) <= 0.01
    change = resolve(plan, 1024)[1].change
    assert "window.window 64 → " in change
    assert "feed_forward.d_hidden" in change
    # One token more or less of the window is further away.
    chosen = resolve(plan, 1024)[1].config
    for other in (-1, 1):
        options = replace(chosen.mixers["window"], window=chosen.mixers["window"].window + other)
        moved = cost_of(chosen.replace(mixers={**chosen.mixers, "window": options}))
        off = abs(moved.state_bytes(4096) - kda.state_bytes(4096))
        assert off >= abs(window.state_bytes(4096) - kda.state_bytes(4096))


def test_states_that_cannot_be_matched_are_said() -> None:
    arms = (Arm("kda", preset="kimi-linear-tiny"), Arm("full", preset="full-tiny"))
    plan = make_plan(arms=arms, matching=Matching(state_at=4096))
    with pytest.raises(
        PlanError, match=r"full cannot be matched to kda: its states take .* no sliding window"
    ):
        resolve(plan, 1024)
    plan = make_plan(arms=arms, matching=Matching(state_at=4096, adjust=False))
    with pytest.raises(PlanError, match=r"another size, and the plan forbids changes"):
        resolve(plan, 1024)


def test_active_parameters_are_matched_too() -> None:
    arms = (
        Arm("experts", preset="kimi-linear-tiny-moe"),
        Arm("dense", preset="kimi-linear-tiny"),
    )
    with pytest.raises(PlanError, match=r"active parameters .* more than 1% apart, .*matching\.of"):
        resolve(make_plan(arms=arms), 1024)
    total, active = (
        resolve(make_plan(arms=arms, matching=Matching(of=of)), 1024) for of in ("total", "active")
    )
    for resolved, count in ((total, "non_embedding_parameters"), (active, "active_non_embedding_parameters")):
        one, other = (getattr(cost_of(arm.config), count) for arm in resolved)
        assert abs(one / other - 1) <= 0.01
