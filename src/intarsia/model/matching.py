"""Models of different layers and the same size."""

from __future__ import annotations

import dataclasses

from intarsia.errors import ConfigError
from intarsia.model.config import ModelConfig
from intarsia.model.language_model import cost_of

MULTIPLE = 8
"""Widths are multiples of this, where that is fine enough."""


def match_parameters(config: ModelConfig, target_non_embedding: int, tolerance: float = 0.01) -> ModelConfig:
    """The configuration with as many parameters as the target, embedding and head not counted.

    The rule: the width of the feed-forward changes (with experts, that of every expert, the shared ones
    included, while the dense layers stay), to the multiple of 8 that comes nearest to the target; if that is
    off by more than the tolerance, to the nearest width. Nothing else changes.

    Args:
        target_non_embedding: parameters without embedding and head.
        tolerance: the largest difference allowed, as a fraction of the target.

    Raises:
        ConfigError: no width comes near enough.
    """
    width = _width(config)
    parameters = cost_of(config).non_embedding_parameters
    slope = cost_of(_with_width(config, width + 1)).non_embedding_parameters - parameters
    if not slope:
        raise ConfigError("no block of this model has a feed-forward whose width could be chosen")
    exact = width + (target_non_embedding - parameters) / slope
    for multiple in (MULTIPLE, 1):
        matched = _with_width(config, max(1, round(exact / multiple) * multiple))
        difference = cost_of(matched).non_embedding_parameters - target_non_embedding
        if abs(difference) <= tolerance * target_non_embedding:
            return matched
    raise ConfigError(
        f"no feed-forward width gives {target_non_embedding:,} parameters (embeddings not counted) within "
        f"{tolerance:.1%}: the nearest, {_width(matched)}, is off by {difference:+,}"
    )


def _width(config: ModelConfig) -> int:
    return config.feed_forward.d_hidden if config.experts is None else config.experts.d_hidden


def _with_width(config: ModelConfig, width: int) -> ModelConfig:
    if config.experts is not None:
        return config.replace(experts=dataclasses.replace(config.experts, d_hidden=width))
    return config.replace(feed_forward=dataclasses.replace(config.feed_forward, d_hidden=width))
