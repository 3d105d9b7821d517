"""`intarsia mixers`: the token mixers that a layout can name."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from intarsia.cli.options import Json, Plugins

WIDTH = 1024
LENGTHS = (1 << 10, 1 << 20)
ONE_TABLE = 110
"""A terminal of so many characters shows rules and costs side by side."""


def command(
    name: Annotated[str | None, typer.Argument(help="Show this mixer alone, with all its options.")] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """List the token mixers: year, update rule, cost, and what runs them here.

    These are the names that a layout can hold, as in "kda kda kda mla".

    The costs are those of one layer of width 1024, where possible with 8 heads of 128: parameters, FLOPs of a
    forward pass per token at a length of 1 k, bytes of state at 1 k and 1 M tokens. "Runs here" names the
    implementations of the operator behind the mixer on this machine's CPU, the fastest first.

    \b
      intarsia mixers
      intarsia mixers kda
      intarsia mixers --json
    """
    from intarsia.cli.output import print_json
    from intarsia.mixers import mixer
    from intarsia.mixers import mixers as all_mixers
    from intarsia.mixers.registry import use_plugins

    use_plugins(plugin)
    if name is None:
        rows = [_facts(each) for each in all_mixers()]
        if json:
            print_json(rows)
        else:
            _print(rows)
        return
    facts = _facts(mixer(name))
    if json:
        print_json(facts)
    else:
        _print_one(facts)


def _facts(config: Any) -> dict[str, Any]:
    """What is told of a mixer, as JSON-able values."""
    import inspect

    import torch

    from intarsia.mixers import config_to_dict
    from intarsia.ops.available import available
    from intarsia.ops.table import TABLE

    with torch.device("meta"):
        cost = config.example().build(WIDTH).cost()
    options = config_to_dict(config.example())
    del options["type"]
    required = [f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING]
    return {
        "name": config.type,
        "title": config.about.title,
        "year": config.about.year,
        "source": config.about.source,
        "family": config.about.family,
        "decay": config.about.decay,
        "equation": config.about.equation,
        "brought": config.about.brought,
        "operator": config.about.operator,
        # What is no operator of the table is plain PyTorch.
        "implementations": list(
            available(config.about.operator) if config.about.operator in TABLE else ["pytorch"]
        ),
        "about": inspect.getdoc(config) or "",
        "options": options,
        "required_options": required,
        "cost": {
            "d_model": WIDTH,
            "parameters": cost.parameters,
            "lengths": [
                {
                    "length": length,
                    "forward_flops_per_token": cost.forward_flops_per_token(length),
                    "state_bytes": cost.state_bytes(length),
                }
                for length in LENGTHS
            ],
        },
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape

    from intarsia.cli.output import show, table

    costs = ("parameters", "FLOPs/token\nat 1 k", "state\nat 1 k", "state\nat 1 M")
    title = f"One layer of width {WIDTH}, where possible 8 heads of 128"
    if Console().width >= ONE_TABLE:
        whole = table("name", "year", "update rule", *costs, "runs here", title=title, left=(0, 2, 7))
        for row in rows:
            whole.add_row(
                row["name"], str(row["year"]), escape(row["equation"]), *_cost_cells(row), _runs(row)
            )
        tables = [whole]
    else:
        rules = table("name", "mixer", left=(0, 1))
        numbers = table("name", *costs, "runs here", title=title, left=(0, 5))
        for row in rows:
            rules.add_row(row["name"], escape(f"{row['title']} ({row['year']})\n{row['equation']}"))
            numbers.add_row(row["name"], *_cost_cells(row), _runs(row))
        tables = [rules, numbers]
    show(
        *tables,
        "S is the state, b_t is beta_t, the write strength, g_t the log-decay. One in full: intarsia mixers NAME",
    )


def _runs(row: dict[str, Any]) -> str:
    return ", ".join(name for name in row["implementations"] if name != "reference")


def _print_one(facts: dict[str, Any]) -> None:
    from intarsia.cli.output import count, show, size, table

    options = table("option", "here", left=(0, 1))
    for name, value in facts["options"].items():
        options.add_row(name + (" (required)" if name in facts["required_options"] else ""), str(value))
    costs = table("tokens", "FLOPs/token, forward", "state", left=())
    for row in facts["cost"]["lengths"]:
        costs.add_row(f"{row['length']:,}", count(row["forward_flops_per_token"]), size(row["state_bytes"]))
    runs = f"{facts['operator']}, here by {', '.join(facts['implementations'])}"
    show(
        f"{facts['title']} ({facts['year']}, {facts['source']})\n\n    {facts['equation']}\n\n"
        f"Brought: {facts['brought']}.\nOperator: {runs}.\n\n{facts['about']}\n",
        options,
        f"{count(facts['cost']['parameters'])} parameters at width {facts['cost']['d_model']}",
        costs,
    )


def _cost_cells(row: dict[str, Any]) -> list[str]:
    from intarsia.cli.output import count, size

    cost = row["cost"]
    states = [size(at["state_bytes"]) for at in cost["lengths"]]
    return [count(cost["parameters"]), count(cost["lengths"][0]["forward_flops_per_token"]), *states]
