"""Kimi Linear: Kimi Delta Attention 3 : latent attention without positions 1, fine-grained experts. Kimi K3's text
model has its options and more: residuals that attend to earlier layers, gates, SiTU, experts in a latent space."""

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
    experts_in_mxfp4,
    outside,
    sizes_of,
    the_experts,
)
from intarsia.checkpoints.family import Family, layout_of, names_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import (
    Either,
    Row,
    Tensors,
    Transform,
    either,
    reshaped,
    row,
    under,
    weights,
)
from intarsia.errors import CheckpointError
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig

KINDS = {KDAConfig: LINEAR, MLAConfig: FULL}
GATES = {
    "beta_proj": "b_proj", "output_gate_proj.0": "g_a_proj", "output_gate_proj.1": "g_b_proj", "norm": "o_norm",
}  # fmt: skip
FULL_GATE = {"beta_proj": "b_proj", "output_gate_proj": "g_proj", "norm": "o_norm"}
LATENT = {
    "latent_down": "routed_expert_down_proj", "latent_norm": "routed_expert_norm",
    "latent_up": "routed_expert_up_proj",
}  # fmt: skip
RESIDUALS = {"mixer_streams": "self_attention_res", "feed_forward_streams": "mlp_res"}
PADDED = 128
"""Kimi K3's `A_log` is as long as a multiple of it."""


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


def delta_options(options: Options, linear: Options, k3: bool) -> KDAConfig:
    """Kimi Delta Attention. The release of K3 says nothing of the epsilon of its norms: it is that of the kernels."""
    bound = linear.maybe("gate_lower_bound", float)
    return KDAConfig(
        num_heads=linear.get("num_heads", int, options.get("linear_num_heads", int, 32)),
        head_dim=linear.get("head_dim", int, options.get("linear_head_dim", int, 128)),
        conv_size=linear.get("short_conv_kernel_size", int, options.get("linear_conv_kernel_dim", int, 4)),
        gate="softplus" if bound is None else "bounded",
        gate_lower_bound=-5.0 if bound is None else bound,
        output_gate_rank=None if linear.get("use_full_rank_gate", bool, False) else "head",
        norm_eps=1e-5 if k3 else None,
    )


def activation_options(options: Options) -> dict[str, Any]:
    """Of feed-forwards and experts."""
    options.only("hidden_act", "silu", "situ", part="activation of that name in this family")
    gate, up = (options.maybe(f"activation_situ_{name}", float) for name in ("beta", "linear_beta"))
    if options.get("hidden_act", str, "silu") == "silu":
        return {}
    return {"activation": "situ", "limit": None if gate == 1 else gate, "up_limit": up}


def packed_as_mxfp4(options: Options) -> None:
    """That weights of four bits are of the format in which K3's experts were released."""
    if options.values.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        return
    weights_as = options.within("quantization_config")
    weights_as.only("format", "mxfp4-pack-quantized", part="weights of that format in this family")


def read(options: Options) -> ModelConfig:
    options.only("moe_router_activation_func", "sigmoid", part="router of that kind")
    options.only("topk_method", "noaux_tc", part="choice of experts of that kind")
    options.only("mla_use_nope", True, part="latent attention with positions in this family")
    # Of no meaning without positions, and where there is one group.
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "use_grouped_topk"):
        options.maybe(name, object)
    packed_as_mxfp4(options)
    linear = options.within("linear_attn_config")
    kinds = kinds_of(options, linear)
    groups_of = options.maybe("attn_res_block_size", int)
    kda = delta_options(options, linear, groups_of is not None)
    linear.finish()
    eps = options.get("rms_norm_eps", float, 1e-5)
    more: dict[str, Any] = {} if groups_of is None else {"latent_norm_eps": eps}
    more["output_gate"] = options.get("mla_use_output_gate", bool, False)
    mla = latent_options(options, None, None, **more)
    activation, latent = activation_options(options), options.maybe("routed_expert_hidden_size", int)
    normed = options.get("latent_moe_use_norm", bool, False)
    dense = dense_layers(options, len(kinds), 1)
    experts = ExpertsConfig(
        num_experts=options.get("num_experts", int, 256, "num_local_experts"),
        d_hidden=options.get("moe_intermediate_size", int, 1024),
        num_active=options.get("num_experts_per_token", int, 8, "num_experts_per_tok"),
        num_shared=options.get("num_shared_experts", int, 1, "n_shared_experts"),
        routed_scaling_factor=options.get("routed_scaling_factor", float, 2.446),
        normalize=options.get("moe_renormalize", bool, True, "norm_topk_prob"),
        num_groups=options.get("num_expert_group", int, 1, "n_group"),
        num_active_groups=options.get("topk_group", int, 1),
        d_latent=latent,
        latent_norm=normed and latent is not None,
        **activation,
    )
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=options.get("hidden_size", int),
        depth=len(kinds),
        layout=layout_of(kinds, {LINEAR: "kda", FULL: "mla"}, options),
        mixers={"kda": kda, "mla": mla},
        feed_forward=FeedForwardConfig(options.get("intermediate_size", int, 9216), **activation),
        experts=experts if dense < len(kinds) else None,
        dense_layers=dense,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=eps,
        attention_residuals=groups_of,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    kda, mla, of = only_mixer(config, KDAConfig), only_mixer(config, MLAConfig), config.experts
    kinds = names_of(config, KINDS)
    linear = {
        "kda_layers": [layer for layer, kind in enumerate(kinds, 1) if kind == LINEAR],
        "full_attn_layers": [layer for layer, kind in enumerate(kinds, 1) if kind == FULL],
        "num_heads": kda.num_heads,
        "head_dim": kda.head_dim,
        "short_conv_kernel_size": kda.conv_size,
    }
    if kda.gate == "bounded":
        linear["gate_lower_bound"] = kda.gate_lower_bound
    if kda.output_gate_rank is None:
        linear["use_full_rank_gate"] = True
    return {
        **sizes_of(config),
        **latent_written(mla),
        "mla_use_nope": True,
        # Other engines need it, and transformers reads it before its own `layer_types`.
        "linear_attn_config": linear,
        "intermediate_size": config.feed_forward.d_hidden,
        "moe_layer_freq": 1,
        **({"first_k_dense_replace": config.depth} if of is None else experts_written(config, of)),
        **options_of_k3(config, mla),
    }


