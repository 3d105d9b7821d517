"""The recurrences behind flash-linear-attention's functions as loops over tokens, and inputs for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

B, T, H, HV, K, V = 2, 37, 2, 4, 8, 6


def tensors(heads: int = HV, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Queries, keys and values, decays of both kinds, write strengths and a state."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {
        "q": normal(B, T, H, K),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, heads, V),
        "g": -F.softplus(normal(B, T, heads)),
        "gk": -F.softplus(normal(B, T, heads, K)),
        "beta": torch.sigmoid(normal(B, T, heads)),
        "state": normal(B, heads, K, V),
    }
    return {name: x.to(dtype) for name, x in made.items()}


def loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One token after another; `g` `[B, T, HV, K]` or None, `beta` None for the rule that does not erase."""
    groups = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    S = (
        torch.zeros(*v.shape[:1], v.shape[2], k.shape[3], v.shape[3], dtype=v.dtype)
        if state is None
        else state
    )
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            S = S * g[:, t].exp()[..., None]
        write = v[:, t]
        if beta is not None:
            write = beta[:, t][..., None] * (write - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + k[:, t][..., None] * write[..., None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1), S


def close(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
