"""What several families call the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from intarsia.checkpoints.mxfp4 import MXFP4_ROWS
from intarsia.checkpoints.options import REQUIRED, Options, Rotation
from intarsia.checkpoints.rows import (
    CONVOLUTION,
    Either,
    Row,
    either,
    joined,
    joined_convolutions,
    row,
    weights,
)
from intarsia.errors import UnsupportedError
from intarsia.layers.rope import Yarn
from intarsia.mixers import GatedDeltaNetConfig
from intarsia.model.config import ExpertsConfig, ModelConfig

SWIGLU = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
QKVO = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
QK_NORMS = {"q_norm": "q_norm", "k_norm": "k_norm"}
PRE_NORMS = {"mixer_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"

VISION = {"model.visual.": "the vision tower", "visual.": "the vision tower"}
MTP = {"mtp.": "layers that predict several tokens"}


def outside(config: ModelConfig, model: str = "model.", norm: str = "norm") -> Iterator[Row]:
    """What stands around the layers."""
    yield from weights({"embed": f"{model}embed_tokens", "norm": f"{model}{norm}"})
    if not config.tie_embeddings:
        yield row("head.weight", "lm_head.weight")


def convolution(*channels: int) -> Either:
    """The convolution of a linear layer: of queries, keys and values apart, as released, or joined."""
    apart = row("conv.weight", tuple(f"{x}_conv1d.weight" for x in "qkv"), joined_convolutions(*channels))
    return either([apart], [row("conv.weight", "conv1d.weight", CONVOLUTION)])


def experts(
    config: ExpertsConfig, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Either:
    """Routed experts under `experts.`: each with its own matrices, or all of them stacked."""
    apart: list[Row] = []
    for e in range(config.num_experts):
        both = (f"experts.{e}.{gate}.weight", f"experts.{e}.{up}.weight")
        apart.append(row(f"gate_up[{e}]", both, joined(config.d_hidden, config.d_hidden)))
        apart.append(row(f"down[{e}]", f"experts.{e}.{down}.weight"))
    stacked = (row("gate_up", "experts.gate_up_proj"), row("down", "experts.down_proj"))
    return either(apart, stacked)


def experts_in_mxfp4(config: ExpertsConfig, gate: str, up: str, down: str) -> Iterator[Row]:
    """Routed experts under `experts.`, each with its own matrices, as compressed-tensors packs them."""
    for e in range(config.num_experts):
        kinds = ("weight_packed", "weight_scale")
        both = tuple(f"experts.{e}.{name}.{kind}" for name in (gate, up) for kind in kinds)
        yield row(f"gate_up[{e}]", both, MXFP4_ROWS)
        yield row(f"down[{e}]", tuple(f"experts.{e}.{down}.{kind}" for kind in kinds), MXFP4_ROWS)


def block_of_experts(
    config: ExpertsConfig, others: Iterable[Row], packed: Iterable[Row] = ()
) -> Iterator[Either]:
    """A feed-forward of experts as Mixtral has it: `block_sparse_moe` in releases, `mlp` in transformers' modules.
    `others` are all but the routed experts, and `packed` those of releases where they are packed."""
    released, modules = "block_sparse_moe.", "mlp."
    apart, stacked = experts(config, "w1", "w3", "w2").layouts
    packed = [x.under("", released) for x in packed]
    yield either(
        [x.under("", released) for x in apart],
        [x.under("", modules) for x in stacked],
        *([packed] if packed else []),
    )
    others = list(others)
    yield either([x.under("", released) for x in others], [x.under("", modules) for x in others])


def dense_layers(options: Options, depth: int, default: int) -> int:
    """How many layers at the beginning have no experts."""
    options.only("moe_layer_freq", 1, part="choice of layers with experts")
    first = options.get("first_k_dense_replace", int, default)
    listed: list[str] = options.get("mlp_layer_types", list, [])
    return first_dense(options, listed, depth) if listed else first


def first_dense(options: Options, listed: Sequence[str], depth: int) -> int:
    """How many layers at the beginning have no experts, of those that are listed as `dense` or `sparse`."""
    dense = listed.count("dense")
    if list(listed) != ["dense"] * dense + ["sparse"] * (depth - dense):
        raise options.unsupported("mlp_layer_types has a layer without experts behind one with experts")
    return dense


def listed_layers(options: Options, depth: int, default: Sequence[str]) -> list[str]:
    """`layer_types`, of which there must be `depth`; `default` where they are not listed."""
    kinds: list[str] = options.get("layer_types", list, list(default))
    if len(kinds) != depth:
        raise options.unsupported(f"layer_types has {len(kinds)} layers, and num_hidden_layers is {depth}")
    return kinds


def layers_by_interval(options: Options, interval: int) -> list[str]:
    """`layer_types`; where they are not listed, each `full_attention_interval`-th is full attention."""
    depth = options.get("num_hidden_layers", int)
    interval = options.get("full_attention_interval", int, interval)
    return listed_layers(
        options, depth, [LINEAR if (layer + 1) % interval else FULL for layer in range(depth)]
    )


def share_of(rotated: int, dim: int) -> float:
    """The `partial_rotary_factor` that others, who round down, read as `rotated` of `dim` channels."""
    share = rotated / dim
    return share if int(dim * share) == rotated else (rotated + 0.25) / dim


def yarn_options(rotation: Rotation, original_length: int = REQUIRED) -> Yarn | None:
    """What stretches a rotation; `original_length` is what holds where the file says nothing."""
    more = rotation.more
    if rotation.kind == "default":
        more.finish()
        return None
    if rotation.kind != "yarn":
        raise more.unsupported(f"rope_type is {rotation.kind!r}; known are 'default' and 'yarn'")
    yarn = Yarn(
        factor=more.get("factor", float),
        original_length=more.get("original_max_position_embeddings", int, original_length),
        fast=more.get("beta_fast", float, 32.0),
        slow=more.get("beta_slow", float, 1.0),
        truncate=more.get("truncate", bool, True),
        attention_factor=more.maybe("attention_factor", float),
    )
    more.finish()
    return yarn


def rotation_written(theta: float, yarn: Yarn | None = None) -> dict[str, Any]:
    """`rope_parameters` of a rotation of all channels."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.fast,
            "beta_slow": yarn.slow,
            "truncate": yarn.truncate,
        }
        rope |= {} if yarn.attention_factor is None else {"attention_factor": yarn.attention_factor}
    return rope


def read_as(wanted: float, guess: float, read: Callable[[float], float]) -> float:
    """What must be written so that it is read as `wanted` to the bit: `guess`, or a number beside it."""
    near = (guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
    return next((value for value in near if read(value) == wanted), guess)


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """What must stand in `config.json` of every family."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.depth,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def gated_delta_written(config: GatedDeltaNetConfig) -> dict[str, Any]:
    """The sizes of Gated DeltaNet, as Qwen's models and OLMo's spell them."""
    return {
        "linear_num_key_heads": config.num_heads,
        "linear_key_head_dim": config.head_dim,
        "linear_num_value_heads": config.value_heads,
        "linear_value_head_dim": config.value_dim,
        "linear_conv_kernel_dim": config.conv_size,
    }


def the_experts(config: ModelConfig) -> ExpertsConfig:
    """The experts of a model that must have some.

    Raises:
        UnsupportedError: it has none.
    """
    if config.experts is None:
        raise UnsupportedError("the model has no experts")
    return config.experts
