"""Nemotron-H and Nemotron 3: Mamba-2, attention without positions, and feed-forwards without gates.

Each layer there is one thing: a mixer, a feed-forward, or experts. Here a feed-forward belongs to the block of the
mixer before it; one that stands behind another feed-forward, or first, is a block of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from intarsia.checkpoints.families.mamba2 import limits_written, state_space, step_limits
from intarsia.checkpoints.families.parts import FULL, LINEAR, MTP, QKVO, the_experts
from intarsia.checkpoints.family import Family, only_mixer
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Either, Row, either, row, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers import AttentionConfig, ChannelMixingConfig, Mamba2Config
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig

MLP, EXPERTS = "mlp", "moe"
LETTERS = {"M": LINEAR, "*": FULL, "-": MLP, "E": EXPERTS}
OLDER = {"mamba": LINEAR, "attention": FULL}
MIXERS = {LINEAR: "mamba2", FULL: "attention", MLP: "mlp"}
ALONE = "_alone"
"""What the name of a mixer ends in whose block has no feed-forward."""
UP_DOWN = {"up": "up_proj", "down": "down_proj"}
LATENT = {"latent_down": "fc1_latent_proj", "latent_up": "fc2_latent_proj"}
LEAST = 1e-9
"""What is written as transformers' least step size where there is none: it takes the logarithm of it."""
RELEASED, MODULES = "backbone.", "model."


class Placed(NamedTuple):
    """A block of ours: its mixer and its feed-forward there, and the numbers of their layers."""

    mixer: str
    number: int
    feed_forward: str | None = None

    @property
    def name(self) -> str:
        """What its mixer is called here."""
        return MIXERS[self.mixer] + (ALONE if self.feed_forward is None and self.mixer != MLP else "")


def placed(kinds: Iterable[str], options: Options) -> list[Placed]:
    """The blocks that layers of these kinds make."""
    blocks: list[Placed] = []
    for number, kind in enumerate(kinds):
        last = blocks[-1] if blocks else None
        if kind in (MLP, EXPERTS) and last and last.feed_forward is None and last.mixer != MLP:
            blocks[-1] = last._replace(feed_forward=kind)
        elif kind == EXPERTS:
            raise options.unsupported(f"layer {number} has experts, and no mixer stands before it")
        elif kind in MIXERS:
            blocks.append(Placed(kind, number))
        else:
            raise options.unsupported(f"layer {number} is {kind!r}; known are {', '.join(LETTERS.values())}")
    return blocks


def kinds_of(options: Options) -> list[str]:
    """What each layer is: listed, or as a letter of the older pattern."""
    listed: list[str] = options.get("layers_block_type", list, [], "layer_types")
    pattern = options.get("hybrid_override_pattern", str, "")
    spelled = [LETTERS.get(letter, letter) for letter in pattern]
    kinds = [OLDER.get(kind, kind) for kind in listed] or spelled
    if not kinds:
        raise options.unsupported(
            "neither layers_block_type nor hybrid_override_pattern says what the layers are"
        )
    if spelled and kinds != spelled:
        raise options.unsupported("layers_block_type and hybrid_override_pattern differ")
    depth = options.get("num_hidden_layers", int, len(kinds))
    if depth != len(kinds):
        raise options.unsupported(f"{len(kinds)} layers are listed, and num_hidden_layers is {depth}")
    return kinds


def state_space_options(options: Options) -> Mamba2Config:
    """transformers also keeps step sizes above time_step_min, where several tokens are read and not where one is;
    neither the released code nor other engines do."""
    options.only("mamba_hidden_act", "silu", part="activation of that name in Mamba-2")
    options.only("mamba_proj_bias", False, part="bias under that name in Mamba-2")
    first = (
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "time_step_rank",
        "rescale_prenorm_residual",
    )
    computed = ("chunk_size", "expand", "mamba_ssm_cache_dtype", "use_mamba_kernels", "residual_in_fp32")
    for name in (*first, *computed):  # of the first weights, and of how it is computed
        options.maybe(name, object)
    return Mamba2Config(
        num_heads=options.get("mamba_num_heads", int, 128),
        head_dim=options.get("mamba_head_dim", int, 64),
        state_dim=options.get("ssm_state_size", int, 128),
        num_groups=options.get("n_groups", int, 8),
        conv_size=options.get("conv_kernel", int, 4),
        bias=options.get("use_bias", bool, False),
        conv_bias=options.get("use_conv_bias", bool, True),
        **step_limits(options),
    )


