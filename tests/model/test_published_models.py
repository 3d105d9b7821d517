"""Whole small models of the published presets against transformers' with the same weights, logit for logit.

The widths are small and the weights large, so that epsilons, scales and rotations matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.model import LanguageModel, ModelConfig, presets
from support.published import shrunk, theirs

pytest.importorskip("transformers")

D, H, K, V, E, F, DEPTH, VOCABULARY = 32, 4, 8, 12, 4, 16, 8, 50
Weights = Iterator[tuple[str, Tensor]]

OURS = {
    "vocab_size": VOCABULARY, "d_model": D, "num_heads": H, "num_kv_heads": 2, "head_dim": K, "d_hidden": F,
    "num_experts": E, "num_active": 2, "window": 20,
    "kv_rank": 10, "nope_dim": K, "rope_dim": 4, "v_dim": V,
}  # fmt: skip
THEIRS = {
    "vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": DEPTH,
    "num_attention_heads": H, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": H, "kv_lora_rank": 10, "qk_nope_head_dim": K, "qk_rope_head_dim": 4, "v_head_dim": V,
    "moe_intermediate_size": F, "num_experts_per_tok": 2,
}  # fmt: skip


def small(name: str, **changes: int) -> dict[str, Any]:
    """The preset's options, narrow, with its first layers alone."""
    config = presets.get(name)
    values = shrunk(config.to_dict(), {**OURS, **changes})
    return {**values, "depth": DEPTH, "layout": " ".join(config.layers[:DEPTH])}


def same(w: Mapping[str, Tensor], ours: str, there: str, names: Mapping[str, str]) -> Weights:
    for name, his in names.items():
        yield ours + name, w[there + his]


def matrices(**names: str) -> dict[str, str]:
    """Names of matrices, `q_proj="q_proj"` for `q_proj.weight`."""
    return {f"{name}.weight": f"{his}.weight" for name, his in names.items()}


