"""RWKV-7: time mixing and channel mixing in turn, layer norms, values mixed with those of the first layer.

The layout is that of the published safetensors, which are named as in flash-linear-attention. Each of their layers is
two blocks here, since the channel mixing sees the token before and so is a mixer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.family import Family, names_of, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, either, reshaped, row, same, under, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers import ChannelMixingConfig, RWKV7Config
from intarsia.model.config import FeedForwardConfig, ModelConfig

KINDS = {RWKV7Config: "time", ChannelMixingConfig: "channels"}
RANKS = {
    "decay_rank": ("decay_low_rank_dim", 2.5), "rate_rank": ("a_low_rank_dim", 2.5),
    "gate_rank": ("gate_low_rank_dim", 5.0), "value_rank": ("v_low_rank_dim", 1.7),
}  # fmt: skip
"""What they call the ranks, and how large they are, in roots of the width, where a file says null."""
PROJECTIONS = {name: name for name in ("r_proj", "k_proj", "v_proj", "o_proj")}
NETWORKS = {
    "decay_proj": "w_lora",
    "rate_proj": "a_lora",
    "output_gate_proj": "g_lora",
    "value_mix_proj": "v_lora",
}
SHIFTS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
BOTH = (".weight", ".bias")


def ranks_of(options: Options, d_model: int, head_dim: int) -> dict[str, int]:
    """The ranks of the small networks."""
    ranks = {}
    for ours, (theirs, roots) in RANKS.items():
        if theirs in options.values and not options.has(theirs):
            options.maybe(theirs, int)
            # That of the gate does not grow with the heads.
            size = roots * d_model**0.5 * (1.0 if ours == "gate_rank" else head_dim / 64)
            ranks[ours] = max(32, round(size / 32) * 32)
        else:
            ranks[ours] = options.get(theirs, int)
    return ranks


def value_dim(options: Options, depth: int, default: int) -> int:
    """The channels of all value heads, which may be listed layer by layer."""
    options.maybe("value_dim", object)
    said = options.values.get("value_dim")
    listed = said if isinstance(said, list) else [default if said is None else said] * depth
    if len(listed) != depth or len(set(listed)) != 1 or not isinstance(listed[0], int):
        raise options.unsupported(f"value_dim is {said!r}: all layers must have the same")
    return listed[0]


def width_inside(options: Options, d_model: int) -> int:
    """Of the channel mixing."""
    ratio = options.get("hidden_ratio", float, 4.0)
    return options.get("intermediate_size", int, 32 * -(-int(d_model * ratio) // 32))


def read(options: Options) -> ModelConfig:
    options.only("hidden_act", "sqrelu", part="activation of that name in channel mixing")
    options.only("attn", part="hybrid of this family with attention")
    options.only("norm_bias", True, part="layer norm without a bias")
    fused = ("fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
    for name in ("attn_mode", *fused):  # of how it is computed, or of training
        options.maybe(name, object)
    d_model, depth = options.get("hidden_size", int), options.get("num_hidden_layers", int)
    heads = options.maybe("num_heads", int)
    head_dim = options.get("head_dim", int, 64 if heads is None else d_model // heads)
    heads = d_model // head_dim
    if heads * head_dim != d_model:
        raise options.unsupported(f"heads of {head_dim} channels do not make up the width, {d_model}")
    inside = width_inside(options, d_model)
    time = RWKV7Config(
        num_heads=heads,
        head_dim=head_dim,
        head_v_dim=value_dim(options, depth, d_model) // heads,
        **ranks_of(options, d_model, head_dim),
    )
    return ModelConfig(
        vocab_size=options.get("vocab_size", int),
        d_model=d_model,
        depth=2 * depth,
        layout="time channels",
        mixers={"time": time, "channels": ChannelMixingConfig(inside)},
        mixer_only=("time", "channels"),
        feed_forward=FeedForwardConfig(inside),
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm="layer",
        norm_eps=options.get("norm_eps", float, 1e-5),
        embed_norm=options.get("norm_first", bool, True),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    time, channels = only_mixer(config, RWKV7Config), only_mixer(config, ChannelMixingConfig)
    depth = config.depth // 2
    if names_of(config, KINDS) != ["time", "channels"] * depth:
        raise UnsupportedError("time mixing and channel mixing must come in turn")
    ranks = {theirs: getattr(time, ours) for ours, (theirs, _) in RANKS.items()}
    return {
        **ranks,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": depth,
        "num_heads": time.num_heads,
        "head_dim": time.head_dim,
        "value_dim": [time.num_heads * time.value_dim] * depth,
        "hidden_ratio": channels.d_hidden / config.d_model,
        "intermediate_size": channels.d_hidden,
        "hidden_act": "sqrelu",
        "norm_first": config.embed_norm,
        "norm_bias": True,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attn": None,
        "attn_mode": "chunk",
    }


def time_mixing(config: RWKV7Config, d_model: int) -> Iterator[Row | Either]:
    """Older files have the six shifts in one tensor."""
    H, K = config.num_heads, config.head_dim
    apart = [row(f"shift[{n}]", name, reshaped((d_model,), (1, 1, d_model))) for n, name in enumerate(SHIFTS)]
    yield either(apart, [row("shift", "x_x", reshaped((6, d_model), (6, d_model)))])
    yield from weights(PROJECTIONS)
    for ours, theirs in NETWORKS.items():
        if ours != "value_mix_proj" or config.depth_fraction:
            yield from weights({f"{ours}.0": f"{theirs}.lora.0", f"{ours}.2": f"{theirs}.lora.2"})
    yield row("decay.bias", "w_lora.lora.2.bias")
    yield row("rate_bias", "a_lora.lora.2.bias")
    if config.depth_fraction:
        yield row("value_mix_bias", "v_lora.lora.2.bias")
    for ours, theirs in {"removal": "k_k", "replacement": "k_a"}.items():
        yield row(ours, theirs, reshaped((H, K), (H * K,)))
    yield row("bonus", "r_k")
    for kind in BOTH:
        yield row(f"norm{kind}", f"g_norm{kind}")


def channel_mixing(d_model: int) -> Iterator[Row]:
    yield row("shift", "x_k", reshaped((d_model,), (d_model,)))
    yield from weights({"k_proj": "key", "o_proj": "value"})


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield row("embed.weight", "model.embeddings.weight")
    if not config.tie_embeddings:
        yield row("head.weight", "lm_head.weight")
    norms = {"norm": "model.norm", "embed_norm": "model.layers.0.pre_norm"}
    for layer, name in enumerate(config.layers):
        theirs, ours = f"model.layers.{layer // 2}.", f"blocks.{layer}."
        options = config.mixers[name].at_layer(layer, config.depth)
        if isinstance(options, RWKV7Config):
            norms[f"{ours}mixer_norm"] = f"{theirs}attn_norm"
            yield from under(f"{ours}mixer.", f"{theirs}attn.", time_mixing(options, config.d_model))
        else:
            norms[f"{ours}mixer_norm"] = f"{theirs}ffn_norm"
            yield from under(f"{ours}mixer.", f"{theirs}ffn.", channel_mixing(config.d_model))
    if not config.embed_norm:
        del norms["embed_norm"]
    for kind in BOTH:
        yield from same(norms, kind)


FAMILY = Family(
    name="rwkv7",
    title="RWKV-7",
    model_types=("rwkv7", "rwkv7_fla"),
    architecture="RWKV7ForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("rwkv7", "channel-mix"),
    missing="hybrids with attention (`attn`); the authors' own `.pth` files, which are pickles",
    oracle="the published equations, in float64",
)
