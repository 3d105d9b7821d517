"""The language in which a family says how its tensors and ours belong together.

A `Row` has names of ours, names of theirs, and a transform that goes both ways. A name may end in an index, as in
`gate_up[3]`: part 3 of that tensor in its first dimension. So experts are read one by one, whether they lie stacked or
each for itself. `Either` lists the layouts in which the same is found; the first is the one that is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.errors import CheckpointError

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Transform:
    """What becomes of tensors on the way in (`load`: theirs to ours) and out (`save`: ours to theirs)."""

    name: str
    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]


SAME = Transform("same", lambda theirs: theirs, lambda ours: ours)


@dataclass(frozen=True)
class Row:
    """Some tensors of ours, and those of theirs that hold the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    how: Transform = SAME

    def under(self, ours: str, theirs: str) -> Row:
        """The row of a module that is called `ours` and `theirs`."""
        return Row(tuple(ours + x for x in self.ours), tuple(theirs + x for x in self.theirs), self.how)


@dataclass(frozen=True)
class Either:
    """The same tensors of ours in several layouts of theirs."""

    layouts: tuple[tuple[Row, ...], ...]

    def under(self, ours: str, theirs: str) -> Either:
        """As `Row.under`."""
        return Either(tuple(tuple(row.under(ours, theirs) for row in rows) for rows in self.layouts))


Rows = Iterable[Row | Either]


def row(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], how: Transform = SAME) -> Row:
    """A row; a single name may stand for a tuple."""
    return Row(_tuple(ours), _tuple(theirs), how)


def either(*layouts: Iterable[Row]) -> Either:
    """Layouts of the same, the one that is written first."""
    return Either(tuple(tuple(rows) for rows in layouts))


def same(names: Mapping[str, str], suffix: str = "") -> Iterator[Row]:
    """A row for each pair of names, ours: theirs, which hold the same. `suffix` is put behind both."""
    for ours, theirs in names.items():
        yield row(ours + suffix, theirs + suffix)


def weights(names: Mapping[str, str]) -> Iterator[Row]:
    """`same` of modules that have a `weight`."""
    return same(names, ".weight")


def under(ours: str, theirs: str, rows: Rows) -> Iterator[Row | Either]:
    """The rows of a module that is called `ours` and `theirs`."""
    for each in rows:
        yield each.under(ours, theirs)


def indexed(name: str) -> tuple[str, int | None]:
    """`"gate_up[3]"` as the name and the index; None where there is none."""
    found = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (name, None) if found is None else (found[1], int(found[2]))


# What goes both ways.


def joined(*sizes: int) -> Transform:
    """Theirs, one after the other in the first dimension, are ours; `sizes` are the rows of each."""
    return Transform(
        "joined", lambda theirs: (torch.cat(list(theirs)),), lambda ours: ours[0].split(list(sizes))
    )


def split(*sizes: int) -> Transform:
    """The first dimension of theirs, of these sizes, are ours one after the other."""
    return inverse(joined(*sizes), "split")


def inverse(how: Transform, name: str) -> Transform:
    """The same the other way round."""
    return Transform(name, how.save, how.load)


def both(first: Transform, second: Transform) -> Transform:
    """On loading `first`, then `second`."""
    return Transform(
        f"{first.name}, {second.name}",
        lambda theirs: second.load(first.load(theirs)),
        lambda ours: first.save(second.save(ours)),
    )


def reshaped(ours: tuple[int, ...], theirs: tuple[int, ...]) -> Transform:
    """The same numbers in another shape; any shape of as many numbers is read."""
    return Transform("reshaped", lambda x: (x[0].reshape(ours),), lambda x: (x[0].reshape(theirs),))


def grouped(groups: int, *sizes: int) -> Transform:
    """Theirs hold for each of `groups` heads its part of each of ours, of `sizes` rows a head."""

    def load(theirs: Tensors) -> Tensors:
        parts = theirs[0].unflatten(0, (groups, sum(sizes))).split(list(sizes), dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    def save(ours: Tensors) -> Tensors:
        parts = [x.unflatten(0, (groups, size)) for x, size in zip(ours, sizes, strict=True)]
        return (torch.cat(parts, dim=1).flatten(0, 1),)

    return Transform("grouped by head", load, save)


CONVOLUTION = Transform(
    "without the middle dimension", lambda x: (x[0].squeeze(1),), lambda x: (x[0].unsqueeze(1),)
)
"""`[C, 1, W]` of theirs, `[C, W]` of ours."""

TRANSPOSED = Transform("transposed", lambda x: (x[0].mT,), lambda x: (x[0].mT,))


def joined_convolutions(*sizes: int) -> Transform:
    """Convolutions `[C, 1, W]` of `sizes` channels as one `[sum, W]`."""
    return both(joined(*sizes), CONVOLUTION)


def nothing(*shape: int) -> Transform:
    """Ours is zero, and theirs does not have it."""

    def save(ours: Tensors) -> Tensors:
        if not ours[0].is_meta and bool(ours[0].any()):
            raise CheckpointError("it is not zero, and this family has no place for it")
        return ()

    return Transform("zero", lambda theirs: (torch.zeros(shape),), save)


def halves_of_pairs(heads: int, kept: int, rotated: int, behind: int = 0) -> Transform:
    """`rotated` rows of each head, whose pairs are neighbours there (as DeepSeek rotates), in the order of ours, where
    a pair's second half lies `rotated / 2` behind; `kept` rows before them stay, and those `behind`."""

    def ordered(x: Tensor, *, load: bool) -> Tensor:
        still, turned, last = x.unflatten(0, (heads, -1)).split([kept, rotated, behind], dim=1)
        pairs = (rotated // 2, 2) if load else (2, rotated // 2)
        turned = turned.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
        return torch.cat([still, turned, last], dim=1).flatten(0, 1)

    return Transform(
        "pairs as halves", lambda x: (ordered(x[0], load=True),), lambda x: (ordered(x[0], load=False),)
    )


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
