"""`intarsia inspect`: what a model is made of and what it costs."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.options import Json, Plugins, Sparse

if TYPE_CHECKING:
    from intarsia.model import ModelConfig
    from intarsia.model.machine import Machine

LENGTHS = (1024, 4096, 131072, 1048576)


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset's name, the directory of a model (trained here or published) or of a training run, or a "
            "repository in the cache.",
        ),
    ],
    length: Annotated[
        list[str] | None,
        typer.Option("--length", "-n", help="Show costs at this length, such as 4096 or 64k. Repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded side by side.")] = 1,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="For a preset: the size of the vocabulary instead of its own.")
    ] = None,
    machine: Annotated[
        str,
        typer.Option(
            help="Whose times to show: `a100`, `h100`, `h200`, `mi300x`, or TFLOP/s:GB/s as in 2.5:80."
        ),
    ] = "h100",
    dtype: Annotated[str, typer.Option(help="Of the weights: `bfloat16` or `float32`.")] = "bfloat16",
    page_size: Annotated[int, typer.Option(min=1, help="Entries in a page of a pool of states.")] = 64,
    sparse: Sparse = "",
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Show what a model is made of and what it costs.

    Its layers, parameters and FLOPs; at growing lengths what it remembers, in one piece and in the pages of a pool, and
    what the last token reads of that; and how fast a machine could be: the larger of FLOPs by its FLOP/s and bytes by
    its bytes/s, which no program goes below.

    No weights are made or read, so the largest preset takes as little time as the smallest.

    \b
      intarsia inspect kimi-linear-48b-a3b
      intarsia inspect runs/my-run --length 4k --length 1M --batch 8
      intarsia inspect kimi-linear-48b-a3b --machine 2.5:80 --dtype float32    # a computer's processor
      intarsia inspect Qwen/Qwen3.5-0.8B    # if it has been downloaded
      intarsia inspect kimi-linear-tiny --json
    """
    from intarsia.cli.counts import parse_count
    from intarsia.cli.output import print_json
    from intarsia.mixers.registry import use_plugins
    from intarsia.model.machine import machine_of

    use_plugins(plugin)
    lengths = [parse_count(text) for text in length] if length else list(LENGTHS)
    facts = describe(model, lengths, batch, vocab_size, machine_of(machine), dtype, page_size, sparse)
    if json:
        print_json(facts)
    else:
        _print(facts)


def describe(
    target: str,
    lengths: list[int],
    batch: int,
    vocab_size: int | None,
    machine: Machine,
    dtype: str,
    page_size: int,
    sparse: str = "",
) -> dict[str, Any]:
    """Everything that `inspect` shows, as JSON-able values."""
    import torch

    from intarsia.checkpoints.packed_native import bytes_when_packed
    from intarsia.checkpoints.places import is_repository
    from intarsia.cli.places import find_config, packed_weights
    from intarsia.errors import ConfigError, did_you_mean
    from intarsia.model.language_model import cost_of
    from intarsia.model.machine import free_memory

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype was given {dtype!r}{did_you_mean(dtype, dtypes)}")
    config = find_config(target, vocab_size, sparse)
    cost = cost_of(config, dtypes[dtype])
    # Of a preset there are no files.
    packed = packed_weights(target) if Path(target).exists() or is_repository(target) else None
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
        "dtype": dtype,
        "batch": batch,
        "page_size": page_size,
        "machine": asdict(machine),
        "lengths": [
            {
                "length": length,
                "training_flops_per_token": cost.training_flops_per_token(length),
                "state_bytes": cost.state_bytes(length, batch=batch),
                "pool_bytes": cost.pool_bytes([length] * batch, page_size),
                "keys_read": cost.keys_read(length),
                "training_tokens_per_second": cost.training_tokens_per_second(machine, length),
                "prefill_seconds": cost.prefill_seconds(machine, length, batch),
                "decode_seconds": cost.decode_seconds(machine, length, batch),
            }
            for length in lengths
        ],
        "parameters_by_part": cost.parameters_by_part(),
        "weight_bytes": dict([packed])
        if packed
        else {
            dtype: cost.parameters * cost.weight_bytes,
            **bytes_when_packed(config, dtypes[dtype]),
        },
        "packed": None if packed is None else packed[0],
        "free_memory": free_memory(),
        "config": config.to_dict(),
    }


