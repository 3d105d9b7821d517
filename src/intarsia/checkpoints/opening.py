"""Opening and writing models, whatever their format."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, overload

import torch

from intarsia.checkpoints import native
from intarsia.checkpoints.family import Family, OtherFamilyError, written
from intarsia.checkpoints.filling import Reader, fill, packed_model
from intarsia.checkpoints.float8 import Block, float8_blocks
from intarsia.checkpoints.options import Options, Sparse
from intarsia.checkpoints.packed_native import check_asked, load_packed
from intarsia.checkpoints.places import find_folder
from intarsia.checkpoints.plan import Plan, embedding_of, make_plan, stored
from intarsia.checkpoints.registry import CHECKPOINTS, families, family, family_of
from intarsia.checkpoints.tensor_folder import TensorFolder
from intarsia.checkpoints.writing import CONFIG, save_as
from intarsia.errors import ConfigError, UnsupportedError
from intarsia.layers.packed import Packing
from intarsia.model.config import ModelConfig
from intarsia.model.inference_model import InferenceModel
from intarsia.model.language_model import LanguageModel
from intarsia.ops.packed_weights import WeightFormat

PathOrRepo = str | os.PathLike[str]
UNNAMED = {"ssm_cfg": "mamba_ssm"}
"""Options by which a `config.json` without a `model_type` is known."""
NEAREST = 2
"""Families of which it is said what they lack, where none can hold a model."""


@overload
def load(
    path_or_repo: PathOrRepo,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: None = None,
    *,
    group: int | None = None,
    sparse: Sparse = "published",
    ignore: Iterable[str] = (),
) -> LanguageModel: ...


@overload
def load(
    path_or_repo: PathOrRepo,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    weights: WeightFormat,
    group: int | None = None,
    sparse: Sparse = "published",
    ignore: Iterable[str] = (),
) -> InferenceModel: ...


def load(
    path_or_repo: PathOrRepo,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    weights: WeightFormat | None = None,
    *,
    group: int | None = None,
    sparse: Sparse = "published",
    ignore: Iterable[str] = (),
) -> LanguageModel | InferenceModel:
    """Open a model: of this package, or of a published family.

    Tensors are read one after the other and cast, or packed, on the way.

    Args:
        path_or_repo: a folder, or a repository that is in Hugging Face's cache on this machine. There is no download.
        dtype: of the parameters, except for those that are always float32; None for the embedding's in the file.
        weights: for inference, what linear maps and experts are packed into, `"int8"`, `"int4"`, ...: the result is
            an `InferenceModel`, and no part of it was ever there unpacked as a whole. None: a `LanguageModel`, in
            evaluation mode; but of a folder whose weights are packed (`intarsia convert --weights`) the
            `InferenceModel` that they are.
        group: how many numbers share a scale, as in `pack_weights`.
        sparse: layers that choose what they attend to are computed as they were published, or as if they chose
            everything (`"dense"`), which is another model for texts longer than what they choose.
        ignore: options of `config.json` to pass over though nobody knows what they mean.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit; nothing has been read of the weights then.
        UnsupportedError: the model has a part that is not built; the message names it.
        ConfigError: an argument that cannot be.
    """
    device, ignore = _checked(dtype, device, weights, group, sparse, ignore)
    folder = find_folder(path_or_repo)
    values = native.read_options(folder)
    if native.is_packed(values):
        check_asked(folder, weights, group)
        return load_packed(folder, dtype, device)
    packing = None if weights is None else Packing(weights, group)
    model, reader = opened(folder, dtype, sparse, ignore)
    if packing is not None:
        return packed_model(model, reader, packing, device)
    fill(model, reader, stored(model), device)
    return model


def _checked(
    dtype: object,
    device: torch.device | str,
    weights: object,
    group: object,
    sparse: object,
    ignore: Iterable[str],
) -> tuple[torch.device, Iterable[str]]:
    """The device and the options to pass over, when all arguments of `load` can be.

    Raises:
        ConfigError: one cannot.
    """
    if dtype is not None and dtype not in native.DTYPES.values():
        known = ", ".join(f"torch.{name}" for name in native.DTYPES)
        raise ConfigError(f"dtype is that of the parameters, {known} or None; got {dtype!r}")
    if sparse not in get_args(Sparse):
        raise ConfigError(f"sparse is {' or '.join(map(repr, get_args(Sparse)))}; got {sparse!r}")
    if group is not None and weights is None:
        raise ConfigError("group says how many numbers of packed weights share a scale: give weights too")
    if isinstance(ignore, str):
        raise ConfigError(f"ignore is a list of options' names: ignore=[{ignore!r}]")
    try:
        made = torch.device(device)
        torch.empty(0, device=made)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"there is no device {device!r} here: {str(error).splitlines()[0]}") from error
    return made, tuple(ignore)


def opened(
    folder: Path, dtype: torch.dtype | None = None, sparse: Sparse = "published", ignore: Iterable[str] = ()
) -> tuple[LanguageModel, Reader]:
    """A model on the meta device, in evaluation mode, and what reads its tensors, which have been checked. Arguments
    and errors are those of `load`."""
    values = native.read_options(folder)
    if values.get("format") == native.FORMAT:
        model, reader = native.open_model(folder, dtype)
        return model.eval(), reader
    found, config, left, block = _translated(values, folder, sparse, frozenset(ignore))
    tensors = TensorFolder(folder, named=_without_prefix, block=block)
    with torch.device("meta"):
        model = LanguageModel(config)
    if dtype is None:
        name = embedding_of(found, config, tensors)
        dtype = tensors.place(name).dtype if name in tensors.names else torch.float32
    model = model.to(dtype).eval()
    plan = make_plan(found, config, tensors, stored(model))
    _tell(folder, plan, left)
    return model, Reader(tensors, plan)


def load_config(
    path_or_repo: PathOrRepo, *, sparse: Sparse = "published", ignore: Iterable[str] = ()
) -> ModelConfig:
    """The configuration of a model that `load` would open. Arguments and errors are those of `load`."""
    folder = find_folder(path_or_repo)
    values = native.read_options(folder)
    if values.get("format") == native.FORMAT:
        return native.load_config(folder)
    return _translated(values, folder, sparse, frozenset(ignore))[1]


def save(
    model: LanguageModel,
    path: str | os.PathLike[str],
    family_name: str | None = None,
    *,
    tokenizer: native.Saveable | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a published family has it, so that transformers and others read it.

    Args:
        path: the folder; what is there is replaced as a whole, or, when anything fails, stays. Other files in it
            than weights stay.
        family_name: of `registry.CHECKPOINTS`, or `"intarsia"` for this package's own format; None for the first family
            that can hold the model.
        tokenizer: written beside the model by its `save`.
        extra: options to write into `config.json` beside those of the model, such as `eos_token_id`.

    Raises:
        UnsupportedError: the family, or without one every family, lacks something that the model has.
        ConfigError: it is a model for decoding alone.
    """
    if isinstance(model, InferenceModel):
        raise ConfigError(
            "an InferenceModel is for decoding and is not written: save the LanguageModel that was loaded or trained; "
            "packed weights are written by `intarsia convert --to intarsia --weights int8`"
        )
    if family_name == "intarsia":
        native.save_model(path, model, tokenizer, extra)
        return
    found = family_that_holds(model.config) if family_name is None else family(family_name)
    save_as(found, model, path, tokenizer, extra)


