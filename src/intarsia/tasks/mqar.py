"""Multi-query associative recall (Kimi Linear report, arXiv:2510.26692, section 5.1; Arora et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from intarsia.errors import ConfigError
from intarsia.tasks.base import Integers, Task, at_least, below, ignored, numbered


@dataclass(frozen=True)
class MQAR(Task):
    """Keys, each followed by its value; a separator; then keys alone, each of which asks for its value.

        input    A 1 C 3 B 0 M 8 G 5 E 4 <sep> B G
        target   . . . . . . . . . . . . .     0 5

    As in the report's table, the value is asked at the key itself and is not part of the input. (Arora et al.,
    arXiv:2312.04927, put the queries at positions drawn from a power law and filler between them; the report's
    table has neither.)

    The report does not say, and here it is so:

    * There are `pairs` pairs, a quarter of the length unless said otherwise, and as many queries as make the
      length exact: `length - 1 - 2 * pairs`.
    * The keys of an example are different from one another, drawn uniformly from `keys` of them, twice as many
      as there are pairs unless said otherwise. Values are drawn uniformly, with repetition, from `values`.
    * Each query is one of the pairs, drawn uniformly, with repetition.
    """

    type: ClassVar[str] = "mqar"
    title: ClassVar[str] = "Multi-query associative recall"
    source: ClassVar[str] = "arXiv:2510.26692, section 5.1; arXiv:2312.04927"
    pairs: int | None = None
    keys: int | None = None
    values: int = 64

    def __post_init__(self) -> None:
        at_least(1, length=self.length)
        at_least(2, values=self.values)
        if self.length < 4:
            raise ConfigError(
                f"length must be at least 4: a pair, the separator and a query; got {self.length}"
            )
        at_least(1, pairs=self.num_pairs)
        if self.num_queries < 1:
            raise ConfigError(
                f"{self.num_pairs} pairs and the separator take {2 * self.num_pairs + 1} tokens and leave no "
                f"query in a length of {self.length}; there can be {(self.length - 2) // 2} pairs"
            )
        at_least(1, keys=self.num_keys)
        if self.num_keys < self.num_pairs:
            raise ConfigError(
                f"the keys of an example differ, so {self.num_pairs} pairs need as many keys; got {self.num_keys}"
            )

    @property
    def num_pairs(self) -> int:
        """Pairs of an example."""
        return self.length // 4 if self.pairs is None else self.pairs

    @property
    def num_queries(self) -> int:
        """Queries of an example."""
        return self.length - 1 - 2 * self.num_pairs

    @property
    def num_keys(self) -> int:
        """Keys of the vocabulary."""
        return 2 * self.num_pairs if self.keys is None else self.keys

    @property
    def names(self) -> tuple[str, ...]:
        return (*numbered("k", self.num_keys), *numbered("v", self.values), "<sep>")

    @property
    def chance(self) -> float:
        return 1 / self.values

    def _draws(self) -> int:
        return self.num_keys + self.num_pairs + self.num_queries

    def _make(self, random: NDArray[np.uint64]) -> tuple[Integers, Integers]:
        pairs, keys = self.num_pairs, self.num_keys
        for_keys, for_values, for_queries = np.split(random, [keys, keys + pairs], axis=1)
        # A random order of all keys, of which an example takes the first.
        key = np.argsort(for_keys, axis=1, kind="stable")[:, :pairs]
        value = keys + below(self.values, for_values)
        query = below(pairs, for_queries)

        inputs = np.empty((len(random), self.length), dtype=np.int64)
        inputs[:, 0 : 2 * pairs : 2] = key
        inputs[:, 1 : 2 * pairs : 2] = value
        inputs[:, 2 * pairs] = keys + self.values
        inputs[:, 2 * pairs + 1 :] = np.take_along_axis(key, query, axis=1)
        targets = ignored(inputs)
        targets[:, 2 * pairs + 1 :] = np.take_along_axis(value, query, axis=1)
        return inputs, targets
