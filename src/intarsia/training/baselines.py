"""What counting alone achieves on the same tokens: unigram and bigram models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intarsia.data import Tokenizer, TokenSplit
from intarsia.training.evaluate import Evaluation, document_numbers, scored_bytes

_Score = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]
_BLOCK = 1 << 24
"""Tokens that are counted at a time."""


@dataclass(frozen=True, eq=False)
class NGrams:
    """Counts of the targets of a training split, alone and after each input.

    Unigram, with add-one smoothing over the vocabulary of V:

        p(w) = (c(w) + 1) / (N + V)

    Bigram, interpolated with the unigram as Witten and Bell (1991) do, where D(v) is how many different
    tokens were seen after v:

        p(w | v) = (c(v, w) + D(v) p(w)) / (c(v) + D(v))        p(w | v) = p(w) where v was never seen

    The first target of a document follows the separator, as for the model.
    """

    vocab_size: int
    counts: NDArray[np.int64]
    """`[V]`: how often each token is a target."""
    pairs: NDArray[np.int64]
    """`[P]`: the pairs that occur, `input * V + target`, ascending."""
    pair_counts: NDArray[np.int64]
    """`[P]`: how often."""

    @classmethod
    def count(cls, split: TokenSplit) -> NGrams:
        """Count a split."""
        V = split.vocab_size
        counts = np.zeros(V, dtype=np.int64)
        pairs, pair_counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for first, last in _blocks(split):
            inputs = np.concatenate([split.document(index) for index in range(first, last)]).astype(np.int64)
            targets = np.concatenate([split.targets(index) for index in range(first, last)]).astype(np.int64)
            counts += np.bincount(targets, minlength=V)
            new, new_counts = np.unique(inputs * V + targets, return_counts=True)
            merged, where = np.unique(np.concatenate([pairs, new]), return_inverse=True)
            summed = np.zeros(len(merged), dtype=np.int64)
            np.add.at(summed, where, np.concatenate([pair_counts, new_counts]))
            pairs, pair_counts = merged, summed
        return cls(V, counts, pairs, pair_counts)

    def unigram(
        self,
        split: TokenSplit,
        documents: Sequence[int] | None = None,
        *,
        tokens_per_document: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Evaluation:
        """The unigram model's evaluation; the arguments are those of `evaluate`."""
        log_p = np.log(self._unigram_probabilities())
        return _evaluation(
            split, documents, lambda inputs, targets: log_p[targets], tokens_per_document, tokenizer
        )

    def bigram(
        self,
        split: TokenSplit,
        documents: Sequence[int] | None = None,
        *,
        tokens_per_document: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Evaluation:
        """The bigram model's evaluation; the arguments are those of `evaluate`."""
        p = self._unigram_probabilities()
        before = self.pairs // self.vocab_size
        seen = np.bincount(before, weights=self.pair_counts, minlength=self.vocab_size)
        distinct = np.bincount(before, minlength=self.vocab_size)

        def log_likelihood(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
            wanted = inputs * self.vocab_size + targets
            place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
            both = np.where(self.pairs[place] == wanted, self.pair_counts[place], 0)
            total, kinds = seen[inputs], distinct[inputs]
            interpolated = (both + kinds * p[targets]) / np.maximum(total + kinds, 1)
            return np.log(np.where(total > 0, interpolated, p[targets]))

        return _evaluation(split, documents, log_likelihood, tokens_per_document, tokenizer)

    def _unigram_probabilities(self) -> NDArray[np.float64]:
        probabilities: NDArray[np.float64] = (self.counts + 1) / (self.counts.sum() + self.vocab_size)
        return probabilities


def _evaluation(
    split: TokenSplit,
    documents: Sequence[int] | None,
    log_likelihood: _Score,
    tokens_per_document: int | None,
    tokenizer: Tokenizer | None,
) -> Evaluation:
    chosen = document_numbers(split, documents)
    tokens = split.lengths[chosen]
    if tokens_per_document is not None:
        tokens = np.minimum(tokens, tokens_per_document)
    nll = [
        -log_likelihood(
            split.document(index)[:count].astype(np.int64), split.targets(index)[:count].astype(np.int64)
        ).sum()
        for index, count in zip(chosen.tolist(), tokens.tolist(), strict=True)
    ]
    return Evaluation(chosen, np.array(nll), tokens, scored_bytes(split, chosen, tokens, tokenizer))


def _blocks(split: TokenSplit) -> list[tuple[int, int]]:
    """Ranges of documents of about `_BLOCK` tokens."""
    edges = np.unique(np.searchsorted(split.offsets[:-1], np.arange(0, split.tokens, _BLOCK)))
    edges = edges[edges < split.documents]
    return list(zip(edges.tolist(), [*edges[1:].tolist(), split.documents], strict=True))
