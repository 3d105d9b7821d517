"""A model from one format to another, with what lies beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from intarsia.checkpoints import native
from intarsia.checkpoints.family import written
from intarsia.checkpoints.filling import fill
from intarsia.checkpoints.opening import family_that_holds, opened, save
from intarsia.checkpoints.options import Sparse
from intarsia.checkpoints.packed_native import check_written, save_packed
from intarsia.checkpoints.places import find_folder
from intarsia.checkpoints.plan import stored
from intarsia.checkpoints.registry import family
from intarsia.errors import ConfigError
from intarsia.layers.packed import Packing
from intarsia.ops.packed_weights import WeightFormat

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
    weights: WeightFormat | None = None,
    sparse: Sparse = "published",
    separator: int | None = None,
) -> str:
    """Write the model of a folder or of a cached repository in another format, tokenizer and all.

    Args:
        target: the folder, replaced as a whole.
        to: the name of a family, `"hf"` for the first that can hold the model, or `"intarsia"`.
        dtype: of the weights; None: as they are.
        weights: pack them to `"int8"` or `"int4"`, ready for decoding, which only `"intarsia"` holds. They are read,
            packed and written tensor by tensor.
        sparse: as in `load`.
        separator: the token that ends a text, for a family's `config.json` where the source does not say it; models
            that were trained here leave that to their tokenizers.

    Returns:
        The name of the format.

    Raises:
        CheckpointError: the source is missing or damaged.
        UnsupportedError: the format lacks something that the model has.
        ConfigError: packed weights are asked for in another format, or in a form that is not written.
    """
    folder = find_folder(source)
    found = _Beside(folder)
    beside = found if found.files else None  # no folder of a tokenizer that there is not
    if weights is not None and to != native.FORMAT:
        raise ConfigError(
            f"weights packed to {weights} are written in this package's own format alone: convert to 'intarsia' (--to "
            f"intarsia), or write {to!r} without packing them (--dtype bfloat16 halves float32)"
        )
    if weights is not None:
        check_written(weights)
    if to not in ("hf", native.FORMAT):
        family(to)
    model, reader = opened(folder, dtype, sparse)
    extra = _extra(folder, to)
    if to != native.FORMAT and separator is not None:
        extra.setdefault("eos_token_id", separator)
    if weights is not None:
        save_packed(target, model, reader, Packing(weights), beside, extra)
        return to
    name = family_that_holds(model.config).short if to == "hf" else to
    if name != native.FORMAT:
        written(family(name), model.config)  # said before gigabytes are read
    fill(model, reader, stored(model), torch.device("cpu"))
    save(model, target, name, tokenizer=beside, extra=extra)
    return name


class _Beside:
    """The files beside a model, the tokenizer's among them."""

    def __init__(self, folder: Path) -> None:
        inner = folder / native.TOKENIZER
        self.files = [
            file
            for place in ((folder, inner) if inner.is_dir() else (folder,))
            for file in place.iterdir()
            if file.is_file() and (file.name in BESIDE or place == inner)
        ]

    def save(self, directory: Path, /) -> None:
        """Copy them."""
        for file in self.files:
            shutil.copyfile(file, directory / file.name)


def _extra(folder: Path, to: str) -> dict[str, Any]:
    """What is to stand in `config.json` beside the model: what was kept with one of this format, and of others the
    special tokens that the source names."""
    if to == native.FORMAT:
        ours = native.read_options(folder).get("format") == native.FORMAT
        return native.load_extra(folder) if ours else {}
    values = json.loads((folder / native.CONFIG).read_text(encoding="utf-8"))
    values = values["text_config"] if isinstance(values.get("text_config"), dict) else values
    return {name: values[name] for name in TOKENS if values.get(name) is not None}