SHADES = "░█▓▒▚▞"


def picture(config: ModelConfig) -> str:
    """A character a layer, from the first to the last, and what each stands for."""
    shades = {name: SHADES[n % len(SHADES)] for n, name in enumerate(dict.fromkeys(config.layers))}
    return f"{''.join(shades[name] for name in config.layers)}  {', '.join(f'{s} {n}' for n, s in shades.items())}"


def layer_runs(config: ModelConfig) -> str:
    """The layers in order, repetitions counted: `3 × kda, mla, 3 × kda, mla`."""
    runs = [(name, len(list(group))) for name, group in groupby(config.layers)]
    return ", ".join(name if times == 1 else f"{times} × {name}" for name, times in runs)


def _fits(facts: dict[str, Any], nbytes: int) -> str:
    """How long a state fits beside weights into the free memory of this machine."""
    if facts["free_memory"] is None:
        return ""
    left = facts["free_memory"] - nbytes
    lengths = [row["length"] for row in facts["lengths"] if row["state_bytes"] <= left]
    if left <= 0 or not lengths:
        return ": more than is free here"
    sequences = f"{facts['batch']} sequences of " if facts["batch"] > 1 else ""
    return f": fits here with {sequences}{max(lengths):,} tokens"


def _print(facts: dict[str, Any]) -> None:
    from intarsia.cli.output import count, duration, show, size, table
    from intarsia.model import ModelConfig

    config = ModelConfig.from_dict(facts["config"])
    about = table("", "", left=(0, 1))
    about.show_header = False
    about.add_row("layers", f"{config.depth}: {layer_runs(config)}")
    about.add_row("", picture(config))
    about.add_row("width, vocabulary", f"{config.d_model}, {config.vocab_size:,}")
    about.add_row("parameters", f"{count(facts['parameters'])} ({facts['parameters']:,})")
    about.add_row("  active per token", count(facts["active_parameters"]))
    about.add_row("  without embeddings", count(facts["non_embedding_parameters"]))
    for name, number in facts["parameters_by_part"].items():
        about.add_row(f"  {name}", count(number))
    for name, nbytes in facts["weight_bytes"].items():
        packed = "" if facts["packed"] is None else ", as they are packed in its files"
        about.add_row(f"weights in {name}", f"{size(nbytes)}{packed}{_fits(facts, nbytes)}")
    if facts["free_memory"] is not None:
        about.add_row("free memory here", size(facts["free_memory"]))
    sequences = "" if facts["batch"] == 1 else f" of {facts['batch']} sequences"
    costs = table(
        "tokens", f"state{sequences}", f"in pages\nof {facts['page_size']}", "keys read\nby a token",
        "training\nFLOPs/token", left=(),
    )  # fmt: skip
    machine = facts["machine"]
    times = table(
        "tokens", "training\ntokens/s", f"prompt read\n{sequences}".rstrip(), "decoding\na step", left=(),
        title=f"At best, on {machine['name']}: {machine['flops'] / 1e12:g} TFLOP/s, "
        f"{machine['bandwidth'] / 1e12:g} TB/s, weights in {facts['dtype']}",
    )  # fmt: skip
    for row in facts["lengths"]:
        length = f"{row['length']:,}"
        costs.add_row(
            length, size(row["state_bytes"]), size(row["pool_bytes"]), count(row["keys_read"]),
            count(row["training_flops_per_token"]),
        )  # fmt: skip
        times.add_row(
            length, count(row["training_tokens_per_second"]), duration(row["prefill_seconds"]),
            duration(row["decode_seconds"]),
        )  # fmt: skip
    show(facts["model"], about, costs, times)