def attention_options(options: Options) -> AttentionConfig:
    options.only("sliding_window", part="window in this family's attention")
    options.only("attention_bias", False, part="bias in this family's attention")
    for name in ("rope_theta", "partial_rotary_factor", "rope_parameters"):  # there are no positions
        options.maybe(name, object)
    heads = options.get("num_attention_heads", int, 32)
    return AttentionConfig(
        num_heads=heads,
        head_dim=options.get("head_dim", int, 128, "attention_head_dim"),
        num_kv_heads=options.get(
            "num_key_value_heads", int, heads if "num_key_value_heads" in options.values else 8
        ),
        rope=0.0,
    )


def expert_options(options: Options) -> ExpertsConfig:
    options.maybe("moe_shared_expert_overlap", bool)  # of when it is computed
    if options.get("n_shared_experts", int, 1) < 1:
        raise options.unsupported("n_shared_experts is 0, and this family's layers have shared experts")
    return ExpertsConfig(
        num_experts=options.get("n_routed_experts", int, 8, "num_local_experts"),
        d_hidden=options.get("moe_intermediate_size", int, 7688),
        num_active=options.get("num_experts_per_tok", int, 2),
        d_shared=options.get("moe_shared_expert_intermediate_size", int, 7688),
        routed_scaling_factor=options.get("routed_scaling_factor", float, 1.0),
        normalize=options.get("norm_topk_prob", bool, True),
        num_groups=options.get("n_group", int, 1),
        num_active_groups=options.get("topk_group", int, 1),
        activation="relu2",
        d_latent=options.maybe("moe_latent_size", int),
    )


def read(options: Options) -> ModelConfig:
    options.only("mlp_hidden_act", "relu2", part="activation of that name in this family")
    options.only("mlp_bias", False, part="feed-forward with biases")
    for name in (
        "num_logits_to_keep",
        "hidden_dropout",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
    ):
        options.maybe(name, object)
    blocks = placed(kinds_of(options), options)
    mixers, attention = state_space_options(options), attention_options(options)
    experts, inside = expert_options(options), options.get("intermediate_size", int, 21504)
    of = {LINEAR: mixers, FULL: attention, MLP: ChannelMixingConfig(inside, shift=False)}
    with_experts = [n for n, block in enumerate(blocks) if block.feed_forward == EXPERTS]
    first = with_experts[0] if with_experts else len(blocks)
    if any(block.feed_forward == MLP for block in blocks[first:]):
        raise options.unsupported("a mixer with a feed-forward stands behind one with experts")
    return ModelConfig(
        vocab_size=options.get("vocab_size", int, 131072),
        d_model=options.get("hidden_size", int, 4096),
        depth=len(blocks),
        layout=" ".join(block.name for block in blocks),
        mixers={block.name: of[block.mixer] for block in blocks},
        mixer_only=tuple(dict.fromkeys(block.name for block in blocks if block.feed_forward is None)),
        feed_forward=FeedForwardConfig(inside, activation="relu2"),
        experts=experts if with_experts else None,
        dense_layers=first,
        tie_embeddings=options.get("tie_word_embeddings", bool, False),
        norm_eps=options.get("layer_norm_epsilon", float, 1e-5, "rms_norm_eps", "norm_eps"),
    )


def blocks_of(config: ModelConfig) -> list[Placed]:
    """The blocks of a model, with the numbers of their layers there.

    Raises:
        UnsupportedError: a layer whose mixer this family does not have.
    """
    kinds = {Mamba2Config: LINEAR, AttentionConfig: FULL, ChannelMixingConfig: MLP}
    blocks, number = [], 0
    for layer, name in enumerate(config.layers):
        kind = kinds.get(type(config.mixers[name]))
        if kind is None:
            raise UnsupportedError(f"layer {layer} is {config.mixers[name].type!r}")
        behind = EXPERTS if config.has_experts(layer) else MLP if config.has_feed_forward(layer) else None
        blocks.append(Placed(kind, number, behind))
        number += 1 if behind is None else 2
    return blocks