def experts_written(config: ModelConfig, of: ExpertsConfig) -> dict[str, Any]:
    values = {
        "first_k_dense_replace": config.dense_layers,
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
    # As `options_of_k3`.
    more = {"routed_expert_hidden_size": of.d_latent, "latent_moe_use_norm": of.latent_norm or None}
    return values | {name: value for name, value in more.items() if value is not None}


def options_of_k3(config: ModelConfig, mla: MLAConfig) -> dict[str, Any]:
    """Those that a model says only if it has what they mean: others do not know them."""
    values: dict[str, Any] = {
        "attn_res_block_size": config.attention_residuals,
        "mla_use_output_gate": mla.output_gate or None,
    }
    of = config.feed_forward
    if of.activation == "situ":
        values |= {
            "hidden_act": "situ",
            "activation_situ_beta": 1.0 if of.limit is None else of.limit,
            "activation_situ_linear_beta": of.up_limit,
        }
    return {name: value for name, value in values.items() if value is not None}


def _narrowed(heads: int) -> Transform:
    """Ours are the first of theirs, which may go on to a multiple of 128."""

    def load(theirs: Tensors) -> Tensors:
        if theirs[0].numel() not in (heads, -(-heads // PADDED) * PADDED):
            raise CheckpointError(f"{heads} numbers are wanted, or those and what pads them to {PADDED}")
        return (theirs[0].reshape(-1)[:heads],)

    return Transform("narrowed", load, lambda ours: ours)


def delta_attention(config: KDAConfig, flat: bool = False) -> Iterator[Row | Either]:
    """What decides of forgetting stands by itself in the release, and in a module of its own in transformers. `flat`
    says that `A_log` has one dimension there."""
    H, wide = config.num_heads, config.num_heads * config.head_dim
    full = config.output_gate_rank is None
    rates = _narrowed(H) if full else reshaped((H,), (H,) if flat else (1, 1, H, 1))
    yield from weights({**QKVO, **(FULL_GATE if full else GATES)})
    yield convolution(wide, wide, wide)
    forgetting = [
        row("decay_proj.0.weight", "f_a_proj.weight"),
        row("decay_proj.1.weight", "f_b_proj.weight"),
        row("decay.A_log", "A_log", rates),
        row("decay.dt_bias", "dt_bias"),
    ]
    yield either(forgetting, [each.under("", "forget_gate.") for each in forgetting])


def mixer(config: ModelConfig, name: str) -> Iterator[Row | Either]:
    """The layer that is called `name` in the configuration."""
    options = config.mixers[name]
    if isinstance(options, MLAConfig):
        yield from latent_attention(options)
        if options.output_gate:
            yield row("output_gate_proj.weight", "g_proj.weight")
    else:
        yield from delta_attention(only_mixer(config, KDAConfig))


def feed_forward(config: ModelConfig, layer: int) -> Iterator[Row | Either]:
    """Dense layers are `mlp` in the release and `block_sparse_moe` in what transformers saves, which renames all; in
    its modules all are `mlp`."""
    if config.has_experts(layer):
        of = the_experts(config)
        latent = {name: LATENT[name] for name in LATENT if of.d_latent is not None}
        if not of.latent_norm:
            latent.pop("latent_norm", None)
        others = [*sigmoid_experts(of), *weights(latent)]
        yield from block_of_experts(of, others, experts_in_mxfp4(of, "w1", "w3", "w2"))
        return
    dense = list(weights(SWIGLU))
    yield either([x.under("", "mlp.") for x in dense], [x.under("", "block_sparse_moe.") for x in dense])


def residuals(config: ModelConfig, names: dict[str, str]) -> Iterator[Row]:
    """How parts read the sums of earlier layers."""
    if config.attention_residuals is not None:
        D = config.d_model
        for ours, theirs in names.items():
            yield row(f"{ours}.weight", f"{theirs}_norm.weight")
            yield row(f"{ours}.query", f"{theirs}_proj.weight", reshaped((D,), (1, D)))


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield from outside(config)
    yield from residuals(config, {"output_sources": "model.output_attn_res"})
    for layer, name in enumerate(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield from under(ours, theirs, weights(PRE_NORMS))
        yield from under(ours, theirs, residuals(config, RESIDUALS))
        yield from under(ours + "mixer.", theirs + "self_attn.", mixer(config, name))
        yield from under(ours + "feed_forward.", theirs, feed_forward(config, layer))


FAMILY = Family(
    name="kimi_linear",
    title="Kimi-Linear-48B-A3B, Kimi K3",
    model_types=("kimi_linear", "kimi_k3", "kimi_k3_text"),
    architecture="KimiLinearForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("kda", "mla"),
    unties=True,
    left_out={"vision_tower.": "the vision tower", "mm_projector.": "the vision tower's projector"},
    oracle="transformers; of K3 vLLM's equations, in float64",
    missing="writing MXFP4: K3's experts are written as floats",
)
