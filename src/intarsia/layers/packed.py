"""Modules made ready for inference: the same modules with packed weights in place of their linear maps."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from intarsia.errors import UnsupportedError
from intarsia.ops import PackedWeights, pack_weights, packed_linear
from intarsia.ops.available import available
from intarsia.ops.packed_weights import FLOATING, WeightFormat, check_format

M = TypeVar("M", bound=nn.Module)

SMALL = 1 << 16
"""Weights of fewer numbers keep their dtype: they lie in the cache, and gates among them are sensitive."""


@dataclass(frozen=True)
class Packing:
    """What becomes of weights."""

    format: WeightFormat | None = None
    """None: float32 and bfloat16 as they are, which copies nothing."""
    group: int | None = None
    """How many numbers share a scale; see `pack_weights`."""
    zeros: bool = False
    least: int = SMALL

    def __post_init__(self) -> None:
        if self.format is not None:
            check_format(self.format, self.group, self.zeros)

    def packs(self, weight: Tensor) -> bool:
        """Whether a weight is packed at all: not where it is divided among processes, nor, as it is, where no kernels
        read it."""
        if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
            return False
        if self.format is None or weight.numel() < self.least:
            # PyTorch's product of one row takes microseconds in float32 and a tenth of a millisecond in bfloat16.
            slow = weight.dtype == torch.bfloat16 or weight.numel() >= self.least
            return (
                slow
                and weight.is_contiguous()
                and weight.dtype in FLOATING.values()
                and _read_as_they_are(weight)
            )
        return True

    def pack(self, weight: Tensor) -> PackedWeights:
        """The weight `[N, K]` or `[E, N, K]`, packed; one of fewer than `least` numbers as it is."""
        if self.format is None or weight.numel() < self.least:
            name: WeightFormat = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
            return pack_weights(weight, name)
        return pack_weights(weight, self.format, group=self.group, zeros=self.zeros)


@runtime_checkable
class PacksItself(Protocol):
    """A module with weights of its own that are not in linear maps."""

    def packed(self, packing: Packing) -> nn.Module:
        """The same, for inference."""
        ...


class PackedLinear(nn.Linear):
    """A linear map whose weight is packed. There is nothing to train here: its parameter `weight` has the shape, dtype
    and device of the weight that it stands for, for those who ask, no memory, and NaN for every number."""

    def __init__(self, weights: PackedWeights, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`dtype` is that of the linear map which it stands for."""
        nn.Module.__init__(self)
        self.packed_weights, self.bias = weights, bias  # type: ignore[assignment]
        self.out_features, self.in_features = weights.shape
        self.weight = stand_in(weights, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed_weights, self.bias)

    def train(self, mode: bool = True) -> PackedLinear:
        """Only `eval`.

        Raises:
            UnsupportedError: it is asked to train.
        """
        refuse_training(mode)
        return super().train(mode)

    def all_packed(self) -> tuple[PackedWeights, ...]:
        """Its packed weights."""
        return (self.packed_weights,)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packed_weights.format}"


@runtime_checkable
class HasPacked(Protocol):
    """A module with packed weights."""

    def all_packed(self) -> tuple[PackedWeights, ...]:
        """Its packed weights."""
        ...


def bytes_of_weights(modules: Iterable[nn.Module], beside: Iterable[PackedWeights] = ()) -> int:
    """What the weights and buffers of modules take, packed ones as they are packed, and others `beside` them; what is
    shared counts once."""
    found: dict[int, int] = {}
    packs = [*beside]
    for module in modules:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        found.update({x.data_ptr(): x.untyped_storage().nbytes() for x in own})
        packs += module.all_packed() if isinstance(module, HasPacked) else ()
    found.update({each.data.data_ptr(): each.nbytes for each in packs})
    return sum(found.values())


def refuse_training(mode: bool = True) -> None:
    """Raise UnsupportedError, which says what can be trained, unless `mode` is False."""
    if mode:
        raise UnsupportedError(
            "packed weights are for inference and cannot be trained: train the model that they were packed from (it is "
            "as it was), or load it again from its checkpoint"
        )


def weights_of(module: nn.Module) -> PackedWeights | None:
    """The weights of a linear map as products with few rows read them, packed or where they are; None where they
    cannot: of another dtype, divided among processes, or on no CPU."""
    if isinstance(module, PackedLinear):
        return module.packed_weights if module.packed_weights.device.type == "cpu" else None
    weight = module.weight if type(module) is nn.Linear else None
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":
        return None
    name = next((name for name, dtype in FLOATING.items() if dtype == weight.dtype), None)
    return None if name is None or not weight.is_contiguous() else pack_weights(weight, name)  # type: ignore[arg-type]


def stand_in(weights: PackedWeights, dtype: torch.dtype) -> nn.Parameter:
    """What has the shape and the device of packed weights, for those who ask, and `dtype`; no memory, and only NaN."""
    nothing = torch.full((), torch.nan, dtype=dtype, device=weights.device)
    return nn.Parameter(nothing.expand(weights.shape), requires_grad=False)


def packed(module: M, packing: Packing, keep: tuple[str, ...] = ()) -> M:
    """`module` with packed linear maps: modules of its own, whose other parameters are shared with it.

    `keep` names linear maps that stay. A module lists in `reads_weights` those whose weights it reads itself.
    """
    made = copy.copy(module)
    keep = (*keep, *getattr(module, "reads_weights", ()))
    made._modules = {
        name: copy.copy(child) if child is None or name in keep else packed_child(child, packing)
        for name, child in module._modules.items()
    }
    return made


def packed_child(module: nn.Module, packing: Packing) -> nn.Module:
    """A module or a linear map, packed."""
    if isinstance(module, PacksItself):
        return module.packed(packing)
    if type(module) is not nn.Linear:
        return packed(module, packing)
    if not packing.packs(module.weight):
        return copy.copy(module)
    return PackedLinear(packing.pack(module.weight), module.bias, module.weight.dtype)


def _read_as_they_are(weight: Tensor) -> bool:
    """Whether something reads these weights faster than PyTorch's own linear map."""
    return available("packed_linear", weight.device)[0] != "torch"
