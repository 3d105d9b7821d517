"""Every task: examples from the seed alone, answers that an independent solver finds, exact lengths."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import ConfigError
from intarsia.model.loss import IGNORED
from intarsia.tasks import MQAR, ExampleSplit, Palindrome, Stack, Task, make_task, names, registry, task
from support import task_cases, task_solvers

SPLITS: tuple[ExampleSplit, ...] = ("train", "validation", "test")
Answers = dict[int, str]
Solver = Callable[[list[str]], Answers]


# The solvers see the names of an example's tokens and say what is asked where. None knows the task's options.


def solve_palindrome(words: list[str]) -> Answers:
    half = words.index("<sep>")
    said = words[:half]
    for position, word in enumerate(words[half + 1 :]):
        assert word == said[-1 - position]
    # What comes after each token of the second half, as long as there is anything left to say.
    return {half + 1 + i: said[-2 - i] for i in range(half - 1)}


def solve_mqar(words: list[str]) -> Answers:
    half = words.index("<sep>")
    keys, values = words[0:half:2], words[1:half:2]
    table = dict(zip(keys, values, strict=True))
    assert len(table) == len(keys), "a key came twice"
    return {position: table[words[position]] for position in range(half + 1, len(words))}


def solve_stack(words: list[str]) -> Answers:
    stacks: dict[str, list[str]] = {}
    answers: Answers = {}
    for start in range(0, len(words), 3):
        action, *rest = words[start : start + 3]
        assert action in {"<push>", "<pop>"}
        if not rest:
            continue
        content = stacks.setdefault(rest[0], [])
        if action == "<pop>":
            assert content, "an empty stack was popped"
            answers[start + 1] = content.pop()
            assert rest[1:] in ([], [answers[start + 1]])
        elif len(rest) == 2:
            content.append(rest[1])
    return answers


SOLVERS: dict[str, Solver] = {
    "palindrome": solve_palindrome,
    "mqar": solve_mqar,
    "stack": solve_stack,
    **task_solvers.SOLVERS,
}

palindromes = st.builds(Palindrome, length=st.integers(4, 90), symbols=st.integers(2, 70))
stacks = st.builds(Stack, length=st.integers(5, 200), stacks=st.integers(1, 64), elements=st.integers(2, 70))


@st.composite
def mqars(draw: st.DrawFn) -> MQAR:
    length = draw(st.integers(4, 90))
    pairs = draw(st.none() | st.integers(1, (length - 2) // 2))
    least = length // 4 if pairs is None else pairs
    keys = draw(st.none() | st.integers(least, least + 20))
    return MQAR(length, pairs=pairs, keys=keys, values=draw(st.integers(2, 70)))


tasks = palindromes | mqars() | stacks | task_cases.tasks
seeds = st.integers(0, 2**70)
indices = st.integers(0, 2**40)
splits = st.sampled_from(SPLITS)


def test_each_task_has_a_name_and_a_solver() -> None:
    assert names() == list(SOLVERS)
    for name in names():
        assert task(name).type == name


@given(tasks, seeds, indices, splits)
def test_a_solver_finds_each_answer_and_nothing_else_is_asked(
    it: Task, seed: int, first: int, split: ExampleSplit
) -> None:
    examples = it.examples(seed, range(first, first + 3), split)
    for inputs, targets in zip(*examples, strict=True):
        answers = SOLVERS[it.type]([it.names[token] for token in inputs])
        asked = {i: it.names[target] for i, target in enumerate(targets.tolist()) if target != IGNORED}
        assert asked == answers


@given(tasks, seeds, st.integers(0, 5))
def test_lengths_shapes_and_vocabulary(it: Task, seed: int, count: int) -> None:
    examples = it.examples(seed, count)
    for tokens in examples:
        assert tokens.shape == (count, it.length)
        assert tokens.dtype == torch.int64
        assert tokens.is_contiguous()
    assert ((examples.inputs >= 0) & (examples.inputs < it.vocab_size)).all()
    asked = examples.targets[examples.targets != IGNORED]
    assert ((asked >= 0) & (asked < it.vocab_size)).all()
    # Kinds of tokens do not overlap: each token has a name of its own, and so a kind.
    assert len(set(it.names)) == it.vocab_size


@given(tasks, seeds, st.integers(0, 50), st.integers(0, 5), st.integers(1, 5), splits)
def test_an_example_is_the_same_in_any_batch(
    it: Task, seed: int, first: int, before: int, after: int, split: ExampleSplit
) -> None:
    alone = it.examples(seed, range(first, first + 1), split)
    begin = max(0, first - before)
    others = it.examples(seed, range(begin, first + after), split)
    for one, many in zip(alone, others, strict=True):
        assert torch.equal(one[0], many[first - begin])


@given(tasks, seeds)
def test_global_generators_are_neither_read_nor_moved(it: Task, seed: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = it.examples(seed, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    second = it.examples(seed, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("it", [Palindrome(64), MQAR(64), Stack(64)], ids=lambda it: it.type)
def test_seeds_splits_and_indices_have_examples_of_their_own(it: Task) -> None:
    rows = torch.cat([it.examples(seed, 50, split).inputs for seed in range(3) for split in SPLITS])
    assert len(torch.unique(rows, dim=0)) == len(rows) == 450


def test_a_seed_means_the_same_on_every_machine_and_in_every_version() -> None:
    palindrome = Palindrome(9, symbols=10).examples(7, range(100, 101))
    assert palindrome.inputs.tolist() == PALINDROME
    assert MQAR(9, pairs=2, keys=5, values=3).examples(7, range(100, 101), "test").inputs.tolist() == RECALL
    assert Stack(11, stacks=2, elements=5).examples(7, range(100, 101)).inputs.tolist() == STACK


PALINDROME = [[9, 5, 4, 0, 10, 0, 4, 5, 9]]
RECALL = [[4, 6, 0, 7, 8, 0, 0, 0, 4]]
STACK = [[7, 0, 3, 7, 1, 2, 7, 1, 6, 8, 0]]


def test_the_reports_table_has_this_form() -> None:
    """Table 5.1: seven letters reversed in 15 tokens; six pairs and two queries in 15."""
    palindrome = Palindrome(15).examples(0, 1)
    assert (palindrome.inputs[0, :7].flip(0) == palindrome.inputs[0, 8:]).all()
    assert (palindrome.targets[0, :8] == IGNORED).all()
    assert palindrome.targets[0, 8:14].tolist() == palindrome.inputs[0, 9:].tolist()
    assert palindrome.targets[0, 14] == IGNORED
    recall = MQAR(15, pairs=6)
    assert recall.num_queries == 2
    assert recall.examples(0, 1).inputs[0].tolist().index(recall.vocab_size - 1) == 12


@pytest.mark.parametrize("name", names())
def test_chance_is_what_the_commonest_answer_scores(name: str) -> None:
    it = make_task(name, task_cases.EXAMPLE[name])
    targets = it.examples(1, 2000, "test").targets
    asked = targets[targets != IGNORED]
    share = float(asked.bincount().max() / len(asked))
    # Answers of an example hang together, so examples are what is counted: five standard deviations of 2000 of
    # them, and the commonest of many equal ones is by chance above the rest.
    assert abs(share - it.chance) < 5 * (max(it.chance, 1 / 2000) / 2000) ** 0.5


def test_draws_are_uniform() -> None:
    """Each kind of token comes about as often as any other: within five standard deviations."""
    palindrome = Palindrome(201, symbols=8).examples(0, 400).inputs[:, :100]
    mqar = MQAR(64, pairs=8, keys=16, values=8).examples(0, 2000).inputs
    stack = Stack(300, stacks=4, elements=8).examples(0, 200)
    fresh = stack.inputs.view(200, -1, 3)[..., 1]
    for drawn, sides in ((palindrome, 8), (mqar[:, 0], 16), (mqar[:, 1], 8), (mqar[:, 14], 16), (fresh, 4)):
        counts = torch.unique(drawn, return_counts=True)[1].double()
        expected = drawn.numel() / sides
        assert len(counts) == sides
        assert (counts - expected).abs().max() < 5 * expected**0.5
    # Every pair is asked for, wherever it stands; a query may come again.
    where = (mqar[:, :16:2, None] == mqar[:, None, 17:]).sum(2)
    assert (where.double().mean(0) - (64 - 17) / 8).abs().max() < 0.3
    # Stacks with something on them are popped as often as pushed.
    pops = (stack.targets != IGNORED).sum() / (200 * 100)
    assert 0.4 < pops < 0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("palindrome", {"length": 3}, "length must be at least 4"),
        ("palindrome", {"length": 8.0}, "length must be a whole number of at least 1; got 8.0"),
        ("palindrome", {"length": 8, "symbols": 1}, "symbols must be a whole number of at least 2; got 1"),
        ("mqar", {"length": 3}, "length must be at least 4"),
        ("mqar", {"length": 16, "pairs": 8}, "there can be 7 pairs"),
        ("mqar", {"length": 16, "pairs": 0}, "pairs must be a whole number of at least 1; got 0"),
        ("mqar", {"length": 16, "keys": 3}, "4 pairs need as many keys; got 3"),
        ("mqar", {"length": 16, "values": True}, "values must be a whole number"),
        ("stack", {"length": 4}, "length must be at least 5"),
        ("stack", {"length": 16, "stacks": 0}, "stacks must be a whole number of at least 1; got 0"),
        ("stack", {"length": 16, "elements": 1}, "elements must be a whole number of at least 2; got 1"),
        ("parity", {"length": 8, "asked_from": 8}, "asked_from must be below the length, 8; got 8"),
        ("modular-counting", {"length": 8, "modulus": 1}, "modulus must be a whole number of at least 2"),
        ("word-problem", {"length": 8, "group": "s6"}, "group must be one of s3, s4, s5, a4, a5; got 's6'"),
        ("zoology-mqar", {"length": 15}, "take 16 tokens; the length is 15"),
        ("zoology-mqar", {"length": 64, "vocabulary": 8}, "has 3 keys; got 4 pairs"),
        ("zoology-mqar", {"length": 64, "power": 0.0}, "power must be above 0"),
        ("k-hop", {"length": 9, "hops": 17}, "hops must not be more, got 17"),
        ("chains", {"length": 9, "hops": 2, "chains": 2}, "take 10 tokens; the length is 9"),
        ("chains", {"length": 99, "symbols": 5}, "need 6 symbols; got 5"),
        ("relations", {"length": 99, "order": "upward"}, "order must be one of random, forward, backward"),
        ("needle", {"length": 99, "depth": 101}, "depth is in percent"),
        ("needle", {"length": 4}, "take 5 tokens; the length is 4"),
        (
            "multi-round",
            {"length": 20, "back": 1},
            "a round takes 15 tokens and 2 are needed; the length is 20",
        ),
        ("mad-fuzzy-recall", {"length": 32, "pairs": 9}, "of which there are 8; got 9 pairs"),
        ("mad-noisy-recall", {"length": 32, "noise": 100}, "noise is in percent and at most 99"),
        ("mad-compression", {"length": 12}, "8 places cannot be asked of 3 tokens"),
        ("mad-selective-copying", {"length": 31}, "length must be at least 32; got 31"),
        ("regression", {"length": 11}, "a point takes 6 tokens and at least two are needed"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(name)(**options)


@pytest.mark.parametrize("name", ["parity", "modular-counting", "word-problem"])
def test_state_tracking_beyond_a_position(name: str) -> None:
    whole, late = (
        make_task(name, {"length": 30, **more}).examples(2, 5) for more in ({}, {"asked_from": 20})
    )
    assert torch.equal(whole.inputs, late.inputs)
    assert (late.targets[:, :20] == IGNORED).all()
    assert torch.equal(late.targets[:, 20:], whole.targets[:, 20:])
    assert (whole.targets != IGNORED).all()


@pytest.mark.parametrize("name", ["chains", "variables", "relations"])
def test_a_dial_of_multi_hop_moves_no_other(name: str) -> None:
    """Distance is filler alone: the facts, the question and the answer of an example stay what they are."""
    near, far = (make_task(name, {"length": 90, "distance": distance}) for distance in (0, 5))
    (inputs, answers), (others, other_answers) = near.examples(0, 20), far.examples(0, 20)
    assert torch.equal(answers[:, -1], other_answers[:, -1])
    for a, b in zip(inputs, others, strict=True):
        words = [[near.names[token] for token in row if near.names[token] != "_"] for row in (a, b)]
        assert words[0] == words[1]


def test_groups_are_groups() -> None:
    for group, size in (("s3", 6), ("s4", 24), ("s5", 120), ("a4", 12), ("a5", 60)):
        assert make_task("word-problem", {"length": 1, "group": group}).vocab_size == size


@pytest.mark.parametrize("group", ["s3", "s4", "s5", "a4", "a5"])
def test_two_elements_generate_each_group(group: str) -> None:
    it = make_task("word-problem", {"length": 40, "group": group, "generators": True})
    inputs, targets = it.examples(0, 200)
    assert len(inputs.unique()) == 2
    assert len(targets.unique()) == it.vocab_size


def test_depth_is_where_the_needle_stands() -> None:
    for depth, place in ((0, 0), (50, 12), (100, 25)):
        it = make_task("needle", {"length": 30, "depth": depth})
        assert {row.tolist().index(it.vocab_size - 1) for row in it.examples(0, 9).inputs} == {place}


def test_queries_of_zoology_are_near_by_a_power_law() -> None:
    it = make_task("zoology-mqar", {"length": 256, "pairs": 1, "vocabulary": 64})
    where = (it.examples(0, 4000).targets != IGNORED).nonzero()[:, 1] // 2 - 1
    weight = np.arange(1, 128) ** (0.01 - 1.0)
    expected = 4000 * weight / weight.sum()
    counts = np.bincount(where, minlength=127)
    assert (np.abs(counts - expected) < 5 * expected**0.5 + 1).all()


def test_unknown_names_and_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no task 'palindrom'; did you mean 'palindrome'\?"):
        registry.task("palindrom")
    it = Palindrome(8)
    for wrong in (-1, True, range(0, 4, 2), range(-1, 3), range(4, 2), [1]):
        with pytest.raises(ConfigError, match="indices must be a count or a range"):
            it.examples(0, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed must be a whole number of at least 0"):
        it.examples(-1, 1)
    with pytest.raises(ConfigError, match="split must be one of train, validation, test; got 'dev'"):
        it.examples(0, 1, "dev")  # type: ignore[arg-type]


def test_a_task_is_a_value_and_can_be_shown() -> None:
    it = MQAR(8, pairs=2)
    assert MQAR(**dataclasses.asdict(it)) == it
    with pytest.raises(dataclasses.FrozenInstanceError):
        it.length = 9  # type: ignore[misc]
    assert it.show(torch.tensor([0, 4, 68, IGNORED])) == "k0 v0 <sep> ."
