"""Training a byte-level BPE on a corpus."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from intarsia.data.build_once import build_once, slug
from intarsia.data.documents import Corpus, digest
from intarsia.data.fast_tokenizer import TOKENIZER_FILE, FastTokenizer, fast_tokenizer, load_fast_tokenizer
from intarsia.data.tokenizer_base import METADATA_FILE, SEPARATOR
from intarsia.errors import DataError

MIN_VOCAB_SIZE = 257  # the bytes and the separator

# Merges of a small vocabulary are settled by far less text; reading more only takes longer.
TRAINING_BYTES = 16 * 1024 * 1024

# How text is cut before merging (Llama 3's pattern): contractions, a word with the character before it, up to
# three digits, punctuation with the line ends after it, runs of white space but for the last character.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_log = logging.getLogger(__name__)


def train_bpe(corpus: Corpus, vocab_size: int) -> FastTokenizer:
    """Train a byte-level BPE on the first training documents of a corpus. The same each time.

    Args:
        corpus: at most `TRAINING_BYTES` of it are read, held-out documents never.
        vocab_size: the bytes, the separator (id 0) and the merges together. A small corpus may give fewer.

    Raises:
        DataError: the vocabulary is too small, or the corpus cannot be read.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"a BPE needs a vocabulary of at least {MIN_VOCAB_SIZE} (bytes and separator), not {vocab_size}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = corpus.limited(TRAINING_BYTES)
    backend.train_from_iterator((document.text for document in sample.documents("train")), trainer)
    tokenizer = fast_tokenizer(backend, f"bpe:{vocab_size}", SEPARATOR)
    if tokenizer.vocab_size < vocab_size:
        _log.warning(
            "the corpus %r has text for a vocabulary of %d only, not %d",
            corpus.name,
            tokenizer.vocab_size,
            vocab_size,
        )
    return tokenizer


def open_bpe(corpus: Corpus, vocab_size: int, directory: str | os.PathLike[str] | None) -> FastTokenizer:
    """A BPE trained on `corpus`; kept in a directory of its own under `directory` and found there again."""
    if directory is None or vocab_size < MIN_VOCAB_SIZE:
        return train_bpe(corpus, vocab_size)
    key = digest("bpe", 1, PATTERN, TRAINING_BYTES, vocab_size, corpus.fingerprint())
    target = Path(directory) / f"bpe-{vocab_size}-{slug(corpus.name)}-{key[:16]}"
    build_once(
        target,
        lambda partial: train_bpe(corpus, vocab_size).save(partial),
        lambda found: (found / METADATA_FILE).is_file(),
    )
    return load_fast_tokenizer(target / TOKENIZER_FILE, f"bpe:{vocab_size}", SEPARATOR)
