"""`intarsia train`: train one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.options import Device, Plugins
from intarsia.errors import ConfigError

if TYPE_CHECKING:
    from intarsia.training import Parent, TrainResult


def command(
    model: Annotated[str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a TOML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run; `runs/NAME` by default.")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus", "-c", help="`python` (the default), a file, directory or pattern, or `hf:NAME`."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="`bytes`, `bpe:SIZE` (`bpe:4096` is the default) or `hf:NAME-OR-PATH`.")
    ] = None,
    limit_bytes: Annotated[
        str | None, typer.Option(help="Take this much of the corpus, such as 50M.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps. 1000 by default.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Or train on so many tokens, such as 20M.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="NAME=VALUE", help="Set any option of the model or the training."
        ),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Let torch.compile compute the blocks; as `training.compile`."
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN[@STEP]",
            help="Go on from a checkpoint of another run, with other settings; the newest before its rate fell.",
        ),
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Where tokenised corpora and trained tokenizers are kept.")
    ] = Path("cache"),
    device: Device = "auto",
    plugin: Plugins = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")
    ] = False,
) -> None:
    """Train a model from scratch, or go on with it.

    The same command again goes on where the run was, or finds it done. Ctrl-C stops after the current step,
    with a checkpoint. A run that is not finished can be given more --steps before its learning rate falls.

    --from RUN goes on from a checkpoint of another run of the same model and data: its settings hold where
    nothing else is said, and steps are those of both together.

    A layer of your own, in a file: `--plugin my_layer.py`, and its name in the layout of [model].

    \b
      intarsia train kimi-linear-tiny --tokens 5M
      intarsia train kimi-linear-tiny --from runs/kimi-linear-tiny --steps 4000 --out runs/longer
      intarsia train gdn-hybrid-tiny --corpus "texts/*.md" --tokenizer bytes --out runs/my-texts
      intarsia train kimi-linear-tiny --set training.lr=3e-3 --set model.depth=8
      torchrun --nproc-per-node 2 -m intarsia train my-run.toml

    A file says the same in tables, for instance

    \b
      preset = "kimi-linear-tiny"
      [corpus]
      source = "texts/*.md"
      tokenizer = "bpe:4096"
      [model.feed_forward]
      d_hidden = 512
      [training]
      steps = 2000
      lr = 3e-3

    What `[training]` can say: `intarsia.training.TrainConfig`. `[model]` changes the preset, table by table, or is
    a whole configuration without one; `intarsia inspect PRESET --json` shows what there is.
    """
    from intarsia.cli.counts import parse_count
    from intarsia.cli.output import note, print_json
    from intarsia.cli.settings import read_settings, settings_of, warmup_of
    from intarsia.mixers.registry import use_plugins
    from intarsia.training import Parent

    use_plugins(plugin)
    if steps is not None and tokens is not None:
        raise ConfigError("give --steps or --tokens, not both")
    limit = None if limit_bytes is None else parse_count(limit_bytes)
    text = {"source": corpus, "tokenizer": tokenizer, "limit_bytes": limit}
    changes = [*(set_ or ()), *([] if compile_ is None else [f"training.compile={str(compile_).lower()}"])]
    settings = read_settings(
        model, changes, {name: value for name, value in text.items() if value is not None}
    )
    parent = None if from_ is None else Parent.parse(from_)
    if out is not None:
        directory = out
    elif parent is not None:
        directory = parent.run.with_name(f"{parent.run.name}-branch")
    else:
        directory = Path("runs") / (Path(model).stem if model.endswith(".toml") else model)
    inherited = settings_of(parent.run) if parent is not None else warmup_of(directory)
    config = settings.train_config(steps, None if tokens is None else parse_count(tokens), inherited)
    settings.model_config()  # a mistake in the model is told before the corpus is read
    main_process = os.environ.get("RANK", "0") == "0"

    result = _train(settings, config, directory, cache, device, parent, show=main_process)
    if not main_process:
        return
    if json:
        print_json(_facts(result))
    elif result.finished:
        _print(result)
    if not result.finished:
        note(f"The same command goes on from step {result.step}.")
        raise typer.Exit(130)


def _train(
    settings: Any,
    config: Any,
    directory: Path,
    cache: Path,
    device: str,
    parent: Parent | None,
    show: bool,
) -> TrainResult:
    from intarsia.jobs.freed_memory import keep_freed_memory
    from intarsia.training import RichProgress, train

    keep_freed_memory()
    dataset, tokenizer = settings.corpus.prepare(cache, progress=show)
    with RichProgress() as progress:
        return train(
            settings.model_config(tokenizer.vocab_size),
            config,
            dataset,
            tokenizer,
            directory,
            progress=progress,
            label=directory.name,
            device=device,
            parent=parent,
        )


def _facts(result: TrainResult) -> dict[str, Any]:
    evaluation = result.evaluation
    return {
        "directory": str(result.directory),
        "finished": result.finished,
        "step": result.step,
        "tokens": result.tokens,
        "loss": result.loss,
        "heldout": None if evaluation is None else evaluation.summary(),
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
    }


def _print(result: TrainResult) -> None:
    from intarsia.cli.output import count, show, table

    about = table("", "", left=(0, 1))
    about.show_header = False
    about.add_row(
        "training",
        f"{result.step:,} steps, {count(result.tokens)} tokens, {result.tokens_per_second:,.0f} tokens/s",
    )
    about.add_row("training loss", f"{result.loss:.4f} nats per token")
    if result.evaluation is not None:
        about.add_row("held-out text", f"{result.evaluation.bits_per_byte:.4f} bits per byte")
    about.add_row("model", str(result.model_directory))
    show(about, f'Let it write: intarsia generate {result.directory} "def "')
