"""`intarsia convert`: write a model as another family has it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli.options import Dtype, Json, Sparse
from intarsia.errors import ConfigError


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A model's folder, that of a training run, or a repository in the cache."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="`hf`: the first published family that holds it; a family's name; `kimi`; or `intarsia`.",
        ),
    ] = "hf",
    dtype: Dtype = "",
    weights: Annotated[
        str | None,
        typer.Option(help="With `--to intarsia`: pack them into `int8` or `int4`, ready for decoding."),
    ] = None,
    sparse: Sparse = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a model as another family has it, tokenizer and all.

    \b
      intarsia convert runs/my-run my-model                         # for transformers and others
      intarsia convert Qwen/Qwen3.5-0.8B runs/qwen --to intarsia    # to train it further here
      intarsia convert runs/my-run my-model --to kimi --dtype bfloat16
      intarsia convert Qwen/Qwen3.5-0.8B small --to intarsia --weights int4    # opened packed, for generate and chat
    """
    from intarsia.checkpoints.convert import convert
    from intarsia.checkpoints.registry import CHECKPOINTS
    from intarsia.cli.output import note, print_json, size
    from intarsia.cli.places import checked_dtype, checked_sparse, model_place, separator_of
    from intarsia.model.config import unknown

    if to not in (known := ("hf", "intarsia", "kimi", *CHECKPOINTS)):
        raise ConfigError(f"--to was given {unknown(to, known, 'family')}")
    if (target / "config.json").exists() and not overwrite:
        raise ConfigError(f"there is a model in {target}: give another folder, or --overwrite")
    place = model_place(source)
    written = convert(
        place,
        target,
        {"kimi": "kimi_linear"}.get(to, to),
        checked_dtype(dtype),
        weights,  # type: ignore[arg-type]  # which is checked
        checked_sparse(sparse),
        separator_of(place),
    )
    nbytes = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    if json:
        print_json({"target": str(target), "format": written, "weights": weights, "bytes": nbytes})
    else:
        packed = f", packed to {weights}" if weights else ""
        note(f"written to {target} as {written}{packed}: {size(nbytes)}")
