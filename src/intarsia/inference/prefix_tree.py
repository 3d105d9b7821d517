"""Which beginnings of texts there are states of: a radix tree over tokens.

A node is a beginning that texts have in common, or at which one ends; a node may hold a snapshot, the states of a model
that has seen just these tokens, in a slot of a pool of its own. Linear layers cannot go back, so a text can only go on
from a snapshot at a place it passes through. Where a text leaves others in the middle of an edge nobody could know
before that this place is worth a snapshot: `find` tells of it, so that whoever reads the text can take one there
(Marconi, arXiv 2411.19379).

The tree knows numbers of slots and no memory. What its snapshots hold is the caller's to free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from intarsia.errors import IntarsiaError

BLOCK = 512
"""Tokens that are compared at once."""


class Miss(StrEnum):
    """Why a text has to read tokens that were read before, or nothing of it was found."""

    NONE = "none"
    """All was found that could be."""
    OFF = "the prefix cache is off"
    NEW = "nobody has read this beginning before"
    NO_STATE = "the beginning was read before, and no state was kept where this text leaves the others"
    EVICTED = "a state was kept there and had to make room"


@dataclass
class Snapshot:
    """The states of a model that has seen the tokens of a node.

    Attributes:
        slot: where they are.
        tokens: how many tokens they have seen, which is the depth of the node.
        logits: those of the next token, `[vocab]`, where they are kept.
        used: when it was last of use, on the tree's clock.
    """

    slot: int
    tokens: int
    logits: Tensor | None = None
    used: int = 0


@dataclass(eq=False)
class Node:
    """A beginning of texts: that of `parent`, and `edge` behind it."""

    edge: tuple[int, ...]
    depth: int
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    evicted: bool = False
    """Whether it held a snapshot that had to make room."""
    touched: int = 0

    def below(self) -> Iterator[Node]:
        """This one and all that begin with it."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo += node.children.values()


@dataclass(frozen=True)
class Found:
    """What the tree knows of a text.

    Attributes:
        known: how many of its first tokens others have in common with it.
        node: the one with the snapshot to go on from; None: there is none.
        tokens: how many tokens of the text that saves. Less than the snapshot has seen where it can be shortened.
        miss: why it is not more.
    """

    known: int
    node: Node | None
    tokens: int
    miss: Miss


