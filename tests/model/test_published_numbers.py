"""Every number of the published presets against transformers' classes: options, epsilons, initial values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.mixers import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KDAConfig,
    LightningConfig,
    MLAConfig,
    SlidingWindowConfig,
)
from intarsia.mixers.dsa import DSAConfig
from intarsia.model import LanguageModel, ModelConfig, presets
from intarsia.model.feed_forward import CLAMP
from support.published import shrunk, theirs

pytest.importorskip("transformers")

NAMES = (
    "kimi-linear", "moonlight", "deepseek-v3.2", "minimax-01", "qwen3-next", "gpt-oss", "gpt-oss-20b", "olmo-hybrid",
)  # fmt: skip
every_preset = pytest.mark.parametrize("name", NAMES)
KINDS = {"kda": "linear", "gdn": "linear", "lightning": "linear", "window": "sliding", "dsa": "indexed"}

DIFFERENT = {
    # transformers 5.23 ignores MiniMax's rotary_dim 64, half of a head; the released code rotates as ours does.
    ("minimax-01", "attention.rope"): (0.5, 1.0),
}
"""What is not equal and why: our value and theirs."""


def rope(config: Any) -> tuple[float, float]:
    """The share of rotated channels and the base of the rotation."""
    values = config.rope_parameters
    return values.get("partial_rotary_factor", 1.0), values["rope_theta"]


def options(c: ModelConfig, t: Any) -> dict[str, tuple[Any, Any]]:
    """Each option of a preset by name: ours, and what their configuration says."""
    pairs: dict[str, tuple[Any, Any]] = {
        "vocab_size": (c.vocab_size, t.vocab_size),
        "d_model": (c.d_model, t.hidden_size),
        "depth": (c.depth, t.num_hidden_layers),
        "norm_eps": (c.norm_eps, t.rms_norm_eps),
        "tie_embeddings": (c.tie_embeddings, t.tie_word_embeddings),
        "init_std": (c.init_std, t.initializer_range),
    }
    if t.model_type != "deepseek_v3":
        kinds = [KINDS.get(name, "full") for name in c.layers]
        pairs["layers"] = (kinds, [layer.partition("_")[0] for layer in t.layer_types])
    for name, mixer in c.mixers.items():
        for key, value in of_mixer(mixer, t).items():
            pairs[f"{name}.{key}"] = value
    return pairs | of_feed_forward(c, t)


def of_mixer(m: Any, t: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(m, KDAConfig):
        return {
            "num_heads": (m.num_heads, t.linear_num_heads),
            "value_heads": (m.value_heads, t.linear_num_heads),
            "head_dim": (m.head_dim, t.linear_head_dim),
            "value_dim": (m.value_dim, t.linear_head_dim),
            "conv_size": (m.conv_size, t.linear_conv_kernel_dim),
            # flash-linear-attention's layer has one, the released weights do not.
            "output_gate_bias": (m.output_gate_bias, False),
        }
    if isinstance(m, GatedDeltaNetConfig):
        return {
            "num_heads": (m.num_heads, t.linear_num_key_heads),
            "value_heads": (m.value_heads, t.linear_num_value_heads),
            "head_dim": (m.head_dim, t.linear_key_head_dim),
            "value_dim": (m.value_dim, t.linear_value_head_dim),
            "conv_size": (m.conv_size, t.linear_conv_kernel_dim),
            "negative_eigenvalues": (m.negative_eigenvalues, getattr(t, "linear_allow_neg_eigval", False)),
        }
    if isinstance(m, LightningConfig):
        return {
            "num_heads": (m.num_heads, t.num_attention_heads),
            "head_dim": (m.head_dim, t.head_dim),
            "value_dim": (m.value_dim, t.head_dim),
        }
    if isinstance(m, MLAConfig):
        pairs = {
            "num_heads": (m.num_heads, t.num_attention_heads),
            "kv_rank": (m.kv_rank, t.kv_lora_rank),
            "q_rank": (m.q_rank, t.q_lora_rank),
            "nope_dim": (m.nope_dim, t.qk_nope_head_dim),
            "rope_dim": (m.rope_dim, t.qk_rope_head_dim),
            "v_dim": (m.v_dim, t.v_head_dim),
            "rotate": (m.rotate, t.model_type != "kimi_linear"),
        }
        if m.rotate:
            pairs["rope_theta"] = (m.rope_theta, rope(t)[1])
        if isinstance(m, DSAConfig):
            pairs["top_k"] = (m.top_k, t.index_topk)
            pairs["index_heads"] = (m.index_heads, t.index_n_heads)
            pairs["index_dim"] = (m.index_dim, t.index_head_dim)
        return pairs
    assert isinstance(m, AttentionConfig)
    head_dim = getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads
    pairs = {
        "num_heads": (m.num_heads, t.num_attention_heads),
        "kv_heads": (m.kv_heads, t.num_key_value_heads),
        "head_dim": (m.head_dim, head_dim),
        "rope": (m.rope, rope(t)[0]),
        "rope_theta": (m.rope_theta, rope(t)[1]),
        "bias": (m.bias, getattr(t, "attention_bias", False)),
        "yarn": (m.yarn is not None, t.rope_parameters["rope_type"] == "yarn"),
    }
    if m.yarn is not None:
        p = t.rope_parameters
        pairs["yarn"] = (
            (m.yarn.factor, m.yarn.fast, m.yarn.slow, m.yarn.truncate, m.yarn.original_length),
            (
                p["factor"],
                p["beta_fast"],
                p["beta_slow"],
                p["truncate"],
                p["original_max_position_embeddings"],
            ),
        )
    if isinstance(m, SlidingWindowConfig):
        pairs["window"] = (m.window, t.sliding_window)
    return pairs


def of_feed_forward(c: ModelConfig, t: Any) -> dict[str, tuple[Any, Any]]:
    e = c.experts
    if e is None:
        return {"d_hidden": (c.feed_forward.d_hidden, t.intermediate_size)}
    dense = 1 if t.model_type == "kimi_linear" else getattr(t, "first_k_dense_replace", 0)
    shared = getattr(t, "shared_expert_intermediate_size", 0) // e.d_hidden
    pairs = {
        "num_experts": (
            e.num_experts,
            t.num_local_experts if hasattr(t, "num_local_experts") else t.num_experts,
        ),
        "expert width": (e.d_hidden, getattr(t, "moe_intermediate_size", t.intermediate_size)),
        "num_active": (e.num_active, t.num_experts_per_tok),
        "num_shared": (e.num_shared, getattr(t, "n_shared_experts", shared)),
        "normalize": (e.normalize, getattr(t, "norm_topk_prob", True)),
        "routed_scaling_factor": (e.routed_scaling_factor, getattr(t, "routed_scaling_factor", 1.0)),
        "dense_layers": (c.dense_layers, dense),
        "groups": (
            (e.num_groups, e.num_active_groups),
            (getattr(t, "n_group", 1), getattr(t, "topk_group", 1)),
        ),
    }
    if dense:
        pairs["d_hidden"] = (c.feed_forward.d_hidden, t.intermediate_size)
    if t.model_type == "gpt_oss":
        pairs["clamp"] = ((CLAMP, e.sharpness), (t.swiglu_limit, t.swiglu_alpha))
    if t.model_type == "minimax":
        for key in ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"):
            pairs[key] = (c.residual_scale, getattr(t, key))
        for key in ("full_attn_beta_factor", "linear_attn_beta_factor", "mlp_beta_factor"):
            pairs[key] = (1, getattr(t, key))
    return pairs


@every_preset
def test_every_option(name: str) -> None:
    for key, (ours, published) in options(presets.get(name), theirs(name)).items():
        assert (ours, published) == DIFFERENT.get((name, key), (ours, ours)), key


def depth_of(name: str, depth: int) -> tuple[ModelConfig, Any]:
    """Both configurations with the first `depth` layers alone."""
    config, published = presets.get(name), theirs(name)
    changes = {} if name == "moonlight" else {"layer_types": published.layer_types[:depth]}
    if name == "kimi-linear":
        changes["linear_attn_config"] = {}
    return config.replace(depth=depth, layout=" ".join(config.layers[:depth])), theirs(
        name, num_hidden_layers=depth, **changes
    )


def epsilons(model: nn.Module, layer_prefix: str) -> dict[str, list[tuple[int, float]]]:
    """The width and epsilon of each norm, a layer at a time and for what stands behind the layers."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, module in model.named_modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(eps, float) and getattr(module, "weight", None) is not None:
            layer = name.removeprefix(layer_prefix).partition(".")[0] if name.startswith(layer_prefix) else ""
            found.setdefault(layer, []).append((module.weight.numel(), eps))
    return {layer: sorted(values) for layer, values in found.items()}


