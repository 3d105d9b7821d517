"""`intarsia compare`: put architectures in a fair fight."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli.options import Plugins, Ray


def command(
    plan: Annotated[
        Path, typer.Argument(help="The plan: a TOML file, or a Python file that defines `plan`.")
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
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Let torch.compile compute the blocks; as `training.compile`.",
        ),
    ] = None,
    ray: Ray = None,
    plugin: Plugins = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the verdict as JSON on stdout, and nothing else there.")
    ] = False,
) -> None:
    """Judge architectures in a fair comparison.

    Trains the arms of a plan on the same data, judges them with intervals over documents and seeds, and writes
    `verdict.json` and `report.html`. What is done is skipped and what is half done is resumed, so that an
    interrupted comparison goes on where it was: give the same command again.

    \b
      intarsia compare examples/demo.toml
      intarsia compare my-plan.toml --quick
      intarsia compare my-plan.toml --out runs/mine --jobs 2 --json > verdict.json
    """
    from dataclasses import replace

    from rich.console import Console

    from intarsia import ladder
    from intarsia.jobs.ray_cluster import ray_cluster
    from intarsia.mixers.registry import use_plugins

    use_plugins(plugin)
    chosen = ladder.load_plan(plan, quick=quick, full=full)
    if compile_ is not None:
        chosen = replace(chosen, training={**chosen.training, "compile": compile_})
    directory = out or Path("runs") / chosen.name
    console = Console(stderr=json)
    with ray_cluster(ray) if ray else nullcontext() as machines:
        ladder.compare(chosen, directory, jobs=jobs, console=console, machines=machines)
    if json:
        print((directory / "verdict.json").read_text(encoding="utf-8"), end="")
