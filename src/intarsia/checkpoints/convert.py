"""A model from one format to another, with what lies beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from intarsia.checkpoints import native
from intarsia.checkpoints.opening import family_that_holds, load, save
from intarsia.checkpoints.places import find_folder

BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja", "generation_config.json", "LICENSE",
)  # fmt: skip
"""Files of published models that are not weights, and have no code."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "hf",
    dtype: torch.dtype | None = None,
) -> str:
    """Write the model of a folder or of a cached repository in another format, tokenizer and all.

    Args:
        target: the folder, replaced as a whole.
        to: the name of a family, `"hf"` for the first that can hold the model, or `"intarsia"`.
        dtype: of the weights; None: as they are.

    Returns:
        The name of the format.

    Raises:
        CheckpointError: the source is missing or damaged.
        UnsupportedError: the format lacks something that the model has.
    """
    folder = find_folder(source)
    model = load(folder, dtype)
    name = family_that_holds(model.config).short if to == "hf" else to
    save(model, target, name, tokenizer=_Beside(folder), extra={} if name == "intarsia" else _tokens(folder))
    return name


class _Beside:
    """The files beside a model, the tokenizer's among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, directory: Path, /) -> None:
        """Copy them."""
        inner = self.folder / native.TOKENIZER
        for place in (self.folder, inner) if inner.is_dir() else (self.folder,):
            for file in place.iterdir():
                if file.is_file() and (file.name in BESIDE or place == inner):
                    shutil.copyfile(file, directory / file.name)


def _tokens(folder: Path) -> dict[str, Any]:
    """The special tokens that the source names."""
    values = json.loads((folder / native.CONFIG).read_text(encoding="utf-8"))
    values = values["text_config"] if isinstance(values.get("text_config"), dict) else values
    return {name: values[name] for name in TOKENS if values.get(name) is not None}
