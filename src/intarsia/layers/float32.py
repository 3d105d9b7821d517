"""Parameters and buffers that stay float32 when their module is cast to a narrower dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn


class KeepsFloat32(nn.Module):
    """A module some of whose own parameters and buffers are never narrower than float32.

    A subclass names them in `float32_names`; names that the module does not have are passed over.
    `module.to(torch.bfloat16)`, `.half()` and `.type(...)` on the module or on any module around it leave the
    values of these tensors alone and obey moves between devices; loading or assigning a narrower tensor widens it.
    A cast to float64 is obeyed, so that a module can be checked in double precision.

    Log-decays, time-step biases and routers need this: rounded to bfloat16 they change which state is
    forgotten and which experts are chosen.

    All of its parameters, those of modules in it too, should have one dtype then, and be read by calling it alone:
    so `fully_shard`, which wants one dtype in a group, can gather them apart from the rest (`float32_parts`). What it
    returns must not be the parameters themselves, whose memory is let go after the call.
    """

    float32_names: ClassVar[tuple[str, ...]] = ()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # A module that is made under `torch.set_default_dtype(torch.bfloat16)` begins with narrow ones.
        if param is not None and name in self.float32_names and is_narrower_than_float32(param):
            param = nn.Parameter(param.detach().float(), requires_grad=param.requires_grad)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and name in self.float32_names and is_narrower_than_float32(tensor):
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        parameters = [self._parameters.get(name) for name in self.float32_names]
        gradients = [parameter.grad for parameter in parameters if parameter is not None]
        buffers = [self._buffers.get(name) for name in self.float32_names]
        identities = {id(tensor) for tensor in (*parameters, *gradients, *buffers) if tensor is not None}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if id(tensor) in identities and is_narrower_than_float32(result):
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        return super()._apply(apply, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # With load_state_dict(assign=True) the loaded tensor becomes the parameter, dtype included.
        for name in self.float32_names:
            tensor = state_dict.get(prefix + name)
            if tensor is not None and is_narrower_than_float32(tensor):
                state_dict[prefix + name] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def float32_parts(module: nn.Module) -> list[KeepsFloat32]:
    """The modules in `module`, itself included, that have parameters which are never narrower than float32."""
    return [
        part
        for part in module.modules()
        if isinstance(part, KeepsFloat32)
        and any(part._parameters.get(name) is not None for name in part.float32_names)
    ]


def is_narrower_than_float32(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is of a floating type with fewer bits than float32."""
    return tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