@every_preset
def test_every_epsilon(name: str) -> None:
    """OLMo-Hybrid's Gated DeltaNet has 1e-5 in a model of 1e-6, MiniMax-01's Lightning 1e-6 in one of 1e-5."""
    from transformers import AutoModelForCausalLM

    config, published = depth_of(name, 8)
    with torch.device("meta"):
        ours = epsilons(LanguageModel(config), "blocks.")
        expected = epsilons(AutoModelForCausalLM.from_config(published), "model.layers.")
    assert ours == expected
    assert len(ours) == 9


@pytest.mark.parametrize("size", presets.SIZES)
@pytest.mark.parametrize("family", ["qwen3-next", "olmo-hybrid", "minimax-01", "gpt-oss", "kimi-linear"])
def test_the_small_sizes_have_the_epsilons_of_the_published_shape(family: str, size: str) -> None:
    if f"{family}-{size}" not in presets.PRESETS:
        pytest.skip("the family has no such size")
    small, published = presets.get(f"{family}-{size}"), presets.get(family)
    assert small.norm_eps == published.norm_eps
    for name, mixer in small.mixers.items():
        for option in ("norm_eps", "latent_norm_eps"):
            assert getattr(mixer, option, None) == getattr(published.mixers[name], option, None)


def test_a_mixers_own_epsilon_is_an_option() -> None:
    config = GatedDeltaNetConfig(2, 8, norm_eps=1e-3)
    assert config.build(16).norm.eps == config.build(16, norm_eps=1e-6).norm.eps == 1e-3
    assert GatedDeltaNetConfig(2, 8).build(16, norm_eps=1e-6).norm.eps == 1e-6


