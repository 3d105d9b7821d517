"""Reading `.safetensors` files: memory-mapped, tensor by tensor, and let go again; and writing them tensor by tensor.

A file is 8 bytes with the length of a header, the header (JSON: of each tensor dtype, shape and place), and the
numbers (https://github.com/huggingface/safetensors). Here the mapping is ours, so that a part of a tensor can be read
without the rest, and what was read need not stay in memory until the file is closed.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import CheckpointError
from intarsia.files import message_of, naming

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000
"""The limit that the format's own library has."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """In bytes from the beginning of the file."""
    end: int


class TensorFile:
    """A `.safetensors` file, opened.

    Raises:
        CheckpointError: it is not there, cut off, or damaged; nothing is said of the numbers themselves.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.places: Mapping[str, Place] = self._read_header(file, size)
                # Written to by nobody: private, since PyTorch warns of memory that it could not write to.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {message_of(error)}") from error

    def tensor(self, name: str, index: int | None = None, rows: slice | None = None) -> Tensor:
        """A view of the mapping: of the tensor, of its part `index`, or of some rows, in the first dimension. It is
        not to be kept: copy it."""
        place = self.places[name]
        shape, begin = place.shape, place.begin
        if index is not None or rows is not None:
            first, last = (index, index + 1) if index is not None else (rows.start, rows.stop)  # type: ignore[union-attr]
            each = math.prod(shape[1:])
            begin += first * each * place.dtype.itemsize
            shape = shape[1:] if index is not None else (last - first, *shape[1:])
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=place.dtype)
        if begin % place.dtype.itemsize:  # allowed, if unusual
            raw = torch.frombuffer(
                self._map, dtype=torch.uint8, count=count * place.dtype.itemsize, offset=begin
            )
            return raw.clone().view(place.dtype).view(shape)
        return torch.frombuffer(self._map, dtype=place.dtype, count=count, offset=begin).view(shape)

    def let_go(self) -> None:
        """Give back the memory of what was read. It is read again where a view is still there."""
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _read_header(self, file: Any, size: int) -> dict[str, Place]:
        damaged = f"{self.path} is damaged or was cut off"
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{damaged}: it has {size} bytes and no whole header")
        try:
            header = json.loads(file.read(length))
            entries = {
                name: _place(entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{damaged}: its header cannot be read ({error})") from error
        end = 8 + length
        for name, place in sorted(entries.items(), key=lambda entry: entry[1].begin):
            if place.begin != end:
                raise CheckpointError(f"{damaged}: {name} does not begin where the tensor before it ends")
            if place.end - place.begin != math.prod(place.shape) * place.dtype.itemsize:
                raise CheckpointError(
                    f"{damaged}: {name} {list(place.shape)} has {place.end - place.begin} bytes"
                )
            end = place.end
        if end != size:
            raise CheckpointError(f"{damaged}: its tensors have {end} bytes and the file {size}")
        return entries


def write_file(
    path: Path,
    like: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a `.safetensors` file of tensors that come one after the other, each in memory only while it is written.

    Args:
        like: all of them by name, in the right shapes and dtypes, for instance on the meta device.
        tensors: names and tensors, in any order, each once.

    Raises:
        CheckpointError: it cannot be written.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    # The widest first, so that all are aligned.
    for name, tensor in sorted(like.items(), key=lambda entry: -entry[1].dtype.itemsize):
        header[name] = {
            "dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes],
        }  # fmt: skip
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        missing = set(like)
        for name, tensor in tensors:
            missing.remove(name)
            assert (tensor.shape, tensor.dtype) == (like[name].shape, like[name].dtype), name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(raw.numpy().data)
        assert not missing, missing


def _place(entry: Mapping[str, Any], start: int) -> Place:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in DTYPES:
        raise ValueError(f"the dtype {kind!r} is not known")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{entry} is no place of a tensor")
    return Place(DTYPES[kind], tuple(shape), start + begin, start + end)
