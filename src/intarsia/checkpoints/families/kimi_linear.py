"""Kimi Linear: Kimi Delta Attention 3 : latent attention without positions 1, fine-grained experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.deepseek_v3 import (
    latent_attention,
    latent_options,
    latent_written,
    sigmoid_experts,
)
from intarsia.checkpoints.families.parts import (
    FULL,
    LINEAR,
    PRE_NORMS,
    QKVO,
    SWIGLU,
    block_of_experts,
    convolution,
    dense_layers,
    outside,
    sizes_of,
    the_experts,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import (
    Either,
    Row,
    either,
    reshaped,
    row,
    under,
    weights,
)
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig

KINDS = {KDAConfig: LINEAR, MLAConfig: FULL}
GATES = {
    "beta_proj": "b_proj", "output_gate_proj.0": "g_a_proj", "output_gate_proj.1": "g_b_proj", "norm": "o_norm",
}  # fmt: skip


def kinds_of(options: Options, linear: Options) -> list[str]:
    """The layers. The release counts from 1 in two lists; transformers writes `layer_types`."""
    depth = options.get("num_hidden_layers", int)
    kinds: list[str | None] = [None] * depth
    for name, kind in (("full_attn_layers", FULL), ("kda_layers", LINEAR)):
        for number in linear.get(name, list, []):
            if (
                not isinstance(number, int)
                or not 1 <= number <= depth
                or kinds[number - 1] not in (None, kind)
            ):
                raise linear.unsupported(
                    f"{name} has {number!r}: layers are counted from 1 to {depth}, each once"
                )
            kinds[number - 1] = kind
    listed: list[str] = options.get("layer_types", list, [])
    if None not in kinds:
        if listed and listed != kinds:
            raise options.unsupported("layer_types and linear_attn_config say different layers")
        return [kind for kind in kinds if kind is not None]
    if any(kinds):
        raise linear.unsupported(f"layer {kinds.index(None) + 1} is in neither of its lists of layers")
    # transformers' own default, which is not the release's.
    return listed or [FULL if layer and layer % 4 == 0 else LINEAR for layer in range(depth)]


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    options.only("moe_router_activation_func", "sigmoid", part="router of that kind")
    options.only("mla_use_nope", True, part="latent attention with positions in this family")
    options.only("attn_res_block_size", part="residuals that attend to earlier blocks, as Kimi K3 has them,")
    options.only("activation_situ_beta", part="activation SiTU, as Kimi K3 has it,")
    # Of no meaning without positions, and where there is one group.
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "use_grouped_topk"):
        options.maybe(name, object)
    linear = options.within("linear_attn_config")
    kinds = kinds_of(options, linear)
    kda = KDAConfig(
        num_heads=linear.get("num_heads", int, options.get("linear_num_heads", int, 32)),
        head_dim=linear.get("head_dim", int, options.get("linear_head_dim", int, 128)),
        conv_size=linear.get("short_conv_kernel_size", int, options.get("linear_conv_kernel_dim", int, 4)),
    )
    linear.finish()
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=options.get("hidden_size", int),
        depth=len(kinds),
        layout=layout_of(kinds, {LINEAR: "kda", FULL: "mla"}, options),
        mixers={"kda": kda, "mla": latent_options(options, None)},
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 9216)),
        experts=ExpertsConfig(
            num_experts=options.get("num_experts", int, 256, "num_local_experts"),
            d_hidden=options.get("moe_intermediate_size", int, 1024),
            num_active=options.get("num_experts_per_token", int, 8, "num_experts_per_tok"),
            num_shared=options.get("num_shared_experts", int, 1, "n_shared_experts"),
            routed_scaling_factor=options.get("routed_scaling_factor", float, 2.446),
            normalize=options.get("moe_renormalize", bool, True, "norm_topk_prob"),
            num_groups=options.get("num_expert_group", int, 1, "n_group"),
            num_active_groups=options.get("topk_group", int, 1),
        ),
        dense_layers=dense_layers(options, len(kinds), 1),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-5),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    kda, mla, of = only_mixer(config, KDAConfig), only_mixer(config, MLAConfig), the_experts(config)
    kinds = names_of(config, KINDS)
    return {
        **sizes_of(config),
        **latent_written(mla),
        "mla_use_nope": True,
        # Other engines need it, and transformers reads it before its own `layer_types`.
        "linear_attn_config": {
            "kda_layers": [layer for layer, kind in enumerate(kinds, 1) if kind == LINEAR],
            "full_attn_layers": [layer for layer, kind in enumerate(kinds, 1) if kind == FULL],
            "num_heads": kda.num_heads,
            "head_dim": kda.head_dim,
            "short_conv_kernel_size": kda.conv_size,
        },
        "intermediate_size": config.feed_forward.d_hidden,
        "first_k_dense_replace": config.dense_layers,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "num_experts": of.num_experts,
        "num_shared_experts": of.num_shared,
        "moe_intermediate_size": of.d_hidden,
        "num_experts_per_token": of.num_active,
        "routed_scaling_factor": of.routed_scaling_factor,
        "moe_renormalize": of.normalize,
        "use_grouped_topk": True,
        "num_expert_group": of.num_groups,
        "topk_group": of.num_active_groups,
    }


def delta_attention(config: KDAConfig) -> Iterator[Row | Either]:
    """What decides of forgetting stands by itself in the release, and in a module of its own in transformers."""
    H, wide = config.num_heads, config.num_heads * config.head_dim
    yield from weights({**QKVO, **GATES})
    yield convolution(wide, wide, wide)
    forgetting = [
        row("decay_proj.0.weight", "f_a_proj.weight"),
        row("decay_proj.1.weight", "f_b_proj.weight"),
        row("decay.A_log", "A_log", reshaped((H,), (1, 1, H, 1))),
        row("decay.dt_bias", "dt_bias"),
    ]
    yield either(forgetting, [each.under("", "forget_gate.") for each in forgetting])


def mixer(config: ModelConfig, name: str) -> Iterator[Row | Either]:
    """The layer that is called `name` in the configuration."""
    options = config.mixers[name]
    if isinstance(options, MLAConfig):
        yield from latent_attention(options)
    else:
        yield from delta_attention(only_mixer(config, KDAConfig))


def feed_forward(config: ModelConfig, layer: int) -> Iterator[Row | Either]:
    """Dense layers are `mlp` in the release and `block_sparse_moe` in what transformers saves, which renames all; in
    its modules all are `mlp`."""
    if config.has_experts(layer):
        of = the_experts(config)
        yield from block_of_experts(of, sigmoid_experts(of))
        return
    dense = list(weights(SWIGLU))
    yield either([x.under("", "mlp.") for x in dense], [x.under("", "block_sparse_moe.") for x in dense])


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours + "mixer.", theirs + "self_attn.", mixer(config, name))
        yield from under(ours + "feed_forward.", theirs, feed_forward(config, layer))


FAMILY = Family(
    name="kimi_linear",
    title="Kimi-Linear-48B-A3B",
    model_types=("kimi_linear",),
    architecture="KimiLinearForCausalLM",
    read=read,
    write=write,
    rows=rows,
)
