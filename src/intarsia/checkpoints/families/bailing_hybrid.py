"""Ling 3.0: Kimi Delta Attention with a bounded decay 5 : latent attention with positions and gated heads 1. Ling and
Ring 2.5 of the same `model_type` have Lightning Attention for it (`ling_lightning.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from intarsia.checkpoints.families import ling_lightning
from intarsia.checkpoints.families.deepseek_v3 import (
    experts_written,
    latent_attention,
    latent_options,
    latent_written,
    rotated_written,
    sigmoid_experts,
)
from intarsia.checkpoints.families.parts import (
    FULL,
    LINEAR,
    PRE_NORMS,
    QKVO,
    SWIGLU,
    convolution,
    dense_layers,
    experts,
    listed_layers,
    outside,
    sizes_of,
    the_experts,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import (
    Either,
    Row,
    either,
    row,
    same,
    under,
    weights,
)
from intarsia.mixers import KDAConfig, LightningConfig, MixerConfig, MLAConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig

KINDS = {KDAConfig: LINEAR, MLAConfig: FULL}
GATES = {"beta_proj": "b_proj", "output_gate_proj": "g_proj", "norm": "o_norm"}

OUTPUTS = ("attention.dense", "attention.o_proj", "self_attn.o_proj")


def kinds_of(options: Options) -> list[str]:
    """`layer_types`; where they are not listed, the last layer of each group is full attention."""
    depth = options.get("num_hidden_layers", int, 42)
    group = options.get("layer_group_size", int, 6)
    return listed_layers(options, depth, [LINEAR if (layer + 1) % group else FULL for layer in range(depth)])


def expert_options(options: Options) -> ExpertsConfig:
    options.only("score_function", "sigmoid", part="router of that kind in this family")
    options.only(
        "moe_router_enable_expert_bias", True, part="router without a correcting bias in this family"
    )
    options.maybe("router_dtype", str)
    hidden = options.get("moe_intermediate_size", int, 768)
    shared = options.get("num_shared_experts", int, 1, "n_shared_experts")
    together = options.get("moe_shared_expert_intermediate_size", int, hidden) * shared
    return ExpertsConfig(
        num_experts=options.get("num_experts", int, 512, "num_local_experts"),
        d_hidden=hidden,
        num_active=options.get("num_experts_per_tok", int, 8, "num_experts_per_token"),
        num_shared=shared,
        d_shared=None if together == hidden * shared else together,
        routed_scaling_factor=options.get("routed_scaling_factor", float, 2.5),
        normalize=options.get("norm_topk_prob", bool, True, "moe_renormalize"),
        num_groups=options.get("n_group", int, 8, "num_expert_group"),
        num_active_groups=options.get("topk_group", int, 4),
    )


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "silu", part="activation of that name")
    for name in ("use_bias", "use_qkv_bias"):
        options.only(name, False, part="layers with biases in this family")
    for name in ("embedding_dropout", "output_dropout", "mtp_loss_scaling_factor", "num_mtp_layers"):
        options.maybe(name, float)  # of training
    if options.has("group_norm_size"):
        depth = options.get("num_hidden_layers", int, 20)
        return _model(options, depth, *ling_lightning.read_mixers(options, depth), dense=1)
    options.presume(rope_theta=6_000_000.0, num_attention_heads=32)
    kinds = kinds_of(options)
    heads = options.get("num_attention_heads", int)
    # transformers writes the rotated channels of latent attention as head_dim, and this beside it.
    head_dim = options.get("linear_head_dim", int, options.get("head_dim", int, 128))
    kda = KDAConfig(
        num_heads=options.get("linear_num_heads", int, heads),
        head_dim=head_dim,
        conv_size=options.get("short_conv_kernel_size", int, 4, "linear_conv_kernel_dim"),
        gate="bounded" if options.get("kda_safe_gate", bool, True) else "softplus",
        gate_lower_bound=options.get("kda_lower_bound", float, -5.0),
        decay_rank=None,
        output_gate_rank=None,
    )
    layout = layout_of(kinds, {LINEAR: "kda", FULL: "mla"}, options)
    mla = latent_options(options, None, Rotation(options), head_gate=True)
    return _model(options, len(kinds), layout, {"kda": kda, "mla": mla}, dense=2)


def _model(
    options: Options, depth: int, layout: str, mixers: Mapping[str, MixerConfig], dense: int
) -> ModelConfig:
    """A model of these mixers, with `dense` layers without experts where the file says nothing."""
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=options.get("hidden_size", int),
        depth=depth,
        layout=layout,
        mixers=mixers,
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 6144)),
        experts=expert_options(options),
        dense_layers=dense_layers(options, depth, dense),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("rms_norm_eps", float, 1e-6),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    if any(isinstance(config.mixers[name], LightningConfig) for name in config.layers):
        return ling_lightning.write(config)
    kda, mla, of = only_mixer(config, KDAConfig), only_mixer(config, MLAConfig), the_experts(config)
    return {
        **sizes_of(config),
        **latent_written(mla),
        "rope_parameters": rotated_written(mla),
        "layer_types": names_of(config, KINDS),
        # In the release's words; transformers reads both and keeps the second.
        "head_dim": kda.head_dim,
        "linear_head_dim": kda.head_dim,
        "linear_num_heads": kda.num_heads,
        "short_conv_kernel_size": kda.conv_size,
        "linear_conv_kernel_dim": kda.conv_size,
        "kda_safe_gate": kda.gate == "bounded",
        "kda_lower_bound": kda.gate_lower_bound,
        "intermediate_size": config.feed_forward.d_hidden,
        "first_k_dense_replace": config.dense_layers,
        "num_experts": of.num_experts,
        "num_shared_experts": of.num_shared,
        **experts_written(of),
    }


def delta_attention(config: KDAConfig) -> Iterator[Row | Either]:
    """What decides of forgetting is in a module of its own in transformers."""
    wide = config.num_heads * config.head_dim
    yield from weights({name: QKVO[name] for name in ("q_proj", "k_proj", "v_proj")})
    yield from weights(GATES)
    yield convolution(wide, wide, wide)
    forgetting = [row("decay_proj.weight", "f_proj.weight")]
    forgetting += same({"decay.A_log": "A_log", "decay.dt_bias": "dt_bias"})
    yield either(forgetting, [each.under("", "forget_gate.") for each in forgetting])


def mixer(config: MixerConfig) -> Iterator[Row | Either]:
    """All but the map of the output."""
    if isinstance(config, LightningConfig):
        yield from ling_lightning.lightning_attention(config)
    elif isinstance(config, KDAConfig):
        yield from delta_attention(config)
    else:
        assert isinstance(config, MLAConfig)
        yield from (each for each in latent_attention(config) if each.ours != ("o_proj.weight",))
        if config.head_gate:
            yield row("head_gate_proj.weight", "g_proj.weight")


def renamed(rows: Iterable[Row | Either], *names: str) -> Iterator[Either]:
    """Rows of a module that has several names there."""
    for each in rows:
        layouts = each.layouts if isinstance(each, Either) else ((each,),)
        yield either(*([x.under("", name) for x in layout] for name in names for layout in layouts))


def feed_forward(config: ModelConfig, layer: int) -> Iterator[Row | Either]:
    if not config.has_experts(layer):
        yield from weights(SWIGLU)
        return
    of = the_experts(config)
    yield experts(of)
    yield from (each for each in sigmoid_experts(of) if each.ours != ("router.bias",))
    names = ("gate.expert_bias", "gate.e_score_correction_bias")
    yield either(*([row("router.bias", name)] for name in names))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    embedding, *others = outside(config)
    yield either([row("embed.weight", "model.word_embeddings.weight")], [embedding])
    yield from others
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        names = renamed(mixer(config.mixers[name]), "attention.", "self_attn.")
        yield from under(ours + "mixer.", theirs, names)
        output = either(*([row("o_proj.weight", f"{place}.weight")] for place in OUTPUTS))
        yield output.under(ours + "mixer.", theirs)
        yield from under(ours + "feed_forward.", theirs + "mlp.", feed_forward(config, layer))


FAMILY = Family(
    name="bailing_hybrid",
    title="Ling 3.0, Ling and Ring 2.5",
    model_types=("bailing_hybrid",),
    architecture="BailingHybridForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("kda", "lightning", "mla"),
    computed=(".slope",),
    oracle="transformers; of 2.5 the released code's equations, in float64",
)