class PrefixTree:
    """The tree, and its clock.

    Args:
        shortens: whether states can go back to any shorter beginning: those of softmax attention to all tokens can.
        most_tokens: in all edges together. Beyond that, beginnings without a snapshot are forgotten, the oldest first.
    """

    def __init__(self, shortens: bool = False, most_tokens: int = 1 << 22) -> None:
        self.root = Node((), 0, None)
        self.shortens, self.most_tokens = shortens, most_tokens
        self.tokens = 0
        self.now = 0

    def snapshots(self) -> list[Node]:
        """The nodes that hold one."""
        return [node for node in self.root.below() if node.snapshot is not None]

    def find(self, text: Sequence[int]) -> Found:
        """Where to go on from to read `text`. A snapshot of all of it is of use only with the logits behind it. What is
        found counts as used; what stands before it does not."""
        text = tuple(text)
        known, path, inside = self._walk(text)
        on_path = [node for node in path if self._serves(node.snapshot, len(text))]
        best, saved = (on_path[-1], on_path[-1].depth) if on_path else (None, 0)
        if self.shortens:
            # Any that begins with what is known; of a whole text the last token is read again for its logits.
            reach = min(known, len(text) - 1)
            longer = next((node for node in inside.below() if node.snapshot is not None), None)
            if longer is not None and saved < reach:
                best, saved = longer, reach
        if best is not None and best.snapshot is not None:
            self.now += 1
            best.snapshot.used = best.touched = self.now
        return Found(known, best, saved, self._why(path, known, saved, len(text)))

    def put(self, text: Sequence[int], snapshot: Snapshot) -> int | None:
        """Keep a snapshot of the beginning `text`. The slot that is of no use then, if any: that of one that was there
        already."""
        text = tuple(text)
        if snapshot.tokens != len(text) or not text:
            raise IntarsiaError(f"a snapshot of {snapshot.tokens} tokens cannot stand at depth {len(text)}")
        self.now += 1
        node = self._node_at(text)
        node.touched, node.evicted = self.now, False
        old, spare = node.snapshot, None
        if old is not None:
            spare = old.slot
            snapshot.logits = old.logits if snapshot.logits is None else snapshot.logits
        snapshot.used = self.now
        node.snapshot = snapshot
        self._forget()
        return spare

    def take(self, node: Node) -> Snapshot:
        """Take a node's snapshot away, to make room. That it was there is remembered."""
        snapshot = node.snapshot
        if snapshot is None:
            raise IntarsiaError(f"the node of {node.depth} tokens holds no snapshot")
        node.snapshot, node.evicted = None, True
        self._tidy(node)
        self._forget()
        return snapshot

    def state_before(self, node: Node) -> int:
        """How many tokens the next snapshot before a node has seen: what would have to be read again without its own
        begins there."""
        above = node.parent
        while above is not None and above.snapshot is None:
            above = above.parent
        return 0 if above is None else above.depth

    def check_integrity(self) -> None:
        """Raise IntarsiaError unless the tree is one, counts its tokens and holds snapshots of its nodes' depths."""
        tokens, slots = 0, []
        for node in self.root.below():
            tokens += len(node.edge)
            parent = node.parent
            before = 0 if parent is None else parent.depth
            if parent is not None and (not node.edge or parent.children.get(node.edge[0]) is not node):
                raise IntarsiaError(f"the node of {node.depth} tokens is not where its first token leads")
            if node.depth != before + len(node.edge):
                raise IntarsiaError(f"a node of depth {node.depth} has {before} tokens and {len(node.edge)}")
            if node.snapshot is not None:
                slots.append(node.snapshot.slot)
                if node.snapshot.tokens != node.depth:
                    raise IntarsiaError(
                        f"a snapshot of {node.snapshot.tokens} tokens stands at depth {node.depth}"
                    )
            elif parent is not None and len(node.children) == 1 and not node.evicted:
                raise IntarsiaError(f"the node of {node.depth} tokens is of no use")
        if tokens != self.tokens:
            raise IntarsiaError(f"{self.tokens} tokens are counted in the tree, which has {tokens}")
        if len(set(slots)) < len(slots):
            raise IntarsiaError(f"two snapshots are in one slot: {sorted(slots)}")

    @staticmethod
    def _serves(snapshot: Snapshot | None, length: int) -> bool:
        return snapshot is not None and (snapshot.tokens < length or snapshot.logits is not None)

    def _walk(self, text: tuple[int, ...]) -> tuple[int, list[Node], Node]:
        """How far the tree knows a text, the nodes it passes, and the node in whose edge, or at which, that ends."""
        node, at, path = self.root, 0, [self.root]
        while at < len(text) and (child := node.children.get(text[at])) is not None:
            n = common_beginning(child.edge, text, len(text), at)
            at += n
            if n < len(child.edge):
                return at, path, child
            node = child
            path.append(node)
        return at, path, node

    def _why(self, path: list[Node], known: int, saved: int, length: int) -> Miss:
        if saved >= min(known, length - 1):
            return Miss.NONE if saved else Miss.NEW
        return Miss.EVICTED if any(n.evicted and n.depth > saved for n in path) else Miss.NO_STATE

    def _node_at(self, text: tuple[int, ...]) -> Node:
        """The node of just this beginning, made where it is not there."""
        known, path, inside = self._walk(text)
        node = path[-1]
        if inside is not node:  # it ends within an edge: divide that
            cut = known - node.depth
            middle = Node(inside.edge[:cut], known, node, {inside.edge[cut]: inside}, touched=inside.touched)
            node.children[middle.edge[0]] = middle
            inside.parent, inside.edge = middle, inside.edge[cut:]
            node = middle
        if known < len(text):
            leaf = Node(text[known:], len(text), node)
            node.children[leaf.edge[0]] = leaf
            self.tokens += len(leaf.edge)
            node = leaf
        return node

    def _tidy(self, node: Node) -> None:
        """Join a node that says nothing with the only one behind it."""
        parent = node.parent
        if parent is None or node.snapshot is not None or node.evicted or len(node.children) != 1:
            return
        (child,) = node.children.values()
        child.edge, child.parent = node.edge + child.edge, parent
        parent.children[child.edge[0]] = child

    def _forget(self) -> None:
        """Drop ends without a snapshot, the oldest first, until the tree has its size."""
        while self.tokens > self.most_tokens:
            ends = [n for n in self.root.below() if n.parent and not n.children and n.snapshot is None]
            if not ends:
                return
            end = min(ends, key=lambda node: node.touched)
            parent = end.parent
            assert parent is not None
            del parent.children[end.edge[0]]
            self.tokens -= len(end.edge)
            self._tidy(parent)


def common_beginning(a: Sequence[int], b: Sequence[int], most: int, at: int = 0) -> int:
    """How many tokens, `most` at most, `a` and `b` from `at` on have in common."""
    most = min(most, len(a), len(b) - at)
    n = 0
    while n < most:
        end = min(n + BLOCK, most)
        if a[n:end] != b[at + n : at + end]:
            return next(i for i in range(n, end) if a[i] != b[at + i])
        n = end
    return max(most, 0)
