"""What stands for several tokens: of windows that are complete, in whole sequences and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.layers.growing import GrowingState
from intarsia.layers.growing.state import Growth
from intarsia.ops import Sequences
from intarsia.ops.keys import Keys, between

Pool = Callable[[Tensor, Tensor], Tensor]
"""From windows `[B, m, width, ...]` and their numbers `[m]` to what stands for them, `[B, m, ...]`."""
Take = Callable[[int, int, int], Tensor]
"""From the number of a sequence, a token and a later one to what is there of the tokens between, `[1, n, ...]`; where
all sequences are alike of all of them, `[B, n, ...]`."""


def windows(
    take: Take, before: tuple[int, ...], after: tuple[int, ...], alike: bool, stride: int, width: int
) -> list[Tensor]:
    """Of each sequence the windows `[1, m_n, width, ...]` whose last token has come between `before` and `after`, where
    the window e is of the `width` tokens up to `(e + 1) stride - 1`; of those that begin before the first token the
    missing ones are zero. Where all are `alike` it is one part, `[B, m, width, ...]`."""
    found = []
    for n in range(1 if alike else len(before)):
        first, end = before[n] // stride, after[n] // stride
        begin = (first + 1) * stride - width
        if first == end:
            rows = take(n, 0, 0)
            found.append(rows.new_zeros(rows.shape[0], 0, width, *rows.shape[2:]))
            continue
        rows = take(n, max(begin, 0), end * stride)
        if begin < 0:
            rows = F.pad(rows, (*[0, 0] * (rows.dim() - 2), -begin, 0))
        found.append(rows.unfold(1, width, stride).movedim(-1, 2))
    return found


def of_kept(keys: Keys, seqs: Sequences | None, packed: bool) -> Take:
    """What reads tokens of what is kept of all of them: `packed` where it is a row of several sequences."""
    if packed:
        assert isinstance(keys, Tensor)
        assert seqs is not None
        row, starts = keys, seqs.starts
        return lambda n, begin, end: row[:, starts[n] + begin : starts[n] + end]
    if isinstance(keys, Tensor):
        held = keys
        return lambda n, begin, end: held[:, begin:end]
    return lambda n, begin, end: between(keys, n, begin, end)


def of_tail(parts: list[Tensor], before: tuple[int, ...], tail: int) -> Take:
    """What reads tokens of the new ones and of the last `tail` before them: `parts` are of both, of each sequence."""
    return lambda n, begin, end: parts[n][:, begin - before[n] + tail : end - before[n] + tail]


def with_tail(tail: Tensor, new: Tensor, seqs: Sequences | None, alike: bool) -> list[Tensor]:
    """The last rows before, `[N, tail, ...]`, with the new ones `[B, T, ...]` behind them, of each sequence."""
    if alike:
        return [torch.cat([tail.to(new.dtype), new], dim=1)]
    parts = new.split(1) if seqs is None else new.split(seqs.lengths, dim=1)
    return [torch.cat([old.to(part.dtype)[None], part], dim=1) for old, part in zip(tail, parts, strict=True)]


def tails_of(state: GrowingState | None) -> dict[str, Tensor]:
    """What each sequence keeps of its last tokens, to be read before the state goes on."""
    return {} if state is None else {name: state.fixed(name) for name in state.form.fixed}


@dataclass(frozen=True)
class Past:
    """What came before the new tokens of some sequences."""

    before: tuple[int, ...]
    """How many tokens each sequence has had."""
    lengths: tuple[int, ...]
    """How many each has with the new ones."""
    seqs: Sequences | None
    tails: dict[str, Tensor]
    """What each sequence keeps of its last tokens, as it was before the new ones."""
    grown: Growth | None
    """Where what is remembered goes; None without a state."""
    alike: bool
    """Whether what is kept of all sequences stands in one tensor, and all have had as many tokens."""

    @classmethod
    def of(
        cls,
        x: Tensor,
        state: GrowingState | None,
        seqs: Sequences | None,
        grown: Growth | None,
        together: bool,
        tails: dict[str, Tensor],
    ) -> Past:
        """Of the tokens x `[B, T, ...]`; `together`: what is kept of all sequences is one tensor."""
        new = (x.shape[1],) * x.shape[0] if seqs is None else seqs.lengths
        before = (0,) * len(new) if state is None else tuple(state.tokens)
        after = tuple(a + b for a, b in zip(before, new, strict=True))
        return cls(before, after, seqs, tails, grown, together and (seqs is None or seqs.count == 1))

    def kept(self, name: str, rows: Keys, stride: int, width: int, pool: Pool) -> Keys:
        """What `pool` makes of the windows of `width` tokens that end with each `stride`. `rows` are those
        of all tokens, which are kept; what the new ones complete is remembered as `name`."""
        take = of_kept(rows, self.seqs, self.grown is None and not self.alike)
        return self._all(name, take, stride, width, pool)

    def passing(self, name: str, rows: Tensor, stride: int, pool: Pool, width: int | None = None) -> Keys:
        """The same of `rows` `[B, T, ...]` of the new tokens, windows of a stride where no width is given: no more of
        them is kept than the next window needs: the last `width - 1`, as `name_tail`."""
        width = stride if width is None else width
        if self.grown is None:
            return self._all(name, of_kept(rows, self.seqs, not self.alike), stride, width, pool)
        parts = self._remembered(f"{name}_tail", rows, width - 1)
        return self._all(name, of_tail(parts, self.before, width - 1), stride, width, pool)

    def recent(self, name: str, rows: Tensor, count: int) -> Keys:
        """`rows` `[B, T, ...]` of the new tokens behind those of up to `count` before them, of each sequence: the last
        `count` are kept, as `name_tail`."""
        if self.grown is None:
            return rows
        parts = self._remembered(f"{name}_tail", rows, count)
        found = tuple(part[:, max(count - seen, 0) :] for part, seen in zip(parts, self.before, strict=False))
        return found[0] if self.alike else found

    def _remembered(self, name: str, rows: Tensor, count: int) -> list[Tensor]:
        """The last `count` rows before with the new ones behind them, of each sequence, or of all where they are alike;
        the last `count` of those are kept."""
        assert self.grown is not None
        parts = with_tail(self.tails[name], rows, self.seqs, self.alike)
        self.grown.fix(name, torch.cat([x[:, x.shape[1] - count :] for x in parts]))
        return parts

    def _all(self, name: str, take: Take, stride: int, width: int, pool: Pool) -> Keys:
        parts = []
        for n, rows in enumerate(windows(take, self.before, self.lengths, self.alike, stride, width)):
            first = self.before[n] // stride
            parts.append(pool(rows, torch.arange(first, first + rows.shape[1], device=rows.device)))
        found = parts[0] if self.alike else parts
        if self.grown is not None:
            return self.grown.add(name, found)
        return found if isinstance(found, Tensor) else tuple(found)
