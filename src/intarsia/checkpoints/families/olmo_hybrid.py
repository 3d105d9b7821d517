"""OLMo-Hybrid: Gated DeltaNet with norms before 3 : attention with norms after 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.parts import (
    FULL,
    LINEAR,
    QK_NORMS,
    QKVO,
    SWIGLU,
    convolution,
    gated_delta_written,
    layers_by_interval,
    outside,
    sizes_of,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import (
    Either,
    Row,
    either,
    same,
    under,
    weights,
)
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig
from intarsia.model.config import FeedForwardConfig, ModelConfig

KINDS = {GatedDeltaNetConfig: LINEAR, AttentionConfig: FULL}
GATES = {"output_gate_proj": "g_proj", "beta_proj": "b_proj", "decay_proj": "a_proj", "norm": "o_norm"}
NORMS = {"mixer_norm": "attention_layer_norm", "feed_forward_norm": "feedforward_layer_norm"}
"""Of linear layers, in the release."""
MODULE_NORMS = {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
"""The same in transformers' modules."""
NORMS_AFTER = {"mixer_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"}
"""Of attention layers."""
RENAMED_NORMS_AFTER = {
    "mixer_norm": "feedforward_layer_norm",
    "feed_forward_norm": "post_feedforward_layernorm",
}
"""The same in what transformers saves, which renames them with those of linear layers."""


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    kinds = layers_by_interval(options, 4)
    d_model, heads = options.get("hidden_size", int), options.get("num_attention_heads", int)
    key_heads = options.get("linear_num_key_heads", int, heads)
    K = options.get("linear_key_head_dim", int, int(0.75 * d_model / key_heads))
    gdn = GatedDeltaNetConfig(
        num_heads=key_heads,
        head_dim=K,
        num_v_heads=options.get("linear_num_value_heads", int, heads),
        head_v_dim=options.get("linear_value_head_dim", int, 2 * K),
        conv_size=options.get("linear_conv_kernel_dim", int, 4),
        negative_eigenvalues=options.get("linear_allow_neg_eigval", bool, True),
        norm_eps=1e-5,  # whatever the model's is
    )
    for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"):  # of the first weights
        options.maybe(f"linear_{name}", float)
    # Without a base there are no positions.
    rotation = Rotation(options, theta=None)
    rotation.plain()
    attention = AttentionConfig(
        num_heads=heads,
        head_dim=options.get("head_dim", int, d_model // heads),
        num_kv_heads=options.get("num_key_value_heads", int, heads),
        rope=0.0 if rotation.theta is None else rotation.share,
        rope_theta=rotation.theta or 10000.0,
        qk_norm="channels",
        bias=options.get("attention_bias", bool, False),
    )
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=d_model,
        depth=len(kinds),
        layout=layout_of(kinds, {LINEAR: "gdn", FULL: "attention"}, options),
        mixers={"gdn": gdn, "attention": attention},
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int)),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
        norm_placement={"attention": "after"},
    )


def write(config: ModelConfig) -> dict[str, Any]:
    gdn, attention = only_mixer(config, GatedDeltaNetConfig), only_mixer(config, AttentionConfig)
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta if attention.rotated else None}
    return {
        **sizes_of(config),
        "intermediate_size": config.feed_forward.d_hidden,
        "layer_types": names_of(config, KINDS),
        **gated_delta_written(gdn),
        "linear_allow_neg_eigval": gdn.negative_eigenvalues,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "rope_parameters": rope,
    }


def gated_delta_net(config: GatedDeltaNetConfig) -> Iterator[Row | Either]:
    keys, values = config.num_heads * config.head_dim, config.value_heads * config.value_dim
    yield from weights({**QKVO, **GATES})
    yield from same({"decay.A_log": "A_log", "decay.dt_bias": "dt_bias"})
    yield convolution(keys, keys, values)


def attention(config: AttentionConfig) -> Iterator[Row]:
    yield from weights({**QKVO, **QK_NORMS})
    if config.bias:
        yield from same(QKVO, ".bias")


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours + "feed_forward.", theirs + "mlp.", weights(SWIGLU))
        options = config.mixers[name]
        if isinstance(options, AttentionConfig):
            norms = either(weights(NORMS_AFTER), weights(RENAMED_NORMS_AFTER))
            yield from under(ours + "mixer.", theirs + "self_attn.", attention(options))
        else:
            norms = either(weights(NORMS), weights(MODULE_NORMS))
            delta = gated_delta_net(only_mixer(config, GatedDeltaNetConfig))
            yield from under(ours + "mixer.", theirs + "linear_attn.", delta)
        yield norms.under(ours, theirs)


FAMILY = Family(
    name="olmo_hybrid",
    title="OLMo-Hybrid-7B",
    model_types=("olmo_hybrid",),
    architecture="OlmoHybridForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("gdn", "attention"),
)
