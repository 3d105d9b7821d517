"""The table of mixers: one line each.

Others add their own by a file (`--plugin`, see `intarsia.mixers.plugins`) or, from a package, by an entry point of the
group `intarsia.mixers`, which names a `MixerConfig`:

    [project.entry-points."intarsia.mixers"]
    decayed-mean = "my_package.decayed_mean:DecayedMeanConfig"
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from intarsia.errors import ConfigError, OptionError, did_you_mean
from intarsia.mixers.base import MixerConfig
from intarsia.mixers.plugins import VARIABLE, plugin_mixers, plugins
from intarsia.settings import read

MIXERS = {
    "attention": "attention:AttentionConfig",
    "window": "sliding_window:SlidingWindowConfig",
    "mla": "mla:MLAConfig",
    "dsa": "dsa:DSAConfig",
    "msa": "msa:MSAConfig",
    "moba": "moba:MoBAConfig",
    "nsa": "nsa:NSAConfig",
    "infllm2": "infllm2:InfLLM2Config",
    "qsa": "qsa:QSAConfig",
    "static": "static_sparse:StaticSparseConfig",
    "gdn": "gated_deltanet:GatedDeltaNetConfig",
    "kda": "kda:KDAConfig",
    "mamba": "mamba:MambaConfig",
    "mamba2": "mamba2:Mamba2Config",
    "parallel": "parallel:ParallelConfig",
    "conv": "gated_convolution:GatedConvolutionConfig",
    "channel-mix": "channel_mixing:ChannelMixingConfig",
    "lightning": "lightning:LightningConfig",
    "longhorn": "longhorn:LonghornConfig",
    "deltanet": "deltanet:DeltaNetConfig",
    "deltaproduct": "deltaproduct:DeltaProductConfig",
    "gdn2": "gated_deltanet2:GatedDeltaNet2Config",
    "rwkv7": "rwkv7:RWKV7Config",
    "comba": "comba:CombaConfig",
    "fox": "forgetting:ForgettingConfig",
    "trnn": "trnn:TRNNConfig",
    "linear": "linear_attention:LinearAttentionConfig",
    "performer": "performer:PerformerConfig",
    "retnet": "retnet:RetNetConfig",
    "gla": "gla:GLAConfig",
    "hgrn2": "hgrn2:HGRN2Config",
    "path": "path:PathConfig",
    "deltaformer": "deltaformer:DeltaFormerConfig",
    "simplicial": "simplicial:SimplicialConfig",
}
"""The mixers of this package, by their names in layouts: the module in `intarsia.mixers` and the configuration."""


ENTRY_POINTS = "intarsia.mixers"


def use_plugins(files: Iterable[str | os.PathLike[str]] | None) -> None:
    """Let this process, and all that it starts, name the mixers that files define.

    Raises:
        ConfigError: a file is not there, cannot be run, defines no mixer or one whose name is taken.
    """
    before = os.environ.get(VARIABLE, "")
    paths = dict.fromkeys([*plugins(), *(Path(file).absolute() for file in files or ())])
    if not paths:
        return
    os.environ[VARIABLE] = os.pathsep.join(map(str, paths))
    try:
        _plugged()
    except ConfigError:
        os.environ[VARIABLE] = before
        raise


def own_mixers() -> tuple[type[MixerConfig], ...]:
    """The configurations of this package's mixers."""
    return tuple(map(mixer, MIXERS))


def mixers() -> tuple[type[MixerConfig], ...]:
    """The configurations of all mixers, the oldest first: this package's, those of plugins and of installed packages.

    Raises:
        ConfigError: a plugin or an installed package's entry point does not give a mixer.
    """
    found = {point.name: _load(point) for point in _others()} | _plugged()
    return tuple(
        sorted((*found.values(), *own_mixers()), key=lambda config: (config.about.year, config.about.source))
    )


def names() -> list[str]:
    """The names of all mixers."""
    return [config.type for config in mixers()]


def mixer(name: str) -> type[MixerConfig]:
    """The configuration of a mixer. A plugin's goes before that of an installed package.

    Raises:
        ConfigError: there is none of that name, or a plugin takes a name that is not free.
    """
    plugged = _plugged()
    if name in MIXERS:
        return _load(EntryPoint(name, f"intarsia.mixers.{MIXERS[name]}", ENTRY_POINTS))
    if name in plugged:
        return plugged[name]
    for point in _others():
        if point.name == name:
            return _load(point)
    raise ConfigError(
        f"there is no mixer {name!r}{did_you_mean(name, names())}\nOne of your own comes from a file, by --plugin "
        f"FILE.py, or from an installed package, by an entry point of the group {ENTRY_POINTS!r} (docs/new-mixer.md)"
    )


def _plugged() -> dict[str, type[MixerConfig]]:
    """The mixers of plugins by name."""
    found: dict[str, type[MixerConfig]] = {}
    for config in plugin_mixers():
        if config.type in MIXERS or config.type in found:
            whose = (
                "this package" if config.type in MIXERS else f"the plugin {found[config.type].__module__!r}"
            )
            raise ConfigError(
                f"the plugin {config.__module__!r} calls a mixer {config.type!r}, as {whose} does: choose another name"
            )
        found[config.type] = config
    return found


def _others() -> list[EntryPoint]:
    """The entry points of installed packages. Names of this package's mixers cannot be taken."""
    return [point for point in entry_points(group=ENTRY_POINTS) if point.name not in MIXERS]


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
