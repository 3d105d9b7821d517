"""Intervals cover the truth as often as they say, on simulated documents and seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import ConfigError
from intarsia.ladder.documents import FEW_JUDGED
from intarsia.ladder.plan_tables import FEWEST_JUDGED
from intarsia.ladder.statistics import Estimate, estimate
from intarsia.ladder.student import student_t_quantile

TRUTH = 0.02


def simulate(
    rng: np.random.Generator, seeds: int, documents: int, by_seed: float, by_document: float, by_both: float
) -> tuple[np.ndarray, np.ndarray]:
    """Differences in bits [S, D] and bytes [D]: sizes as uneven as real files', three sources of noise."""
    text_bytes = np.exp(rng.normal(7, 1, documents)).round() + 1
    rate = (
        TRUTH
        + by_seed * rng.normal(size=(seeds, 1))
        + by_document * rng.normal(size=(1, documents))
        + by_both * rng.normal(size=(seeds, documents))
    )
    return text_bytes * rate, text_bytes


def coverage(
    seeds: int, documents: int, by_seed: float, by_document: float, by_both: float, trials: int = 200
) -> tuple[float, float]:
    """How often the interval, and the simultaneous one of a family of three, hold the truth."""
    rng = np.random.default_rng(1)
    hits = np.zeros(2)
    for trial in range(trials):
        bits, text_bytes = simulate(rng, seeds, documents, by_seed, by_document, by_both)
        found = estimate([bits], text_bytes, comparisons=3, resamples=500, seed=trial)[0]
        hits += [found.interval.contains(TRUTH), found.simultaneous.contains(TRUTH)]
    return tuple(hits / trials)


# The standard error of a coverage of 95 % in 200 trials is 1.5 %.
@pytest.mark.parametrize(
    ("seeds", "documents", "by_seed", "by_document", "by_both"),
    [
        pytest.param(3, 60, 0.01, 0.001, 0.0, id="seeds dominate"),
        pytest.param(3, 80, 0.0001, 0.1, 0.0, id="documents dominate"),
        pytest.param(2, 60, 0.01, 0.05, 0.0, id="two seeds"),
        pytest.param(5, 100, 0.01, 0.05, 0.05, id="all three"),
        pytest.param(3, 60, 0.0, 0.0, 0.1, id="interaction alone"),
    ],
)
def test_intervals_cover_at_least_at_the_nominal_rate(
    seeds: int, documents: int, by_seed: float, by_document: float, by_both: float
) -> None:
    single, family = coverage(seeds, documents, by_seed, by_document, by_both)
    assert single > 0.91
    assert family > 0.95
    if by_both == 0 and max(by_seed / by_document, by_document / by_seed) >= 10:
        assert single < 0.985, "with one source of noise the interval should not be much too wide"


@pytest.mark.parametrize(
    ("documents", "least", "most"),
    [(2, 0.0, 0.65), (5, 0.7, 0.9), (FEWEST_JUDGED, 0.83, 0.93), (FEW_JUDGED, 0.87, 0.97)],
)
def test_few_documents_cover_less_than_is_said(documents: int, least: float, most: float) -> None:
    """Why a comparison refuses very few documents and warns of few, and the shares that it names."""
    assert least < coverage(3, documents, 1e-6, 0.1, 0.0, trials=400)[0] < most


def test_resampling_three_seeds_would_not_cover() -> None:
    """Why seeds are not simply drawn with replacement."""
    rng = np.random.default_rng(2)
    plain = ours = 0
    for trial in range(200):
        bits, text_bytes = simulate(rng, 3, 40, 0.01, 0.001, 0.0)
        seeds = rng.multinomial(3, np.full(3, 1 / 3), size=500) / 3
        documents = rng.multinomial(40, np.full(40, 1 / 40), size=500)
        draws = np.einsum("rs,sd,rd->r", seeds, bits, documents) / (documents @ text_bytes)
        low, high = np.quantile(draws, [0.025, 0.975])
        plain += low <= TRUTH <= high
        ours += estimate([bits], text_bytes, resamples=500, seed=trial)[0].interval.contains(TRUTH)
    assert plain / 200 < 0.82
    assert ours / 200 > 0.92


