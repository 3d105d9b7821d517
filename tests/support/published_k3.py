"""Kimi K3's text model as far as it is published: the equations of vLLM's code for it (`vllm/models/kimi_k3`), token by
token, over tensors of the released names."""

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
    under,
    wide,
)


class PublishedK3(PublishedModel):
    """The language model."""

    model_type, architecture = "kimi_linear", "KimiLinearForCausalLM"

    def logits(self, tokens: Tensor, weights: Weights) -> Tensor:
        c, eps = self.config, self.config.rms_norm_eps
        total: Tensor | None = weights["model.embed_tokens.weight"][tokens]
        blocks: list[Tensor] = []
        for layer in range(c.num_hidden_layers):
            w = under(weights, f"model.layers.{layer}.")
            h = _mixture([*blocks, total], w, "self_attention_res", eps)
            if layer % c.attn_res_block_size == 0:
                blocks.append(total)  # type: ignore[arg-type]
                total = None
            mixer = _delta_attention if layer + 1 in c.linear_attn_config["kda_layers"] else _latent_attention
            y = mixer(rms_norm(h, w["input_layernorm.weight"], eps), under(w, "self_attn."), c)
            total = y if total is None else total + y
            h = rms_norm(
                _mixture([*blocks, total], w, "mlp_res", eps), w["post_attention_layernorm.weight"], eps
            )
            if layer < c.first_k_dense_replace:
                total = total + _feed_forward(h, under(w, "mlp."), c, "gate_proj", "up_proj", "down_proj")
            else:
                total = total + _experts(h, under(w, "block_sparse_moe."), c)
        x = _mixture([*blocks, total], under(weights, "model."), "output_attn_res", eps)
        return linear(rms_norm(x, weights["model.norm.weight"], eps), weights["lm_head.weight"])

    def other_layout(self, tensors: Weights) -> Weights:
        """Within the multimodal model."""
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        return {**tensors, "vision_tower.patch_embed.proj.weight": torch.ones(2, 3)}

    @staticmethod
    def tensors(c: Any) -> Iterator[tuple[str, Tensor]]:
        D, ones, zeros = c.hidden_size, torch.ones, torch.zeros
        yield "model.embed_tokens.weight", zeros(c.vocab_size, D)
        yield "lm_head.weight", zeros(c.vocab_size, D)
        yield "model.norm.weight", ones(D)
        yield "model.output_attn_res_norm.weight", ones(D)
        yield "model.output_attn_res_proj.weight", zeros(1, D)
        for layer in range(c.num_hidden_layers):
            here = f"model.layers.{layer}."
            for norm in (
                "input_layernorm",
                "post_attention_layernorm",
                "self_attention_res_norm",
                "mlp_res_norm",
            ):
                yield f"{here}{norm}.weight", ones(D)
            for name in ("self_attention_res_proj", "mlp_res_proj"):
                yield f"{here}{name}.weight", zeros(1, D)
            delta = layer + 1 in c.linear_attn_config["kda_layers"]
            for name, tensor in _delta_tensors(c) if delta else _latent_tensors(c):
                yield f"{here}self_attn.{name}", tensor
            if layer < c.first_k_dense_replace:
                yield from _map_tensors(
                    f"{here}mlp.", D, c.intermediate_size, "gate_proj", "up_proj", "down_proj"
                )
                continue
            part, W = f"{here}block_sparse_moe.", c.routed_expert_hidden_size
            yield f"{part}gate.weight", zeros(c.num_experts, D)
            yield f"{part}gate.e_score_correction_bias", zeros(c.num_experts)
            yield f"{part}routed_expert_down_proj.weight", zeros(W, D)
            yield f"{part}routed_expert_up_proj.weight", zeros(D, W)
            if getattr(c, "latent_moe_use_norm", False):
                yield f"{part}routed_expert_norm.weight", ones(W)
            inside = c.moe_intermediate_size * c.num_shared_experts
            yield from _map_tensors(f"{part}shared_experts.", D, inside, "gate_proj", "up_proj", "down_proj")
            for expert in range(c.num_experts):
                yield from _map_tensors(
                    f"{part}experts.{expert}.", W, c.moe_intermediate_size, "w1", "w3", "w2"
                )


