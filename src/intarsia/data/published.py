"""What lies beside a model: its tokenizer, and how it is meant to be asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.checkpoints.native import TOKENIZER
from intarsia.checkpoints.places import find_folder
from intarsia.data import tokenizer
from intarsia.data.beside import read_object
from intarsia.data.tokenizer_base import Tokenizer
from intarsia.errors import DataError

CONDUCT, CONFIG, TOKENIZER_CONFIG = "generation_config.json", "config.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Conduct:
    """How a model is meant to be asked, as far as its files say; what they do not say is None or empty."""

    begin: tuple[int, ...] = ()
    """The tokens before every text."""
    stop: frozenset[int] = frozenset()
    """The tokens that end one."""
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None


def load_tokenizer(path_or_repo: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model that `intarsia.load` opens.

    Args:
        path_or_repo: the model's folder, or a repository that is in Hugging Face's cache on this machine.

    Raises:
        CheckpointError: there is no such folder.
        DataError: it holds no tokenizer that is known.
    """
    folder = find_folder(path_or_repo)
    return tokenizer.load_tokenizer(folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder)


def conduct_of(path_or_repo: str | os.PathLike[str]) -> Conduct:
    """How a published model is meant to be asked: of its `generation_config.json`, or else `config.json`.

    Raises:
        CheckpointError: there is no such folder.
        DataError: a file is damaged, or a value cannot be right.
    """
    folder = find_folder(path_or_repo)
    options, config, of_tokenizer = (
        read_object(folder / name) for name in (CONDUCT, CONFIG, TOKENIZER_CONFIG)
    )
    config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    ends = options.get("eos_token_id", config.get("eos_token_id"))
    first = options.get("bos_token_id", config.get("bos_token_id"))
    begins = of_tokenizer.get("add_bos_token") is True and first is not None
    if options.get("do_sample") is False:
        options = {**options, "temperature": 0}
    return Conduct(
        begin=_ids(folder, "bos_token_id", first) if begins else (),
        stop=frozenset(_ids(folder, "eos_token_id", ends)),
        temperature=_number(folder, options, "temperature"),
        top_p=_number(folder, options, "top_p"),
        min_p=_number(folder, options, "min_p"),
    )


def _ids(folder: Path, name: str, value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise DataError(f"{folder}: {name} must be a token's number, or a list of them; it is {value!r}")
    return tuple(ids)


def _number(folder: Path, options: dict[str, Any], name: str) -> float | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{folder / CONDUCT}: {name} must be a number; it is {value!r}")
    return float(value)
