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

Modules of PyTorch and of other packages that do not know these are filled by their `reset_parameters`, as when they
were made, with a generator seeded from the seed and the module's name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.filling import INITIAL_STD, FillsItself, GeneratorOf

Unknown = Literal["refuse", "keep"]


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


def init_weights(
    model: nn.Module, seed: int, *, std: float = INITIAL_STD, depth: float = 1, unknown: Unknown = "refuse"
) -> None:
    """Fill all parameters and buffers of `model` by `seed` and their names.

    The model may be any module: one mixer, a PyTorch model that has some of them, or one that comes from `to_empty`.
    PyTorch's global generator is left as it was.

    Args:
        std: the standard deviation of matrices and embeddings.
        depth: how many layers write to the residual stream, a block without a feed-forward being half a layer: for a
            model's layers, not for a mixer's.
        unknown: what becomes of parameters and buffers that nobody knows how to fill, since their module has neither
            the methods above nor `reset_parameters`: `"refuse"` them, or `"keep"` the values that they have.

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
            if unknown == "keep" and _filler(module) is None and not any(p.is_meta for p in own.values()):
                continue
            drawn = _draw(module, prefix, own, seed, std)
            for name, values in drawn.items():
                if _join(prefix, name) in residual:
                    values.div_(math.sqrt(2 * depth))
                own[name].copy_(_placed_as(own[name], values))
    init_buffers(model, unknown)


def _placed_as(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """The values, divided among processes as the parameter is where it is a DTensor: each drew them all."""
    mesh, placements = getattr(parameter, "device_mesh", None), getattr(parameter, "placements", None)
    if mesh is None or placements is None:
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.detach().to(device=parameter.device, dtype=parameter.dtype)
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def init_buffers(model: nn.Module, unknown: Unknown = "refuse") -> None:
    """Fill all buffers of `model` with what they are in a new model; `unknown` as in `init_weights`."""
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = dict(module.named_buffers(recurse=False))
            if _fills_buffers(module):
                module.init_own_buffers()
            elif callable(reset := getattr(module, "reset_running_stats", None)):
                reset()
            elif own and (unknown == "refuse" or any(buffer.is_meta for buffer in own.values())):
                raise _unclaimed(module, prefix, next(iter(own)), "init_own_buffers")


def make_unsaved_buffers(model: nn.Module, device: torch.device) -> None:
    """Give buffers of a loaded model that are in no file, and so still on the meta device, memory on `device` and the
    values of a new model; leave the others alone."""
    saved = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    init_buffers(model)
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def _fills_buffers(module: nn.Module) -> TypeGuard[FillsBuffers]:
    """Whether the module says what its buffers are, beyond what it has of `FillsItself`."""
    return (
        isinstance(module, FillsBuffers)
        and getattr(type(module), "init_own_buffers", None) is not FillsItself.init_own_buffers
    )


def generator(seed: int, name: str) -> torch.Generator:
    """The generator of the parameter `name` under the model's `seed`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draw(
    module: nn.Module, prefix: str, own: dict[str, nn.Parameter], seed: int, std: float
) -> dict[str, nn.Parameter]:
    """Values for the parameters `own` of the module: float32 on the CPU."""
    drawn = {
        name: nn.Parameter(torch.full(parameter.shape, math.nan, dtype=torch.float32, device="cpu"))
        for name, parameter in own.items()
    }
    fill = _filler(module)
    if drawn and fill is not None:
        try:
            module._parameters.update(drawn)
            fill(prefix, seed, std)
        finally:
            module._parameters.update(own)
    for name, values in drawn.items():
        if values.isnan().any():
            raise _unclaimed(module, prefix, name, "init_own_weights")
    return drawn


def _filler(module: nn.Module) -> Callable[[str, int, float], None] | None:
    """What fills the module's own parameters, given its name, the seed and the standard deviation; None: nobody."""
    if isinstance(module, FillsWeights):
        parent = getattr(module, "drawn_as_parent", False)

        def fill_own(prefix: str, seed: int, std: float) -> None:
            prefix = prefix.rpartition(".")[0] if parent else prefix
            module.init_own_weights(lambda name: generator(seed, _join(prefix, name)), std)

        return fill_own
    if isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
        return lambda prefix, seed, std: _fill_matrix(module, prefix, seed, std)
    for name in ("reset_parameters", "_reset_parameters"):  # nn.MultiheadAttention has the second
        if callable(reset := getattr(module, name, None)):

            def fill(prefix: str, seed: int, std: float, reset: Callable[[], object] = reset) -> None:
                with _global_generator(seed, prefix):
                    reset()

            return fill
    return None


def _fill_matrix(
    module: nn.Linear | nn.Embedding | nn.EmbeddingBag, prefix: str, seed: int, std: float
) -> None:
    for name, values in module.named_parameters(recurse=False):
        if name == "bias":
            values.zero_()
        else:
            values.normal_(0, std, generator=generator(seed, _join(prefix, name)))
    if not isinstance(module, nn.Linear) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()


@contextmanager
def _global_generator(seed: int, name: str) -> Iterator[None]:
    """A block in which PyTorch's global generator on the CPU is that of `name`, for modules that know no other."""
    before = torch.get_rng_state()
    torch.default_generator.set_state(generator(seed, name).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _residual_outputs(model: nn.Module) -> set[str]:
    """The full names of the parameters that write to the residual stream."""
    names = set()
    for prefix, module in model.named_modules():
        for output in getattr(module, "residual_outputs", ()):
            if (child := getattr(module, output, None)) is None:
                kind = type(module).__name__
                raise ConfigError(
                    f"{kind}.residual_outputs says that {output} writes to the residual stream, and {kind} has no"
                    f" {output}: name there what does"
                )
            name = _join(prefix, output)
            names.add(name if isinstance(child, nn.Parameter) else f"{name}.weight")
    return names


def _unclaimed(module: nn.Module, prefix: str, name: str, method: str) -> ConfigError:
    return ConfigError(
        f"nobody fills {_join(prefix, name)}: {type(module).__name__}.{method} must do it, or its reset_parameters"
        " (init_weights(…, unknown='keep') leaves what is not on the meta device as it is)"
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
