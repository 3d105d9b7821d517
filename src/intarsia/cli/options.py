"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        help="A file of your own that defines mixers (docs/new-mixer.md). Repeatable.",
    ),
]

Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Make the runs on a Ray cluster: HOST:PORT, `auto`, or `local` for one of this machine's cores.",
    ),
]

Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", help="Below 1 careful, above 1 daring; what the model's files say, or 0.8."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Keep the most probable tokens up to this sum; 1 keeps all. What the model's files say, or 1."
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Keep tokens at least this fraction as probable as the best one; 0 keeps all. What the model's files "
        "say, or 0.05."
    ),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: `float32` or `bfloat16`. As stored by default.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Pack the weights into `bfloat16`, `int8` or `int4`. As they are by default."),
]
Sparse = Annotated[
    str,
    typer.Option(
        "--sparse",
        help="`dense`: let layers that choose what they attend to attend to everything, which is another model for "
        "texts longer than what they choose. As the model says by default.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
