"""The mixers against independent implementations: the classes of transformers with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig, KDAConfig, Mixer, MLAConfig
from intarsia.ops import gated_delta_rule

pytest.importorskip("transformers")

D, T = 48, 150


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
        if "norm" in name:
            parameter.data += 1
        parameter.requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))


def causal_mask() -> Tensor:
    return torch.full((T, T), -torch.inf).triu(1)[None, None]


def load(mixer: Mixer, weights: dict[str, Tensor]) -> Mixer:
    mixer.load_state_dict(weights, strict=True)
    return mixer


def close(got: Tensor, expected: Tensor) -> None:
    # Both work in float32 and round differently: a few roundings of the largest value.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * expected.abs().max().item() * 8)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_the_operator_equals_transformers_kda(form: str) -> None:
    from transformers.models.kimi_linear import modeling_kimi_linear as hf

    f = {"chunk": hf.chunk_kimi_delta_attention, "recurrent": hf.recurrent_kimi_delta_attention}[form]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        nn.functional.normalize(torch.randn(2, T, 3, 16, generator=generator), dim=-1) for _ in range(3)
    )
    g, beta = -torch.rand(2, T, 3, 16, generator=generator), torch.rand(2, T, 3, generator=generator)
    state = torch.randn(2, 3, 16, 16, generator=generator)
    o, final = gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    expected, expected_final = f(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    close(o, expected)
    close(final, expected_final)


def test_kda_equals_transformers_kimi_linear() -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    H, K = 2, 16
    config = KimiLinearConfig(hidden_size=D, linear_num_heads=H, linear_head_dim=K, num_hidden_layers=4)
    theirs = KimiLinearDeltaAttention(config, 0)
    randomise(theirs)
    w = theirs.state_dict()
    ours = load(
        KDAConfig(H, K).build(D, config.rms_norm_eps),
        {
            **{f"{name}_proj.weight": w[f"{name}_proj.weight"] for name in "qkvo"},
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "beta_proj.weight": w["b_proj.weight"],
            "decay_proj.0.weight": w["forget_gate.f_a_proj.weight"],
            "decay_proj.1.weight": w["forget_gate.f_b_proj.weight"],
            "decay.A_log": w["forget_gate.A_log"].flatten(),
            "decay.dt_bias": w["forget_gate.dt_bias"],
            "output_gate_proj.0.weight": w["g_a_proj.weight"],
            "output_gate_proj.1.weight": w["g_b_proj.weight"],
            "norm.weight": w["o_norm.weight"],
        },
    )
    close(ours(inputs())[0], theirs(inputs()))


def test_bounded_decay_equals_transformers_glm5_next() -> None:
    from transformers.models.glm5_next import modeling_glm5_next as hf
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

    from intarsia.layers.gates import DecayGate

    H, K = 2, 16
    config = Glm5NextTextConfig(hidden_size=D, linear_num_heads=H, linear_head_dim=K, linear_lower_bound=-5.0)
    theirs = hf.Glm5NextTextForgetGate(config)
    randomise(theirs)
    projections = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
    x = inputs()
    f = x
    for projection in projections:
        f = projection(f)
    ours = DecayGate(H, K, lower_bound=-5.0)
    ours.load_state_dict({"A_log": theirs.A_log.flatten(), "dt_bias": theirs.dt_bias.flatten()})
    close(ours().log_decay(f.unflatten(-1, (H, K))).flatten(), theirs(x).flatten())


def test_gated_deltanet_equals_transformers_qwen3_next() -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    H, K, HV, V = 2, 16, 4, 12
    config = Qwen3NextConfig(
        hidden_size=D, linear_num_key_heads=H, linear_num_value_heads=HV, linear_key_head_dim=K,
        linear_value_head_dim=V, num_hidden_layers=4,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    randomise(theirs)
    w = theirs.state_dict()
    # Their projection holds, for each key head in turn, its q, k, and the v and z of its value heads.
    group = HV // H
    q, k, v, z = w["in_proj_qkvz.weight"].view(H, -1, D).split([K, K, group * V, group * V], dim=1)
    beta, decay = w["in_proj_ba.weight"].view(H, -1, D).split([group, group], dim=1)
    ours = load(
        GatedDeltaNetConfig(H, K, HV, V).build(D, config.rms_norm_eps),
        {
            **{f"{n}_proj.weight": x.reshape(-1, D) for n, x in zip("qkv", (q, k, v), strict=True)},
            "output_gate_proj.weight": z.reshape(-1, D),
            "beta_proj.weight": beta.reshape(-1, D),
            "decay_proj.weight": decay.reshape(-1, D),
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "decay.A_log": w["A_log"],
            "decay.dt_bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "o_proj.weight": w["out_proj.weight"],
        },
    )
    close(ours(inputs())[0], theirs(inputs()))


def test_gated_deltanet_equals_transformers_qwen3_5() -> None:
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    H, K, HV, V = 2, 16, 6, 12
    config = Qwen3_5TextConfig(
        hidden_size=D, linear_num_key_heads=H, linear_num_value_heads=HV, linear_key_head_dim=K,
        linear_value_head_dim=V, num_hidden_layers=4,
    )  # fmt: skip
    theirs = Qwen3_5GatedDeltaNet(config, 0)
    randomise(theirs)
    w = theirs.state_dict()
    q, k, v = w["in_proj_qkv.weight"].split([H * K, H * K, HV * V])
    ours = load(
        GatedDeltaNetConfig(H, K, HV, V).build(D, config.rms_norm_eps),
        {
            **{f"{n}_proj.weight": x for n, x in zip("qkv", (q, k, v), strict=True)},
            "output_gate_proj.weight": w["in_proj_z.weight"],
            "beta_proj.weight": w["in_proj_b.weight"],
            "decay_proj.weight": w["in_proj_a.weight"],
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "decay.A_log": w["A_log"],
            "decay.dt_bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "o_proj.weight": w["out_proj.weight"],
        },
    )
    close(ours(inputs())[0], theirs(inputs()))


@pytest.mark.parametrize(("K", "V"), [(12, 24), (96, 192)])
def test_gated_deltanet_equals_transformers_olmo_hybrid(K: int, V: int) -> None:
    from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    H = 2
    config = OlmoHybridConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_hidden_layers=4,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
    )
    assert config.linear_allow_neg_eigval
    theirs = OlmoHybridGatedDeltaNet(config, 0)
    randomise(theirs)
    w = theirs.state_dict()
    # The norm's epsilon there is 1e-5 whatever the configuration says.
    ours = load(
        GatedDeltaNetConfig(H, K, head_v_dim=V, negative_eigenvalues=True).build(D, 1e-5),
        {
            **{f"{name}_proj.weight": w[f"{name}_proj.weight"] for name in "qkvo"},
            "output_gate_proj.weight": w["g_proj.weight"],
            "beta_proj.weight": w["b_proj.weight"],
            "decay_proj.weight": w["a_proj.weight"],
            "conv.weight": w["conv1d.weight"].squeeze(1),
            "decay.A_log": w["A_log"],
            "decay.dt_bias": w["dt_bias"],
            "norm.weight": w["o_norm.weight"],
        },
    )
    close(ours(inputs())[0], theirs(inputs()))


def mla_weights(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "q_proj.weight": w["q_proj.weight"],
        "kv_down_proj.weight": w["kv_a_proj_with_mqa.weight"],
        "kv_norm.weight": w["kv_a_layernorm.weight"],
        "kv_up_proj.weight": w["kv_b_proj.weight"],
        "o_proj.weight": w["o_proj.weight"],
    }


SIZES = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
OURS = {"num_heads": 3, "kv_rank": 20, "nope_dim": 12, "rope_dim": 8, "v_dim": 10}


def test_mla_without_positions_equals_transformers_kimi_linear() -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

    config = KimiLinearConfig(
        hidden_size=D, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=4, **SIZES
    )
    config._attn_implementation = "eager"
    theirs = KimiLinearAttention(config, 3)
    randomise(theirs)
    ours = load(MLAConfig(**OURS).build(D), mla_weights(theirs.state_dict()))
    close(ours(inputs())[0], theirs(inputs(), causal_mask())[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_mla_equals_transformers_deepseek_v3(interleaved: bool) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    config = DeepseekV3Config(
        hidden_size=D, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=4, q_lora_rank=None,
        rope_interleave=interleaved, **SIZES,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = hf.DeepseekV3Attention(config, 3)
    randomise(theirs)
    weights = mla_weights(theirs.state_dict())
    if interleaved:
        # Put the even channels before the odd ones: half-split rotation then turns the same pairs.
        order = [*range(0, 8, 2), *range(1, 8, 2)]
        q = weights["q_proj.weight"].view(3, 20, D).clone()
        q[:, 12:] = q[:, 12:][:, order]
        down = weights["kv_down_proj.weight"].clone()
        down[20:] = down[20:][order]
        weights |= {"q_proj.weight": q.view(60, D), "kv_down_proj.weight": down}
    ours = load(MLAConfig(**OURS, rotate=True).build(D), weights)
    x = inputs()
    angles = hf.DeepseekV3RotaryEmbedding(config)(x, torch.arange(T)[None])
    close(ours(x)[0], theirs(x, position_embeddings=angles, attention_mask=causal_mask())[0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_transformers_llama(kv_heads: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as hf

    config = LlamaConfig(hidden_size=D, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=12)
    config._attn_implementation = "eager"
    theirs = hf.LlamaAttention(config, 0)
    randomise(theirs)
    ours = load(AttentionConfig(4, 12, kv_heads).build(D), theirs.state_dict())
    x = inputs()
    angles = hf.LlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
    close(ours(x)[0], theirs(x, position_embeddings=angles, attention_mask=causal_mask())[0])
