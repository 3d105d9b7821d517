"""A solver of each task: it sees the names of an example's tokens and says what is asked where."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from intarsia.tasks.mad import Memorization

Answers = dict[int, str]


def solve_zoology(words: list[str]) -> Answers:
    tokens = [int(word) for word in words]
    # The pairs end where filler or a key that has been stands in a key's place.
    middle = next(i for i in range(2, len(tokens), 2) if tokens[i] in {0, *tokens[0:i:2]})
    table = dict(zip(tokens[0:middle:2], words[1:middle:2], strict=True))
    return {place: table[token] for place, token in enumerate(tokens) if place >= middle and token}


def solve_recall(words: list[str]) -> Answers:
    """Keys and values that take turns, whatever stands between the pairs."""
    known: dict[str, str] = {}
    answers: Answers = {}
    for place, word in enumerate(words):
        if word[0] == "k":
            if word in known:
                answers[place] = known[word]
            if place + 1 < len(words):
                known[word] = words[place + 1]
    return answers


def solve_fuzzy(words: list[str]) -> Answers:
    """A run of key tokens, a run of value tokens."""
    known: dict[tuple[str, ...], list[str]] = {}
    answers: Answers = {}
    place = 0
    while place < len(words) and words[place] != "_":
        middle = next(i for i in range(place, len(words)) if words[i][0] == "v")
        end = next((i for i in range(middle, len(words)) if words[i][0] != "v"), len(words))
        key = tuple(words[place:middle])
        if key in known:
            answers |= {middle - 1 + i: value for i, value in enumerate(known[key])}
        known[key] = words[middle:end]
        place = end
    return answers


def solve_selective(words: list[str]) -> Answers:
    said = [word for word in words if word[0] == "s"]
    return dict(enumerate(said, words.index("<copy>")))


def solve_compression(words: list[str]) -> Answers:
    middle = words.index("<c>")
    return {place: words[int(words[place][1:])] for place in range(middle + 1, len(words))}


def solve_memorization(words: list[str]) -> Answers:
    """The only one that must have learned: from training examples of another seed."""
    it = Memorization(3000)
    (inputs,), (targets,) = it.examples(99, 1)
    learned = {it.names[key]: it.names[value] for key, value in zip(inputs, targets, strict=True)}
    return {place: learned[word] for place, word in enumerate(words)}


def solve_copying(words: list[str]) -> Answers:
    middle = words.index("<sep>")
    return dict(enumerate(words[:middle], middle))


def solve_needle(words: list[str]) -> Answers:
    first, last = words.index("<key>"), len(words) - 1 - words[::-1].index("<key>")
    starts = [i for i in range(last) if words[i] == "<key>" and words[i + 1] == words[last + 1]]
    assert first in range(last)
    assert len(starts) == 1
    count = len(words) - last - 1
    return {last + 1 + i: words[starts[0] + 2 + i] for i in range(count)}


def solve_multi_round(words: list[str]) -> Answers:
    known: dict[str, str] = {}
    answers: Answers = {}
    for place, (word, after) in enumerate(pairwise(words)):
        if word == "?":
            answers[place + 1] = known[after]
        elif word[0] == "k":
            known[word] = after
    return answers


def solve_regression(words: list[str]) -> Answers:
    """Least squares, where the point lies in the span of those before."""
    size = words.index("=")
    points: list[list[float]] = []
    values: list[float] = []
    answers: Answers = {}
    for start in range(0, len(words) - size - 1, size + 2):
        point = (
            [{"+": 1.0, "-": -1.0}[word] for word in words[start : start + size]]
            if words[start] != "_"
            else None
        )
        if point is None:
            break
        if points and np.linalg.matrix_rank(np.array([*points, point])) == np.linalg.matrix_rank(
            np.array(points)
        ):
            weights = np.linalg.lstsq(np.array(points), np.array(values), rcond=None)[0]
            answers[start + size] = str(round(float(weights @ point)))
        points.append(point)
        values.append(float(words[start + size + 1]))
    return answers


def solve_parity(words: list[str]) -> Answers:
    return {place: str(words[: place + 1].count("1") % 2) for place in range(len(words))}


def solve_counting(words: list[str]) -> Answers:
    return {place: str(words[: place + 1].count("+") % 3) for place in range(len(words))}


def solve_word_problem(words: list[str]) -> Answers:
    """Follows each thing through all permutations."""
    answers: Answers = {}
    where = list(range(len(words[0]) - 1))
    for place, word in enumerate(words):
        where = [int(word[1 + at]) for at in where]
        answers[place] = "p" + "".join(map(str, where))
    return answers


def solve_k_hop(words: list[str]) -> Answers:
    """By the definition: find(i) is the largest j <= i whose predecessor is the letter at i."""
    hops, letters = int(words[0][1:]), words[1:]
    answers: Answers = {}
    for start in range(len(letters)):
        place: int | None = start
        for _ in range(hops):
            if place is not None:
                letter, found = (
                    letters[place],
                    [j for j in range(1, place + 1) if letters[j - 1] == letters[place]],
                )
                place = max(found, default=None)
                assert place is None or letters[place - 1] == letter
        answers[start + 1] = "~" if place is None else letters[place]
    return answers


def _facts(words: list[str], size: int) -> tuple[list[list[str]], list[str]]:
    """Facts of so many tokens, and the question."""
    said = [word for word in words if word != "_"]
    ask = said.index("?")
    return [said[i : i + size] for i in range(0, ask, size)], said[ask + 1 :]


def solve_chains(words: list[str]) -> Answers:
    facts, (at,) = _facts(words, 2)
    table = dict(facts)
    while at in table:
        at = table[at]
    return {len(words) - 1: at}


def solve_variables(words: list[str]) -> Answers:
    facts, (at,) = _facts(words, 3)
    table = {to: of for to, _, of in facts}
    while at in table:
        at = table[at]
    return {len(words) - 1: at}


def solve_relations(words: list[str]) -> Answers:
    facts, (at, *by) = _facts(words, 3)
    table = {(subject, relation): to for subject, relation, to in facts}
    assert len(table) == len(facts), "a subject and a relation have two objects"
    for relation in by:
        at = table[at, relation]
    return {len(words) - 1: at}


SOLVERS: dict[str, Callable[[list[str]], Answers]] = {
    "zoology-mqar": solve_zoology,
    "mad-recall": solve_recall,
    "mad-fuzzy-recall": solve_fuzzy,
    "mad-noisy-recall": solve_recall,
    "mad-selective-copying": solve_selective,
    "mad-compression": solve_compression,
    "mad-memorization": solve_memorization,
    "copying": solve_copying,
    "needle": solve_needle,
    "multi-round": solve_multi_round,
    "regression": solve_regression,
    "parity": solve_parity,
    "modular-counting": solve_counting,
    "word-problem": solve_word_problem,
    "k-hop": solve_k_hop,
    "chains": solve_chains,
    "variables": solve_variables,
    "relations": solve_relations,
}
