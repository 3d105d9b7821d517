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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from intarsia.checkpoints.filling import Reader, fill, own_plan
from intarsia.checkpoints.plan import stored
from intarsia.checkpoints.tensor_folder import TensorFolder
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
from intarsia.model.language_model import LanguageModel

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer"
FORMAT, VERSION = "intarsia", 1
PACKED_VERSION = 2
"""Of directories whose weights are packed, which earlier releases do not read; see `packed_native`."""
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
        dtype = name_of_dtype(model.embed.weight.dtype)
        write_json(new / CONFIG, described(model.config, dtype, new / WEIGHTS, extra))
        if tokenizer is not None:
            (new / TOKENIZER).mkdir()
            tokenizer.save(new / TOKENIZER)
        take_over(target, new)


def described(
    config: ModelConfig,
    dtype: str,
    weights: Path,
    extra: Mapping[str, Any] | None = None,
    packed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `config.json` says of a model whose weights have been written, `packed` of how they are."""
    file: dict[str, Any] = {"file": WEIGHTS, "sha256": sha256(weights)}
    return {
        "format": FORMAT,
        "version": VERSION if packed is None else PACKED_VERSION,
        "model_type": FORMAT,  # by which transformers knows it: intarsia.integrations.huggingface
        "architectures": ["IntarsiaForCausalLM"],
        "dtype": dtype,
        "weights": file if packed is None else {**file, "packed": dict(packed)},
        "model": config.to_dict(),
        "extra": dict(extra or {}),
    }


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
    model, reader = open_model(directory, dtype, verify=verify)
    fill(model, reader, stored(model), torch.device(device))
    return model


def open_model(
    directory: str | os.PathLike[str], dtype: torch.dtype | None = None, *, verify: bool = True
) -> tuple[LanguageModel, Reader]:
    """A model on the meta device, and what reads its tensors. Arguments and errors are those of `load_model`."""
    values = read_config(directory)
    if (how := values["weights"].get("packed")) is not None:
        raise CheckpointError(
            f"the weights in {directory} are packed to {how['format']}, for inference: `intarsia.load` opens them so, "
            "and `intarsia generate` and `chat` do. What is trained, examined or written in another format is the "
            "model that they were packed from"
        )
    model, tensors = opened(
        directory,
        values,
        lambda model: {name: (x.shape, x.dtype) for name, x in stored(model).items()},
        verify,
    )
    return model if dtype is None else model.to(dtype), Reader(tensors, own_plan(tensors.names))


Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def opened(
    directory: str | os.PathLike[str],
    values: dict[str, Any],
    expected: Callable[[LanguageModel], Expected],
    verify: bool = True,
) -> tuple[LanguageModel, TensorFolder]:
    """A model on the meta device, in the dtype of its file, and the file, which has the tensors that are `expected` of
    it.

    Raises:
        CheckpointError: it is missing or damaged, or has other tensors.
    """
    config, weights = model_config(directory, values), Path(directory) / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing: the directory holds no weights")
    if verify and sha256(weights) != values["weights"]["sha256"]:
        raise CheckpointError(
            f"{weights} is not the file that {CONFIG} beside it describes (the checksums differ): "
            f"it is damaged, cut off, or from another save"
        )
    with torch.device("meta"):
        model = LanguageModel(config).to(DTYPES[values["dtype"]])
    tensors = TensorFolder(Path(directory))
    _check_tensors(weights, tensors, expected(model))
    return model, tensors


def is_packed(values: Mapping[str, Any]) -> bool:
    """Whether what `read_options` gives is of a model in this format whose weights are packed."""
    return values.get("format") == FORMAT and values.get("version") == PACKED_VERSION


def load_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a saved model.

    Raises:
        CheckpointError: `config.json` is missing, damaged or of something else.
    """
    return model_config(directory, read_config(directory))


def load_extra(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The values that were saved as `extra`.

    Raises:
        CheckpointError: `config.json` is missing, damaged or of something else.
    """
    return dict(read_config(directory)["extra"])


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


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What `config.json` holds, of a model in this format.

    Raises:
        CheckpointError: it is missing, damaged or of something else.
    """
    path, values = Path(directory) / CONFIG, read_options(directory)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe an Intarsia model")
    if values.get("version") not in (VERSION, PACKED_VERSION):
        raise CheckpointError(
            f"{path} has format version {values.get('version')}; this release reads {VERSION} and {PACKED_VERSION}"
        )
    missing = [key for key in ("dtype", "weights", "model", "extra") if key not in values]
    weights = values.get("weights")
    if not isinstance(weights, dict) or "sha256" not in weights:
        missing = [*missing, "weights"]
    elif (values["version"] == PACKED_VERSION) != isinstance(weights.get("packed"), dict):
        missing = [*missing, "weights.packed"]
    if missing or values["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path} is damaged: {', '.join(dict.fromkeys(missing)) or 'dtype'} cannot be right"
        )
    return values


def model_config(directory: str | os.PathLike[str], values: dict[str, Any]) -> ModelConfig:
    """The configuration in what `read_config` gives. Raises CheckpointError if it is none."""
    try:
        return ModelConfig.from_dict(values["model"])
    except ConfigError as error:
        raise CheckpointError(f"{Path(directory) / CONFIG} has no valid model: {error}") from error


def _check_tensors(path: Path, folder: TensorFolder, expected: Expected) -> None:
    """Names, shapes and dtypes, before any tensor is read."""
    problems = [f"{name} is missing" for name in expected if name not in folder.names]
    problems += [f"{name} does not belong there" for name in sorted(folder.names - expected.keys())]
    for name, (shape, dtype) in expected.items():
        if name in folder.names:
            place = folder.place(name)
            if place.shape != tuple(shape):
                problems.append(f"{name} is {list(place.shape)} and should be {list(shape)}")
            elif place.dtype != dtype:
                problems.append(f"{name} is {place.dtype} and should be {dtype}")
    if problems:
        shown = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        raise CheckpointError(f"{path} does not fit its {CONFIG}, {len(problems)} tensors in all: {shown}")


def name_of_dtype(dtype: torch.dtype) -> str:
    """`"bfloat16"` and so on, as files call it."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise CheckpointError(f"models are saved in {', '.join(DTYPES)}; this one is {dtype}")