def write(config: ModelConfig) -> dict[str, Any]:
    blocks = blocks_of(config)
    kinds = [kind for block in blocks for kind in (block.mixer, block.feed_forward) if kind is not None]
    letters = {kind: letter for letter, kind in LETTERS.items()}
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(kinds),
        "layers_block_type": kinds,
        "hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "mlp_hidden_act": "relu2",
        "intermediate_size": config.feed_forward.d_hidden,
    }
    if any(block.mixer == LINEAR for block in blocks):
        mixer = only_mixer(config, Mamba2Config)
        values |= {
            "mamba_num_heads": mixer.num_heads,
            "mamba_head_dim": mixer.head_dim,
            "ssm_state_size": mixer.state_dim,
            "n_groups": mixer.num_groups,
            "conv_kernel": mixer.conv_size,
            "use_bias": mixer.bias,
            "use_conv_bias": mixer.conv_bias,
            "time_step_limit": limits_written(mixer),
            "time_step_min": mixer.dt_min or LEAST,
        }
    if any(block.mixer == FULL for block in blocks):
        attention = only_mixer(config, AttentionConfig)
        values |= {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
        }
    if any(block.feed_forward == EXPERTS for block in blocks):
        of = the_experts(config)
        values |= {
            "n_routed_experts": of.num_experts,
            "n_shared_experts": 1,
            "moe_intermediate_size": of.d_hidden,
            "moe_shared_expert_intermediate_size": of.shared_width,
            "moe_latent_size": of.d_latent,
            "num_experts_per_tok": of.num_active,
            "routed_scaling_factor": of.routed_scaling_factor,
            "norm_topk_prob": of.normalize,
            "n_group": of.num_groups,
            "topk_group": of.num_active_groups,
        }
    return values


def anywhere(ours: str, theirs: str, *layouts: Iterable[Row]) -> Either:
    """Rows whose names begin with `backbone.`, as released, or with `model.`; `layouts` hold the same."""
    spelled = [list(rows) for rows in layouts]
    return either(
        *([x.under(ours, start + theirs) for x in rows] for start in (RELEASED, MODULES) for rows in spelled)
    )


def expert_rows(config: ExpertsConfig) -> tuple[list[Row], list[Row]]:
    """The routed experts of a layer, each with its own matrices or stacked, and all that is beside them."""
    others = [row("router.weight", "gate.weight"), row("router.bias", "gate.e_score_correction_bias")]
    others += [x.under("shared.", "shared_experts.") for x in weights(UP_DOWN)]
    others += weights(LATENT) if config.d_latent is not None else []
    apart, stacked = list(others), list(others)
    for ours, name in {"gate_up": "up_proj", "down": "down_proj"}.items():
        apart += [row(f"{ours}[{e}]", f"experts.{e}.{name}.weight") for e in range(config.num_experts)]
        stacked.append(row(ours, f"experts.{name}"))
    return apart, stacked


def rows(config: ModelConfig) -> Iterator[Row | Either]:
    yield anywhere("", "", weights({"embed": "embeddings"}))
    yield anywhere("", "", weights({"norm": "norm_f"}))
    if not config.tie_embeddings:
        yield row("head.weight", "lm_head.weight")
    mixers = {LINEAR: state_space, FULL: lambda _: weights(QKVO), MLP: lambda _: alone()}
    for layer, block in enumerate(blocks_of(config)):
        ours, theirs = f"blocks.{layer}.", f"layers.{block.number}."
        yield anywhere(ours, theirs, weights({"mixer_norm": "norm"}))
        options: Any = config.mixers[config.layers[layer]]
        yield anywhere(ours + "mixer.", theirs + "mixer.", mixers[block.mixer](options))
        if block.feed_forward is None:
            continue
        theirs = f"layers.{block.number + 1}."
        yield anywhere(ours, theirs, weights({"feed_forward_norm": "norm"}))
        layouts = [weights(UP_DOWN)] if block.feed_forward == MLP else expert_rows(the_experts(config))
        yield anywhere(ours + "feed_forward.", theirs + "mixer.", *layouts)


def alone() -> Iterator[Row]:
    """A feed-forward in a block of its own."""
    return weights({"k_proj": "up_proj", "o_proj": "down_proj"})


FAMILY = Family(
    name="nemotron_h",
    title="Nemotron-H, Nemotron Nano 2, Nemotron 3",
    model_types=("nemotron_h",),
    architecture="NemotronHForCausalLM",
    read=read,
    write=write,
    rows=rows,
    mixers=("mamba2", "attention", "channel-mix"),
    left_out=MTP,
    missing="experts behind no mixer, and feed-forwards behind experts, in other orders than have been released",
)
