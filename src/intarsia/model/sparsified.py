"""The configuration of a model whose layers of full attention become sparse: the same weights, and an indexer beside
them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

from intarsia.errors import ConfigError, OptionError
from intarsia.mixers import AttentionConfig, MixerConfig, MLAConfig, config_from_dict, config_to_dict
from intarsia.model.config import ModelConfig

Choose = Callable[[Any, int, Mapping[str, Any]], dict[str, Any]]
MOST_HEADS, MOST_CHANNELS = 64, 128
"""Of an indexer, where nothing else is said: those of DeepSeek-V3.2."""


def sparsified(
    config: ModelConfig, kind: str, read: int, options: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model with each of its layers of full attention (for `"qsa"` and `"msa"`) or of latent attention (`"dsa"`) as
    one of this kind: the layer's own options, and those of an indexer that picks about `read` tokens for each.

    Args:
        options: of the indexer, in place of what is chosen here, such as `index_heads` or `index_pool`.

    Raises:
        ConfigError: there is no such kind, no layer that could become one, or options that do not fit together.
    """
    if kind not in KINDS:
        raise ConfigError(f"layers of attention can become {', '.join(KINDS)}; got {kind!r}")
    if read < 1:
        raise ConfigError(f"each token reads at least one; got {read}")
    dense, choose = KINDS[kind]
    names = [name for name, mixer in config.mixers.items() if type(mixer) is dense and name in config.layers]
    if not names:
        there = ", ".join(dict.fromkeys(config.mixers[name].type for name in config.layers))
        ways = ", ".join(f"{made_of.type} becomes {other}" for other, (made_of, _) in KINDS.items())
        raise ConfigError(
            f"{kind} is made of {dense.type}, and the model has no such layer: its layers are {there} ({ways})"
        )
    mixers, said = dict(config.mixers), dict(options or {})
    for name in names:
        own = config_to_dict(mixers[name])
        if taken := sorted(set(own) & set(said)):
            raise OptionError("is the layer's own, and its weights are made for it", (taken[0],))
        mixers[name] = config_from_dict({**own, **choose(mixers[name], read, said), **said, "type": kind})
    rename = {dense.type: kind} if dense.type in names and kind not in mixers else {}
    return _renamed(config, mixers, rename)


def reading_everything(config: ModelConfig, dense: bool) -> ModelConfig:
    """The model with all layers that have an indexer that learns reading everything, or what is picked."""
    mixers = {
        name: dataclasses.replace(cast(Any, mixer), dense=dense) if hasattr(mixer, "dense") else mixer
        for name, mixer in config.mixers.items()
    }
    return config.replace(mixers=mixers)


def _renamed(config: ModelConfig, mixers: Mapping[str, MixerConfig], names: Mapping[str, str]) -> ModelConfig:
    """The model with these mixers, of which some have other names in the layout."""
    words = (word.partition("*") for word in config.layout.split())
    placement = config.norm_placement
    if isinstance(placement, Mapping):
        placement = {names.get(name, name): where for name, where in placement.items()}
    return config.replace(
        layout=" ".join(f"{names.get(name, name)}{star}{times}" for name, star, times in words),
        mixers={names.get(name, name): mixer for name, mixer in mixers.items()},
        norm_placement=placement,
        mixer_only=tuple(names.get(name, name) for name in config.mixer_only),
    )


def _dsa(mixer: MLAConfig, read: int, said: Mapping[str, Any]) -> dict[str, Any]:
    pool = said.get("index_pool", 1)
    pool = pool if isinstance(pool, int) and pool > 0 else 1
    return {
        "top_k": max(read // pool, 1) * pool,
        "index_heads": min(mixer.num_heads, MOST_HEADS),
        "index_dim": max(min(mixer.key_dim, MOST_CHANNELS), mixer.rope_dim),
    }


def _qsa(mixer: AttentionConfig, read: int, said: Mapping[str, Any]) -> dict[str, Any]:
    ratio = said.get("index_ratio", 4)
    ratio = ratio if isinstance(ratio, int) and ratio > 0 else 1
    return {
        "index_heads": min(mixer.num_heads, MOST_HEADS),
        "index_dim": max(min(mixer.head_dim, MOST_CHANNELS), mixer.rotated),
        "index_budget": max(read // ratio, 1) * ratio,
    }


def _msa(mixer: AttentionConfig, read: int, said: Mapping[str, Any]) -> dict[str, Any]:
    # Eight blocks to choose from at least, where there is room for them.
    block = said.get("index_block_size", min(128, max(read // 8, 1)))
    size = block if isinstance(block, int) and block > 0 else 1
    return {
        "index_dim": max(min(mixer.head_dim, MOST_CHANNELS), mixer.rotated),
        "index_block_size": block,
        "index_topk_blocks": max(read // size, 1),
    }


KINDS: Mapping[str, tuple[type[MixerConfig], Choose]] = MappingProxyType(
    {"dsa": (MLAConfig, _dsa), "qsa": (AttentionConfig, _qsa), "msa": (AttentionConfig, _msa)}
)
"""What layers can become, of which kind they are made, and how an indexer is chosen for one."""
