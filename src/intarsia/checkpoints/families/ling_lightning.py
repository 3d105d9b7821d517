"""Ling and Ring 2.5, which have the `model_type` of Ling 3.0: Lightning Attention with norms of queries and keys, half
of their channels rotated, and norms of groups of heads; latent attention with positions where a group of layers ends.

After the code that was released with Ring-2.5-1T. Its decays fall from layer 1 on, so that the first layer's are the
fastest; vLLM and SGLang let them fall from layer 0 on. It makes layers behind the last whole group full attention; vLLM
makes them linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from intarsia.checkpoints.families.deepseek_v3 import (
    experts_written,
    latent_options,
    latent_written,
    rotated_written,
    stretched,
)
from intarsia.checkpoints.families.parts import FULL, LINEAR, share_of, sizes_of, the_experts
from intarsia.checkpoints.family import names_of, only_mixer
from intarsia.checkpoints.options import Options, Rotation
from intarsia.checkpoints.rows import Row, row, split, weights
from intarsia.errors import UnsupportedError
from intarsia.mixers import LightningConfig, MLAConfig
from intarsia.model.config import ModelConfig

KINDS = {LightningConfig: LINEAR, MLAConfig: FULL}
NAMES = {LINEAR: "lightning", FULL: "mla"}


def kinds_of(depth: int, group: int) -> list[str]:
    """The last layer of each group is full attention, and so are those behind the last whole group."""
    whole = depth // group * group
    return [LINEAR if (layer + 1) % group and layer < whole else FULL for layer in range(depth)]


def group_of(kinds: list[str]) -> int:
    """The `layer_group_size` of such layers.

    Raises:
        UnsupportedError: they have none.
    """
    group = kinds.index(FULL) + 1 if FULL in kinds else 0
    if not group or kinds_of(len(kinds), group) != kinds:
        raise UnsupportedError("the last layer of each group is full attention, all groups being of one size")
    return group


def lightning_options(options: Options, rotation: Rotation) -> LightningConfig:
    """The linear layers, of which `rotation` turns a part of the channels."""
    options.only("linear_rope", True, part="linear layers without positions in this family")
    heads, head_dim = options.get("num_attention_heads", int), options.get("head_dim", int, 128)
    if heads & (heads - 1):
        raise options.unsupported(
            f"it has {heads} heads, and of a number that is no power of 2 its decays are others than built here"
        )
    return LightningConfig(
        num_heads=heads,
        head_dim=head_dim,
        decay_from=1,
        silu=options.get("linear_silu", bool, False, "use_linear_silu"),
        qk_norm=options.get("use_qk_norm", bool, True),
        rope=int(head_dim * rotation.share) / head_dim,
        rope_theta=rotation.theta or 10000.0,
        yarn=stretched(rotation)[0],
        scale=head_dim**-0.5,
        norm_groups=options.get("group_norm_size", int, 4),
    )


def lightning_written(lightning: LightningConfig) -> dict[str, Any]:
    """`lightning_options` the other way round, without the rotation's base and stretching."""
    return {
        "partial_rotary_factor": share_of(lightning.rotated, lightning.head_dim),
        "head_dim": lightning.head_dim,
        "group_norm_size": lightning.norm_groups,
        "linear_silu": lightning.silu,
        "use_qk_norm": lightning.qk_norm,
    }


def read_mixers(options: Options, depth: int) -> tuple[str, dict[str, LightningConfig | MLAConfig]]:
    """The layout and the mixers."""
    options.presume(
        num_attention_heads=16, rope_theta=600_000.0, partial_rotary_factor=0.5, num_experts=256, n_group=8,
        topk_group=4, moe_intermediate_size=512, first_k_dense_replace=1, routed_scaling_factor=1.0,
        intermediate_size=5120,
    )  # fmt: skip
    options.only("scoring_func", "sigmoid", part="router of that kind in this family")
    options.only("topk_method", "noaux_tc", part="choice of experts of that kind")
    options.only("rope_interleave", True, part="order of rotated channels other than DeepSeek's here")
    options.maybe("max_window_layers", int)  # of no meaning here
    rotation = Rotation(options)
    lightning = lightning_options(options, rotation)
    rotation.share = 1.0  # latent attention rotates all of its shared channels
    mla = latent_options(options, None, rotation)
    kinds = kinds_of(depth, options.get("layer_group_size", int, 5))
    return " ".join(NAMES[kind] for kind in kinds), {"lightning": lightning, "mla": mla}


def write(config: ModelConfig) -> dict[str, Any]:
    lightning, mla, of = (
        only_mixer(config, LightningConfig),
        only_mixer(config, MLAConfig),
        the_experts(config),
    )
    kinds = names_of(config, KINDS)
    group = group_of(kinds)
    stretching = {name: value for name, value in rotated_written(mla).items() if name != "rope_theta"}
    return {
        "architectures": ["BailingMoeV2_5ForCausalLM"],
        **sizes_of(config),
        **latent_written(mla),
        "rope_theta": mla.rope_theta,
        "rope_scaling": None if mla.yarn is None else stretching,
        **lightning_written(lightning),
        "layer_group_size": group,
        "intermediate_size": config.feed_forward.d_hidden,
        "first_k_dense_replace": config.dense_layers,
        "num_experts": of.num_experts,
        "num_shared_experts": of.num_shared,
        **experts_written(of),
    }


def lightning_attention(config: LightningConfig) -> Iterator[Row]:
    """All but the map of the output."""
    wide = config.num_heads * config.head_dim
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    yield row(names, "query_key_value.weight", split(wide, wide, wide))
    if config.qk_norm:
        yield from weights({"q_norm": "query_layernorm", "k_norm": "key_layernorm"})
    yield from weights({"output_gate_proj": "g_proj", "norm": "g_norm"})
