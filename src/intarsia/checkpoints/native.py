"""Models in a directory of their own: `config.json`, `model.safetensors` and, if given, `tokenizer/`.

A directory takes its name when it is complete, and `config.json` holds the checksum of the weights, so that one that
was half copied or damaged is known as such. Tensors keep their dtypes; tied weights are
there once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from intarsia.errors import CheckpointError, ConfigError
from intarsia.files import (
    directory_atomically,
    link_or_copy,
    message_of,
    naming,
    sha256,
    write_json,
)
from intarsia.model.config import ModelConfig
from intarsia.model.initialization import make_unsaved_buffers
from intarsia.model.language_model import LanguageModel

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
FORMAT, VERSION = "intarsia", 1
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Saveable(Protocol):
    """What can write itself into a directory, as tokenizers can."""

    def save(self, directory: Path, /) -> Any:
        """Write everything into `directory`, which exists."""


def save_model(
    directory: str | os.PathLike[str],
    model: LanguageModel,
    tokenizer: Saveable | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model. A crash leaves the old directory or the new one, and no mixture.

    Args:
        directory: made if it is not there, and else replaced as a whole; other files in it stay.
        tokenizer: written into `tokenizer/` by its `save`. Without one a `tokenizer/` that is there stays.
        extra: JSON-able values to keep with the model; `load_extra` reads them.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in stored(model).items()}
    target = Path(directory)
    with directory_atomically(target) as new:
        write_tensors(tensors, new / WEIGHTS, {"model": FORMAT})
        config = {
            "format": FORMAT,
            "version": VERSION,
            "model_type": FORMAT,  # by which transformers knows it: intarsia.integrations.huggingface
            "architectures": ["IntarsiaForCausalLM"],
            "dtype": name_of_dtype(model.embed.weight.dtype),
            "weights": {"file": WEIGHTS, "sha256": sha256(new / WEIGHTS)},
            "model": model.config.to_dict(),
            "extra": dict(extra or {}),
        }
        write_json(new / CONFIG, config)
        if tokenizer is not None:
            (new / TOKENIZER).mkdir()
            tokenizer.save(new / TOKENIZER)
        take_over(target, new)


def take_over(old: Path, new: Path, unless: Callable[[str], bool] = lambda name: False) -> None:
    """Give `new` what `old` holds and it does not, unless `unless` holds of the name."""
    for entry in old.iterdir() if old.is_dir() else ():
        place = new / entry.name
        if place.exists() or unless(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, place, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(entry, place)


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a `.safetensors` file, which is not yet of any name that is read.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with naming(path):
            save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        # The library reports what the system said as text: on a full disk "No space left on device (os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise CheckpointError(f"the weights could not be written to {path}: {error}") from error
        reason = OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path))
        raise CheckpointError(message_of(reason)) from error


def load_model(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    verify: bool = True,
) -> LanguageModel:
    """Read a model that `save_model` wrote, in training mode as a new one.

    Args:
        dtype: the dtype of parameters, except for those that are always float32; None for that of the file.
        device: where to put the parameters.
        verify: compare the file's checksum, which reads it twice.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of the configuration.
    """
    values = _read_config(directory)
    config, weights = _model_config(directory, values), Path(directory) / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing: the directory holds no weights")
    if verify and sha256(weights) != values["weights"]["sha256"]:
        raise CheckpointError(
            f"{weights} is not the file that {CONFIG} beside it describes (the checksums differ): "
            f"it is damaged, cut off, or from another save"
        )
    with torch.device("meta"):
        model = LanguageModel(config).to(DTYPES[values["dtype"]])
    expected = stored(model)
    try:
        with safe_open(weights, "pt", device=str(device)) as file:
            _check_tensors(weights, file, expected)
            # Copies: the file's own pages are not aligned, which changes the last bits of products, and a
            # file that is overwritten must not change a model.
            tensors = {name: file.get_tensor(name).clone() for name in expected}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from error
    # The head is given too, to satisfy the check for completeness; afterwards it is tied again.
    tied = {"head.weight": tensors["embed.weight"]} if config.tie_embeddings else {}
    model.load_state_dict({**tensors, **tied}, assign=True)
    model.tie_weights()
    make_unsaved_buffers(model, torch.device(device))
    return model if dtype is None else model.to(dtype)


def load_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a saved model.

    Raises:
        CheckpointError: `config.json` is missing, damaged or of something else.
    """
    return _model_config(directory, _read_config(directory))


def load_extra(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The values that were saved as `extra`.

    Raises:
        CheckpointError: `config.json` is missing, damaged or of something else.
    """
    return dict(_read_config(directory)["extra"])


def stored(model: LanguageModel) -> dict[str, Tensor]:
    """The tensors that a file of this model holds, by name."""
    tensors: dict[str, Tensor] = model.state_dict()
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    return tensors


def read_options(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What `config.json` holds, of whatever model it is.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(directory) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        where = "the directory is not there" if not path.parent.is_dir() else f"it has no {CONFIG}"
        raise CheckpointError(f"no model in {path.parent}: {where}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {message_of(error)}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged or was cut off: it is no JSON ({error}). It describes the weights beside it, which are "
            "of no use without it: take the directory from a copy, or save the model again. If it is that of a "
            "training run whose `checkpoints/` are there, remove it and `result.json`, and give the `intarsia train` "
            "command again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not describe an Intarsia model, nor another")
    return values


def _read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    path, values = Path(directory) / CONFIG, read_options(directory)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe an Intarsia model")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {values.get('version')}; this release reads {VERSION}"
        )
    missing = [key for key in ("dtype", "weights", "model", "extra") if key not in values]
    if missing or values["dtype"] not in DTYPES or "sha256" not in values["weights"]:
        raise CheckpointError(
            f"{path} is damaged: {', '.join(missing) or 'dtype or weights'} cannot be right"
        )
    return values


def _model_config(directory: str | os.PathLike[str], values: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(values["model"])
    except ConfigError as error:
        raise CheckpointError(f"{Path(directory) / CONFIG} has no valid model: {error}") from error


def _check_tensors(path: Path, file: Any, expected: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes, before any tensor is read."""
    names = set(file.keys())
    problems = [f"{name} is missing" for name in expected if name not in names]
    problems += [f"{name} does not belong there" for name in sorted(names - expected.keys())]
    for name, tensor in expected.items():
        if name in names:
            stored = file.get_slice(name)
            shape, dtype = list(stored.get_shape()), _SAFETENSORS.get(stored.get_dtype())
            if shape != list(tensor.shape):
                problems.append(f"{name} is {shape} and should be {list(tensor.shape)}")
            elif dtype != tensor.dtype:
                problems.append(f"{name} is {stored.get_dtype()} and should be {tensor.dtype}")
    if problems:
        shown = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        raise CheckpointError(f"{path} does not fit its {CONFIG}, {len(problems)} tensors in all: {shown}")


def name_of_dtype(dtype: torch.dtype) -> str:
    """`"bfloat16"` and so on, as files call it."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise CheckpointError(f"models are saved in {', '.join(DTYPES)}; this one is {dtype}")


_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
