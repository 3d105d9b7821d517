"""`intarsia sparsify`: make a trained model sparse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.options import Device, Json, Plugins
from intarsia.errors import ConfigError

if TYPE_CHECKING:
    from intarsia.cli.settings import Origin
    from intarsia.training import TrainConfig
    from intarsia.training.sparsify import Sparsified

WARM_UP_LR, CHECKPOINTS_LR = 1e-3, 1e-5
"""Learning rates where nothing else is said: of the warm-up, and of all of a model of which no run is known."""
INHERITED = (
    "rows", "length", "micro_rows", "optimizer", "adamw_lr_scale", "weight_decay", "muon_momentum", "muon_precision",
    "adamw_betas", "adamw_eps", "grad_clip", "precision", "activation_checkpointing", "data_seed",
)  # fmt: skip
"""What both stages have from the run that trained the model."""


def command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory of a training run that is finished, or of a model, ours or published; or a repository in "
            "Hugging Face's cache.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option("--to", help="What layers become: `dsa` of latent attention, `qsa` or `msa` of full."),
    ],
    read: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that each token reads; an eighth of the length by default."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row of text; the run's, or 512, by default.")
    ] = None,
    warm_up_steps: Annotated[
        int, typer.Option(min=1, help="Steps in which indexers learn, all else frozen.")
    ] = 300,
    steps: Annotated[int, typer.Option(min=1, help="Steps behind them in which all learns.")] = 300,
    corpus: Annotated[
        str, typer.Option("--corpus", "-c", help="`python`, a file, directory or pattern, or `hf:NAME`.")
    ] = "python",
    limit_bytes: Annotated[
        str | None, typer.Option(help="Take this much of the corpus, such as 50M.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="NAME=VALUE",
            help="Set an option of the layers (`indexer.index_heads=8`) or of a stage (`warm_up.lr=1e-3`, "
            "`sparse.lr=1e-4`).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory; the model's with `-dsa` by default.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where tokenised corpora are kept.")] = Path("cache"),
    device: Device = "auto",
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Make a trained model sparse: its attention then reads only what an indexer picks.

    Two stages: indexers learn from full attention while all else is frozen; then layers read what is picked, and all
    learns from that. Shows how likely held-out text is before, after the warm-up and in the end.

    The same command again goes on where it was, or finds it done. Ctrl-C stops after the current step, with a
    checkpoint.

    \b
      intarsia sparsify runs/kimi-linear-tiny --to dsa
      intarsia sparsify runs/mine --to dsa --read 256 --set indexer.index_pool=4
      intarsia sparsify Qwen/Qwen3.5-0.8B --to qsa --corpus "texts/*.md" --length 4096 --set sparse.lr=7.3e-6

    The result is a run: `intarsia generate runs/kimi-linear-tiny-dsa "def "`. What a stage can say:
    `intarsia.training.TrainConfig`.
    """
    from intarsia.checkpoints.opening import load_config
    from intarsia.cli.counts import parse_count
    from intarsia.cli.output import note, print_json
    from intarsia.cli.places import model_place, told_plugins
    from intarsia.cli.settings import Origin, set_value
    from intarsia.mixers.registry import use_plugins
    from intarsia.model.sparsified import sparsified

    use_plugins(plugin)
    place = model_place(run)
    started = _trained_with(Path(run))
    values: dict[str, Any] = {}
    origin = Origin(changes={set_value(values, change): change for change in set_ or ()})
    wrong = [name for name in values if name not in ("indexer", "warm_up", "sparse")]
    if wrong or not all(isinstance(table, dict) for table in values.values()):
        raise ConfigError(
            f"--set takes indexer.NAME, warm_up.NAME or sparse.NAME; got {wrong[0] if wrong else set_[0]!r}"  # type: ignore[index]
        )
    if length is not None:
        started = {**started, "length": length}
    warm_up, sparse = _stages(started, values, warm_up_steps, steps, origin)
    with told_plugins(Path(run)):
        config = load_config(place)
    with origin.told("indexer"):
        model = sparsified(
            config, to, max(sparse.length // 8, 1) if read is None else read, values.get("indexer")
        )
    directory = Path("runs") / f"{Path(run).name}-{to}" if out is None else out
    limit = None if limit_bytes is None else parse_count(limit_bytes)
    result = _run(place, model, directory, warm_up, sparse, (corpus, limit, cache), device)
    if json:
        print_json(_facts(result))
    elif result.finished:
        _print(result)
    if not result.finished:
        note("The same command goes on from there.")
        raise typer.Exit(130)


def _trained_with(run: Path) -> dict[str, Any]:
    """What is inherited of the settings of the run that trained a model, where one is known."""
    from intarsia.training.run_directory import RunDirectory

    for directory in (run, run / "train", run.parent):
        file = RunDirectory(directory)
        record = file.read() if file.config.is_file() else None
        if record is not None and "train" in record:
            kept = {name: record["train"][name] for name in INHERITED if name in record["train"]}
            return {**kept, "lr": record["train"]["lr"] / 10}
    return {"optimizer": "adamw", "lr": CHECKPOINTS_LR}


def _stages(
    inherited: dict[str, Any], values: dict[str, Any], warm_up_steps: int, steps: int, origin: Origin
) -> tuple[TrainConfig, TrainConfig]:
    from intarsia.cli.settings import DEFAULTS
    from intarsia.training import TrainConfig

    common = {**DEFAULTS, "keep_stable": False, **inherited}
    stages = []
    for name, own in (
        ("warm_up", {"steps": warm_up_steps, "trains": "indexers", "lr": WARM_UP_LR, "eval_documents": 0}),
        ("sparse", {"steps": steps}),
    ):
        said = {**common, **own, **values.get(name, {})}
        total = said["steps"]
        with origin.told(name):
            stages.append(
                TrainConfig.from_dict({"warmup_steps": total // 20 if isinstance(total, int) else 0, **said})
            )
    if stages[0].length != stages[1].length:
        raise ConfigError("both stages read rows of one length: give it by --length")
    return stages[0], stages[1]


def _run(
    place: Path,
    model: Any,
    directory: Path,
    warm_up: TrainConfig,
    sparse: TrainConfig,
    text: tuple[str, int | None, Path],
    device: str,
) -> Sparsified:
    from intarsia.data import open_corpus, prepare
    from intarsia.data.published import load_tokenizer
    from intarsia.jobs.freed_memory import keep_freed_memory
    from intarsia.training import RichProgress
    from intarsia.training.beginning import Beginning
    from intarsia.training.sparsify import sparsify

    Beginning(place).check(model)  # before the text is read
    tokenizer = load_tokenizer(place)
    keep_freed_memory()
    corpus, limit, cache = text
    dataset = prepare(open_corpus(corpus, limit_bytes=limit), tokenizer, cache)
    with RichProgress() as progress:
        return sparsify(
            place, model, dataset, tokenizer, directory, warm_up=warm_up, sparse=sparse, progress=progress,
            device=device,
        )  # fmt: skip


STAGES = ("before", "after the warm-up", "after the sparse stage")


def _facts(result: Sparsified) -> dict[str, Any]:
    scores = (result.before, result.warmed_up, None if result.sparse is None else result.sparse.evaluation)
    names = ("before", "warmed_up", "sparse")
    lost = _lost(result)
    return {
        "directory": str(result.directory.path),
        "finished": result.finished,
        "heldout": {
            name: None if score is None else {**score.summary(), "lost": lost.get(name)}
            for name, score in zip(names, scores, strict=True)
        },
        "picked_share": result.picked_share,
    }


def _lost(result: Sparsified) -> dict[str, dict[str, float | None]]:
    """By how many bits per byte the model is worse than before, with intervals of 95 % over documents if there are
    several."""
    import numpy as np

    from intarsia.ladder.statistics import estimate

    before = result.before
    found: dict[str, dict[str, float | None]] = {}
    later = {
        "warmed_up": result.warmed_up,
        "sparse": None if result.sparse is None else result.sparse.evaluation,
    }
    for name, score in later.items():
        if score is None or before is None:
            continue
        found[name] = {"value": score.bits_per_byte - before.bits_per_byte, "low": None, "high": None}
        if len(score.documents) < 2:
            continue
        bits = (score.nll - before.nll)[None] / np.log(2)
        (told,) = estimate([bits], before.text_bytes)
        found[name] |= {"low": told.interval.low, "high": told.interval.high}
    return found


def _print(result: Sparsified) -> None:
    from intarsia.cli.output import show, table

    facts = _facts(result)
    made = table("held-out text", "bits per byte", "lost", "95 %", "attention picked")
    shares = (None, result.picked_share.get("warm_up"), result.picked_share.get("sparse"))
    for label, (_, score), share in zip(STAGES, facts["heldout"].items(), shares, strict=True):
        if score is None:
            continue
        lost, told = score["lost"], ["", ""]
        if lost is not None:
            told[0] = f"{lost['value']:+.4f}"
        if lost is not None and lost["low"] is not None:
            told[1] = f"{lost['low']:+.4f} to {lost['high']:+.4f}"
        made.add_row(label, f"{score['bits_per_byte']:.4f}", *told, "" if share is None else f"{share:.1%}")
    show(made, f'Let it write: intarsia generate {result.directory.path} "def "')
