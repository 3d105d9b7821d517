"""MiniCPM-SALA as published (arXiv:2602.11761; InfLLM-v2, arXiv:2509.24663): its equations, token by token, over
tensors of the released names. A choice is made by the softmax over the means of all windows of keys, at any length of
the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from support.published_model import PublishedModel, Weights, linear, rms_norm, silu, turned, under, wide


class PublishedSALA(PublishedModel):
    """The language model."""

    model_type, architecture = "minicpm_sala", "MiniCPMSALAForCausalLM"

    def logits(self, tokens: Tensor, weights: Weights) -> Tensor:
        c = self.config
        added = c.scale_depth / c.num_hidden_layers**0.5
        x = weights["model.embed_tokens.weight"][tokens] * c.scale_emb
        for layer, kind in enumerate(c.mixer_types):
            w = under(weights, f"model.layers.{layer}.")
            h = rms_norm(x, w["input_layernorm.weight"], c.rms_norm_eps)
            mixer = _blocks if kind == "minicpm4" else _lightning
            x = x + added * mixer(h, under(w, "self_attn."), c)
            h = rms_norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps)
            inside = silu(linear(h, w["mlp.gate_proj.weight"])) * linear(h, w["mlp.up_proj.weight"])
            x = x + added * linear(inside, w["mlp.down_proj.weight"])
        x = rms_norm(x, weights["model.norm.weight"], c.rms_norm_eps)
        head = weights["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
        return linear(x / (c.hidden_size / c.dim_model_base), head)

    @staticmethod
    def tensors(c: Any) -> Iterator[tuple[str, Tensor]]:
        D, F, ones, zeros = c.hidden_size, c.intermediate_size, torch.ones, torch.zeros
        yield "model.embed_tokens.weight", zeros(c.vocab_size, D)
        if not c.tie_word_embeddings:
            yield "lm_head.weight", zeros(c.vocab_size, D)
        yield "model.norm.weight", ones(D)
        for layer, kind in enumerate(c.mixer_types):
            here = f"model.layers.{layer}."
            yield f"{here}input_layernorm.weight", ones(D)
            yield f"{here}post_attention_layernorm.weight", ones(D)
            part, sparse = f"{here}self_attn.", kind == "minicpm4"
            q = c.num_attention_heads * c.head_dim if sparse else c.lightning_nh * c.lightning_head_dim
            kv = c.num_key_value_heads * c.head_dim if sparse else q
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"{part}{name}_proj.weight", zeros(rows, D)
            yield f"{part}o_proj.weight", zeros(D, q)
            if not sparse:
                yield f"{part}z_proj.weight", zeros(q, D)
                yield f"{part}o_norm.weight", ones(q)
                if c.qk_norm:
                    yield f"{part}q_norm.weight", ones(c.lightning_head_dim)
                    yield f"{part}k_norm.weight", ones(c.lightning_head_dim)
            elif c.attn_use_output_gate:
                yield f"{part}o_gate.weight", zeros(q, D)
            for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                yield f"{here}mlp.{name}_proj.weight", zeros(*shape)


def _lightning(x: Tensor, w: Weights, c: Any) -> Tensor:
    (B, T, _), H, K = x.shape, c.lightning_nh, c.lightning_head_dim
    q, k, v = (linear(x, w[f"{name}_proj.weight"]).view(B, T, H, K) for name in "qkv")
    if c.qk_norm:
        q, k = (rms_norm(z, w[f"{n}_norm.weight"], c.rms_norm_eps) for z, n in ((q, "q"), (k, "k")))
    if c.lightning_use_rope:
        q, k = turned(q, c.rope_theta, False), turned(k, c.rope_theta, False)
    fade = torch.exp(-(2 ** (-8 * torch.arange(1, H + 1, dtype=torch.float64) / H))).view(H, 1, 1)
    scale = K**-0.5 if c.lightning_scale == "1/sqrt(d)" else 1 / K
    board, o = wide(x).new_zeros(B, H, K, K), torch.empty_like(v)
    for t in range(T):
        now = [wide(z[:, t]) for z in (q, k, v)]
        board = board * fade.to(board.dtype) + now[1].unsqueeze(-1) * now[2].unsqueeze(-2)
        o[:, t] = ((board * now[0].unsqueeze(-1)).sum(-2) * scale).to(o.dtype)
    normed = rms_norm(o.flatten(-2), w["o_norm.weight"], c.rms_norm_eps)
    return linear(normed * torch.sigmoid(linear(x, w["z_proj.weight"])), w["o_proj.weight"])


def _blocks(x: Tensor, w: Weights, c: Any) -> Tensor:
    """Of each token and each head of keys: what it reads, and attention to it."""
    (B, T, _), H, G, K = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    q = linear(x, w["q_proj.weight"]).view(B, T, G, H // G, K)
    k, v = (linear(x, w[f"{name}_proj.weight"]).view(B, T, G, K) for name in "kv")
    o = torch.empty_like(q)
    for b in range(B):
        for g in range(G):
            for t in range(T):
                asked, seen, values = q[b, t, g], k[b, : t + 1, g], v[b, : t + 1, g]
                there = torch.tensor([s for block in _picked(asked, seen, c) for s in block if s <= t])
                logits = wide(asked @ seen[there].T) * K**-0.5
                o[b, t, g] = logits.softmax(-1).to(o.dtype) @ values[there]
    y = o.flatten(2)
    if c.attn_use_output_gate:
        y = y * torch.sigmoid(linear(x, w["o_gate.weight"]))
    return linear(y, w["o_proj.weight"])


def _picked(asked: Tensor, seen: Tensor, c: Any) -> list[range]:
    """The blocks that a token reads, which sees the keys `[S, K]` and asks with `[heads, K]`."""
    s, S = c.sparse_config, seen.shape[0]
    size, local = s["block_size"], s["window_size"] // s["block_size"]
    own = (S - 1) // size
    always = {*range(min(s["init_blocks"], own + 1)), *range(max(0, own - local + 1), own + 1)}
    starts = range(0, S - s["kernel_size"] + 1, s["kernel_stride"])
    scores = dict.fromkeys(range(own + 1), 0.0)
    if len(starts):
        means = torch.stack([wide(seen[start : start + s["kernel_size"]]).mean(0) for start in starts])
        shares = (wide(asked) @ means.T * c.head_dim**-0.5).softmax(-1).sum(0).tolist()
        for start, share in zip(starts, shares, strict=True):
            for block in range(start // size, (start + s["kernel_size"] - 1) // size + 1):
                scores[block] = max(scores[block], share)
    others = sorted(set(scores) - always, key=lambda block: (-scores[block], block))
    chosen = sorted(always) + others[: s["topk"] + local - len(always)]
    return [range(block * size, (block + 1) * size) for block in chosen]
