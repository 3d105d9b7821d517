"""Writing a model as a published family has it: `config.json` and sharded safetensors, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoints.family import Family, written
from intarsia.checkpoints.native import Saveable, name_of_dtype, take_over, write_tensors
from intarsia.checkpoints.plan import chosen, stored
from intarsia.checkpoints.rows import Row, indexed
from intarsia.checkpoints.tensor_folder import INDEX, PICKLES, WEIGHTS
from intarsia.errors import CheckpointError
from intarsia.files import directory_atomically, write_json
from intarsia.model.language_model import LanguageModel

CONFIG = "config.json"
SHARD = 4 << 30
"""Bytes of a file, unless one tensor is larger."""


@dataclass(frozen=True)
class Written:
    """A tensor of theirs: its name, the rows that make it or its parts, in their order, and its bytes."""

    name: str
    rows: tuple[Row, ...]
    nbytes: int


@torch.no_grad()
def save_as(
    family: Family,
    model: LanguageModel,
    path: str | os.PathLike[str],
    tokenizer: Saveable | None = None,
    extra: Mapping[str, Any] | None = None,
    shard: int = SHARD,
) -> None:
    """Write `model` into the folder `path`, which is replaced as a whole; files beside the weights stay.

    Args:
        tokenizer: written beside the weights by its `save`.
        extra: options to write into `config.json` beside those of the model, or in their place (`eos_token_id`, ...).
        shard: bytes of a file at most. What a shard holds is in memory beside the model while it is written.

    Raises:
        UnsupportedError: the family cannot say what the model is.
        CheckpointError: a tensor cannot be written as the family has it, or not at all.
    """
    values = {**written(family, model.config), **dict(extra or {})}
    if family.as_written(model.config).tie_embeddings != model.config.tie_embeddings:
        model = _untied(model)
    values["dtype"] = name_of_dtype(model.embed.weight.dtype)
    ours = stored(model)
    shards = list(_shards(_all_written(family, model, ours), shard))
    target = Path(path)
    with directory_atomically(target) as new:
        write_json(new / CONFIG, values)
        where: dict[str, str] = {}
        for number, tensors in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors({x.name: _made(x, ours) for x in tensors}, new / file)
            where.update({x.name: file for x in tensors})
        if len(shards) > 1:
            total = sum(x.nbytes for tensors in shards for x in tensors)
            write_json(
                new / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            )
        if tokenizer is not None:
            tokenizer.save(new)
        take_over(target, new, unless=lambda name: name == INDEX or name.endswith((".safetensors", *PICKLES)))


def _untied(model: LanguageModel) -> LanguageModel:
    """The same model, of the same tensors but for its head, which has one of its own."""
    with torch.device("meta"):
        other = LanguageModel(model.config.replace(tie_embeddings=False))
    other.load_state_dict({**model.state_dict(), "head.weight": model.embed.weight.clone()}, assign=True)
    return other


def _all_written(family: Family, model: LanguageModel, ours: Mapping[str, Tensor]) -> list[Written]:
    """All tensors of theirs, found without their numbers."""
    meta = {name: torch.empty_like(x, device="meta") for name, x in ours.items()}
    found: dict[str, list[Row]] = {}
    sizes: dict[str, int] = {}
    for row in chosen(family.rows(model.config)):
        if family.around is not None:
            row = replace(row, theirs=tuple(map(_inside, row.theirs)))
        theirs = _saved(row, meta)
        if not row.theirs:
            _saved(row, ours)  # which checks that what the family does not have is nothing
        for name, tensor in zip(row.theirs, theirs, strict=True):
            base = indexed(name)[0]
            found.setdefault(base, []).append(row)
            sizes[base] = sizes.get(base, 0) + tensor.nbytes
    return [Written(name, tuple(rows), sizes[name]) for name, rows in found.items()]


def _inside(name: str) -> str:
    """The name of a tensor of a text model that is a part of another."""
    alone = name.removeprefix("model.")
    return name if alone == name else f"model.language_model.{alone}"


def _shards(tensors: list[Written], limit: int) -> Iterator[list[Written]]:
    shard: list[Written] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _made(tensor: Written, ours: Mapping[str, Tensor]) -> Tensor:
    """A tensor of theirs, on the CPU and in one piece."""
    parts = {
        name: part
        for row in tensor.rows
        for name, part in zip(row.theirs, _saved(row, ours), strict=True)
        if indexed(name)[0] == tensor.name
    }
    if tensor.name in parts:
        whole = parts[tensor.name]
    else:
        whole = torch.stack([parts[f"{tensor.name}[{index}]"] for index in range(len(parts))])
    # A copy where it is a part of another, which the format does not know.
    whole = whole.detach().cpu().contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def _saved(row: Row, ours: Mapping[str, Tensor]) -> list[Tensor]:
    given = []
    for name in row.ours:
        base, index = indexed(name)
        given.append(ours[base] if index is None else ours[base][index])
    try:
        return list(row.how.save(given))
    except CheckpointError as error:
        raise CheckpointError(f"{' and '.join(row.ours)}: {error}") from error
