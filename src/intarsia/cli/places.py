"""Where models are found: by a preset's name, in a directory of a model, or in that of a training run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from intarsia.errors import CheckpointError, ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from intarsia.checkpoints.options import Sparse
    from intarsia.data import Tokenizer
    from intarsia.data.published import Conduct
    from intarsia.model import InferenceModel, LanguageModel, ModelConfig


def find_config(target: str, vocab_size: int | None = None, sparse: str = "") -> ModelConfig:
    """The configuration of a preset, of a model on disk (ours, or of a published family), or of a training run,
    finished or not.

    Raises:
        ConfigError: there is neither a preset nor a directory of that name.
        CheckpointError: the directory holds no model, or the repository is not in the cache.
    """
    from intarsia.model import ModelConfig, presets

    directory = Path(target)
    if target in presets.names():
        return presets.get(target, vocab_size=vocab_size)
    if not directory.exists() and target == directory.name:
        near = nearest(target, presets.names())
        meant = f"did you mean {near!r}? " if near else ""
        raise ConfigError(
            f"there is neither a directory nor a preset {target!r}: {meant}`intarsia presets` lists what there is"
        )
    # What reads directories takes as long to load as all the rest: a preset needs none of it, a run that is finished
    # not what trains.
    from intarsia.checkpoints.opening import load_config
    from intarsia.checkpoints.places import is_repository

    if not directory.exists() and not is_repository(target):
        raise ConfigError(
            f"there is no directory {target}, and presets have no slashes: see `intarsia presets`"
        )
    if vocab_size is not None:
        raise ConfigError("--vocab-size is for presets: a trained model has the vocabulary that it has")
    if is_repository(target):
        return load_config(target, sparse=checked_sparse(sparse))
    place = model_directory(directory)
    with told_plugins(directory):
        if place == directory and is_unfinished(directory):
            from intarsia.training.run_directory import RunDirectory, read_json

            return ModelConfig.from_dict(read_json(RunDirectory(directory).config)["model"])
        return load_config(place, sparse=checked_sparse(sparse))


@contextmanager
def told_plugins(directory: Path) -> Iterator[None]:
    """A model whose mixers come from files is not read without these: the error says which they were, and where."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        from intarsia.training.run_directory import RunDirectory, read_json

        for run in (directory, directory / "train", directory.parent):
            if (file := RunDirectory(run).config).is_file():
                files = (read_json(file).get("fingerprint") or {}).get("files") or {}
                missing = [f"--plugin {path}" for name, path in files.items() if name not in sys.modules]
                if missing:
                    raise type(error)(f"{error}\nIt was trained with {' '.join(missing)}") from error
        raise


