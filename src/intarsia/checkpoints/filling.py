"""Filling a model with the tensors of a checkpoint, one after the other: cast, or packed, on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intarsia.checkpoints.plan import Plan, loaded
from intarsia.checkpoints.rows import SAME, indexed
from intarsia.checkpoints.tensor_folder import TensorFolder
from intarsia.layers.packed import Packing, packed
from intarsia.model.inference_model import InferenceModel
from intarsia.model.initialization import make_unsaved_buffers
from intarsia.model.language_model import LanguageModel
from intarsia.ops import PackedWeights, pack_weights

PIECE = 64 << 20
"""Bytes of a tensor that are read at a time, where it is read as it is."""
KEPT = 256 << 20
"""Bytes that may be read before the memory of the files is given back."""

Part = tuple[int | slice, Tensor]
"""Where in the first dimension of a tensor of ours something belongs, and what."""


class Reader:
    """Reads tensors of ours, part by part, and gives the memory of the files back in between."""

    def __init__(self, folder: TensorFolder, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self._read = 0

    def parts(self, name: str) -> Iterator[Part]:
        """All that becomes the tensor `name`."""
        for row in self.plan.of[name]:
            if row.how is SAME and indexed(row.ours[0])[1] is None and indexed(row.theirs[0])[1] is None:
                yield from self._rows(row.theirs[0])
                continue
            for target, tensor in zip(row.ours, loaded(row, self.folder), strict=True):
                base, index = indexed(target)
                if base == name:
                    yield slice(None) if index is None else index, tensor
                    self._count(tensor)

    def _rows(self, theirs: str) -> Iterator[Part]:
        place = self.folder.place(theirs)
        each = max(1, PIECE // max(1, math.prod(place.shape[1:]) * place.dtype.itemsize))
        if not place.shape or place.shape[0] <= each:
            whole = self.folder.tensor(theirs)
            yield slice(None), whole
            self._count(whole)
            return
        for first in range(0, place.shape[0], each):
            rows = slice(first, min(first + each, place.shape[0]))
            part = self.folder.tensor(theirs, rows=rows)
            yield rows, part
            self._count(part)

    def _count(self, read: Tensor) -> None:
        self._read += read.nbytes
        if self._read >= KEPT:
            self.folder.let_go()
            self._read = 0


@torch.no_grad()
def fill(model: LanguageModel, reader: Reader, names: Mapping[str, Tensor], device: torch.device) -> None:
    """Give those tensors of a model on the meta device memory and numbers, in the dtypes that they have."""
    for name, like in names.items():
        target = torch.empty(like.shape, dtype=like.dtype, device=device)
        for where, part in reader.parts(name):
            target[where].copy_(part)
        _put(model, name, target)
    model.tie_weights()


@dataclass(frozen=True)
class _Asking(Packing):
    """Packs nothing, and remembers which weights it was given."""

    given: list[nn.Parameter] = field(default_factory=list)

    def packs(self, weight: Tensor) -> bool:
        return weight.numel() >= self.least

    def pack(self, weight: Tensor) -> PackedWeights:
        assert isinstance(weight, nn.Parameter)
        self.given.append(weight)
        return PackedWeights("bfloat16", tuple(weight.shape), weight.shape[-1], weight, None, None)


@dataclass(frozen=True)
class _Streamed(Packing):
    """Packs weights that are still in a file: those of the meta device are read when they are packed."""

    read: Callable[[Tensor, Packing], PackedWeights] | None = None

    def packs(self, weight: Tensor) -> bool:
        return weight.is_meta or super().packs(weight)

    def pack(self, weight: Tensor) -> PackedWeights:
        if not weight.is_meta:
            return super().pack(weight)
        assert self.read is not None
        return self.read(weight, self)


def packed_model(
    model: LanguageModel,
    reader: Reader,
    expected: Mapping[str, Tensor],
    packing: Packing,
    device: torch.device,
) -> InferenceModel:
    """The model for inference, of one on the meta device: what is packed is never there as a whole beside it."""
    asking = _Asking(packing.format, packing.group, packing.zeros, packing.least)
    packed(model, asking)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    later = {names[id(weight)] for weight in asking.given}
    if model.config.tie_embeddings:
        later.discard("embed.weight")  # the head reads it, and so do tokens
    fill(model, reader, {name: x for name, x in expected.items() if name not in later}, device)
    make_unsaved_buffers(model, device)

    def read(weight: Tensor, how: Packing) -> PackedWeights:
        return _packed_parts(weight, reader.parts(names[id(weight)]), how, device)

    return InferenceModel(model, _Streamed(packing.format, packing.group, packing.zeros, packing.least, read))


def _packed_parts(
    weight: Tensor, parts: Iterator[Part], packing: Packing, device: torch.device
) -> PackedWeights:
    """What `pack_weights` makes of the whole: rows have scales of their own, so that they can be packed some at a
    time."""
    whole: PackedWeights | None = None
    format = packing.format
    assert format is not None
    for where, part in parts:
        # Rounded first to what the model would hold: the integers are then those of the model that is packed.
        numbers = part.to(device, weight.dtype)
        made = pack_weights(numbers, format, group=packing.group, zeros=packing.zeros)
        if whole is None:
            room = [
                None if x is None else x.new_empty(*weight.shape[:-1], x.shape[-1])
                for x in (made.data, made.scales, made.zeros)
            ]
            assert room[0] is not None
            whole = PackedWeights(made.format, tuple(weight.shape), made.group, room[0], room[1], room[2])
        for into, of in ((whole.data, made.data), (whole.scales, made.scales), (whole.zeros, made.zeros)):
            if into is not None and of is not None:
                into[where] = of
    assert whole is not None
    return whole


def _put(model: LanguageModel, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor)
    else:
        module._buffers[last] = tensor
