"""Ling and Ring 2.5 and linear 2.0 as published: the equations of the code that was released with Ring-2.5-1T
(`modeling_bailing_moe_v2_5.py`) and with Ring-mini-linear-2.0, token by token, over tensors of their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from support.published_model import (
    PublishedModel,
    Weights,
    attention,
    chosen_experts,
    linear,
    rms_norm,
    silu,
    turned,
    under,
    wide,
)


class PublishedLing25(PublishedModel):
    """The language model."""

    model_type, architecture = "bailing_hybrid", "BailingMoeV2_5ForCausalLM"

    def logits(self, tokens: Tensor, weights: Weights) -> Tensor:
        c = self.config
        x = weights["model.word_embeddings.weight"][tokens]
        for layer in range(c.num_hidden_layers):
            w = under(weights, f"model.layers.{layer}.")
            h = rms_norm(x, w["input_layernorm.weight"], c.rms_norm_eps)
            mixer = self.full_attention if _is_full(c, layer) else _lightning
            x = x + mixer(h, under(w, "attention."), c, layer)
            h = rms_norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps)
            mlp = under(w, "mlp.")
            x = x + (_experts(h, mlp, c) if layer >= c.first_k_dense_replace else _swiglu(h, mlp))
        x = rms_norm(x, weights["model.norm.weight"], c.rms_norm_eps)
        return linear(x, weights["lm_head.weight"])

    @staticmethod
    def full_attention(x: Tensor, w: Weights, c: Any, layer: int) -> Tensor:
        """The layer where a group ends."""
        return _latent_attention(x, w, c, layer)

    @staticmethod
    def full_tensors(part: str, c: Any) -> Iterator[tuple[str, Tensor]]:
        """Its tensors."""
        yield from _latent_tensors(part, c)

    @classmethod
    def tensors(cls, c: Any) -> Iterator[tuple[str, Tensor]]:
        D, H, K = c.hidden_size, c.num_attention_heads, c.head_dim
        ones, zeros = torch.ones, torch.zeros
        yield "model.word_embeddings.weight", zeros(c.vocab_size, D)
        yield "lm_head.weight", zeros(c.vocab_size, D)
        yield "model.norm.weight", ones(D)
        for layer in range(c.num_hidden_layers):
            here = f"model.layers.{layer}."
            yield f"{here}input_layernorm.weight", ones(D)
            yield f"{here}post_attention_layernorm.weight", ones(D)
            part = f"{here}attention."
            if _is_full(c, layer):
                yield from cls.full_tensors(part, c)
            else:
                yield f"{part}query_key_value.weight", zeros(3 * H * K, D)
                yield f"{part}g_proj.weight", zeros(H * K, D)
                yield f"{part}g_norm.weight", ones(H * K)
                yield f"{part}dense.weight", zeros(D, H * K)
                if c.use_qk_norm:
                    yield f"{part}query_layernorm.weight", ones(K)
                    yield f"{part}key_layernorm.weight", ones(K)
            part, F = f"{here}mlp.", c.moe_intermediate_size
            if layer < c.first_k_dense_replace:
                yield from _swiglu_tensors(part, D, c.intermediate_size)
                continue
            yield f"{part}gate.weight", zeros(c.num_experts, D)
            yield f"{part}gate.expert_bias", zeros(c.num_experts)
            yield from _swiglu_tensors(f"{part}shared_experts.", D, F * c.num_shared_experts)
            for expert in range(c.num_experts):
                yield from _swiglu_tensors(f"{part}experts.{expert}.", D, F)


class PublishedLingLinear(PublishedLing25):
    """Linear 2.0: grouped attention where 2.5 has latent attention."""

    model_type, architecture = "bailing_moe_linear", "BailingMoeLinearV2ForCausalLM"

    @staticmethod
    def full_attention(x: Tensor, w: Weights, c: Any, layer: int) -> Tensor:
        H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        made = linear(x, w["query_key_value.weight"]).unflatten(-1, (H + 2 * G, K))
        q, k, v = made.split([H, G, G], dim=2)
        if c.use_qk_norm:
            q = rms_norm(q, w["query_layernorm.weight"], c.rms_norm_eps)
            k = rms_norm(k, w["key_layernorm.weight"], c.rms_norm_eps)
        R = int(K * c.partial_rotary_factor)
        q, k = (torch.cat([turned(z[..., :R], c.rope_theta, False), z[..., R:]], dim=-1) for z in (q, k))
        k, v = (z.repeat_interleave(H // G, dim=2) for z in (k, v))
        return linear(attention(q, k, v).flatten(-2), w["dense.weight"])

    @staticmethod
    def full_tensors(part: str, c: Any) -> Iterator[tuple[str, Tensor]]:
        D, H, G, K = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        yield f"{part}query_key_value.weight", torch.zeros((H + 2 * G) * K, D)
        yield f"{part}dense.weight", torch.zeros(D, H * K)
        if c.use_qk_norm:
            yield f"{part}query_layernorm.weight", torch.ones(K)
            yield f"{part}key_layernorm.weight", torch.ones(K)


def _latent_tensors(part: str, c: Any) -> Iterator[tuple[str, Tensor]]:
    D, H, ones, zeros = c.hidden_size, c.num_attention_heads, torch.ones, torch.zeros
    query = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    if c.q_lora_rank is None:
        yield f"{part}q_proj.weight", zeros(query, D)
    else:
        yield f"{part}q_a_proj.weight", zeros(c.q_lora_rank, D)
        yield f"{part}q_a_layernorm.weight", ones(c.q_lora_rank)
        yield f"{part}q_b_proj.weight", zeros(query, c.q_lora_rank)
    yield f"{part}kv_a_proj_with_mqa.weight", zeros(c.kv_lora_rank + c.qk_rope_head_dim, D)
    yield f"{part}kv_a_layernorm.weight", ones(c.kv_lora_rank)
    yield f"{part}kv_b_proj.weight", zeros(H * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield f"{part}dense.weight", zeros(D, H * c.v_head_dim)


def _is_full(c: Any, layer: int) -> bool:
    group = c.layer_group_size
    return (layer + 1) % group == 0 or layer >= c.num_hidden_layers // group * group


def _lightning(x: Tensor, w: Weights, c: Any, layer: int) -> Tensor:
    (B, T, _), H, K = x.shape, c.num_attention_heads, c.head_dim
    made = linear(x, w["query_key_value.weight"])
    q, k, v = (silu(made) if c.linear_silu else made).view(B, T, 3 * H, K).split(H, dim=2)
    if c.use_qk_norm:
        q = rms_norm(q, w["query_layernorm.weight"], c.rms_norm_eps)
        k = rms_norm(k, w["key_layernorm.weight"], c.rms_norm_eps)
    R = int(K * c.partial_rotary_factor)
    q, k = (torch.cat([turned(z[..., :R], c.rope_theta, False), z[..., R:]], dim=-1) for z in (q, k))
    heads = torch.arange(1, H + 1, dtype=torch.float64)
    rate = 2 ** (-8 * heads / H) * (1 - (layer - 1) / (c.num_hidden_layers - 1) + 1e-5)
    fade = torch.exp(-rate).view(H, 1, 1)
    board, o = wide(x).new_zeros(B, H, K, K), torch.empty_like(v)
    for t in range(T):
        now = [wide(z[:, t]) for z in (q, k, v)]
        board = board * fade.to(board.dtype) + now[1].unsqueeze(-1) * now[2].unsqueeze(-2)
        o[:, t] = ((board * now[0].unsqueeze(-1)).sum(-2) * K**-0.5).to(o.dtype)
    groups = (c.group_norm_size, H * K // c.group_norm_size)
    normed = rms_norm(o.flatten(-2).unflatten(-1, groups), torch.ones(groups[1]), c.rms_norm_eps)
    o = normed.flatten(-2) * w["g_norm.weight"] * torch.sigmoid(linear(x, w["g_proj.weight"]))
    return linear(o, w["dense.weight"])


def _latent_attention(x: Tensor, w: Weights, c: Any, layer: int) -> Tensor:
    H, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
    if c.q_lora_rank is None:
        q = linear(x, w["q_proj.weight"])
    else:
        latent = rms_norm(linear(x, w["q_a_proj.weight"]), w["q_a_layernorm.weight"], 1e-6)
        q = linear(latent, w["q_b_proj.weight"])
    q_own, q_turned = q.unflatten(-1, (H, -1)).split([nope, rope], dim=-1)
    latent, k_turned = linear(x, w["kv_a_proj_with_mqa.weight"]).split([c.kv_lora_rank, rope], dim=-1)
    kv = linear(rms_norm(latent, w["kv_a_layernorm.weight"], 1e-6), w["kv_b_proj.weight"])
    k_own, v = kv.unflatten(-1, (H, -1)).split([nope, c.v_head_dim], dim=-1)
    q_turned, k_turned = (turned(z, c.rope_theta, True) for z in (q_turned, k_turned.unsqueeze(2)))
    k = torch.cat([k_own, k_turned.expand(-1, -1, H, -1)], dim=-1)
    return linear(attention(torch.cat([q_own, q_turned], dim=-1), k, v).flatten(-2), w["dense.weight"])


def _swiglu(x: Tensor, w: Weights) -> Tensor:
    inside = silu(linear(x, w["gate_proj.weight"])) * linear(x, w["up_proj.weight"])
    return linear(inside, w["down_proj.weight"])


def _experts(x: Tensor, w: Weights, c: Any) -> Tensor:
    rows = x.flatten(0, 1)
    chosen, shares = chosen_experts(
        rows, w["gate.weight"], w["gate.expert_bias"], c.num_experts_per_tok, c.n_group, c.topk_group
    )
    routed = torch.zeros_like(rows)
    for expert in range(c.num_experts):
        share = (shares * (chosen == expert)).sum(-1, keepdim=True) * c.routed_scaling_factor
        routed = routed + (share * _swiglu(rows, under(w, f"experts.{expert}."))).to(rows.dtype)
    return routed.view(x.shape) + _swiglu(x, under(w, "shared_experts."))


def _swiglu_tensors(part: str, width: int, inside: int) -> Iterator[tuple[str, Tensor]]:
    yield f"{part}gate_proj.weight", torch.zeros(inside, width)
    yield f"{part}up_proj.weight", torch.zeros(inside, width)
    yield f"{part}down_proj.weight", torch.zeros(width, inside)
