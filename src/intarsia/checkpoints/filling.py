"""Filling a model with the tensors of a checkpoint, one after the other: cast, or packed, on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from intarsia.checkpoints.plan import Plan, loaded, stored
from intarsia.checkpoints.rows import SAME, Row, indexed
from intarsia.checkpoints.tensor_folder import TensorFolder
from intarsia.layers.packed import Packing, packed
from intarsia.model.inference_model import InferenceModel, packing_of_head
from intarsia.model.initialization import make_unsaved_buffers
from intarsia.model.language_model import LanguageModel
from intarsia.ops import PackedWeights, pack_weights
from intarsia.ops.packed_weights import WeightFormat, empty_packed

PIECE = 64 << 20
"""Bytes of a tensor that are read at a time, where it is read as it is."""
KEPT = 256 << 20
"""Bytes that may be read before the memory of the files is given back."""

HEAD = "head.weight"

Part = tuple[int | slice, Tensor]
"""Where in the first dimension of a tensor of ours something belongs, and what."""


def own_plan(names: Iterable[str]) -> Plan:
    """Of files that call tensors what we call them."""
    return Plan({name: (Row((name,), (name,)),) for name in names}, {})


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
    """Give those tensors of a model on the meta device memory and numbers, in the dtypes that they have, and make its
    buffers that no file holds."""
    for name, like in names.items():
        _put(model, name, whole(reader, name, like, device))
    model.tie_weights()
    make_unsaved_buffers(model, device)


def whole(reader: Reader, name: str, like: Tensor, device: torch.device) -> Tensor:
    """A tensor of ours, in the shape and dtype of `like`."""
    target = torch.empty(like.shape, dtype=like.dtype, device=device)
    for where, part in reader.parts(name):
        target[where].copy_(part)
    return target


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


def packings(model: LanguageModel, packing: Packing) -> dict[str, Packing]:
    """How each weight is packed that is, by its name: `head.weight` is the head's even where the embedding is tied."""
    asking = _Asking(packing.format, packing.group, packing.zeros, packing.least)
    packed(model, asking)
    names = _names(model)
    found = dict.fromkeys((names[id(weight)] for weight in asking.given), packing)
    if HEAD in found:
        found[HEAD] = packing_of_head(packing)
    return found


def _names(model: LanguageModel) -> dict[int, str]:
    """What parameters are called; of one that the head shares, what the head calls it."""
    return {id(weight): name for name, weight in model.named_parameters(remove_duplicate=False)}


@dataclass(frozen=True)
class _Streamed(Packing):
    """Packs weights that are still in a file: `read` gives those of `names`, by `id`."""

    names: Mapping[int, str] = field(default_factory=dict)
    read: Callable[[str, Tensor, Packing], PackedWeights] | None = None

    def packs(self, weight: Tensor) -> bool:
        return id(weight) in self.names or super().packs(weight)

    def pack(self, weight: Tensor) -> PackedWeights:
        if id(weight) not in self.names:
            return super().pack(weight)
        assert self.read is not None
        return self.read(self.names[id(weight)], weight, self)


def packed_model(
    model: LanguageModel, reader: Reader, packing: Packing, device: torch.device
) -> InferenceModel:
    """The model for inference, of one on the meta device: what is packed is never there as a whole beside it."""

    def read(name: str, weight: Tensor, how: Packing) -> PackedWeights:
        if not weight.is_meta:  # a head that is the embedding, which is there for the tokens
            return pack_weights(weight, _format(how), group=how.group, zeros=how.zeros)
        return packed_parts(weight, reader.parts(name), how, device)

    return streamed_model(model, reader, packing, device, read)


def streamed_model(
    model: LanguageModel,
    reader: Reader,
    packing: Packing,
    device: torch.device,
    read: Callable[[str, Tensor, Packing], PackedWeights],
) -> InferenceModel:
    """The model for inference, of one on the meta device, whose packed weights come from `read(name, weight, how)`, one
    after the other, and the others from the reader."""
    how = packings(model, packing)
    later = how.keys() - ({HEAD} if model.config.tie_embeddings else set())
    fill(model, reader, {name: x for name, x in stored(model).items() if name not in later}, device)
    names = {weight: name for weight, name in _names(model).items() if name in how}
    streamed = _Streamed(packing.format, packing.group, packing.zeros, packing.least, names, read)
    return InferenceModel(model, streamed)


def packed_parts(
    weight: Tensor, parts: Iterator[Part], packing: Packing, device: torch.device
) -> PackedWeights:
    """What `pack_weights` makes of the whole: rows have scales of their own, so that they can be packed some at a
    time."""
    format = _format(packing)
    room = empty_packed(tuple(weight.shape), format, group=packing.group, zeros=packing.zeros, device=device)
    for where, part in parts:
        # Rounded first to what the model would hold: the integers are then those of the model that is packed.
        numbers = part.to(device, weight.dtype)
        made = pack_weights(numbers, format, group=packing.group, zeros=packing.zeros)
        for into, of in ((room.data, made.data), (room.scales, made.scales), (room.zeros, made.zeros)):
            if into is not None and of is not None:
                into[where] = of
    return room


def _format(packing: Packing) -> WeightFormat:
    assert packing.format is not None
    return packing.format


def _put(model: LanguageModel, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor)
    else:
        module._buffers[last] = tensor
