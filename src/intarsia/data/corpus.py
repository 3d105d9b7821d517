"""Opening a corpus by its name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from intarsia.data.documents import DEFAULT_HELDOUT, Corpus
from intarsia.data.file_corpus import DEFAULT_DOCUMENT_BYTES, FileCorpus
from intarsia.data.hub_corpus import HubCorpus
from intarsia.data.python_corpus import PythonCorpus


def open_corpus(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "python",
    *,
    limit_bytes: int | None = None,
    text_field: str = "text",
    heldout: float = DEFAULT_HELDOUT,
    document_bytes: int = DEFAULT_DOCUMENT_BYTES,
) -> Corpus:
    """Open a corpus.

    Args:
        source: `"python"`, the Python files of this environment; `"python-stdlib"`, those of its standard
            library; a file, directory or pattern, or a list of them: text, JSON Lines (`.jsonl`,
            `.jsonl.gz`), Parquet; `"hf:NAME"` or `"hf:NAME:CONFIG"`, a Hugging Face dataset.
        limit_bytes: take documents of at most so many bytes of text in all; which ones is always the same.
        text_field: the field or column of JSON Lines, Parquet and datasets that holds the text.
        heldout: the share of documents that is kept from training.
        document_bytes: longer text files are cut into several documents of at most so many bytes.

    Raises:
        DataError: nothing is there, or an option makes no sense. Files are read, and errors in them found,
            only when the documents are.
    """
    if source in ("python", "python-stdlib"):
        stdlib_only = source == "python-stdlib"
        return PythonCorpus(stdlib_only=stdlib_only, limit_bytes=limit_bytes, heldout=heldout)
    if isinstance(source, str) and source.startswith("hf:"):
        return HubCorpus(source[3:], limit_bytes=limit_bytes, heldout=heldout, text_field=text_field)
    corpus = FileCorpus(
        source, limit_bytes=limit_bytes, heldout=heldout, text_field=text_field, document_bytes=document_bytes
    )
    corpus.files  # noqa: B018 - looks for the files now, so that a wrong path is an error here
    return corpus