QKVO = matrices(**{f"{n}_proj": f"{n}_proj" for n in "qkvo"})
SWIGLU = matrices(gate="gate_proj", up="up_proj", down="down_proj")
MLA = matrices(
    q_proj="q_proj",
    kv_down_proj="kv_a_proj_with_mqa",
    kv_norm="kv_a_layernorm",
    kv_up_proj="kv_b_proj",
    o_proj="o_proj",
)
EXPERTS = {"gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}


def sigmoid_experts(w: Mapping[str, Tensor], ours: str, there: str) -> Weights:
    """Of Kimi Linear and DeepSeek-V3; a dense feed-forward in the first layer."""
    if there + "gate_proj.weight" in w:
        yield from same(w, ours, there, SWIGLU)
        return
    yield from same(w, ours, there, {**EXPERTS, "router.weight": "gate.weight"})
    yield ours + "router.bias", w[there + "gate.e_score_correction_bias"]
    yield from same(w, ours + "shared.", there + "shared_experts.", SWIGLU)


def kimi_linear() -> tuple[dict[str, Any], Any, Callable[..., Weights]]:
    layers = ["linear_attention"] * 3 + ["full_attention"]
    config = theirs(
        "kimi-linear", **THEIRS, **LATENT, linear_attn_config={}, layer_types=layers * 2, linear_num_heads=H,
        linear_head_dim=K, num_local_experts=E,
    )  # fmt: skip

    def layer(w: Mapping[str, Tensor], kind: str, ours: str, there: str) -> Weights:
        yield from norms(w, ours, there, "input_layernorm", "post_attention_layernorm")
        yield from sigmoid_experts(w, ours + "feed_forward.", there + "mlp.")
        ours, there = ours + "mixer.", there + "self_attn."
        if kind == "mla":
            yield from same(w, ours, there, MLA)
            return
        names = matrices(
            beta_proj="b_proj", norm="o_norm",
            **{"decay_proj.0": "forget_gate.f_a_proj", "decay_proj.1": "forget_gate.f_b_proj"},
            **{"output_gate_proj.0": "g_a_proj", "output_gate_proj.1": "g_b_proj"},
        )  # fmt: skip
        yield from same(w, ours, there, {**QKVO, **names, "decay.dt_bias": "forget_gate.dt_bias"})
        yield ours + "decay.A_log", w[there + "forget_gate.A_log"].flatten()
        yield ours + "conv.weight", w[there + "conv1d.weight"].squeeze(1)

    return small("kimi-linear"), config, layer


def moonlight() -> tuple[dict[str, Any], Any, Callable[..., Weights]]:
    # Rotated in halves, as ours; the interleaved order is a permutation of weights.
    config = theirs("moonlight", **THEIRS, **LATENT, n_routed_experts=E, rope_interleave=False)

    def layer(w: Mapping[str, Tensor], kind: str, ours: str, there: str) -> Weights:
        yield from norms(w, ours, there, "input_layernorm", "post_attention_layernorm")
        yield from sigmoid_experts(w, ours + "feed_forward.", there + "mlp.")
        yield from same(w, ours + "mixer.", there + "self_attn.", MLA)

    return small("moonlight"), config, layer


def qwen3_next() -> tuple[dict[str, Any], Any, Callable[..., Weights]]:
    HV, group = 2 * H, 2
    config = theirs(
        "qwen3-next", **THEIRS, num_key_value_heads=2, head_dim=K, linear_num_key_heads=H, linear_num_value_heads=HV,
        linear_key_head_dim=K, linear_value_head_dim=K, moe_intermediate_size=F, shared_expert_intermediate_size=F,
        num_experts=E, num_experts_per_tok=2,
    )  # fmt: skip

    def layer(w: Mapping[str, Tensor], kind: str, ours: str, there: str) -> Weights:
        yield from norms(w, ours, there, "input_layernorm", "post_attention_layernorm")
        mlp, block = there + "mlp.", ours + "feed_forward."
        names = {
            **EXPERTS,
            "router.weight": "gate.weight",
            "shared_gate.weight": "shared_expert_gate.weight",
        }
        yield from same(w, block, mlp, names)
        yield from same(w, block + "shared.", mlp + "shared_expert.", SWIGLU)
        yield block + "router.bias", torch.zeros(E)
        ours += "mixer."
        if kind == "attention":
            there += "self_attn."
            # Each head's gate lies behind its query.
            q, gate = w[there + "q_proj.weight"].view(H, 2, K, D).unbind(1)
            yield ours + "q_proj.weight", q.reshape(-1, D)
            yield ours + "output_gate_proj.weight", gate.reshape(-1, D)
            kvo = matrices(
                k_proj="k_proj", v_proj="v_proj", o_proj="o_proj", q_norm="q_norm", k_norm="k_norm"
            )
            yield from same(w, ours, there, kvo)
            return
        there += "linear_attn."
        # For each key head in turn its q, k, and the v and z of its value heads.
        wide = w[there + "in_proj_qkvz.weight"].view(H, -1, D).split([K, K, group * K, group * K], dim=1)
        for name, x in zip(("q", "k", "v", "output_gate"), wide, strict=True):
            yield f"{ours}{name}_proj.weight", x.reshape(-1, D)
        beta, decay = w[there + "in_proj_ba.weight"].view(H, -1, D).split([group, group], dim=1)
        yield ours + "beta_proj.weight", beta.reshape(-1, D)
        yield ours + "decay_proj.weight", decay.reshape(-1, D)
        yield ours + "conv.weight", w[there + "conv1d.weight"].squeeze(1)
        yield from same(w, ours + "decay.", there, {"A_log": "A_log", "dt_bias": "dt_bias"})
        yield from same(w, ours, there, matrices(norm="norm", o_proj="out_proj"))

    return small("qwen3-next", num_v_heads=HV), config, layer


def gpt_oss() -> tuple[dict[str, Any], Any, Callable[..., Weights]]:
    config = theirs(
        "gpt-oss", **THEIRS, num_key_value_heads=2, head_dim=K, num_local_experts=E, num_experts_per_tok=2,
        sliding_window=20,
    )  # fmt: skip

    def halves(x: Tensor) -> Tensor:
        """Gate and up alternate in their last dimension; ours has the gate's first."""
        return torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)

    def layer(w: Mapping[str, Tensor], kind: str, ours: str, there: str) -> Weights:
        yield from norms(w, ours, there, "input_layernorm", "post_attention_layernorm")
        biases = {name.replace("weight", "bias"): his.replace("weight", "bias") for name, his in QKVO.items()}
        yield from same(w, ours + "mixer.", there + "self_attn.", {**QKVO, **biases, "sinks": "sinks"})
        ours, there = ours + "feed_forward.", there + "mlp."
        yield from same(
            w, ours, there, {"router.weight": "router.weight", "router.logit_bias": "router.bias"}
        )
        yield ours + "router.bias", torch.zeros(E)
        yield ours + "gate_up", halves(w[there + "experts.gate_up_proj"]).mT.contiguous()
        yield ours + "gate_up_bias", halves(w[there + "experts.gate_up_proj_bias"])
        yield ours + "down", w[there + "experts.down_proj"].mT.contiguous()
        yield ours + "down_bias", w[there + "experts.down_proj_bias"]

    return small("gpt-oss"), config, layer