def model_directory(directory: Path) -> Path:
    """The directory of the model itself, where that of a training run may be given.

    Raises:
        CheckpointError: it is the directory of a comparison, which holds several models, or a file.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file: give the directory that it is in")
    for place in (directory / "model", directory / "train" / "model"):
        if (place / "config.json").exists():
            return place
    models = sorted(
        path for kind in ("runs", "exams") for path in directory.glob(f"{kind}/*/train/model/config.json")
    )
    if models:
        listed = "".join(f"\n  {path.parents[2]}" for path in models)
        raise CheckpointError(f"{directory} holds a comparison; choose one of its models:{listed}")
    return directory


def finished_model(directory: Path) -> Path:
    """The directory of the model itself, of a run that has come to its end.

    Raises:
        CheckpointError: it has not, or there is no model, or several.
    """
    if is_unfinished(directory):
        raise CheckpointError(
            f"the training run in {directory} is not finished and holds no model yet: give the same "
            "`intarsia train` command again to go on"
        )
    return model_directory(directory)


def is_unfinished(directory: Path) -> bool:
    """Whether this is the directory of a training run that has not come to its end, and so has no model."""
    from intarsia.training.run_directory import RunDirectory, read_json

    run = RunDirectory(directory)
    return run.config.is_file() and not run.model.is_dir() and "train" in read_json(run.config)


def model_place(target: str) -> Path:
    """The directory of a model that is to be read: its own, that of a training run that has come to its end, or that of
    a repository in the cache.

    Raises:
        CheckpointError: there is none, or several.
    """
    from intarsia.checkpoints.places import find_folder, is_repository

    # What is not there is told of alike, whatever it may have been.
    absent = is_repository(target) or not Path(target).exists()
    return find_folder(target) if absent else finished_model(Path(target))


def load(
    target: str, device: str = "auto", dtype: str = "", weights: str | None = None, sparse: str = ""
) -> tuple[InferenceModel, Tokenizer, Conduct]:
    """A model, ready to run, its tokenizer, and how it is to be asked.

    Raises:
        CheckpointError: there is no model, or no tokenizer with it.
        ConfigError: no such device, dtype or format of weights.
    """
    from intarsia.checkpoints import native
    from intarsia.checkpoints.opening import load as open_model
    from intarsia.data.published import Conduct, conduct_of, load_tokenizer
    from intarsia.data.tokenizer import holds_tokenizer
    from intarsia.model import InferenceModel

    as_dtype, on = checked_dtype(dtype), find_device(device)
    place = model_place(target)
    ours = native.read_options(place).get("format") == native.FORMAT
    # In a folder of its own; beside the model where transformers has saved both.
    own = place / native.TOKENIZER if ours and (place / native.TOKENIZER).is_dir() else place
    if ours and not holds_tokenizer(own):
        raise CheckpointError(
            f"{place} holds a model without a tokenizer, so no text can be read or written: from where "
            f"the model came from, copy its files (tokenizer.json, tokenizer_config.json, ...) into {native.TOKENIZER}/"
        )
    tokenizer = load_tokenizer(place)
    with told_plugins(Path(target)):
        opened: LanguageModel | InferenceModel = open_model(
            place,
            as_dtype,
            on,
            weights=weights,  # type: ignore[arg-type]  # which is checked
            sparse=checked_sparse(sparse),
        )
    model = opened if isinstance(opened, InferenceModel) else InferenceModel(opened)
    # One that was converted has the files of its origin beside its tokenizer.
    asked = conduct_of(own)
    if ours and not asked.stop:
        return model, tokenizer, Conduct((tokenizer.separator,), frozenset([tokenizer.separator]))
    return model, tokenizer, asked if asked.stop else replace(asked, stop=frozenset([tokenizer.separator]))


def separator_of(place: Path) -> int | None:
    """The token that ends a text of a model that was trained here, with a tokenizer; None of others, whose own files
    say it."""
    from intarsia.checkpoints.native import TOKENIZER
    from intarsia.data.published import load_tokenizer
    from intarsia.data.tokenizer_base import METADATA_FILE

    return load_tokenizer(place).separator if (place / TOKENIZER / METADATA_FILE).is_file() else None


def checked_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for no name.

    Raises:
        ConfigError: there is none.
    """
    from intarsia.checkpoints.native import DTYPES
    from intarsia.model.config import unknown

    if name and name not in DTYPES:
        raise ConfigError(f"--dtype was given {unknown(name, DTYPES, 'dtype')}")
    return DTYPES[name] if name else None


def checked_sparse(value: str) -> Sparse:
    """What `--sparse` says.

    Raises:
        ConfigError: something that it cannot.
    """
    if value not in ("", "dense"):
        raise ConfigError(
            f"--sparse was given {value!r}: it can be dense, or is left out for layers as the model says"
        )
    return "dense" if value == "dense" else "published"


def packed_weights(target: str) -> tuple[str, int] | None:
    """The format and the bytes of the weights of a model that are packed in its files; None where they are not.

    Raises:
        CheckpointError: the files are damaged.
    """
    from intarsia.checkpoints import native
    from intarsia.checkpoints.packed_native import bytes_of
    from intarsia.checkpoints.places import find_folder, is_repository

    place = find_folder(target) if is_repository(target) else model_directory(Path(target))
    if not (place / native.CONFIG).is_file() or not native.is_packed(native.read_options(place)):
        return None
    return bytes_of(place)


def find_device(name: str) -> str:
    """The device to run on; `auto` is a GPU where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"there is no device {name!r} here: use auto, cpu, cuda or cuda:N") from None
    return name