def family_that_holds(config: ModelConfig) -> Family:
    """The first family whose words say all of a configuration.

    Raises:
        UnsupportedError: there is none; the message says what those that come nearest lack.
    """
    reasons: list[OtherFamilyError] = []
    for found in families():
        try:
            written(found, config)
        except OtherFamilyError as error:
            reasons.append(error)
        else:
            return found
    nearest = sorted(reasons, key=lambda error: error.distance)[
        :NEAREST
    ]  # of equals the first, which more people have
    listed = "".join(f"\n  {reason}" for reason in nearest)
    raise UnsupportedError(
        "no published family has such a model; 'intarsia', this package's own format, holds all of them. The nearest:"
        f"{listed}\nNamed instead of 'hf', each of the other {len(reasons) - len(nearest)} says what it lacks too: "
        f"{', '.join(CHECKPOINTS)}"
    )


def _translated(
    values: Mapping[str, Any], folder: Path, sparse: Sparse, ignored: frozenset[str]
) -> tuple[Family, ModelConfig, list[str], Block | None]:
    """The family, the configuration, the parts beside the text model that the options name, and the blocks of weights
    of eight bits."""
    where, left = str(folder / CONFIG), []
    if isinstance(text := values.get("text_config"), Mapping):
        parts = {name.removesuffix("_config"): of for name, of in values.items() if name.endswith("_config")}
        # A part of no layers is that of a text model which was written alone.
        left = [
            name
            for name, of in parts.items()
            if of and not (isinstance(of, Mapping) and of.get("depth") == 0)
        ]
        left = [name for name in left if name not in ("text", "quantization")]
        outer = (
            {"tie_word_embeddings": values["tie_word_embeddings"]} if "tie_word_embeddings" in values else {}
        )
        quantised = {"quantization_config": values.get("quantization_config")}
        found = family_of(text.get("model_type", values.get("model_type")), where)
        values = {**quantised, **text, **outer}
    else:
        unnamed = (kind for option, kind in UNNAMED.items() if option in values)
        found = family_of(values.get("model_type", next(unnamed, None)), where)
    options = Options(values, where, ignored, sparse)
    config = found.read(options)
    block = None if options.asked("quantization_config") else float8_blocks(options)
    options.finish()
    return found, config, left, block


def _without_prefix(name: str) -> str:
    """The name that a tensor has where the text model is alone."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    alone = name.removeprefix("language_model.")
    return "model." + alone if alone != name and alone.startswith("layers.") else alone


def _tell(folder: Path, plan: Plan, left: list[str]) -> None:
    told = [f"{what} ({count} tensors)" for what, count in plan.left_out.items()]
    told += [f"its {name} part" for name in left if not any(name in what for what in plan.left_out)]
    if told:
        warnings.warn(f"{folder}: the text model is loaded; left out: {', '.join(told)}", stacklevel=3)
