"""The engine's memory: slots and pages of a pool, and the snapshots in it from which later texts go on.

Texts that run have slots, and so have snapshots: a snapshot is a fork of a text that nobody lets go on, so it shares
pages, and its row until the text goes on. When room is wanted snapshots make way, those first whose states save least
work for the bytes they take and have not been used for long (Marconi, arXiv 2411.19379, section 4.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from intarsia.errors import IntarsiaError, PoolError
from intarsia.inference.prefix_tree import Found, Miss, Node, PrefixTree, Snapshot
from intarsia.layers.growing import PagedPool
from intarsia.layers.recurrent import RecurrentPool
from intarsia.model import InferenceModel, ModelStates
from intarsia.model.language_model import cost_of


@dataclass(frozen=True)
class Hits:
    """What the prefix cache has done: texts that were looked up, those of which something was found, the tokens that
    were not read again for it, and why it was not more, by reason."""

    looked_up: int
    hits: int
    saved_tokens: int
    misses: dict[str, int]


class Room:
    """Slots and pages for texts and snapshots. Not for several threads at once.

    Args:
        slots: of texts and snapshots together.
        tokens: for how many tokens of all of them together there are pages.
        caches: whether snapshots are kept.
        weight: of the work that a snapshot saves for its bytes, against how lately it was used.
    """

    def __init__(
        self,
        model: InferenceModel,
        slots: int,
        tokens: int,
        page_size: int,
        caches: bool,
        weight: float = 1.0,
    ) -> None:
        self._new_pool = partial(model.new_pool, slots, tokens, page_size)
        self.pool = self._new_pool()
        self.tokens, self.caches, self._weight = tokens, caches, weight
        self.shortens = all(_shortens(pool) for pool in self.pool.layers)
        self.tree = self._new_tree()
        self._cost = cost_of(model.config, model.model.embed.weight.dtype)
        self._logit_bytes = 4 * model.config.vocab_size
        self._looked_up = self._hits = self._saved = 0
        self._misses: Counter[str] = Counter()

    @property
    def hits(self) -> Hits:
        """What the prefix cache has done so far."""
        return Hits(self._looked_up, self._hits, self._saved, dict(self._misses))

    @property
    def state_bytes(self) -> int:
        """The size of what has a slot each: recurrent states and the inputs of convolutions."""
        pools = self.pool.layers
        fixed = sum(x.nbytes for p in pools if isinstance(p, PagedPool) for x in p.fixed.values())
        return fixed + sum(p.nbytes for p in pools if isinstance(p, RecurrentPool))

    @property
    def page_bytes(self) -> int:
        """The size of the pages, of keys, values and latents."""
        return self.pool.nbytes - self.state_bytes

    @property
    def used_pages(self) -> float:
        """The share of the pages that a text or a snapshot has, in the layers where it is largest."""
        pagings = self.pool.books.pagings.values()
        return max((1 - paging.free_pages / paging.pages for paging in pagings), default=0.0)

    def find(self, text: Sequence[int]) -> Found:
        """What there is of a text."""
        return self.tree.find(text) if self.caches else Found(0, None, 0, Miss.OFF)

    def note(self, found: Found) -> None:
        """Count what a text that begins goes on from among the hits and misses."""
        self._looked_up += 1
        self._hits += found.tokens > 0
        self._saved += found.tokens
        if found.miss is not Miss.NONE:
            self._misses[found.miss.value] += 1

    def has_room(self, texts: Sequence[int], tokens: int, found: Found) -> bool:
        """Whether a text of so many `tokens`, of which there is what was `found`, would have pages beside those in the
        slots `texts`, if all other snapshots went."""
        node = found.node
        held = [*texts, *([] if node is None or node.snapshot is None else [node.snapshot.slot])]
        for paging in self.pool.books.pagings.values():
            # A page more for the one that is copied, where a text leaves what it shares.
            wanted = paging.most_pages(tokens) - (0 if node is None else paging.most_pages(found.tokens)) + 1
            if paging.pages - paging.held(held) < wanted:
                return False
        return True

    def begin(self, found: Found) -> int | None:
        """A slot for a text that goes on from what was found; None where texts have all of them."""
        node = found.node
        if node is None or node.snapshot is None:
            return self.pool.take() if self.free_slot() else None
        # Where there is no other slot the text takes that of the snapshot.
        slot = self.pool.fork(node.snapshot.slot) if self.free_slot(node) else self.tree.take(node).slot
        if self.pool.tokens([slot])[0] > found.tokens:
            self.pool.view([slot]).truncated([found.tokens])
        return slot

    def free_slot(self, but: Node | None = None) -> bool:
        """Whether a slot is free, for which a snapshot, but not this one, has made way if need be."""
        return bool(self.pool.free_slots) or self._make_way(self._candidates(but))

    def fork(self, slot: int) -> int | None:
        """A second slot for what is in one; None where texts have all of them."""
        return self.pool.fork(slot) if self.free_slot() else None

    def view(self, slots: Sequence[int], lengths: Sequence[int]) -> ModelStates:
        """The states in these slots, for the next `lengths` tokens of which snapshots have made way if need be.

        Raises:
            PoolError: texts have the pages that are wanted.
        """
        states = self.pool.view(slots)
        while True:
            try:
                states.check_room(lengths)
                return states
            except PoolError:
                if not self._make_way(self._with_pages()):
                    raise

    def keep(self, text: Sequence[int], slot: int, logits: Tensor | None = None) -> None:
        """Keep a snapshot of what is in a slot, which has seen just `text`, and goes on."""
        if self.caches and len(text) and (copy := self.fork(slot)) is not None:
            self._put(text, copy, logits)

    def keep_last(self, text: Sequence[int], slot: int) -> None:
        """Keep what is in a slot, which has seen just `text` and is free otherwise."""
        if self.caches and len(text):
            self._put(text, slot, None)
        else:
            self.pool.free(slot)

    def clear(self) -> None:
        """Let all snapshots go."""
        for node in self.tree.snapshots():
            self.pool.free(self.tree.take(node).slot)

    def begin_anew(self) -> None:
        """Forget what is in all slots and pages, and the tree: memory as it was in the beginning."""
        del self.pool  # there may be no room for both
        self.pool, self.tree = self._new_pool(), self._new_tree()

    def check_integrity(self, texts: dict[int, int]) -> None:
        """Raise IntarsiaError unless slots, pages and tree fit together, and with texts in slots that have seen so many
        tokens."""
        self.tree.check_integrity()
        kept = {n.snapshot.slot: n.depth for n in self.tree.snapshots() if n.snapshot is not None}
        if kept.keys() & texts.keys():
            raise IntarsiaError(f"texts and snapshots share the slots {sorted(kept.keys() & texts.keys())}")
        wanted = {**kept, **texts}
        taken = sorted(set(range(self.pool.slots)) - set(self.pool.free_slots))
        if taken != sorted(wanted):
            raise IntarsiaError(f"the slots {taken} are taken; texts and snapshots have {sorted(wanted)}")
        if taken and self.pool.tokens(taken) != tuple(wanted[slot] for slot in taken):
            raise IntarsiaError(
                f"{wanted} should have been seen in the slots; it was {self.pool.tokens(taken)}"
            )
        for pool in self.pool.layers:
            if isinstance(pool, PagedPool):
                pool.check_integrity()
        self.pool.books.rows.check_integrity()

    def _new_tree(self) -> PrefixTree:
        return PrefixTree(self.shortens, most_tokens=max(8 * self.tokens, 1 << 20))

    def _put(self, text: Sequence[int], slot: int, logits: Tensor | None) -> None:
        spare = self.tree.put(text, Snapshot(slot, len(text), None if logits is None else logits.clone()))
        if spare is not None:
            self.pool.free(spare)

    def _candidates(self, but: Node | None = None) -> list[Node]:
        return [node for node in self.tree.snapshots() if node is not but]

    def _with_pages(self) -> list[Node]:
        """The snapshots with a page that nobody else has: the others give none."""
        pagings = self.pool.books.pagings.values()
        return [
            node
            for node in self._candidates()
            if node.snapshot is not None and any(p.has_own(node.snapshot.slot) for p in pagings)
        ]

    def _make_way(self, candidates: list[Node]) -> bool:
        """Let the snapshot go that is worth least; False: there is none."""
        if not candidates:
            return False
        used = [node.snapshot.used for node in candidates if node.snapshot is not None]
        worth = [self._saved_per_byte(node) for node in candidates]
        first, span, most = min(used), max(max(used) - min(used), 1), max(*worth, 1e-300)
        scores = [(u - first) / span + self._weight * w / most for u, w in zip(used, worth, strict=True)]
        node = candidates[min(range(len(scores)), key=scores.__getitem__)]
        self.pool.free(self.tree.take(node).slot)
        return True

    def _saved_per_byte(self, node: Node) -> float:
        """FLOPs that need not be done again, for each byte that only this snapshot takes."""
        before = self.tree.state_before(node)
        flops = self._flops(node.depth) - self._flops(before)
        taken = (
            self._cost.state_bytes(node.depth) - self._cost.state_bytes(before) + self._cost.state_bytes(0)
        )
        kept = node.snapshot is not None and node.snapshot.logits is not None
        return flops / max(taken + (self._logit_bytes if kept else 0), 1)

    def _flops(self, tokens: int) -> float:
        return tokens * self._cost.forward_flops_per_token(tokens) if tokens else 0.0


def _shortens(pool: object) -> bool:
    """Whether states in it can go back to any number of tokens."""
    return (
        isinstance(pool, PagedPool)
        and pool.form.window is None
        and not pool.form.fixed
        and not pool.form.rewritten
    )
