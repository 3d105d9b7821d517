"""Fresh weights that depend on a seed and on names, and on nothing else.

Each parameter has a generator of its own, seeded from the model's seed and the parameter's name. Parameters
of the same name and shape therefore begin with the same numbers in all arms of a comparison, whatever else
the models are made of, in whatever order, and on whatever device.

The policy: matrices and embeddings are normal with standard deviation `std`, and those that write to the
residual stream `std / sqrt(2 depth)`, so that the stream's variance does not grow with the depth (Radford et
al. 2019). Biases are zero and norms neutral. A module says by itself what its other parameters are:

* `init_own_weights(generator_of, std)` fills the parameters that belong to the module directly, with
  `generator_of(name)` the generator of its parameter `name`. It is called without gradients, and while it
  runs the parameters are float32 on the CPU, so that the same is drawn for every device and dtype.
* `init_own_buffers()` fills the buffers that belong to the module directly, where they are.
* `residual_outputs`, a tuple, names the children and parameters that write to the residual stream.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from intarsia.errors import ConfigError
from intarsia.mixers.base import GeneratorOf


@runtime_checkable
class FillsWeights(Protocol):
    """A module with parameters of its own kind."""

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        """Fill the parameters that belong to the module directly."""


@runtime_checkable
class FillsBuffers(Protocol):
    """A module with buffers."""

    def init_own_buffers(self) -> None:
        """Fill the buffers that belong to the module directly."""


def init_weights(model: nn.Module, seed: int, *, std: float, depth: int) -> None:
    """Fill all parameters and buffers of `model`, which may come from `to_empty`.

    Raises:
        ConfigError: a module has parameters or buffers that nobody fills.
    """
    residual = _residual_outputs(model)
    shared = {id(parameter): name for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for prefix, module in model.named_modules():
            # A shared parameter is filled where it comes first.
            own = {
                name: parameter
                for name, parameter in module.named_parameters(recurse=False)
                if shared[id(parameter)] == _join(prefix, name)
            }
            drawn = _draw(module, prefix, own, seed, std)
            for name, values in drawn.items():
                if _join(prefix, name) in residual:
                    values.div_(math.sqrt(2 * depth))
                own[name].copy_(values)
    init_buffers(model)


def init_buffers(model: nn.Module) -> None:
    """Fill all buffers of `model` with what they are in a new model."""
    with torch.no_grad():
        for prefix, module in model.named_modules():
            if isinstance(module, FillsBuffers):
                module.init_own_buffers()
            else:
                for name, _ in module.named_buffers(recurse=False):
                    raise _unclaimed(module, prefix, name, "init_own_buffers")


def generator(seed: int, name: str) -> torch.Generator:
    """The generator of the parameter `name` under the model's `seed`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draw(
    module: nn.Module, prefix: str, own: dict[str, nn.Parameter], seed: int, std: float
) -> dict[str, nn.Parameter]:
    """Values for the parameters `own` of the module: float32 on the CPU."""

    def generator_of(name: str) -> torch.Generator:
        return generator(seed, _join(prefix, name))

    drawn = {
        name: nn.Parameter(torch.full(parameter.shape, math.nan, dtype=torch.float32, device="cpu"))
        for name, parameter in own.items()
    }
    if isinstance(module, FillsWeights):
        try:
            module._parameters.update(drawn)
            module.init_own_weights(generator_of, std)
        finally:
            module._parameters.update(own)
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        for name, values in drawn.items():
            if name == "bias":
                values.zero_()
            else:
                values.normal_(0, std, generator=generator_of(name))
    for name, values in drawn.items():
        if values.isnan().any():
            raise _unclaimed(module, prefix, name, "init_own_weights")
    return drawn


def _residual_outputs(model: nn.Module) -> set[str]:
    """The full names of the parameters that write to the residual stream."""
    names = set()
    for prefix, module in model.named_modules():
        for output in getattr(module, "residual_outputs", ()):
            child = getattr(module, output)
            name = _join(prefix, output)
            names.add(name if isinstance(child, nn.Parameter) else f"{name}.weight")
    return names


def _unclaimed(module: nn.Module, prefix: str, name: str, method: str) -> ConfigError:
    return ConfigError(f"nobody fills {_join(prefix, name)}: {type(module).__name__}.{method} must do it")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