# ---- Initial values. Matrices are normal with 0.02 in both; what is special, and what differs:

INITIAL: dict[str, list[tuple[str, str, Callable[[Tensor], bool], Callable[[Tensor], bool]]]] = {}
"""By preset: our parameter, theirs, and what each begins with."""


def spans(
    low: float, high: float, of: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> Callable[[Tensor], bool]:
    """All between the two, and at least half of the way from one to the other."""

    def check(values: Tensor) -> bool:
        x, slack = of(values.float()), 1e-3 * (high - low)
        inside = (x >= low - slack).all() and (x <= high + slack).all()
        return bool(inside and x.max() - x.min() >= (high - low) / 2)

    return check


def equals(number: float) -> Callable[[Tensor], bool]:
    return lambda values: bool((values == number).all())


def normal(std: float) -> Callable[[Tensor], bool]:
    """Of that standard deviation, as closely as so many numbers show it (four times their own deviation)."""

    def check(values: Tensor) -> bool:
        x, slack = values.float(), 4 / values.numel() ** 0.5
        return bool((x.std() / std - 1).abs() < slack and (x.mean() / std).abs() < slack)

    return check


MAMBA = (spans(1, 16, torch.exp), spans(1e-3, 0.1, F.softplus))
INITIAL["kimi-linear"] = [
    ("blocks.0.mixer.decay.A_log", "model.layers.0.self_attn.forget_gate.A_log", MAMBA[0], MAMBA[0]),
    ("blocks.0.mixer.decay.dt_bias", "model.layers.0.self_attn.forget_gate.dt_bias", MAMBA[1], MAMBA[1]),
    ("blocks.0.mixer.norm.weight", "model.layers.0.self_attn.o_norm.weight", equals(1), equals(1)),
    # Ours as PyTorch begins convolutions, and flash-linear-attention with it.
    ("blocks.0.mixer.conv.weight", "model.layers.0.self_attn.conv1d.weight", spans(-0.5, 0.5), normal(0.02)),
    ("blocks.3.mixer.kv_norm.weight", "model.layers.3.self_attn.kv_a_layernorm.weight", equals(1), equals(1)),
    ("blocks.1.feed_forward.router.weight", "model.layers.1.mlp.gate.weight", normal(0.02), normal(0.02)),
    ("embed.weight", "model.embed_tokens.weight", normal(0.02), normal(0.02)),
    ("blocks.0.mixer.q_proj.weight", "model.layers.0.self_attn.q_proj.weight", normal(0.02), normal(0.02)),
    # Ours are smaller by the root of twice the depth where they write to the residual stream.
    (
        "blocks.0.mixer.o_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        normal(0.02 / 4),
        normal(0.02),
    ),
]
INITIAL["qwen3-next"] = [
    # transformers' choice for these two is not that of the layer's authors.
    ("blocks.0.mixer.decay.A_log", "model.layers.0.linear_attn.A_log", MAMBA[0], spans(0.01, 16, torch.exp)),
    ("blocks.0.mixer.decay.dt_bias", "model.layers.0.linear_attn.dt_bias", MAMBA[1], equals(1)),
    ("blocks.0.mixer.norm.weight", "model.layers.0.linear_attn.norm.weight", equals(1), equals(1)),
    ("blocks.0.mixer_norm.weight", "model.layers.0.input_layernorm.weight", equals(0), equals(0)),
    ("blocks.3.mixer.q_norm.weight", "model.layers.3.self_attn.q_norm.weight", equals(0), equals(0)),
    ("norm.weight", "model.norm.weight", equals(0), equals(0)),
]
INITIAL["olmo-hybrid"] = [
    ("blocks.0.mixer.decay.A_log", "model.layers.0.linear_attn.A_log", MAMBA[0], spans(0, 16, torch.exp)),
    ("blocks.0.mixer.decay.dt_bias", "model.layers.0.linear_attn.dt_bias", MAMBA[1], MAMBA[1]),
    ("blocks.3.mixer.q_norm.weight", "model.layers.3.self_attn.q_norm.weight", equals(1), equals(1)),
]
INITIAL["gpt-oss"] = [
    ("blocks.0.mixer.sinks", "model.layers.0.self_attn.sinks", normal(0.02), normal(0.02)),
    ("blocks.0.mixer.q_proj.bias", "model.layers.0.self_attn.q_proj.bias", equals(0), equals(0)),
    ("blocks.0.feed_forward.gate_up", "model.layers.0.mlp.experts.gate_up_proj", normal(0.02), normal(0.02)),
    (
        "blocks.0.feed_forward.gate_up_bias",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        equals(0),
        equals(0),
    ),
    # The router's bias: ours begins without a preference.
    ("blocks.0.feed_forward.router.logit_bias", "model.layers.0.mlp.router.bias", equals(0), normal(0.02)),
]
INITIAL["minimax-01"] = [
    ("blocks.0.mixer.norm.weight", "model.layers.0.self_attn.norm.weight", equals(1), equals(1)),
    ("blocks.0.feed_forward.gate_up", "model.layers.0.mlp.experts.gate_up_proj", normal(0.02), normal(0.02)),
    ("blocks.0.feed_forward.router.weight", "model.layers.0.mlp.gate.weight", normal(0.02), normal(0.02)),
]


@pytest.mark.parametrize("name", INITIAL)
def test_initial_values(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config, published = depth_of(name, 8)
    narrow = {
        "d_model": 64,
        "vocab_size": 100,
        "d_hidden": 32,
        "num_experts": 16,
        "num_active": 2,
        "head_dim": 16,
    }
    ours = LanguageModel(ModelConfig.from_dict(shrunk(config.to_dict(), narrow)))
    ours.init_weights(0)
    changes = {
        "hidden_size": 64, "vocab_size": 100, "intermediate_size": 32, "moe_intermediate_size": 32, "pad_token_id": 0,
        "shared_expert_intermediate_size": 32, "num_experts": 16, "num_local_experts": 16, "head_dim": 16,
        "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1, "linear_head_dim": 16,
    }  # fmt: skip
    for key, value in changes.items():
        if hasattr(published, key):
            setattr(published, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(published)
    for mine, his, begins, begins_there in INITIAL[name]:
        assert begins(ours.get_parameter(mine).detach()), mine
        assert begins_there(model.get_parameter(his).detach()), his


def test_no_option_of_these_mixers_is_forgotten() -> None:
    """An option that is added must come into the table, or be one that the layers' own oracles decide."""
    known = {
        KDAConfig: {
            "gate",
            "gate_lower_bound",
            "output_gate",
            "decay_rank",
            "output_gate_rank",
            "output_gate_bias",
            "negative_eigenvalues",
        },
        GatedDeltaNetConfig: {"output_gate"},
        LightningConfig: {"decay_factor", "decay_from", "silu", "qk_norm", "scale", "norm_groups"},
        MLAConfig: {"latent_norm_eps", "yarn_logits", "head_gate", "output_gate"},
        AttentionConfig: {"qk_norm", "zero_centered_qk_norm", "output_gate", "sinks", "scale"},
    }
    compared = {
        "num_heads", "head_dim", "head_v_dim", "num_v_heads", "num_kv_heads", "conv_size", "norm_eps",
        "negative_eigenvalues", "kv_rank", "q_rank", "nope_dim", "rope_dim", "v_dim", "rotate", "rope",
        "rope_theta", "bias", "yarn",
    }  # fmt: skip
    for config, elsewhere in known.items():
        assert {field.name for field in dataclasses.fields(config)} <= compared | elsewhere, config
