"""Which text, and how it becomes tokens: the `[corpus]` table of plans and training files."""

from __future__ import annotations

import os
from dataclasses import dataclass

from intarsia.data.corpus import open_corpus
from intarsia.data.dataset import TokenDataset
from intarsia.data.documents import DEFAULT_HELDOUT, Corpus
from intarsia.data.prepare import prepare
from intarsia.data.tokenizer import open_tokenizer
from intarsia.data.tokenizer_base import Tokenizer
from intarsia.settings import check_bounds, settle_types


@dataclass(frozen=True)
class CorpusOptions:
    """The text and how it becomes tokens; `open_corpus` and `open_tokenizer` say what there is."""

    source: str = "python"
    tokenizer: str = "bpe:4096"
    limit_bytes: int | None = None
    text_field: str = "text"
    heldout: float = DEFAULT_HELDOUT
    """The share of documents that is kept from training, for evaluation."""

    def __post_init__(self) -> None:
        settle_types(self)
        check_bounds(self, "limit_bytes", least=1)
        check_bounds(self, "heldout", above=0, below=1)

    def open(self) -> Corpus:
        """The corpus.

        Raises:
            DataError: it is not there.
        """
        return open_corpus(
            self.source, limit_bytes=self.limit_bytes, text_field=self.text_field, heldout=self.heldout
        )

    def prepare(
        self, directory: str | os.PathLike[str], progress: bool = True
    ) -> tuple[TokenDataset, Tokenizer]:
        """The tokens of the text and what made them, kept in `directory`: made now, or found there.

        Raises:
            DataError: the text or the tokenizer cannot be used.
        """
        corpus = self.open()
        tokenizer = open_tokenizer(self.tokenizer, corpus=corpus, directory=directory)
        return prepare(corpus, tokenizer, directory, progress=progress), tokenizer
