"""`intarsia exam`: examine a trained model on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.options import Plugins
from intarsia.cli.output import note, print_json, show, table
from intarsia.errors import ConfigError

if TYPE_CHECKING:
    from intarsia.inference.harness import StandardTask
    from intarsia.tasks import Task
    from intarsia.tasks.text import TextTask


def command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory of a training run, of a comparison's run, or of a model, ours or published; or a "
            "repository in Hugging Face's cache.",
        ),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Tasks with their options, `NAME:length=64,option=value`, or `value|value` for one after the other; "
            "several tasks with spaces between, or by more --tasks. `lm_eval:NAME,fewshot=5,limit=100` is one of "
            "lm-eval-harness's. By default what the model learned in a comparison.",
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples of each task.")] = 256,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the examples; by default that of a model's own task, or 0.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="train, validation or test: which of the seed's examples.")
    ] = "test",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    show_examples: Annotated[
        int,
        typer.Option("--show", min=0, help="Print so many examples of each task, with what was answered."),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Keep results there, after each task; the same command goes on with what is missing.",
        ),
    ] = None,
    plugin: Plugins = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")
    ] = False,
) -> None:
    """Examine a trained model on tasks.

    Shows the share of right answers with an interval of 95 % over examples. A task's tokens are taken for the model's
    first ones, so this is for models that learned the task, or tasks alike; `examined_on` in a plan of `intarsia
    compare` has models learn it. Several values of two options are shown as a table of one by the other.

    \b
      intarsia exam runs/recall/exams/mqar-64-kda-lr0.005-seed1-0adb7d87
      intarsia exam runs/mine --tasks "mqar:length=128 palindrome:length=64,symbols=32"
      intarsia exam runs/mine --tasks stack:length=64,stacks=16 --show 2
      intarsia exam runs/mine --tasks "chains:length=64,hops=1|2|3,distance=0|4|8" --out hops.json
      intarsia exam moonshotai/Kimi-Linear-48B-A3B-Base --tasks "lm_eval:arc_easy lm_eval:hellaswag,limit=500"
    """
    from intarsia.checkpoints.opening import load, load_config
    from intarsia.cli.exam_standard import asked_of_harness, open_missing, show_standard, standard_entry
    from intarsia.cli.places import find_device, model_place, told_plugins
    from intarsia.mixers.registry import use_plugins
    from intarsia.tasks import examine
    from intarsia.tasks.exam import check_vocabulary
    from intarsia.tasks.sheet import Sheet, asked_of, entry_of

    use_plugins(plugin)
    place = model_place(run)
    learned = _learned(place)
    if seed is None:
        seed = learned["seed"] if learned else 0
    said, standard = _chosen(tasks, run, learned)
    if standard and split != "test":
        raise ConfigError(f"lm-eval's tasks say themselves what they ask; leave --split {split} out")
    sheet = Sheet(_identity(place), out)
    with told_plugins(Path(run)):
        vocab_size = load_config(place).vocab_size
        chosen = [(asked_of(task, seed, split, examples), _bound(task, place)) for task in said]
        for _, task in chosen:  # before the weights are read
            check_vocabulary(task, vocab_size)
            task.examples(seed, 1, _split(split))
        missing = [asked for asked, _ in chosen if sheet.find(asked) is None]
        opened = open_missing(standard, seed, sheet)
        on = find_device(device)
        model = load(place, device=on) if missing or opened or (show_examples and chosen) else None
    there, asked_for = len(missing) + len(opened), len(chosen) + len(standard)
    if out and there < asked_for:
        note(f"{asked_for - there} of {asked_for} were in {out}")
    entries = []
    for asked, task in chosen:
        entry = sheet.find(asked)
        if entry is None:
            assert model is not None, "the weights are read where anything is missing"
            answers = examine(model, task, seed=seed, examples=examples, split=_split(split))
            entry = entry_of(asked, task.vocab_size, task.chance, answers)
            sheet.add(entry)
        entries.append(entry)
        if show_examples:
            _show_examples(
                model, asked["task"], task, seed, min(show_examples, examples), split, to_stderr=json
            )
    for asked, data in opened:
        assert model is not None, "the weights are read where anything is missing"
        sheet.add(standard_entry(model, place, asked, data))
    of_harness = [sheet.find(asked_of_harness(task, seed)) for task in standard]
    if json:
        print_json(
            {
                "model": str(place),
                "seed": seed,
                "split": split,
                "examples": examples,
                "exams": [*entries, *of_harness],
            }
        )
        return
    if entries:
        _show(entries)
    if standard:
        show_standard(of_harness)


def _show(entries: list[dict[str, Any]]) -> None:
    """A line for each exam, and for each task of which two options had several values a table of one by the other."""
    from intarsia.tasks.sheet import dials_of, grid_of
    from intarsia.tasks.written import written

    dials = {name: varied for name, varied, _ in dials_of(entries)}
    made = table("task", "right answers", "95 %", "chance", "sequences", "95 %")
    for entry in entries:
        cells = []
        for counts in (entry["answers"], entry["sequences"]):
            low, high = counts["interval"]
            cells += [f"{counts['accuracy']:.1%} of {counts['asked']:,}", f"{100 * low:.1f}–{100 * high:.1f}"]
        made.add_row(
            written(entry["task"], entry["options"], dials.get(entry["task"], ())),
            *cells[:2],
            f"{entry['chance']:.1%}",
            *cells[2:],
        )
    show(made)
    for name, varied, of_task in dials_of(entries):
        if len(varied) == 2:
            rows, columns, cells_of = grid_of(of_task, *varied)
            grid = table(f"{varied[0]} \\ {varied[1]}", *columns)
            for row in rows:
                found = (cells_of.get((row, column)) for column in columns)
                grid.add_row(row, *("" if cell is None else f"{100 * cell:.0f}" for cell in found))
            show(f"{name}: right answers in %", grid)


def _bound(task: Task | TextTask, place: Path) -> Task:
    """The task itself, of tokens; one of text in the tokens of the model's tokenizer."""
    from intarsia.data.published import load_tokenizer
    from intarsia.tasks.text import TextTask

    return task.bound(load_tokenizer(place)) if isinstance(task, TextTask) else task


