"""The first sentence of a verdict, from its pairs."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.ladder.pairs import PairVerdict, failures_of
from intarsia.ladder.results import Results
from intarsia.ladder.words import UNIT, amount, bracket, listed

MANY = 10
"""Of more pairs than these the first sentence tells who is beaten by none, and leaves the pairs to their list."""


def headline(results: Results, pairs: Sequence[PairVerdict]) -> str:
    """What all pairs together have shown."""
    weak = sum(bool(pair.weaknesses) for pair in pairs)
    if len(pairs) > MANY and weak:
        are = (
            "are less certain than their intervals, and say"
            if weak > 1
            else "is less certain than its interval, and says"
        )
        return f"{_finding(results, pairs)} {weak} of the pairs {are} why."
    return " ".join([_finding(results, pairs), *_doubts(pairs)])


def _doubts(pairs: Sequence[PairVerdict]) -> list[str]:
    """What weakens the outcomes, each once."""
    return list(dict.fromkeys(doubt for pair in pairs for doubt in pair.weaknesses))


def _finding(results: Results, pairs: Sequence[PairVerdict]) -> str:
    names = [arm.name for arm in results.arms]
    absent = [arm.name for arm in results.arms if not arm.judged]
    note = (
        f" {listed(absent)} finished no run and {'is' if len(absent) == 1 else 'are'} not judged."
        if absent
        else ""
    )
    live = [pair for pair in pairs if pair.difference is not None]
    if not live:
        who = f"both {listed(names)}" if len(names) == 2 else f"any two of {listed(names)}"
        return f"No verdict: no seed was finished by {who}{failures_of(*results.arms)}.{note}"
    if len(live) == 1:
        # Its doubts come behind, with those of all pairs.
        return live[0].sentence.removesuffix(" ".join(["", *live[0].weaknesses])) + note
    if any(pair.outcome == "unjudged" for pair in live) and not any(pair.better for pair in live):
        return (
            "No verdict: one seed cannot tell an architecture from its luck. With it, the lowest was "
            f"{_lowest(results, live)}.{note}"
        )
    decided = [pair for pair in live if pair.better]
    present = [name for name in names if name not in absent]
    failures = failures_of(*[arm for arm in results.arms if arm.judged])
    if not decided:
        if all(pair.outcome == "equal" for pair in live):
            return f"{listed(present)} are equal within the plan's margin{failures}.{note}"
        widest = max(
            max(abs(p.difference.simultaneous.low), abs(p.difference.simultaneous.high))
            for p in live
            if p.difference
        )
        return (
            f"No difference that this budget can show between {listed(present)}; "
            f"differences up to {amount(widest)} {UNIT} cannot be ruled out{failures}.{note}"
        )
    for name in present:
        beaten = [pair for pair in decided if pair.better == name]
        if len(beaten) == len(present) - 1:
            clauses = [f"better than {_other(pair, name)} by {_gain(pair, name)}" for pair in beaten]
            return f"{name} is the best of {len(present)}: {listed(clauses)}{failures}.{note}"
    if len(live) > MANY:
        return f"{_unbeaten(present, live)}{failures}.{note}"
    clauses = []
    for name in present:
        beaten = [pair for pair in decided if pair.better == name]
        if beaten:
            clauses.append(
                f"{name} is better than " + listed([f"{_other(p, name)} by {_gain(p, name)}" for p in beaten])
            )
    open_pairs = [f"{pair.first} and {pair.second}" for pair in live if not pair.better]
    rest = (
        f"; no difference that this budget can show between {', nor between '.join(open_pairs)}"
        if open_pairs
        else ""
    )
    return f"{'; '.join(clauses)}{rest}{failures}.{note}"


def _unbeaten(present: Sequence[str], live: Sequence[PairVerdict]) -> str:
    """Who is beaten by none, and how many pairs are decided."""
    worse = {_other(pair, pair.better) for pair in live if pair.better}
    ahead = [name for name in present if name not in worse]
    first = f"Of {len(present)} architectures, {listed(ahead)} {'is' if len(ahead) == 1 else 'are'} beaten by none"
    decided = sum(bool(pair.better) for pair in live)
    return f"{first}; of {len(live)} pairs {decided} are decided"


def _lowest(results: Results, live: list[PairVerdict]) -> str:
    scores = {
        arm.name: sum(float(run.bits.sum()) for run in arm.judged.values() if run.bits is not None)
        / len(arm.judged)
        for arm in results.arms
        if arm.judged
    }
    return min(scores, key=lambda name: scores[name])


def _other(pair: PairVerdict, name: str) -> str:
    return pair.second if pair.first == name else pair.first


def _gain(pair: PairVerdict, name: str) -> str:
    """By how much `name` is the better of the pair, with its interval turned that way round."""
    assert pair.difference is not None
    interval, value = pair.difference.simultaneous, pair.difference.value
    if pair.first == name:
        return f"{amount(-value)} {UNIT} {bracket(-interval.high, -interval.low)}"
    return f"{amount(value)} {UNIT} {bracket(interval.low, interval.high)}"
