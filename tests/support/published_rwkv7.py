"""RWKV-7 as it is published: the paper's equations, token by token, over tensors of the published names.

Peng et al. 2025 (arXiv:2503.14456), section 4 and appendix. Nothing here is of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from support.published_model import PublishedModel, Weights


class PublishedRWKV7(PublishedModel):
    """The language model."""

    model_type, architecture = "rwkv7", "RWKV7ForCausalLM"

    def logits(self, tokens: Tensor, weights: Weights) -> Tensor:
        eps = self.config.norm_eps
        x = weights["model.embeddings.weight"][tokens]
        first = None
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            w = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
            if layer == 0:
                x = _layer_norm(x, w, "pre_norm", eps)
            y, first = self._time_mixing(_layer_norm(x, w, "attn_norm", eps), w, first)
            x = x + y
            h = _layer_norm(x, w, "ffn_norm", eps)
            k = _shifted(h, w["ffn.x_k"]) @ w["ffn.key.weight"].T
            x = x + (k * k * (k > 0)) @ w["ffn.value.weight"].T
        x = _layer_norm(x, weights, "model.norm", eps)
        return x @ weights["lm_head.weight"].T

    def _time_mixing(self, x: Tensor, w: dict[str, Tensor], first: Tensor | None) -> tuple[Tensor, Tensor]:
        c = self.config
        (B, T, _), H, K = x.shape, c.num_heads, c.head_dim
        x_r, x_w, x_k, x_v, x_a, x_g = (_shifted(x, w[f"attn.x_{name}"]) for name in "rwkvag")
        r, k, v = (
            x_r @ w["attn.r_proj.weight"].T,
            x_k @ w["attn.k_proj.weight"].T,
            x_v @ w["attn.v_proj.weight"].T,
        )
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(_network(x_w, w, "w", torch.tanh)))
        rate = torch.sigmoid(_network(x_a, w, "a"))
        gate = _network(x_g, w, "g", torch.sigmoid)
        if first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(_network(x_v, w, "v"))
        r, k, decay, rate = (z.view(B, T, H, K) for z in (r, k, decay, rate))
        v = v.view(B, T, H, -1)
        removed = k * w["attn.k_k"].view(H, K)
        removed = removed / (removed * removed).sum(-1, keepdim=True).sqrt()
        written = k * (1 + (rate - 1) * w["attn.k_a"].view(H, K))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        board = torch.zeros(B, H, v.shape[-1], K, dtype=wide)  # [V, K], as the paper has it
        o = torch.empty_like(v)
        for t in range(T):
            now = [z[:, t].to(wide) for z in (decay, removed, rate, v, written, r)]
            fade, away, share, value, key, query = now
            found = (board * away.unsqueeze(-2)).sum(-1, keepdim=True)
            board = board * fade.unsqueeze(-2) - found * (away * share).unsqueeze(-2)
            board = board + value.unsqueeze(-1) * key.unsqueeze(-2)
            o[:, t] = (board * query.unsqueeze(-2)).sum(-1).to(o.dtype)
        centred = o - o.mean(-1, keepdim=True)
        o = centred / ((centred * centred).mean(-1, keepdim=True) + K * c.norm_eps).sqrt()
        o = o.flatten(-2) * w["attn.g_norm.weight"] + w["attn.g_norm.bias"]
        bonus = (r * written * w["attn.r_k"]).sum(-1, keepdim=True) * v
        return ((o + bonus.flatten(-2)) * gate) @ w["attn.o_proj.weight"].T, first

    def other_layout(self, tensors: Weights) -> Weights:
        """That of the first files, with all shifts in one tensor."""
        tensors = dict(tensors)
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}.attn.x_"
            tensors[prefix + "x"] = torch.cat([tensors.pop(prefix + name)[0] for name in "rwkvag"])
        return tensors

    @staticmethod
    def tensors(c: Any) -> Iterator[tuple[str, Tensor]]:
        D, values = c.hidden_size, c.value_dim[0]
        ones, zeros = torch.ones, torch.zeros
        yield "model.embeddings.weight", zeros(c.vocab_size, D)
        yield "lm_head.weight", zeros(c.vocab_size, D)
        for layer in range(c.num_hidden_layers):
            here = f"model.layers.{layer}."
            for norm in ("pre_norm", "attn_norm", "ffn_norm")[layer > 0 :]:
                yield f"{here}{norm}.weight", ones(D)
                yield f"{here}{norm}.bias", zeros(D)
            for name in "rwkvag":
                yield f"{here}attn.x_{name}", zeros(1, 1, D)
            for name, rows, columns in (("r", D, D), ("k", D, D), ("v", values, D), ("o", D, values)):
                yield f"{here}attn.{name}_proj.weight", zeros(rows, columns)
            networks = {
                "w": (c.decay_low_rank_dim, D), "a": (c.a_low_rank_dim, D), "g": (c.gate_low_rank_dim, values),
                "v": (c.v_low_rank_dim, values),
            }  # fmt: skip
            for name, (rank, width) in networks.items():
                if name == "v" and layer == 0:
                    continue
                yield f"{here}attn.{name}_lora.lora.0.weight", zeros(rank, D)
                yield f"{here}attn.{name}_lora.lora.2.weight", zeros(width, rank)
                if name != "g":
                    yield f"{here}attn.{name}_lora.lora.2.bias", zeros(width)
            yield f"{here}attn.k_k", 0.7 * ones(D)
            yield f"{here}attn.k_a", ones(D)
            yield f"{here}attn.r_k", zeros(c.num_heads, c.head_dim)
            yield f"{here}attn.g_norm.weight", ones(values)
            yield f"{here}attn.g_norm.bias", zeros(values)
            yield f"{here}ffn.x_k", 0.5 * ones(D)
            yield f"{here}ffn.key.weight", zeros(c.intermediate_size, D)
            yield f"{here}ffn.value.weight", zeros(D, c.intermediate_size)
        yield "model.norm.weight", ones(D)
        yield "model.norm.bias", zeros(D)


def _shifted(x: Tensor, share: Tensor) -> Tensor:
    earlier = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    return x + (earlier - x) * share.flatten()


def _network(x: Tensor, w: dict[str, Tensor], name: str, inside: Any = None) -> Tensor:
    h = x @ w[f"attn.{name}_lora.lora.0.weight"].T
    y = (h if inside is None else inside(h)) @ w[f"attn.{name}_lora.lora.2.weight"].T
    return y + w.get(f"attn.{name}_lora.lora.2.bias", torch.zeros((), dtype=x.dtype))


def _layer_norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]