def _chosen(
    texts: list[str] | None, run: str, learned: dict[str, Any] | None
) -> tuple[list[Task | TextTask], list[StandardTask]]:
    """The tasks that are asked for, or the one that the model learned in a comparison; and those of lm-eval."""
    from intarsia.inference.harness import PREFIX, StandardTask
    from intarsia.tasks import make_task
    from intarsia.tasks.registry import names, text_names
    from intarsia.tasks.written import read_tasks

    words = [text for group in texts or () for text in group.split()]
    standard = [StandardTask.read(text) for text in words if text.startswith(PREFIX)]
    chosen = [task for text in words if not text.startswith(PREFIX) for task in read_tasks(text, _make)]
    if words:
        return chosen, standard
    if learned is None:
        raise ConfigError(
            f"the model in {run} did not learn a task: say what to examine it on, for instance --tasks "
            f"mqar:length=64 (there are {', '.join(names() + text_names())})"
        )
    return [make_task(learned["task"], learned["options"])], []


def _make(name: str, options: Any) -> Task | TextTask:
    """A task; its error says how it is written."""
    from intarsia.tasks.registry import EXAMS, make_exam
    from intarsia.tasks.written import how_to_write

    try:
        return make_exam(name, options)
    except ConfigError as error:
        kinds = {kind.type: kind for kind in EXAMS}
        how = f"; {how_to_write(kinds[name])}" if name in kinds else ""
        raise ConfigError(f"{error}{how}") from None


def _learned(place: Path) -> dict[str, Any] | None:
    """What a model of ours learned in a comparison, if it did."""
    from intarsia.checkpoints.native import FORMAT, load_extra, read_options

    if read_options(place).get("format") != FORMAT:
        return None
    learned: dict[str, Any] | None = load_extra(place).get("exam")
    return learned


def _identity(place: Path) -> dict[str, Any]:
    """What says that a model is still the same: where it is, and the size and age of its weights."""
    weights = sorted(place.glob("*.safetensors"))
    return {
        "place": str(place.resolve()),
        "bytes": sum(file.stat().st_size for file in weights),
        "changed": max((file.stat().st_mtime_ns for file in weights), default=0),
    }


def _split(name: str) -> Any:
    """The name of a split; `Task.examples` knows which there are."""
    return name


def _show_examples(
    model: Any, name: str, task: Task, seed: int, count: int, split: str, *, to_stderr: bool
) -> None:
    """Print examples: what is read, what is asked, what the model answered where something is asked."""
    import torch

    from intarsia.model.loss import IGNORED

    inputs, targets = task.examples(seed, count, _split(split))
    with torch.no_grad():
        logits = model(inputs.to(model.embed.weight.device)).logits
    answered = logits.argmax(-1).cpu()
    answered[(targets == IGNORED) | (answered >= task.vocab_size)] = (
        IGNORED  # "." for what is no token of the task
    )
    say = note if to_stderr else show
    for row in range(count):
        say(f"{name} {row}")
        for what, tokens in (("reads", inputs), ("asked", targets), ("says", answered)):
            say(f"  {what:<6} {task.show(tokens[row])}")
