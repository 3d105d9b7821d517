"""Which parameter is trained by which optimizer, and the optimizers as one object.

| role | parameters | optimizer | weight decay |
| --- | --- | --- | --- |
| matrix | 2-D weights of linear layers | Muon | yes |
| experts | 3-D stacks of expert matrices | Muon | yes |
| fused experts | the same, where each matrix is gate and up together | Muon, on each half | yes |
| router | the router's weight, those of hyper-connections, linear maps to one number | AdamW | yes |
| head | the output layer, unless tied | AdamW | yes |
| embedding | token embeddings (and the tied head) | AdamW | no |
| vector | norms, biases, decay rates, short convolutions | AdamW | no |

Decay pulls towards zero, so it is for weights whose size is free: not for scales and biases, whose zero means
something else, and not for embeddings, most rows of which get no gradient in a step and would only shrink.
Short convolutions have two dimensions and are no matrices: each row is a filter of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intarsia.errors import TrainingError
from intarsia.model.experts import Experts, Router
from intarsia.model.hyper_connections import HyperConnection
from intarsia.training.config import MuonPrecision, TrainConfig
from intarsia.training.muon import Muon, fast_dtype

Role = Literal["matrix", "experts", "fused experts", "router", "head", "embedding", "vector"]

MUON_ROLES: frozenset[Role] = frozenset({"matrix", "experts", "fused experts"})
DECAYED_ROLES: frozenset[Role] = MUON_ROLES | {"router", "head"}


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each parameter that is to be trained, by name. A shared parameter has one name, its
    first."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    roles: dict[str, Role] = dict.fromkeys(names.values(), "vector")

    def claim(parameter: Tensor | None, role: Role) -> None:
        if parameter is not None and id(parameter) in names:
            roles[names[id(parameter)]] = role

    for module in model.modules():
        if isinstance(module, nn.Linear):
            # A map to one number, like the gate of shared experts, has no directions to make orthogonal.
            claim(module.weight, "matrix" if module.out_features > 1 else "router")
        elif isinstance(module, Router | HyperConnection):
            claim(module.weight, "router")
        elif isinstance(module, Experts):
            claim(module.gate_up, "experts" if module.config.activation == "relu2" else "fused experts")
            claim(module.down, "experts")
    # Last, as both are found above as well: the head is a linear layer, and a tied head is the embedding.
    last: tuple[tuple[str, Role], ...] = (("head", "head"), ("embed", "embedding"))
    for name, role in last:
        if (layer := getattr(model, name, None)) is not None:
            claim(layer.weight, role)
    return roles


@dataclass(frozen=True)
class Optimizers:
    """Muon and AdamW, stepped together. Which parameters they hold is checked when they are made."""

    members: tuple[torch.optim.Optimizer, ...]

    def step(self) -> None:
        """Update every parameter."""
        for optimizer in self.members:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.members:
            optimizer.zero_grad(set_to_none=True)

    def set_multiplier(self, multiplier: float) -> None:
        """Set every group's learning rate to its peak times the schedule's `multiplier`."""
        for group in self.groups():
            group["lr"] = group["peak_lr"] * multiplier

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both, each with its `role`."""
        return [group for optimizer in self.members for group in optimizer.param_groups]


def build_optimizers(model: nn.Module, config: TrainConfig) -> Optimizers:
    """The optimizers of `model`: call it after sharding, since sharding replaces the parameters.

    Raises:
        TrainingError: a trainable parameter belongs to no group, or to two.
    """
    parameters = dict(model.named_parameters())
    roles = parameter_roles(model)
    muon_groups, adamw_groups = [], []
    for role in dict.fromkeys(roles.values()):
        is_muon = config.optimizer == "muon" and role in MUON_ROLES
        # With AdamW alone there is nothing for its learning rate to be scaled against.
        scale = config.adamw_lr_scale if config.optimizer == "muon" and not is_muon else 1.0
        group = {
            "params": [parameters[name] for name, its_role in roles.items() if its_role == role],
            "role": role,
            "peak_lr": config.lr * scale,
            "weight_decay": config.weight_decay if role in DECAYED_ROLES else 0.0,
        }
        if is_muon:
            muon_groups.append({**group, "fused": 2 if role == "fused experts" else 1})
        else:
            adamw_groups.append(group)

    members: list[torch.optim.Optimizer] = []
    if muon_groups:
        dtype = _muon_dtype(config.muon_precision, next(iter(parameters.values())).device)
        members.append(Muon(muon_groups, lr=config.lr, momentum=config.muon_momentum, dtype=dtype))
    if adamw_groups:
        members.append(
            torch.optim.AdamW(
                adamw_groups, lr=config.lr, betas=config.adamw_betas, eps=config.adamw_eps, fused=True
            )
        )
    optimizers = Optimizers(tuple(members))
    _assert_claimed_once(model, optimizers.groups())
    return optimizers


def _assert_claimed_once(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    claims: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            claims[id(parameter)] = claims.get(id(parameter), 0) + 1
    for name, parameter in model.named_parameters():
        count = claims.pop(id(parameter), 0)
        if count != int(parameter.requires_grad):
            wanted = "one" if parameter.requires_grad else "none, since it is frozen"
            raise TrainingError(f"{name} is claimed by {count} optimizer groups and must be by {wanted}")
    if claims:
        raise TrainingError(f"the optimizers hold {len(claims)} parameters that are not the model's")


def _muon_dtype(precision: MuonPrecision, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return fast_dtype(device)
    return torch.bfloat16 if precision == "bf16" else torch.float32