def olmo_hybrid() -> tuple[dict[str, Any], Any, Callable[..., Weights]]:
    config = theirs(
        "olmo-hybrid", **THEIRS, num_key_value_heads=H, linear_key_head_dim=K, linear_value_head_dim=V
    )

    def layer(w: Mapping[str, Tensor], kind: str, ours: str, there: str) -> Weights:
        yield from same(w, ours + "feed_forward.", there + "mlp.", SWIGLU)
        if kind == "attention":
            yield from norms(w, ours, there, "post_attention_layernorm", "post_feedforward_layernorm")
            qk = matrices(q_norm="q_norm", k_norm="k_norm")
            yield from same(w, ours + "mixer.", there + "self_attn.", {**QKVO, **qk})
            return
        yield from norms(w, ours, there, "input_layernorm", "post_attention_layernorm")
        ours, there = ours + "mixer.", there + "linear_attn."
        names = matrices(output_gate_proj="g_proj", beta_proj="b_proj", decay_proj="a_proj", norm="o_norm")
        yield from same(w, ours, there, {**QKVO, **names})
        yield ours + "conv.weight", w[there + "conv1d.weight"].squeeze(1)
        yield from same(w, ours + "decay.", there, {"A_log": "A_log", "dt_bias": "dt_bias"})

    return small("olmo-hybrid", head_v_dim=V), config, layer


def minimax_01() -> tuple[dict[str, Any], Any, Callable[..., Weights]]:
    layers = ["linear_attention"] * 7 + ["full_attention"]
    config = theirs(
        "minimax-01",
        **{**THEIRS, "layer_types": layers},
        num_key_value_heads=2,
        head_dim=K,
        num_local_experts=E,
    )
    values = small("minimax-01")
    values["mixers"]["attention"]["rope"] = 1.0  # as transformers rotates

    def layer(w: Mapping[str, Tensor], kind: str, ours: str, there: str) -> Weights:
        yield from norms(w, ours, there, "input_layernorm", "post_attention_layernorm")
        yield from same(
            w, ours + "feed_forward.", there + "mlp.", {**EXPERTS, "router.weight": "gate.weight"}
        )
        yield ours + "feed_forward.router.bias", torch.zeros(E)
        ours, there = ours + "mixer.", there + "self_attn."
        if kind == "attention":
            yield from same(w, ours, there, QKVO)
            return
        # Their projection holds q, k and v of each head in turn.
        for name, x in zip("qkv", w[there + "qkv_proj.weight"].view(H, 3, K, D).unbind(1), strict=True):
            yield f"{ours}{name}_proj.weight", x.reshape(-1, D)
        names = matrices(o_proj="out_proj", output_gate_proj="output_gate", norm="norm")
        yield from same(w, ours, there, names)

    return values, config, layer


def norms(w: Mapping[str, Tensor], ours: str, there: str, mixer: str, feed_forward: str) -> Weights:
    yield from same(w, ours, there, matrices(mixer_norm=mixer, feed_forward_norm=feed_forward))


@pytest.mark.parametrize("make", [kimi_linear, moonlight, qwen3_next, gpt_oss, olmo_hybrid, minimax_01])
def test_computes_what_theirs_does(make: Callable[[], tuple[dict[str, Any], Any, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    values, config, layer = make()
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
        parameter.data += 1 if "norm" in name and not values["zero_centered_norms"] else 0
    w = model.state_dict()
    ours = LanguageModel(ModelConfig.from_dict(values))
    outside = matrices(embed="model.embed_tokens", norm="model.norm", head="lm_head")
    weights = dict(same(w, "", "", outside))
    for i, kind in enumerate(ours.config.layers):
        weights |= dict(layer(w, kind, f"blocks.{i}.", f"model.layers.{i}."))
    ours.load_state_dict(weights, strict=True)
    tokens = torch.randint(VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = model(tokens).logits, ours(tokens).logits
    # Eight layers in float32, rounded differently; 1e-6 for 1e-5 in one norm of each layer is 2e-3 and more away.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
