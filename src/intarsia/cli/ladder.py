"""`intarsia ladder`: a fair fight at several sizes and budgets."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli.options import Plugins, Ray


def command(
    plan: Annotated[
        Path,
        typer.Argument(help="The plan: a TOML file with [[sizes]], or a Python file that defines `plan`."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the results; `runs/NAME` by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The plan's small version: shows that all of it works.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="The plan's full size, where it has one: for machines with accelerators."
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", min=1, help="Training runs side by side; what the machine allows by default."
        ),
    ] = None,
    ray: Ray = None,
    plugin: Plugins = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the verdict as JSON on stdout, and nothing else there.")
    ] = False,
) -> None:
    """Judge architectures at several sizes and budgets.

    Makes the comparison of each rung, a size with a budget. From one to the next climb those arms that a gate lets
    through. In the end scaling laws are fitted to all rungs. What is done is skipped and what is half done is resumed;
    a plan may get further sizes, budgets, arms or seeds, and be climbed again in the same directory.

    \b
      intarsia ladder examples/ladder.toml
      intarsia ladder my-ladder.toml --quick
      intarsia ladder my-ladder.toml --out runs/mine --jobs 2 --json > verdict.json
    """
    from rich.console import Console

    from intarsia import ladder
    from intarsia.jobs.ray_cluster import ray_cluster
    from intarsia.mixers.registry import use_plugins

    use_plugins(plugin)
    chosen = ladder.load_ladder(plan, quick=quick, full=full)
    directory = out or Path("runs") / chosen.name
    with ray_cluster(ray) if ray else nullcontext() as machines:
        ladder.climb(chosen, directory, jobs=jobs, console=Console(stderr=json), machines=machines)
    if json:
        print((directory / "verdict.json").read_text(encoding="utf-8"), end="")
