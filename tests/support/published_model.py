"""What published models have in common that are written out from their equations: tensors of the published names, the
interface that the tests of checkpoints need, and a few formulas. Nothing here is of the package.

They compute in float64, or, where their parameters are bfloat16, in that with what must be wide in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]


class PublishedConfig(SimpleNamespace):
    """The options in `config.json`."""


class PublishedModel(nn.Module):
    """A language model. What computes is `logits`, of weights by their names; `tensors` are their names and shapes."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config
        for name, tensor in self.tensors(config):
            module: nn.Module = self
            *owners, last = name.split(".")
            for owner in owners:
                if owner not in module._modules:
                    module.add_module(owner, nn.Module())
                module = module._modules[owner]  # type: ignore[assignment]
            module.register_parameter(last, nn.Parameter(tensor))

    @staticmethod
    def tensors(c: Any) -> Iterator[tuple[str, Tensor]]:
        """The names in the files, and what the tensors begin with."""
        raise NotImplementedError

    def logits(self, tokens: Tensor, weights: Weights) -> Tensor:
        """`[B, T, vocabulary]` of tokens `[B, T]`."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Any:
        """Logits `[B, T, vocabulary]` of tokens `[B, T]`."""
        weights = {name: tensor.detach() for name, tensor in self.named_parameters()}
        if next(iter(weights.values())).dtype != torch.bfloat16:
            weights = {name: tensor.double() for name, tensor in weights.items()}
        return SimpleNamespace(logits=self.logits(tokens, weights))

    def other_layout(self, tensors: Weights) -> Weights:
        """The same in the other layout that there is of the files."""
        return tensors

    def save_pretrained(self, path: Path, save_original_format: bool = True) -> None:
        """In the layout of today's files, or in the other."""
        path.mkdir(parents=True, exist_ok=True)
        values = {**vars(self.config), "model_type": self.model_type, "architectures": [self.architecture]}
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        tensors = {name: tensor.detach().clone() for name, tensor in self.named_parameters()}
        save_file(tensors if save_original_format else self.other_layout(tensors), path / "model.safetensors")

    @classmethod
    def from_pretrained(cls, path: Path, dtype: torch.dtype, **_: Any) -> PublishedModel:
        """The model in a folder, in the layout of today's files."""
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model = cls(PublishedConfig(**values))
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model.to(dtype)


def under(weights: Weights, prefix: str) -> Weights:
    """Those of a part, by their names in it."""
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def wide(x: Tensor) -> Tensor:
    """In float32, or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`W x`"""
    return x @ weight.T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension."""
    y = wide(x)
    return (y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * wide(weight)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """`x sigmoid(x)`"""
    return x / (1 + torch.exp(-x))


def turned(x: Tensor, theta: float, neighbours: bool) -> Tensor:
    """Every pair of channels of `[B, T, H, R]` turned by its token's angle: neighbours, or the halves' equals."""
    R = x.shape[-1]
    pairs = torch.arange(R // 2, dtype=torch.float64)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * theta ** (-2 * pairs / R)
    cos, sin = angle.cos().to(wide(x).dtype), angle.sin().to(wide(x).dtype)
    a, b = (wide(x)[..., 0::2], wide(x)[..., 1::2]) if neighbours else wide(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of `[B, T, H, …]` to all tokens up to each, `[B, T, H, V]`."""
    T = q.shape[1]
    logits = wide(torch.einsum("bthk,bshk->bhts", q, k)) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    return torch.einsum("bhts,bshv->bthv", logits.softmax(-1).to(v.dtype), v)


def chosen_experts(
    x: Tensor, gate: Tensor, bias: Tensor, active: int, groups: int, active_groups: int
) -> tuple[Tensor, Tensor]:
    """The experts of each token of `[N, D]`, by their sigmoids and the bias, from the best groups, and their sigmoids
    over the sum of them: `[N, active]` both."""
    scores = torch.sigmoid(linear(wide(x), wide(gate)))
    biased = (scores + bias).unflatten(-1, (groups, -1))
    strength = biased.topk(2, dim=-1).values.sum(-1)
    used = strength.topk(active_groups, dim=-1).indices
    kept = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, used, True).unsqueeze(-1)
    chosen = biased.masked_fill(~kept, float("-inf")).flatten(-2).topk(active, dim=-1).indices
    shares = scores.gather(-1, chosen)
    return chosen, shares / shares.sum(-1, keepdim=True)
