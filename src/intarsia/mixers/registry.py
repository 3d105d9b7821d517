"""The table of mixers: one line each.

Other packages add their own by an entry point of the group `intarsia.mixers`, which names a `MixerConfig`:

    [project.entry-points."intarsia.mixers"]
    decayed-mean = "my_package.decayed_mean:DecayedMeanConfig"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from intarsia.errors import ConfigError, OptionError, did_you_mean
from intarsia.mixers.attention import AttentionConfig
from intarsia.mixers.base import MixerConfig
from intarsia.mixers.comba import CombaConfig
from intarsia.mixers.deltaformer import DeltaFormerConfig
from intarsia.mixers.deltanet import DeltaNetConfig
from intarsia.mixers.deltaproduct import DeltaProductConfig
from intarsia.mixers.forgetting import ForgettingConfig
from intarsia.mixers.gated_deltanet import GatedDeltaNetConfig
from intarsia.mixers.gated_deltanet2 import GatedDeltaNet2Config
from intarsia.mixers.gla import GLAConfig
from intarsia.mixers.hgrn2 import HGRN2Config
from intarsia.mixers.kda import KDAConfig
from intarsia.mixers.lightning import LightningConfig
from intarsia.mixers.linear_attention import LinearAttentionConfig
from intarsia.mixers.longhorn import LonghornConfig
from intarsia.mixers.mamba import MambaConfig
from intarsia.mixers.mamba2 import Mamba2Config
from intarsia.mixers.mla import MLAConfig
from intarsia.mixers.path import PathConfig
from intarsia.mixers.performer import PerformerConfig
from intarsia.mixers.retnet import RetNetConfig
from intarsia.mixers.rwkv7 import RWKV7Config
from intarsia.mixers.simplicial import SimplicialConfig
from intarsia.mixers.sliding_window import SlidingWindowConfig
from intarsia.mixers.trnn import TRNNConfig
from intarsia.settings import read

MIXERS: tuple[type[MixerConfig], ...] = (
    AttentionConfig,
    SlidingWindowConfig,
    MLAConfig,
    GatedDeltaNetConfig,
    KDAConfig,
    MambaConfig,
    Mamba2Config,
    LightningConfig,
    LonghornConfig,
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNet2Config,
    RWKV7Config,
    CombaConfig,
    ForgettingConfig,
    TRNNConfig,
    LinearAttentionConfig,
    PerformerConfig,
    RetNetConfig,
    GLAConfig,
    HGRN2Config,
    PathConfig,
    DeltaFormerConfig,
    SimplicialConfig,
)
"""The mixers of this package."""


@dataclass(frozen=True)
class Missing:
    """A mixer that the tables name and that is not built yet."""

    name: str
    title: str
    year: int
    source: str


NOT_YET: tuple[Missing, ...] = (
    Missing("nsa", "Native sparse attention", 2025, "arXiv:2502.11089"),
    Missing("moba", "Mixture of block attention", 2025, "arXiv:2502.13189"),
    Missing("dsa", "DeepSeek sparse attention", 2025, "arXiv:2512.02556"),
)

ENTRY_POINTS = "intarsia.mixers"


def mixers() -> tuple[type[MixerConfig], ...]:
    """The configurations of all mixers, the oldest first: this package's and those of installed packages.

    Raises:
        ConfigError: an installed package's entry point does not give a mixer.
    """
    others = (_load(point) for point in _others())
    return tuple(sorted((*MIXERS, *others), key=lambda config: (config.about.year, config.about.source)))


def names() -> list[str]:
    """The names of all mixers."""
    return [config.type for config in mixers()]


def mixer(name: str) -> type[MixerConfig]:
    """The configuration of a mixer.

    Raises:
        ConfigError: there is none of that name.
    """
    for config in MIXERS:
        if config.type == name:
            return config
    for point in _others():
        if point.name == name:
            return _load(point)
    for missing in NOT_YET:
        if missing.name == name:
            raise ConfigError(f"the mixer {name!r} ({missing.title}) is not built yet")
    raise ConfigError(f"there is no mixer {name!r}{did_you_mean(name, names())}")


def _others() -> list[EntryPoint]:
    """The entry points of installed packages. Names of this package's mixers cannot be taken."""
    own = {config.type for config in MIXERS}
    return [point for point in entry_points(group=ENTRY_POINTS) if point.name not in own]


def _load(point: EntryPoint) -> type[MixerConfig]:
    try:
        config = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the mixer {point.name!r} cannot be loaded from {point.value!r}: {error}"
        ) from error
    if not (isinstance(config, type) and issubclass(config, MixerConfig) and config.type == point.name):
        raise ConfigError(
            f"the entry point {point.name!r} must name a MixerConfig whose type is {point.name!r};"
            f" {point.value!r} is {config!r}"
        )
    return config


def config_to_dict(config: MixerConfig) -> dict[str, Any]:
    """The options as JSON-able values, with the mixer's name under `type`."""
    return {"type": config.type, **dataclasses.asdict(config)}


def config_from_dict(values: Mapping[str, Any]) -> MixerConfig:
    """The inverse of `config_to_dict`.

    Raises:
        OptionError: an unknown mixer, an option that it does not have or that is missing, or a value that cannot be
            right. `path` is that option's name.
    """
    if not isinstance(values, Mapping):
        raise OptionError(f"must be a table, the options of a mixer; got {values!r}")
    options = dict(values)
    kind = options.pop("type", None)
    if kind is None:
        raise OptionError(
            f"the options of a mixer need a 'type', one of {', '.join(names())}; got {dict(values)}"
        )
    try:
        config = mixer(kind)
    except ConfigError as error:
        raise OptionError(str(error), ("type",)) from None
    return read(config, options)
