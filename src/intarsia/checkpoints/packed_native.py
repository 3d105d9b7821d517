"""Models whose weights are packed, in a directory of their own: read for decoding as they are, quantised once.

The directory is that of `native`, with integers and scales in place of the weights that `InferenceModel` packs. Instead
of `NAME` the file has `NAME.packed` (uint8, as `PackedWeights.data`), `NAME.scales` and perhaps `NAME.zeros`
(bfloat16). `config.json` says of each such tensor its format and its group, under `weights.packed.tensors`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoints import native
from intarsia.checkpoints.filling import (
    Reader,
    own_plan,
    packed_parts,
    packings,
    streamed_model,
    whole,
)
from intarsia.checkpoints.plan import stored
from intarsia.checkpoints.tensor_file import write_file
from intarsia.checkpoints.tensor_folder import TensorFolder
from intarsia.errors import CheckpointError, ConfigError
from intarsia.files import directory_atomically, write_json
from intarsia.layers.packed import Packing
from intarsia.model.config import ModelConfig
from intarsia.model.inference_model import InferenceModel
from intarsia.model.language_model import LanguageModel
from intarsia.ops import PackedWeights
from intarsia.ops.packed_weights import WeightFormat, empty_packed

FORMATS: tuple[WeightFormat, ...] = ("int8", "int4")
_CPU = torch.device("cpu")


def save_packed(
    directory: str | os.PathLike[str],
    model: LanguageModel,
    reader: Reader,
    packing: Packing,
    tokenizer: native.Saveable | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Pack the weights of a model that is still in files, and write them: one tensor is in memory at a time.

    Args:
        directory: made if it is not there, and else replaced as a whole; other files in it stay.
        model: on the meta device; what the reader reads.
        packing: to `"int8"` or `"int4"`.
        tokenizer, extra: as in `native.save_model`.

    Raises:
        ConfigError: a format that is not written so, a group that cannot be, or a model of which nothing is packed.
        CheckpointError: the directory cannot be written.
    """
    check_written(packing.format)
    ours = stored(model)
    how, rooms, like = _packed(model, packing)
    if not how:
        raise ConfigError(
            f"no weight of this model has {packing.least:,} numbers, and smaller ones are not packed to "
            f"{packing.format}: leave --weights out"
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, x in ours.items():
            if name not in how:
                yield name, whole(reader, name, x, _CPU)
        for name, each in how.items():
            weight = model.get_parameter(name)
            # A head that is the embedding is packed, and the embedding is there for the tokens.
            source = name if name in ours else "embed.weight"
            yield from _tensors(name, packed_parts(weight, reader.parts(source), each, _CPU)).items()

    told = {
        "format": packing.format,
        "group": packing.group,
        "zeros": packing.zeros,
        "least": packing.least,
        "tensors": {name: _told(room) for name, room in rooms.items()},
    }
    target = Path(directory)
    with torch.no_grad(), directory_atomically(target) as new:
        write_file(new / native.WEIGHTS, like, tensors(), {"model": native.FORMAT})
        dtype = native.name_of_dtype(model.embed.weight.dtype)
        values = native.described(model.config, dtype, new / native.WEIGHTS, extra, told)
        write_json(new / native.CONFIG, values)
        if tokenizer is not None:
            (new / native.TOKENIZER).mkdir()
            tokenizer.save(new / native.TOKENIZER)
        native.take_over(target, new)


def check_written(weights: str | None) -> None:
    """Raise ConfigError for a format that is not written packed."""
    if weights not in FORMATS:
        raise ConfigError(
            f"weights are packed in files to {' or '.join(FORMATS)}; got {weights!r} (a dtype says how they are "
            "written as numbers)"
        )


def load_packed(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    verify: bool = True,
) -> InferenceModel:
    """Read what `save_packed` wrote.

    Args:
        dtype: of the parameters that are not packed, as in `native.load_model`.
        device: where to put all of them.
        verify: compare the file's checksum, which reads it twice.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of the configuration.
    """
    values = native.read_config(directory)
    packing = packing_of(directory, values)
    assert packing is not None
    device = torch.device(device)

    def expected(model: LanguageModel) -> native.Expected:
        _, rooms, like = _packed(model, packing)
        _check_told(directory, values["weights"]["packed"], rooms)
        return {name: (tuple(x.shape), x.dtype) for name, x in like.items()}

    model, tensors = native.opened(directory, values, expected, verify)
    model = (model if dtype is None else model.to(dtype)).eval()
    reader = Reader(tensors, own_plan(tensors.names))

    def read(name: str, weight: Tensor, how: Packing) -> PackedWeights:
        room = _room(model, name, how, device)
        for part, target in _tensors(name, room).items():
            for where, numbers in reader.parts(part):
                target[where].copy_(numbers)
        return room

    return streamed_model(model, reader, packing, device, read)


def bytes_of(directory: str | os.PathLike[str]) -> tuple[str, int]:
    """The format of a directory's packed weights, and the bytes of all its tensors: none of them is read.

    Raises:
        CheckpointError: the directory is damaged.
    """
    packing = packing_of(directory, native.read_config(directory))
    assert packing is not None
    assert packing.format is not None
    tensors = TensorFolder(Path(directory))
    return packing.format, sum(tensors.place(name).end - tensors.place(name).begin for name in tensors.names)


def bytes_when_packed(config: ModelConfig, dtype: torch.dtype) -> dict[str, int]:
    """By format, the bytes of all tensors that `save_packed` would write of a model whose other parameters have this
    dtype; nothing for one of which it would pack nothing. The model is laid out without memory."""
    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
    found: dict[str, int] = {}
    for name in FORMATS:
        how, _, like = _packed(model, Packing(name))
        if how:
            found[name] = sum(x.nbytes for x in like.values())
    return found


def check_asked(directory: str | os.PathLike[str], weights: WeightFormat | None, group: int | None) -> None:
    """Raise ConfigError if packed weights are asked for in another form than they have."""
    packing = packing_of(directory, native.read_config(directory))
    assert packing is not None
    if (weights or packing.format) != packing.format or (group or packing.group) != packing.group:
        has = f"{packing.format}" + ("" if packing.group is None else f" in groups of {packing.group}")
        wants = f"{weights or packing.format}" + ("" if group is None else f" in groups of {group}")
        raise ConfigError(
            f"the weights in {directory} are packed to {has} and cannot become {wants}: leave that out, or pack them "
            "anew from the model that they came from"
        )


def packing_of(directory: str | os.PathLike[str], values: Mapping[str, Any]) -> Packing | None:
    """How the weights of a directory are packed, of what `native.read_config` gives; None where they are not.

    Raises:
        CheckpointError: it says something that cannot be.
    """
    told = values["weights"].get("packed")
    if told is None:
        return None
    try:
        if told["format"] not in FORMATS:
            raise ConfigError(f"packed weights are {' or '.join(FORMATS)}; got {told['format']!r}")
        for key, kind in (("group", int | None), ("zeros", bool), ("least", int)):
            if not isinstance(told[key], kind):
                raise ConfigError(f"{key} is {told[key]!r}")
        return Packing(told["format"], told["group"], told["zeros"], told["least"])
    except (KeyError, ConfigError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{Path(directory) / native.CONFIG} is damaged: weights.packed cannot be right: {reason}"
        ) from error


def _packed(
    model: LanguageModel, packing: Packing
) -> tuple[dict[str, Packing], dict[str, PackedWeights], dict[str, Tensor]]:
    """How each weight is packed that is, and what becomes of it; and what the file has, its tensors on the meta
    device. `model` may be there too."""
    how = packings(model, packing)
    rooms = {name: _room(model, name, each, "meta") for name, each in how.items()}
    like = {name: x for name, x in stored(model).items() if name not in how}
    for name, room in rooms.items():
        like.update(_tensors(name, room))
    return how, rooms, like


def _room(model: LanguageModel, name: str, how: Packing, device: torch.device | str) -> PackedWeights:
    assert how.format is not None
    return empty_packed(
        tuple(model.get_parameter(name).shape), how.format, group=how.group, zeros=how.zeros, device=device
    )


def _tensors(name: str, weights: PackedWeights) -> dict[str, Tensor]:
    """What stands in the file for a weight."""
    found = {"packed": weights.data, "scales": weights.scales, "zeros": weights.zeros}
    return {f"{name}.{part}": x for part, x in found.items() if x is not None}


def _told(weights: PackedWeights) -> dict[str, Any]:
    return {"format": weights.format, "group": weights.group}


def _check_told(
    directory: str | os.PathLike[str], told: Mapping[str, Any], rooms: Mapping[str, PackedWeights]
) -> None:
    """The file's own list of what is packed is what this release packs."""
    path, listed = Path(directory) / native.CONFIG, told.get("tensors")
    wanted = {name: _told(room) for name, room in rooms.items()}
    if not isinstance(listed, Mapping):
        raise CheckpointError(f"{path} is damaged: weights.packed.tensors must list what is packed")
    for name in sorted(wanted.keys() | listed.keys()):
        if wanted.get(name) != listed.get(name):
            raise CheckpointError(
                f"{path}: {name} is packed as {listed.get(name)}, and this release has it as {wanted.get(name)}: pack "
                "the model again from its source"
            )
