"""`intarsia inspect`: what a model is made of and what it costs."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.options import Plugins

if TYPE_CHECKING:
    from intarsia.model import ModelConfig

LENGTHS = (1024, 8192, 65536, 1048576)


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A preset's name, or the directory of a model or of a training run."
        ),
    ],
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--length", "-n", help="Show FLOPs and state at this length, such as 4096 or 64k. Repeatable."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded side by side.")] = 1,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="For a preset: the size of the vocabulary instead of its own.")
    ] = None,
    plugin: Plugins = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")] = False,
) -> None:
    """Show what a model is made of and what it costs.

    Its layers, parameters, FLOPs per token, and bytes of state at growing lengths.

    No weights are made or read, so the largest preset takes as little time as the smallest.

    \b
      intarsia inspect kimi-linear-48b-a3b
      intarsia inspect runs/my-run --length 4k --length 1M --batch 8
      intarsia inspect kimi-linear-tiny --json
    """
    from intarsia.cli.counts import parse_count
    from intarsia.cli.output import print_json
    from intarsia.mixers.registry import use_plugins

    use_plugins(plugin)
    lengths = [parse_count(text) for text in length] if length else list(LENGTHS)
    facts = describe(model, lengths, batch, vocab_size)
    if json:
        print_json(facts)
    else:
        _print(facts)


def describe(target: str, lengths: list[int], batch: int, vocab_size: int | None) -> dict[str, Any]:
    """Everything that `inspect` shows, as JSON-able values."""
    from intarsia.cli.places import find_config
    from intarsia.model.language_model import cost_of

    config = find_config(target, vocab_size)
    cost = cost_of(config)
    return {
        "model": target,
        "layout": config.layout,
        "layers": list(config.layers),
        "depth": config.depth,
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "parameters": cost.parameters,
        "active_parameters": cost.active_parameters,
        "embedding_parameters": cost.embedding_parameters,
        "non_embedding_parameters": cost.non_embedding_parameters,
        "batch": batch,
        "lengths": [
            {
                "length": length,
                "training_flops_per_token": cost.training_flops_per_token(length),
                "state_bytes": cost.state_bytes(length, batch=batch),
            }
            for length in lengths
        ],
        "config": config.to_dict(),
    }


def layer_runs(config: ModelConfig) -> str:
    """The layers in order, repetitions counted: `3 × kda, mla, 3 × kda, mla`."""
    runs = [(name, len(list(group))) for name, group in groupby(config.layers)]
    return ", ".join(name if times == 1 else f"{times} × {name}" for name, times in runs)


def _print(facts: dict[str, Any]) -> None:
    from intarsia.cli.output import count, show, size, table
    from intarsia.model import ModelConfig

    config = ModelConfig.from_dict(facts["config"])
    about = table("", "", left=(0, 1))
    about.show_header = False
    about.add_row("layers", f"{config.depth}: {layer_runs(config)}")
    about.add_row("width, vocabulary", f"{config.d_model}, {config.vocab_size:,}")
    about.add_row("parameters", f"{count(facts['parameters'])} ({facts['parameters']:,})")
    about.add_row("  active per token", count(facts["active_parameters"]))
    about.add_row("  without embeddings", count(facts["non_embedding_parameters"]))
    state = "state" if facts["batch"] == 1 else f"state of {facts['batch']} sequences"
    costs = table("tokens", "training FLOPs/token", state, left=())
    for row in facts["lengths"]:
        flops = count(row["training_flops_per_token"])
        costs.add_row(f"{row['length']:,}", flops, size(row["state_bytes"]))
    show(facts["model"], about, costs)
