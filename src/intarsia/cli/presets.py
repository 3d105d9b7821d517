"""`intarsia presets`: the models that can be built by name."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from intarsia.cli.options import Json

CONTEXT = 65536


def command(
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Count with this vocabulary instead of each preset's own.")
    ] = None,
    json: Json = False,
) -> None:
    """List the models that can be built by name.

    With their layers, parameters, and the state that decoding keeps after 64 k tokens, in bfloat16.

    \b
      intarsia presets
      intarsia presets --json | jq '.[].name'

    A preset is a Python function in `intarsia.model.presets`; `intarsia inspect NAME` shows one in full.
    """
    from intarsia.cli.output import count, print_json, show, size, table

    rows = list(_rows(vocab_size))
    if json:
        print_json(rows)
        return
    listing = table("preset", "layers", "width", "parameters", "active", "state\nat 64 k", left=(0, 1))
    for row in rows:
        listing.add_row(
            row["name"],
            " + ".join(f"{times} {mixer}" for mixer, times in Counter(row["layers"]).items()),
            str(row["d_model"]),
            count(row["parameters"]),
            count(row["active_parameters"]),
            size(row["state_bytes"]),
        )
    show(listing)


def _rows(vocab_size: int | None) -> list[dict[str, Any]]:
    import torch

    from intarsia.model import presets
    from intarsia.model.language_model import cost_of

    rows = []
    for name in presets.names():
        config = presets.get(name, vocab_size)
        cost = cost_of(config, torch.bfloat16)
        rows.append(
            {
                "name": name,
                "layers": list(config.layers),
                "depth": config.depth,
                "d_model": config.d_model,
                "vocab_size": config.vocab_size,
                "parameters": cost.parameters,
                "active_parameters": cost.active_parameters,
                "non_embedding_parameters": cost.non_embedding_parameters,
                "context": CONTEXT,
                "state_bytes": cost.state_bytes(CONTEXT),
            }
        )
    return rows
