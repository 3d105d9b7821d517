"""Sampling against a float64 reference written with numpy, and its behaviour at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import ConfigError, IntarsiaError
from intarsia.inference import GREEDY, Sampler, Sampling


def reference(logits: np.ndarray, temperature: float, top_p: float, min_p: float) -> np.ndarray:
    """The definition, a token at a time."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    probabilities = weights / weights.sum()
    nucleus, mass = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i)):
        if mass >= top_p:
            break
        nucleus.add(token)
        mass += probabilities[token]
    kept = [
        p if i in nucleus and p >= min_p * probabilities.max() else 0.0 for i, p in enumerate(probabilities)
    ]
    return np.asarray(kept) / sum(kept)


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 40),
    spread=st.floats(0.01, 20),
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 0.99),
    min_p=st.floats(0, 1),
)
def test_probabilities_equal_the_reference(
    seed: int, size: int, spread: float, temperature: float, top_p: float, min_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, size)
    got = Sampling(temperature, top_p, min_p).probabilities(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(got, reference(logits, temperature, top_p, min_p), rtol=1e-10, atol=1e-12)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.log(torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64))
    assert Sampling(top_p=0.5).probabilities(logits).tolist() == [0, 1, 0, 0]
    assert Sampling(top_p=0.51).probabilities(logits).count_nonzero() == 2
    # Of the two equal ones, the lower id comes first.
    assert Sampling(top_p=0.8).probabilities(logits).nonzero().flatten().tolist() == [0, 1, 2]


def test_min_p_is_relative_to_the_most_probable_token() -> None:
    logits = torch.log(torch.tensor([0.05, 0.5, 0.25, 0.2], dtype=torch.float64))
    assert Sampling(min_p=0.49).probabilities(logits).nonzero().flatten().tolist() == [1, 2]
    assert Sampling(min_p=1.0).probabilities(logits).tolist() == [0, 1, 0, 0]


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, 1.0])
    for sampling in (GREEDY, Sampling(temperature=0), Sampling(temperature=2, greedy=True)):
        assert sampling.is_greedy
        assert Sampler(sampling).choose(logits) == 1
        assert sampling.probabilities(logits).tolist() == [0, 1, 0, 0]


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]))
    sampler = Sampler(Sampling(), seed=5)
    draws = torch.tensor([sampler.choose(logits) for _ in range(4000)])
    frequencies = torch.bincount(draws, minlength=5) / 4000
    assert frequencies[1] == frequencies[4] == 0, "a token of probability 0 was drawn"
    # Four standard deviations of a frequency near 0.5 over 4000 draws.
    torch.testing.assert_close(frequencies, logits.exp(), atol=4 * math.sqrt(0.25 / 4000), rtol=0)


def test_own_generator() -> None:
    logits = torch.zeros(50)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(), seed)
        return [sampler.choose(logits) for _ in range(20)]

    before = torch.get_rng_state()
    first = draws(1)
    torch.manual_seed(99)
    assert draws(1) == first != draws(2)
    torch.set_rng_state(before)


def test_extreme_logits_are_fine() -> None:
    logits = torch.tensor([1e30, -1e30, -math.inf, 0.0])
    assert Sampling(temperature=1e-6, top_p=0.9, min_p=0.1).probabilities(logits).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_logits_that_are_not_finite_are_an_error(value: float, sampling: Sampling) -> None:
    with pytest.raises(IntarsiaError, match=r"NaN or \+inf"):
        Sampler(sampling).choose(torch.tensor([0.0, value]))


def test_all_forbidden_is_an_error() -> None:
    with pytest.raises(IntarsiaError, match="every token"):
        Sampler(Sampling()).choose(torch.full((3,), -math.inf))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
)
def test_wrong_numbers_are_errors_that_name_the_option(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
