"""Models of different layers and the same size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from intarsia.errors import ConfigError
from intarsia.model.config import ModelConfig
from intarsia.model.cost import ModelCost
from intarsia.model.language_model import cost_of

Count = Callable[[ModelCost], int]

MULTIPLE = 8
"""Widths are multiples of this, where that is fine enough."""


def match_parameters(
    config: ModelConfig,
    target_non_embedding: int,
    tolerance: float = 0.01,
    count: Count = attrgetter("non_embedding_parameters"),
) -> ModelConfig:
    """The configuration with as many parameters as the target, embedding and head not counted.

    The rule: the width of the feed-forward changes (with experts, that of every expert, the shared ones
    included, while the dense layers stay), to the multiple of 8 that comes nearest to the target; if that is
    off by more than the tolerance, to the nearest width. Nothing else changes.

    Args:
        target_non_embedding: parameters without embedding and head.
        tolerance: the largest difference allowed, as a fraction of the target.
        count: what is counted, for instance `active_non_embedding_parameters`.

    Raises:
        ConfigError: no width comes near enough.
    """
    width = _width(config)
    parameters = count(cost_of(config))
    slope = count(cost_of(_with_width(config, width + 1))) - parameters
    if not slope:
        raise ConfigError("no block of this model has a feed-forward whose width could be chosen")
    exact = width + (target_non_embedding - parameters) / slope
    for multiple in (MULTIPLE, 1):
        matched = _with_width(config, max(1, round(exact / multiple) * multiple))
        difference = count(cost_of(matched)) - target_non_embedding
        if abs(difference) <= tolerance * target_non_embedding:
            return matched
    raise ConfigError(
        f"no feed-forward width gives {target_non_embedding:,} parameters (embeddings not counted) within "
        f"{tolerance:.1%}: the nearest, {_width(matched)}, is off by {difference:+,}"
    )


def match_states(config: ModelConfig, target_bytes: int, length: int, tolerance: float = 0.05) -> ModelConfig:
    """The configuration whose states take as many bytes after `length` tokens, by its sliding windows.

    The rule: all layers with a sliding window get the same one, that whose bytes come nearest. Nothing else changes,
    and no parameter. A configuration that is near enough stays as it is.

    Args:
        target_bytes: of one sequence's states (`ModelCost.state_bytes`).
        tolerance: the largest difference allowed, as a fraction of the target.

    Raises:
        ConfigError: no window comes near enough, or there is none.
    """

    def off(windows: int | None) -> int:
        made = config if windows is None else _with_window(config, windows)
        return cost_of(made).state_bytes(length) - target_bytes

    if abs(off(None)) <= tolerance * target_bytes:
        return config
    if not _windowed(config):
        raise ConfigError(
            f"its states take {off(None) + target_bytes:,} bytes after {length:,} tokens, where {target_bytes:,} are "
            f"wanted within {tolerance:.1%}, and it has no sliding window that could be chosen"
        )
    low, high = 1, length
    while low < high:  # the first window with at least as many bytes; bytes grow with the window
        middle = (low + high) // 2
        low, high = (low, middle) if off(middle) >= 0 else (middle + 1, high)
    window = min((max(1, low - 1), low), key=lambda one: abs(off(one)))
    if abs(off(window)) > tolerance * target_bytes:
        raise ConfigError(
            f"no sliding window gives states of {target_bytes:,} bytes after {length:,} tokens within {tolerance:.1%}: "
            f"the nearest, {window}, is off by {off(window):+,}"
        )
    return _with_window(config, window)


def _windowed(config: ModelConfig) -> list[str]:
    """The mixers with a sliding window."""
    return [
        name for name, options in config.mixers.items() if isinstance(getattr(options, "window", None), int)
    ]


def _with_window(config: ModelConfig, window: int) -> ModelConfig:
    options: dict[str, Any] = {"window": window}
    changed = {name: dataclasses.replace(config.mixers[name], **options) for name in _windowed(config)}
    return config.replace(mixers={**config.mixers, **changed})


def _width(config: ModelConfig) -> int:
    return config.feed_forward.d_hidden if config.experts is None else config.experts.d_hidden


def _with_width(config: ModelConfig, width: int) -> ModelConfig:
    if config.experts is not None:
        return config.replace(experts=dataclasses.replace(config.experts, d_hidden=width))
    return config.replace(feed_forward=dataclasses.replace(config.feed_forward, d_hidden=width))
