"""What `intarsia train` is to do: a preset or a file, with single values set on the command line.

The file is TOML:

    preset = "kimi-linear-tiny"   # or none, and a whole configuration in [model]

    [corpus]                      # as in a plan of `intarsia compare`
    source = "texts/*.md"
    tokenizer = "bpe:4096"

    [model]                       # changes to the preset
    depth = 8
    [model.feed_forward]
    d_hidden = 512

    [training]                    # fields of TrainConfig
    steps = 2000
    lr = 3e-3

`--set training.lr=3e-3` sets the same value from the command line, whatever the file says. As in a plan, the text
"null" stands for no value, for which TOML has no word. Mistakes are told with the line or the `--set` that made them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intarsia.data import CorpusOptions
from intarsia.errors import CheckpointError, ConfigError, OptionError
from intarsia.model import ModelConfig, presets
from intarsia.settings import merge, read, settle_types, toml, with_none
from intarsia.training.config import TrainConfig
from intarsia.training.run_directory import RunDirectory

DEFAULT_STEPS = 1000
DEFAULTS = {"checkpoint_every": 100, "keep_stable": True, "eval_bytes": 1_000_000}
"""Where the command line differs from `TrainConfig`: a run can be killed at any moment and goes on, can be made longer
when it is done, and the evaluation of a large corpus does not take longer than the training. The warm-up is a twentieth
of the steps."""


@dataclass(frozen=True)
class Origin:
    """Where settings were written down, to point to a mistake."""

    file: Path | None = None
    text: str = ""
    changes: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """What each `--set` sets, and its text."""

    def place(self, path: tuple[str | int, ...]) -> str:
        """Where the option at `path` was set, as far as it can be told: `--set x.y=1`, `run.toml:12` or nothing."""
        for changed, text in self.changes.items():
            if path[: len(changed)] == changed or changed[: len(path)] == path != ():
                return f"--set {text}"
        if self.file is None:
            return ""
        line = toml.line_of(self.text, path)
        return f"{self.file}:{line}" if line else str(self.file)

    @contextmanager
    def told(self, *path: str) -> Iterator[None]:
        """Errors about options within say where the option was set; `path` is what they are options of."""
        try:
            yield
        except OptionError as error:
            told = error.under(path)
            # A mistake of the whole is no mistake of the table's first line.
            raise told.at(self.place(told.path) if error.path or not path else "") from None


@dataclass(frozen=True)
class Settings:
    """One training run, as it was asked for."""

    preset: str | None = None
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the preset; without a preset the whole configuration."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig."""
    origin: Origin = field(default_factory=Origin, init=False, compare=False)

    def __post_init__(self) -> None:
        settle_types(self)
        if self.preset is None and not self.model:
            raise OptionError("a preset is missing, or a [model] table with a whole configuration")

    def model_config(self, vocab_size: int | None = None) -> ModelConfig:
        """The model to train, for a tokenizer of `vocab_size` tokens; None: any, to find mistakes before there is
        one."""
        if vocab_size is None:
            vocab_size = self.model.get("vocab_size", 1024)
        with self.origin.told("model"):
            return presets.configure(self.preset, self.model, vocab_size)

    def train_config(
        self,
        steps: int | None = None,
        tokens: int | None = None,
        inherited: Mapping[str, Any] | None = None,
    ) -> TrainConfig:
        """How to train it. `steps`, or `tokens` rounded up to whole steps, replaces what the settings say; what nobody
        says is `inherited` from a run to go on with."""
        values = {**(inherited or {}), **self.training}
        if tokens is not None:
            with self.origin.told("training"):
                shape = TrainConfig.from_dict(
                    {"steps": 1, **{k: values[k] for k in ("rows", "length") if k in values}}
                )
            steps = -(-tokens // shape.tokens_per_step)
        if steps is not None:
            values["steps"] = steps
        total = values.get("steps", DEFAULT_STEPS)
        defaults = {
            **DEFAULTS,
            "steps": DEFAULT_STEPS,
            "warmup_steps": total // 20 if isinstance(total, int) else 0,
        }
        with self.origin.told("training"):
            return TrainConfig.from_dict({**defaults, **values})


def read_settings(
    source: str, changes: Sequence[str] = (), corpus: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a preset's name or a TOML file, with `key=value` changes and what is said of the corpus.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value has the wrong type.
    """
    file = Path(source) if source.endswith(".toml") else None
    values, text = ({"preset": source}, "") if file is None else toml.load(file)
    changed = {set_value(values, change): change for change in changes}
    origin = Origin(file, text, changed)
    with origin.told():
        settings = read(Settings, merge(with_none(values), {"corpus": corpus or {}}))
    object.__setattr__(settings, "origin", origin)
    return settings


def settings_of(run: Path) -> dict[str, Any]:
    """The fields of TrainConfig that a run was started with.

    Raises:
        CheckpointError: there is no run, or its `config.json` cannot be read.
    """
    started = RunDirectory(run).read()
    if started is None or "train" not in started:
        raise CheckpointError(f"{run} holds no training run to go on from")
    return dict(started["train"])


def warmup_of(directory: Path) -> dict[str, Any]:
    """The warm-up of a run that is in a directory already. It was chosen for the number of steps of then, and another
    number changes nothing that is done."""
    started = RunDirectory(directory).read()
    if started is None or "train" not in started:
        return {}
    return {"warmup_steps": started["train"]["warmup_steps"]}


def set_value(values: dict[str, Any], change: str) -> tuple[str, ...]:
    """Apply one `a.b.c=value` to nested tables; the path that it sets."""
    name, equals, text = change.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"--set takes name=value, for instance training.lr=3e-3; got {change!r}")
    table = values
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {change}: {key!r} is a single value and has no parts")
    table[keys[-1]] = parse_value(text.strip())
    return tuple(keys)


def parse_value(text: str) -> Any:
    """`3e-3`, `true`, `[1, 2]`, `none` as what they mean; anything else is text."""
    if text.lower() in {"none", "null"}:
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
