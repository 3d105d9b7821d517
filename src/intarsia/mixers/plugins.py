"""Mixers from a file of the user's own, without a package around it: `--plugin my_layer.py`.

The files are named in the environment variable `INTARSIA_PLUGINS`, so that the processes that a command starts find
them too. A file is a module of its name: its code is part of a run's fingerprint as that of any mixer, and a run goes
on only with the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from intarsia.errors import ConfigError
from intarsia.mixers.base import MixerConfig

VARIABLE = "INTARSIA_PLUGINS"
"""Paths of files, divided as those in PATH."""


def plugin_mixers() -> tuple[type[MixerConfig], ...]:
    """The configurations of all mixers that the files define.

    Raises:
        ConfigError: a file is not there, cannot be run, or defines no mixer.
    """
    return tuple(config for path in plugins() for config in _mixers_of(path))


def plugins() -> list[Path]:
    """The files that are named."""
    return [Path(file) for file in os.environ.get(VARIABLE, "").split(os.pathsep) if file]


def _mixers_of(path: Path) -> tuple[type[MixerConfig], ...]:
    module = _module(path)
    configs = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, MixerConfig) and value.__module__ == module.__name__
    ]
    # One without a name is a base of others.
    named = tuple(config for config in configs if hasattr(config, "type"))
    if not named:
        raise ConfigError(
            f"{path} defines no mixer: a MixerConfig with a `type` (docs/new-mixer.md shows one)"
        )
    return named


def _module(path: Path) -> ModuleType:
    name = re.sub(r"\W", "_", path.stem)
    loaded = sys.modules.get(name)
    if loaded is not None and _file_of(loaded) == path:
        return loaded
    if not path.is_file():
        raise ConfigError(f"there is no plugin {path}: it is a Python file that defines a mixer")
    found = None if loaded is not None else importlib.util.find_spec(name)
    if loaded is not None or (found is not None and found.origin != str(path)):
        raise ConfigError(f"the plugin {path} cannot be called {name!r}: another module is; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the plugin {path} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"the plugin {path} failed with {type(error).__name__}: {error}") from error
    return module


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).absolute()
