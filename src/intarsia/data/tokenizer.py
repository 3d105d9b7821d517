"""Opening a tokenizer by its name, and loading a saved one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from intarsia.data.beside import read_object
from intarsia.data.bpe import open_bpe
from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.data.documents import Corpus
from intarsia.data.fast_tokenizer import TOKENIZER_FILE, load_fast_tokenizer
from intarsia.data.slow_tokenizer import SlowTokenizer
from intarsia.data.tiktoken_tokenizer import TIKTOKEN_FILE, load_tiktoken_tokenizer
from intarsia.data.tokenizer_base import METADATA_FILE, Tokenizer
from intarsia.data.world_tokenizer import VOCABULARY_FILES, load_world_tokenizer
from intarsia.errors import DataError, MissingExtraError
from intarsia.extras import require

_CONFIGURATION_FILE = "tokenizer_config.json"
_VOCABULARIES = (TOKENIZER_FILE, "vocab", "merges", ".model", ".tiktoken")
"""What stands in the names of files that hold tokens. Others only say of which kind a tokenizer is."""


def open_tokenizer(
    name: str, *, corpus: Corpus | None = None, directory: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """Open a tokenizer.

    Args:
        name: `"bytes"`; `"bpe:SIZE"`, a byte-level BPE of that vocabulary, trained on the corpus;
            `"hf:NAME"`, one on the Hugging Face hub; `"hf:PATH"`, a `tokenizer.json` or a directory with one,
            or with Kimi's `tiktoken.model`, RWKV's `rwkv_vocab*.txt`, or whatever transformers' AutoTokenizer reads.
        corpus: what a BPE is trained on.
        directory: where trained tokenizers are kept, to be found again. If None, a BPE is trained each time.

    Raises:
        DataError: there is no such tokenizer, or it cannot be trained.
    """
    kind, _, argument = name.partition(":")
    if name == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        if not argument.isascii() or not argument.isdigit():
            raise DataError(
                f"a BPE is written with the size of its vocabulary, such as 'bpe:4096', not {name!r}"
            )
        if corpus is None:
            raise DataError(f"the tokenizer {name!r} is trained on a corpus, and none was given")
        return open_bpe(corpus, int(argument), directory)
    if kind == "hf" and argument:
        return _open_hugging_face(argument)
    raise DataError(f"there is no tokenizer {name!r}; there are 'bytes', 'bpe:SIZE' and 'hf:NAME-OR-PATH'")


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load what `Tokenizer.save` wrote, or any directory that `open_tokenizer("hf:PATH")` reads.

    Raises:
        DataError: the directory holds no tokenizer.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"there is no directory {directory} to load a tokenizer from")
    metadata = read_object(directory / METADATA_FILE)
    kind = metadata.get("kind", "foreign")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "fast":
        return load_fast_tokenizer(directory / TOKENIZER_FILE, metadata["name"], metadata["separator"])
    if kind == "slow":
        return SlowTokenizer(_auto_tokenizer(str(directory)), metadata["name"])
    if kind == "tiktoken":
        return load_tiktoken_tokenizer(directory, metadata["name"])
    if kind == "world":
        return load_world_tokenizer(_vocabulary(directory), metadata["name"])
    if kind == "foreign":
        return _open_hugging_face(str(directory))
    raise DataError(f"{directory / METADATA_FILE} is of a later version: it has the kind {kind!r}")


def holds_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has files that look like those of a tokenizer."""
    names = [path.name for path in Path(folder).iterdir()]
    return METADATA_FILE in names or any(part in name for name in names for part in _VOCABULARIES)


def _open_hugging_face(source: str) -> Tokenizer:
    path = Path(source).expanduser()
    if path.is_file():
        return load_fast_tokenizer(path, f"hf:{source}", _end_of_text(path.parent / _CONFIGURATION_FILE))
    if path.is_dir():
        file: Path | None = path / TOKENIZER_FILE
        configuration: Path | None = path / _CONFIGURATION_FILE
    elif source.startswith((".", "/", "~")):
        raise DataError(f"there is no tokenizer at {source}")
    else:
        file = _download(source, TOKENIZER_FILE)
        configuration = _download(source, _CONFIGURATION_FILE)
    if file is not None and file.is_file():
        return load_fast_tokenizer(file, f"hf:{source}", _end_of_text(configuration))
    if (path / TIKTOKEN_FILE).is_file():
        return load_tiktoken_tokenizer(path, f"hf:{source}")
    if path.is_dir() and any(path.glob(VOCABULARY_FILES)):
        return load_world_tokenizer(_vocabulary(path), f"hf:{source}")
    try:
        return SlowTokenizer(_auto_tokenizer(str(path) if path.is_dir() else source), f"hf:{source}")
    except MissingExtraError as error:
        raise DataError(
            f"the tokenizer {source!r} has no {TOKENIZER_FILE} that could be found; {error}"
        ) from error


def _vocabulary(folder: Path) -> Path:
    """The file of RWKV's tokenizer; its name says when it was made."""
    found = sorted(folder.glob(VOCABULARY_FILES))
    if len(found) != 1:
        raise DataError(f"{folder} has {len(found)} files {VOCABULARY_FILES}; a tokenizer of RWKV's has one")
    return found[0]


def _download(repository: str, file: str) -> Path | None:
    """A file of the hub, or of its cache on this machine; None if it is not there or out of reach."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception:  # of many kinds; _auto_tokenizer tries again and reports
        return None


def _auto_tokenizer(source: str) -> Any:
    transformers = require("transformers", "hf")
    try:
        found = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:
        if Path(source).is_dir() and not holds_tokenizer(source):
            raise DataError(_none_in(source)) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot open the tokenizer {source!r}; transformers says: {reason}") from error
    # For a model without tokenizer files some of its classes are made all the same, with no tokens but special ones.
    if not found.get_vocab().keys() - found.get_added_vocab().keys():
        raise DataError(_none_in(source))
    return found


def _none_in(source: str) -> str:
    there = (Path(source) / _CONFIGURATION_FILE).is_file()
    what = (
        f"has {_CONFIGURATION_FILE}, but no {TOKENIZER_FILE} or other file of its tokens"
        if there
        else "holds none"
    )
    return (
        f"cannot open the tokenizer {source!r}: the folder {what}. Copy its files ({TOKENIZER_FILE}, "
        f"{_CONFIGURATION_FILE}, ...) there from where the model came from"
    )


def _end_of_text(configuration: Path | None) -> str | None:
    """The end-of-text token that a `tokenizer_config.json` names."""
    token = read_object(configuration).get("eos_token") if configuration else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
