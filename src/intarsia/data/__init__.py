"""Text in, batches out: corpora, tokenizers, tokenised datasets and packing."""

from intarsia.data.corpus import open_corpus
from intarsia.data.dataset import TokenDataset, TokenSplit
from intarsia.data.documents import Corpus, Document
from intarsia.data.loader import Batch, BatchLoader
from intarsia.data.options import CorpusOptions
from intarsia.data.prepare import prepare
from intarsia.data.tokenizer import load_tokenizer, open_tokenizer
from intarsia.data.tokenizer_base import DecodeStream, Tokenizer

__all__ = [
    "Batch",
    "BatchLoader",
    "Corpus",
    "CorpusOptions",
    "DecodeStream",
    "Document",
    "TokenDataset",
    "TokenSplit",
    "Tokenizer",
    "load_tokenizer",
    "open_corpus",
    "open_tokenizer",
    "prepare",
]