def test_with_fixed_documents_it_is_the_classical_t_interval() -> None:
    rates = np.array([0.012, 0.018, 0.033])
    text_bytes = np.full(50, 1000.0)
    found = estimate([rates[:, None] * text_bytes], text_bytes, resamples=20_000)[0]
    half = 4.302652729749464 * rates.std(ddof=1) / np.sqrt(3)
    assert found.value == pytest.approx(rates.mean())
    assert found.interval.low == pytest.approx(rates.mean() - half, rel=0.01)
    assert found.interval.high == pytest.approx(rates.mean() + half, rel=0.01)
    assert found.standard_error == pytest.approx(rates.std(ddof=1) / np.sqrt(3))


def test_one_seed_speaks_of_documents_alone() -> None:
    rng = np.random.default_rng(0)
    bits, text_bytes = simulate(rng, 1, 50, 0.0, 0.05, 0.0)
    found = estimate([bits], text_bytes)[0]
    assert not found.covers_seeds
    assert found.seeds == 1
    assert found.interval.low < found.value < found.interval.high


def test_the_ratio_weighs_bytes_and_not_documents() -> None:
    bits, text_bytes = np.array([[10.0, 400.0], [10.0, 400.0]]), np.array([10.0, 200.0])
    assert estimate([bits], text_bytes)[0].value == pytest.approx(410 / 210)


def test_the_same_numbers_give_the_same_intervals() -> None:
    bits, text_bytes = simulate(np.random.default_rng(0), 3, 30, 0.01, 0.05, 0.01)
    assert estimate([bits, bits / 2], text_bytes) == estimate([bits, bits / 2], text_bytes)
    assert estimate([bits], text_bytes, seed=1) != estimate([bits], text_bytes, seed=2)


@given(
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    seeds=st.integers(1, 4),
    documents=st.integers(2, 20),
)
def test_intervals_move_and_stretch_with_the_numbers(
    scale: float, shift: float, seeds: int, documents: int
) -> None:
    bits, text_bytes = simulate(np.random.default_rng(documents), seeds, documents, 0.01, 0.05, 0.01)
    first = estimate([bits], text_bytes, resamples=200)[0]
    second = estimate([bits * scale + shift * text_bytes], text_bytes, resamples=200)[0]

    def expected(value: float) -> float:
        return value * scale + shift

    tolerance = 1e-9 * (scale + abs(shift) + 1)
    assert second.value == pytest.approx(expected(first.value), abs=tolerance)
    assert second.interval.low == pytest.approx(expected(first.interval.low), abs=tolerance)
    assert second.simultaneous.high == pytest.approx(expected(first.simultaneous.high), abs=tolerance)


@given(seeds=st.integers(1, 5), documents=st.integers(2, 30), comparisons=st.integers(1, 10))
def test_wider_demands_give_wider_intervals(seeds: int, documents: int, comparisons: int) -> None:
    bits, text_bytes = simulate(np.random.default_rng(seeds), seeds, documents, 0.01, 0.05, 0.01)

    def at(confidence: float) -> Estimate:
        return estimate([bits], text_bytes, resamples=300, confidence=confidence, comparisons=comparisons)[0]

    narrow, wide = at(0.8), at(0.95)
    assert wide.interval.low <= narrow.interval.low <= narrow.interval.high <= wide.interval.high
    assert wide.simultaneous.low <= wide.interval.low <= wide.interval.high <= wide.simultaneous.high


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.706204736),
        (0.975, 2, 4.302652730),
        (0.975, 3, 3.182446305),
        (0.995, 4, 4.604094871),
        (0.9, 5, 1.475884049),
        (0.975, 30, 2.042272456),
        (0.025, 7, -2.364624252),
    ],
)
def test_student_quantiles_agree_with_tables(probability: float, degrees: int, expected: float) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("bits", "text_bytes", "message"),
    [
        (np.zeros((2, 1)), [3.0], "at least two"),
        (np.zeros((2, 3)), [3.0, 4.0], "shape"),
        (np.zeros((2, 2)), [3.0, 0.0], "at least one byte"),
        (np.array([[1.0, np.nan]]), [3.0, 4.0], "not finite"),
    ],
)
def test_wrong_input_is_said(bits: np.ndarray, text_bytes: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate([bits], text_bytes)
