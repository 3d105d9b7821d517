"""The tensors of a published checkpoint: of one file, or of several that an index lists."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoints.float8 import SCALES, Block, dequantised, scales_shape
from intarsia.checkpoints.tensor_file import Place, TensorFile
from intarsia.errors import CheckpointError
from intarsia.files import message_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TensorFolder:
    """The tensors of all weight files of a folder, by name.

    Args:
        path: the folder.
        named: what a name in the files is to be called, for checkpoints that put a prefix before each.
        block: of weights of eight bits that have scales; they are read as float32, and the scales are no tensors of
            their own then.

    Raises:
        CheckpointError: there are no weights, they are pickles, the index does not fit the files, a file is damaged, or
            scales do not fit their weights.
    """

    def __init__(
        self, path: Path, named: Callable[[str], str] = lambda name: name, block: Block | None = None
    ) -> None:
        self.path = path
        self._block = block
        index = path / INDEX
        listed = _read_index(index) if index.is_file() else None
        files = sorted(set(listed.values())) if listed is not None else [_only_file(path)]
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{index} names {missing[0]}, which is not in {path}: the checkpoint is not whole"
            )
        self._file_of: dict[str, TensorFile] = {}
        self._name_in_file: dict[str, str] = {}
        for name in files:
            file = TensorFile(path / name)
            for tensor in file.places:
                if listed is not None and listed.get(tensor) != name:
                    where = listed.get(tensor)
                    said = "does not name it" if where is None else f"says that it is in {where}"
                    raise CheckpointError(f"{tensor} is in {file.path}, and {INDEX} {said}")
                ours = named(tensor)
                if ours in self._file_of:
                    raise CheckpointError(
                        f"{file.path} has {tensor}, and {self._name_in_file[ours]} is the same tensor"
                    )
                self._file_of[ours], self._name_in_file[ours] = file, tensor
        absent = sorted((listed or {}).keys() - set(self._name_in_file.values()))
        if absent:
            assert listed is not None
            raise CheckpointError(
                f"{INDEX} says that {absent[0]} is in {path / listed[absent[0]]}: it is not"
            )
        self._scaled = frozenset(self._with_scales())
        self.names = frozenset(self._file_of) - {name + SCALES for name in self._scaled}

    def _with_scales(self) -> Iterator[str]:
        """The weights that have scales."""
        if self._block is None:
            return
        for name, file in self._file_of.items():
            if name + SCALES not in self._file_of:
                continue
            shape = file.places[self._name_in_file[name]].shape
            scales = self._file_of[name + SCALES].places[self._name_in_file[name + SCALES]].shape
            if len(shape) < 2 or scales != scales_shape(shape, self._block):
                raise CheckpointError(
                    f"{self.told(name + SCALES)} is {list(scales)}: no scales of blocks of {list(self._block)} of "
                    f"{list(shape)}"
                )
            yield name

    def place(self, name: str) -> Place:
        """Dtype and shape of a tensor, as it is read."""
        place = self._file_of[name].places[self._name_in_file[name]]
        return dataclasses.replace(place, dtype=torch.float32) if name in self._scaled else place

    def told(self, name: str) -> str:
        """A tensor as messages name it: what it is called there, and the file."""
        return f"{self._name_in_file[name]} in {self._file_of[name].path}"

    def tensor(self, name: str, index: int | None = None, rows: slice | None = None) -> Tensor:
        """A view, as `TensorFile.tensor` gives it; or numbers, where they are weights with scales."""
        found = self._file_of[name].tensor(self._name_in_file[name], index, rows)
        if name not in self._scaled:
            return found
        assert self._block is not None
        of, first = name + SCALES, 0
        if rows is not None and len(self.place(name).shape) == 2:
            first = rows.start
            rows = None
        scales = self._file_of[of].tensor(self._name_in_file[of], index, rows)
        return dequantised(found, scales, self._block, first)

    def let_go(self) -> None:
        """Give back the memory of what was read."""
        for file in set(self._file_of.values()):
            file.let_go()


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {message_of(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of weights: {error!r}") from error
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError(f"{path} lists no tensors")
    for tensor, file in listed.items():
        _check_name(path, tensor, file)
    return dict(listed)


def _check_name(index: Path, tensor: str, file: Any) -> None:
    """A file of the folder itself; what an index says must not read elsewhere."""
    if (
        not isinstance(file, str)
        or PurePosixPath(file).name != file
        or "\\" in file
        or file in ("", ".", "..")
    ):
        raise CheckpointError(f"{index} says that {tensor} is in {file!r}, which is no file of its folder")
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{index} names {file!r}; weights are read from .safetensors files alone")


def _only_file(path: Path) -> str:
    if (path / WEIGHTS).is_file():
        return WEIGHTS
    found = sorted(file.name for file in path.iterdir() if file.suffix == ".safetensors")
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{path} has {', '.join(found)} and no {INDEX}: which of them are the model's?")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} has its weights in {pickles[0]}, a pickle, which can run any code when it is read and is not "
            "opened here: take the checkpoint's .safetensors files, or convert it with transformers' save_pretrained"
        )
    raise CheckpointError(f"{path} holds no weights: neither {WEIGHTS} nor {INDEX} is there")