def _mixture(sources: list[Any], w: Weights, name: str, eps: float) -> Tensor:
    """Of what is below: its softmax is over the sources, each of which is normed to be weighed."""
    asked = [
        linear(wide(rms_norm(x, w[f"{name}_norm.weight"], eps)), wide(w[f"{name}_proj.weight"]))
        for x in sources
    ]
    shares = torch.cat(asked, dim=-1).softmax(-1)
    return sum(share * wide(x) for share, x in zip(shares.split(1, -1), sources, strict=True)).to(
        sources[0].dtype
    )  # type: ignore[union-attr, return-value]


def _delta_attention(x: Tensor, w: Weights, c: Any) -> Tensor:
    of = c.linear_attn_config
    (B, T, _), H, K = x.shape, of["num_heads"], of["head_dim"]

    def convolved(name: str) -> Tensor:
        y, weight = linear(x, w[f"{name}_proj.weight"]), w[f"{name}_conv1d.weight"].squeeze(1)
        size = weight.shape[1]
        padded = torch.cat([y.new_zeros(B, size - 1, y.shape[2]), y], dim=1)
        taps = (padded[:, tap : tap + T] * weight[:, tap] for tap in range(size))
        return silu(sum(taps)).unflatten(-1, (H, K))  # type: ignore[arg-type]

    q, k = (wide(z) / (wide(z).square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in map(convolved, "qk"))
    v = wide(convolved("v"))
    raw = wide(linear(linear(x, w["f_a_proj.weight"]), w["f_b_proj.weight"]) + w["dt_bias"]).unflatten(
        -1, (H, K)
    )
    fade = torch.exp(of["gate_lower_bound"] * torch.sigmoid(wide(w["A_log"]).exp().view(H, 1) * raw))
    beta = torch.sigmoid(wide(linear(x, w["b_proj.weight"])))
    board, o = v.new_zeros(B, H, K, K), torch.empty_like(v)
    for t in range(T):
        board = board * fade[:, t].unsqueeze(-1)
        found = (board * k[:, t].unsqueeze(-1)).sum(-2)
        written = beta[:, t].unsqueeze(-1) * (v[:, t] - found)
        board = board + k[:, t].unsqueeze(-1) * written.unsqueeze(-2)
        o[:, t] = (board * q[:, t].unsqueeze(-1)).sum(-2) * K**-0.5
    gate = torch.sigmoid(wide(linear(x, w["g_proj.weight"])))
    y = rms_norm(o, w["o_norm.weight"], 1e-5).flatten(-2) * gate
    return linear(y.to(x.dtype), w["o_proj.weight"])


def _latent_attention(x: Tensor, w: Weights, c: Any) -> Tensor:
    H, eps = c.num_attention_heads, c.rms_norm_eps
    if c.q_lora_rank is None:
        q = linear(x, w["q_proj.weight"])
    else:
        q = linear(
            rms_norm(linear(x, w["q_a_proj.weight"]), w["q_a_layernorm.weight"], eps), w["q_b_proj.weight"]
        )
    made = linear(x, w["kv_a_proj_with_mqa.weight"])
    latent, shared = made.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
    kv = linear(rms_norm(latent, w["kv_a_layernorm.weight"], eps), w["kv_b_proj.weight"]).unflatten(
        -1, (H, -1)
    )
    k_own, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
    k = torch.cat([k_own, shared.unsqueeze(2).expand(-1, -1, H, -1)], dim=-1)
    o = attention(q.unflatten(-1, (H, -1)), k, v).flatten(-2)
    if "g_proj.weight" in w:
        o = o * torch.sigmoid(linear(x, w["g_proj.weight"]))
    return linear(o, w["o_proj.weight"])


def _feed_forward(x: Tensor, w: Weights, c: Any, gate: str, up: str, down: str) -> Tensor:
    g, u = wide(linear(x, w[f"{gate}.weight"])), wide(linear(x, w[f"{up}.weight"]))
    g = c.activation_situ_beta * torch.tanh(g / c.activation_situ_beta) / (1 + torch.exp(-g))
    limit = getattr(c, "activation_situ_linear_beta", None)
    u = u if limit is None else limit * torch.tanh(u / limit)
    return linear((g * u).to(x.dtype), w[f"{down}.weight"])


def _experts(x: Tensor, w: Weights, c: Any) -> Tensor:
    rows = x.flatten(0, 1)
    chosen, shares = chosen_experts(
        rows, w["gate.weight"], w["gate.e_score_correction_bias"], c.num_experts_per_token, 1, 1
    )
    latent = linear(rows, w["routed_expert_down_proj.weight"])
    routed = torch.zeros_like(latent)
    for expert in range(c.num_experts):
        share = (shares * (chosen == expert)).sum(-1, keepdim=True) * c.routed_scaling_factor
        y = _feed_forward(latent, under(w, f"experts.{expert}."), c, "w1", "w3", "w2")
        routed = routed + (share * y).to(rows.dtype)
    if "routed_expert_norm.weight" in w:
        routed = rms_norm(routed, w["routed_expert_norm.weight"], c.rms_norm_eps)
    y = linear(routed, w["routed_expert_up_proj.weight"]).view(x.shape)
    return y + _feed_forward(x, under(w, "shared_experts."), c, "gate_proj", "up_proj", "down_proj")


def _delta_tensors(c: Any) -> Iterator[tuple[str, Tensor]]:
    of, D = c.linear_attn_config, c.hidden_size
    H, K = of["num_heads"], of["head_dim"]
    for name in "qkv":
        yield f"{name}_proj.weight", torch.zeros(H * K, D)
        yield f"{name}_conv1d.weight", torch.zeros(H * K, 1, of["short_conv_kernel_size"])
    yield "A_log", torch.zeros(H)
    yield "dt_bias", torch.zeros(H * K)
    yield "f_a_proj.weight", torch.zeros(K, D)
    yield "f_b_proj.weight", torch.zeros(H * K, K)
    yield "b_proj.weight", torch.zeros(H, D)
    yield "g_proj.weight", torch.zeros(H * K, D)
    yield "o_norm.weight", torch.ones(K)
    yield "o_proj.weight", torch.zeros(D, H * K)


def _latent_tensors(c: Any) -> Iterator[tuple[str, Tensor]]:
    D, H = c.hidden_size, c.num_attention_heads
    query = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    if c.q_lora_rank is None:
        yield "q_proj.weight", torch.zeros(query, D)
    else:
        yield "q_a_proj.weight", torch.zeros(c.q_lora_rank, D)
        yield "q_a_layernorm.weight", torch.ones(c.q_lora_rank)
        yield "q_b_proj.weight", torch.zeros(query, c.q_lora_rank)
    yield "kv_a_proj_with_mqa.weight", torch.zeros(c.kv_lora_rank + c.qk_rope_head_dim, D)
    yield "kv_a_layernorm.weight", torch.ones(c.kv_lora_rank)
    yield "kv_b_proj.weight", torch.zeros(H * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield "o_proj.weight", torch.zeros(D, H * c.v_head_dim)
    if getattr(c, "mla_use_output_gate", False):
        yield "g_proj.weight", torch.zeros(H * c.v_head_dim, D)


def _map_tensors(
    part: str, width: int, inside: int, gate: str, up: str, down: str
) -> Iterator[tuple[str, Tensor]]:
    yield f"{part}{gate}.weight", torch.zeros(inside, width)
    yield f"{part}{up}.weight", torch.zeros(inside, width)
    yield f"{part}{down}.weight", torch.zeros(width, inside)
