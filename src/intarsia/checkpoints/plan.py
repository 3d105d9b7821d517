"""Which tensors of a checkpoint become which of a model: all of it checked before the first number is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from intarsia.checkpoints.family import Family
from intarsia.checkpoints.rows import SAME, Row, Rows, indexed
from intarsia.checkpoints.tensor_folder import TensorFolder
from intarsia.errors import CheckpointError
from intarsia.model.config import ModelConfig
from intarsia.model.language_model import LanguageModel

HEAD = "lm_head.weight"
PASSED_OVER = ("rotary_emb.inv_freq",)
"""Ends of names of what is computed anew, whatever a file says, in every family."""
_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """What is read. `of` has for each tensor of ours its rows, several where its parts come from different places."""

    of: Mapping[str, tuple[Row, ...]]
    left_out: Mapping[str, int]
    """What in the files is not of the text model, and how many tensors it has."""


def make_plan(
    family: Family, config: ModelConfig, folder: TensorFolder, expected: Mapping[str, Tensor]
) -> Plan:
    """Choose among the layouts of each row, and check names and shapes.

    Args:
        expected: the tensors of ours that a file of the model holds, on the meta device.

    Raises:
        CheckpointError: tensors are missing, of other shapes, or nobody's. All of them are counted, some named.
    """
    rows = list(chosen(family.rows(config), folder))
    problems = [f"{name} is missing" for row in rows for name in _missing(row, folder)]
    used = {indexed(name)[0] for row in rows for name in row.theirs}
    left_out: dict[str, int] = {}
    passed_over = PASSED_OVER + family.computed
    for name in sorted(folder.names - used):
        what = _left_out(family, config, name)
        if what:
            left_out[what] = left_out.get(what, 0) + 1
        elif not name.endswith(passed_over) and not (name == HEAD and config.tie_embeddings):
            problems.append(f"{folder.told(name)} belongs to nothing")
    if not problems:
        problems = [problem for row in rows for problem in _shape_problems(row, folder, expected)]
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + ("; …" if len(problems) > _SHOWN else "")
        raise CheckpointError(
            f"{folder.path} does not fit its config.json ({family.name}), {len(problems)} tensors in all: {shown}"
        )
    found: dict[str, list[Row]] = {}
    for row in rows:
        for name in dict.fromkeys(indexed(x)[0] for x in row.ours):
            found.setdefault(name, []).append(row)
    unfilled = sorted(expected.keys() - found.keys())
    if unfilled:
        raise CheckpointError(f"the family {family.name} says nothing of {', '.join(unfilled[:_SHOWN])}")
    if config.tie_embeddings and HEAD in folder.names:
        _check_tied(folder, embedding_of(family, config, folder))
    return Plan({name: tuple(of) for name, of in found.items()}, left_out)


def chosen(rows: Rows, folder: TensorFolder | None = None) -> Iterator[Row]:
    """The rows with one layout of each: the first that the folder has whole, else the one that it has most of. Without
    a folder the first."""
    for each in rows:
        if isinstance(each, Row):
            yield each
            continue
        layouts = each.layouts
        yield from layouts[0] if folder is None else min(layouts, key=lambda rows: _absent(rows, folder))


def embedding_of(family: Family, config: ModelConfig, folder: TensorFolder) -> str:
    """What the embedding is called in a folder."""
    return next(row.theirs[0] for row in chosen(family.rows(config), folder) if row.ours == ("embed.weight",))


def loaded(row: Row, folder: TensorFolder) -> list[Tensor]:
    """The row's tensors of ours, as they are in the files: views where nothing is done to them."""
    theirs = [folder.tensor(*indexed(name)) for name in row.theirs]
    return list(row.how.load(theirs))


def stored(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors that a file of this model holds, by name."""
    tensors: dict[str, Tensor] = model.state_dict()
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    return tensors


def _absent(rows: tuple[Row, ...], folder: TensorFolder) -> tuple[bool, int]:
    absent = sum(len(_missing(row, folder)) for row in rows)
    present = sum(len(row.theirs) for row in rows) - absent
    return absent > 0, -present


def _missing(row: Row, folder: TensorFolder) -> list[str]:
    return [name for name in dict.fromkeys(indexed(x)[0] for x in row.theirs) if name not in folder.names]


def _left_out(family: Family, config: ModelConfig, name: str) -> str | None:
    parts = name.split(".")
    if name.startswith("model.layers.") and parts[2].isdigit() and int(parts[2]) >= config.depth:
        return "layers that predict several tokens"
    for part, what in family.left_out.items():
        if part in name if part.startswith(".") else name.startswith(part):
            return what
    return None


def _shape_problems(row: Row, folder: TensorFolder, expected: Mapping[str, Tensor]) -> Iterator[str]:
    told = " and ".join(folder.told(name) for name in dict.fromkeys(indexed(x)[0] for x in row.theirs))
    theirs = []
    for name in row.theirs:
        base, index = indexed(name)
        place = folder.place(base)
        if index is not None and not (place.shape and index < place.shape[0]):
            yield f"{told} is {list(place.shape)}, and part {index} of it is wanted"
            return
        shape = place.shape if index is None else place.shape[1:]
        theirs.append(torch.empty(shape, dtype=place.dtype, device="meta"))
    shapes = [list(x.shape) for x in theirs]
    try:
        ours = row.how.load(theirs)
    except (RuntimeError, IndexError) as error:  # CheckpointError is one
        reason = str(error).split("\n")[0]
        yield f"{told}: {shapes} cannot be read as {' and '.join(row.ours)} ({reason})"
        return
    for name, got in zip(row.ours, ours, strict=True):
        base, index = indexed(name)
        wanted = list(expected[base].shape if index is None else expected[base].shape[1:])
        if list(got.shape) != wanted:
            # Of what is read as it is, their shape should be ours.
            should = (
                f"should be {wanted}"
                if row.how is SAME
                else f"gives {list(got.shape)} for {name}, not {wanted}"
            )
            yield f"{told} is {' and '.join(map(str, shapes))} and {should}"
        elif not got.is_floating_point() or got.dtype.itemsize < 2:
            yield f"{told} is {str(got.dtype).removeprefix('torch.')}, which are no weights that can be read yet"


def _check_tied(folder: TensorFolder, embedding: str) -> None:
    """Embedding and head are one tensor by the configuration; that a file has both must make no difference."""
    if folder.place(HEAD).shape != folder.place(embedding).shape or not torch.equal(
        folder.tensor(HEAD), folder.tensor(embedding)
    ):
        raise CheckpointError(
            f"config.json ties the head to the embedding, and {folder.told(HEAD)} differs from "
            f"{folder.told(embedding)}: one of both is wrong"
        )
    folder.let_go()
