"""The table of mixers: one line each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intarsia.errors import ConfigError
from intarsia.mixers.attention import AttentionConfig
from intarsia.mixers.base import MixerConfig
from intarsia.mixers.gated_deltanet import GatedDeltaNetConfig
from intarsia.mixers.kda import KDAConfig
from intarsia.mixers.mla import MLAConfig


@dataclass(frozen=True)
class Entry:
    """What is told of a mixer in tables: its name in layouts, full name, year, source and update rule."""

    config: type[MixerConfig]
    title: str
    year: int
    source: str
    equation: str
    example: MixerConfig
    """Options of a common size (width 1024), for tables of cost."""

    @property
    def name(self) -> str:
        """The name in the registry and in layouts."""
        return self.config.type


ENTRIES: tuple[Entry, ...] = (
    Entry(
        AttentionConfig, "Softmax attention", 2017, "arXiv:1706.03762",
        "o_t = softmax(q_t K^T / sqrt(K)) V", AttentionConfig(8, 128),
    ),
    Entry(
        MLAConfig, "Multi-head latent attention", 2024, "arXiv:2405.04434",
        "o_t = softmax(q_t [W_k c; k_shared]^T / sqrt(K)) W_v c", MLAConfig(8, 512, 128, 64, 128),
    ),
    Entry(
        GatedDeltaNetConfig, "Gated DeltaNet", 2024, "arXiv:2412.06464",
        "S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T", GatedDeltaNetConfig(8, 128),
    ),
    Entry(
        KDAConfig, "Kimi Delta Attention", 2025, "arXiv:2510.26692",
        "S_t = (I - b_t k_t k_t^T) Diag(exp g_t) S_{t-1} + b_t k_t v_t^T", KDAConfig(8, 128),
    ),
)  # fmt: skip


def names() -> list[str]:
    """The names of all mixers."""
    return [entry.name for entry in ENTRIES]


def entry(name: str) -> Entry:
    """The entry of a mixer.

    Raises:
        ConfigError: there is none of that name.
    """
    for candidate in ENTRIES:
        if candidate.name == name:
            return candidate
    close = difflib.get_close_matches(str(name), names(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"there is no mixer {name!r}{hint} There are: {', '.join(names())}")


def config_to_dict(config: MixerConfig) -> dict[str, Any]:
    """The options as JSON-able values, with the mixer's name under `type`."""
    return {"type": config.type, **dataclasses.asdict(config)}


def config_from_dict(values: Mapping[str, Any]) -> MixerConfig:
    """The inverse of `config_to_dict`.

    Raises:
        ConfigError: an unknown mixer, or an option that it does not have or that is missing.
    """
    options = dict(values)
    kind = options.pop("type", None)
    if kind is None:
        raise ConfigError(
            f"the options of a mixer need a 'type', one of {', '.join(names())}; got {dict(values)}"
        )
    config = entry(kind).config
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in options:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"the mixer {kind!r} has no option {name!r}{hint} It has: {', '.join(fields)}")
    required = (n for n, field in fields.items() if field.default is dataclasses.MISSING)
    missing = [name for name in required if name not in options]
    if missing:
        raise ConfigError(f"the mixer {kind!r} needs the option {', '.join(missing)}")
    return config(**options)
