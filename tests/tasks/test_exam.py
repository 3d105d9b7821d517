"""Examining a model: its answers are counted as they are, and the interval keeps its promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import ConfigError, OptionError
from intarsia.model import LanguageModel, presets
from intarsia.tasks import MQAR, NOTHING, Answers, Palindrome, Stack, examine, make_task, score
from intarsia.tasks.exam import wilson

counts = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), max_size=30)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = LanguageModel(presets.get("kimi-linear-nano", vocab_size=100))
    made.init_weights(0)
    return made


def test_it_counts_what_score_counts(model: LanguageModel) -> None:
    task = MQAR(16, values=8)
    answers = examine(model, task, seed=3, examples=10, split="validation", rows=4)
    inputs, targets = task.examples(3, 10, "validation")
    with torch.no_grad():
        expected = score(model(inputs).logits, targets)
    assert answers.score == expected
    assert len(answers.asked) == 10
    assert examine(model, task, seed=3, examples=10, split="validation", rows=10) == answers
    assert Answers.from_dict(answers.to_dict()) == answers


def test_the_models_mode_is_put_back(model: LanguageModel) -> None:
    for training in (True, False):
        model.train(training)
        examine(model, Palindrome(8, symbols=4), examples=2)
        assert model.training is training


def test_tasks_that_do_not_fit_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="'mqar' has 145 different tokens and the model 100"):
        examine(model, MQAR(160, values=64, pairs=40))
    # One operation on an empty stack is a push, and the cut comes before the second asks.
    with pytest.raises(ConfigError, match="none of 1 test examples"):
        examine(model, Stack(5, stacks=64, elements=30), examples=1)


@given(counts)
def test_answers_add_up(rows: list[list[int]]) -> None:
    answers = Answers(tuple(r for r, _ in rows), tuple(a for _, a in rows))
    total = answers.score
    assert (total.right_tokens, total.tokens) == (sum(answers.right), sum(answers.asked))
    assert total.sequences == sum(a > 0 for _, a in rows)
    assert answers.perfect == all(r == a for r, a in rows)
    for low, high in (answers.token_interval(), answers.sequence_interval()):
        assert 0 <= low <= high <= 1
    if total.tokens:
        low, high = answers.token_interval()
        assert low - 1e-12 <= total.token_accuracy <= high + 1e-12
    else:
        assert total == NOTHING


def test_wilsons_interval() -> None:
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(right / trials, trials)
        assert found == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_interval_covers_the_truth(together: bool, share: float) -> None:
    """Also where the answers of a sequence are right or wrong together, for which counting answers is too sure."""
    rng = np.random.default_rng(0)
    repeats, sequences, asked = 400, 64, 12
    covered, naive = 0, 0
    for _ in range(repeats):
        chance = rng.beta(share * 0.4, (1 - share) * 0.4, sequences) if together else share
        right = rng.binomial(asked, chance, sequences)
        answers = Answers(tuple(right.tolist()), (asked,) * sequences)
        low, high = answers.token_interval()
        covered += low <= share <= high
        low, high = wilson(answers.score.token_accuracy, sequences * asked)
        naive += low <= share <= high
    # 95 % nominal; three standard errors of 400 draws are 3.3 %.
    assert covered / repeats >= 0.915
    assert (naive / repeats < 0.7) is together


def test_tasks_by_name_and_options() -> None:
    assert make_task("mqar", {"length": 32, "pairs": 4}) == MQAR(32, pairs=4)
    for name, options, message in (
        ("mqr", {}, "task: there is no task 'mqr'; did you mean 'mqar'"),
        ("mqar", {"pairs": 4}, "options.length is missing"),
        ("mqar", {"length": 32, "pair": 4}, "options.pair: unknown option; did you mean 'pairs'"),
        ("mqar", {"length": 3}, "options: length must be at least 4"),
    ):
        with pytest.raises(OptionError, match=message):
            make_task(name, options)
