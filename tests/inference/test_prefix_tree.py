"""The tree of beginnings, against a list of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.errors import IntarsiaError
from intarsia.inference.prefix_tree import Miss, PrefixTree, Snapshot, common_beginning

TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)


@dataclass
class Listed:
    """All texts that were put, and the snapshots that are left."""

    texts: list[tuple[int, ...]] = field(default_factory=list)
    kept: dict[tuple[int, ...], int] = field(default_factory=dict)

    def known(self, text: tuple[int, ...]) -> int:
        return max((common_beginning(each, text, len(text)) for each in self.texts), default=0)

    def longest(self, text: tuple[int, ...]) -> int:
        """Of the snapshots without logits that `text` can go on from."""
        return max((len(each) for each in self.kept if each == text[: len(each)] != text), default=0)


@given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "take", "find"]), TEXTS), max_size=40),
    shortens=st.booleans(),
)
@settings(max_examples=300)
def test_is_the_list_of_what_was_put(steps: list[tuple[str, tuple[int, ...]]], shortens: bool) -> None:
    tree, listed = PrefixTree(shortens), Listed()
    for slot, (what, text) in enumerate(steps):
        if what == "put":
            spare = tree.put(text, Snapshot(slot, len(text)))
            assert spare == listed.kept.get(text)
            listed.texts.append(text)
            listed.kept[text] = slot
        elif what == "take" and listed.kept:
            node = min(tree.snapshots(), key=lambda each: abs(each.depth - len(text)))
            assert node.snapshot is not None
            slot = tree.take(node).slot
            listed.kept = {each: other for each, other in listed.kept.items() if other != slot}
        else:
            found = tree.find(text)
            assert found.known == listed.known(text)
            longest = listed.longest(text)
            if shortens:
                reach = max((common_beginning(each, text, len(text) - 1) for each in listed.kept), default=0)
                # What was let go is known and cannot be reached: then what stands before is.
                assert longest <= found.tokens <= max(reach, longest)
                assert found.tokens == reach or reach < found.known
            else:
                assert found.tokens == longest
            assert (found.node is None) == (found.tokens == 0)
            assert (found.miss is Miss.NEW) <= (found.known <= 1 or found.tokens == 0)
        tree.check_integrity()
        assert sorted(n.snapshot.slot for n in tree.snapshots() if n.snapshot) == sorted(listed.kept.values())


def test_says_why_there_is_not_more() -> None:
    tree = PrefixTree()
    assert tree.find((1, 2, 3)).miss is Miss.NEW
    tree.put((1, 2, 3, 4), Snapshot(0, 4))
    assert tree.find((1, 2, 3, 4, 5)).miss is Miss.NONE
    left = tree.find((1, 2, 3, 9))
    assert (left.known, left.tokens, left.miss) == (3, 0, Miss.NO_STATE)
    tree.put((1, 2, 3), Snapshot(1, 3))
    assert tree.find((1, 2, 3, 9)).tokens == 3
    (node,) = [each for each in tree.snapshots() if each.depth == 3]
    tree.take(node)
    assert tree.find((1, 2, 3, 9)).miss is Miss.EVICTED


def test_a_whole_text_needs_the_logits_behind_it() -> None:
    tree = PrefixTree()
    tree.put((1, 2, 3), Snapshot(0, 3))
    assert tree.find((1, 2, 3)).tokens == 0
    assert tree.put((1, 2, 3), Snapshot(1, 3, torch.zeros(5))) == 0
    assert tree.find((1, 2, 3)).tokens == 3
    assert tree.put((1, 2, 3), Snapshot(2, 3)) == 1  # the logits stay
    assert tree.find((1, 2, 3)).tokens == 3


def test_what_can_be_shortened_serves_every_beginning() -> None:
    tree = PrefixTree(shortens=True)
    tree.put((1, 2, 3, 4, 5), Snapshot(0, 5))
    assert [tree.find(text).tokens for text in [(1, 2, 9), (1, 2, 3, 4, 5), (1, 2, 3), (9,)]] == [2, 4, 2, 0]


def test_a_hit_refreshes_what_was_used_alone() -> None:
    tree = PrefixTree()
    tree.put((1,), Snapshot(0, 1))
    tree.put((1, 2), Snapshot(1, 2))
    tree.put((7,), Snapshot(2, 1))
    tree.find((1, 2, 3))
    used = {n.snapshot.slot: n.snapshot.used for n in tree.snapshots() if n.snapshot}
    assert used[0] < used[2] < used[1]


def test_forgets_beginnings_without_states_when_it_is_large() -> None:
    tree = PrefixTree(most_tokens=6)
    for slot, text in enumerate([(1, 2, 3), (1, 4, 5), (6, 7, 8, 9)]):
        tree.put(text, Snapshot(slot, len(text)))
        tree.check_integrity()
    (first,) = [n for n in tree.snapshots() if n.snapshot and n.snapshot.slot == 0]
    tree.take(first)
    tree.check_integrity()
    assert tree.find((1, 2, 3)).known == 1
    assert len(tree.snapshots()) == 2


def test_a_snapshot_stands_at_its_own_depth() -> None:
    with pytest.raises(IntarsiaError, match="cannot stand at depth 2"):
        PrefixTree().put((1, 2), Snapshot(0, 3))
