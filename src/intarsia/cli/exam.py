"""`intarsia exam`: examine a trained model on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.options import Plugins
from intarsia.cli.output import note, print_json, show, table
from intarsia.errors import ConfigError

if TYPE_CHECKING:
    from intarsia.tasks import Answers, Task


def command(
    run: Annotated[
        Path, typer.Argument(help="Directory of a training run, of a comparison's run, or of a model.")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Tasks with their options, `NAME:length=64,option=value`; several with spaces between, or by more "
            "--tasks. By default the one that the model learned in a comparison.",
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
    plugin: Plugins = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")
    ] = False,
) -> None:
    """Examine a trained model on tasks.

    Shows the share of right answers with an interval of 95 % over examples. A task's tokens are taken for the model's
    first ones, so this is for models that learned the task, or tasks alike; `examined_on` in a plan of `intarsia
    compare` has models learn it.

    \b
      intarsia exam runs/recall/exams/mqar-64-kda-lr0.005-seed1-0adb7d87
      intarsia exam runs/mine --tasks "mqar:length=128 palindrome:length=64,symbols=32"
      intarsia exam runs/mine --tasks stack:length=64,stacks=16 --show 2
    """
    from intarsia.checkpoints.native import load_config, load_extra, load_model
    from intarsia.cli.places import find_device, finished_model, told_plugins
    from intarsia.mixers.registry import use_plugins
    from intarsia.tasks import examine
    from intarsia.tasks.exam import check_vocabulary

    use_plugins(plugin)
    place = finished_model(run)
    learned = load_extra(place).get("exam")
    if seed is None:
        seed = learned["seed"] if learned else 0
    chosen = [_parse(text) for group in tasks or () for text in group.split()] or [_learned(run, learned)]
    with told_plugins(run):
        for task in chosen:  # before the weights are read
            check_vocabulary(task, load_config(place).vocab_size)
        model = load_model(place, device=find_device(device))
    results = []
    for task in chosen:
        answers = examine(model, task, seed=seed, examples=examples, split=_split(split))
        results.append((task, answers))
        if show_examples:
            _show_examples(model, task, seed, min(show_examples, examples), split, to_stderr=json)
    if json:
        print_json(
            {
                "model": str(place),
                "seed": seed,
                "split": split,
                "examples": examples,
                "exams": [_described(task, answers) for task, answers in results],
            }
        )
        return
    made = table("task", "right answers", "95 %", "sequences", "95 %")
    for task, answers in results:
        score = answers.score
        made.add_row(
            f"{task.type}:{','.join(f'{name}={value}' for name, value in _options(task).items())}",
            f"{score.token_accuracy:.1%} of {score.tokens:,}",
            _interval(answers.token_interval()),
            f"{score.sequence_accuracy:.1%} of {score.sequences:,}",
            _interval(answers.sequence_interval()),
        )
    show(made)


def _parse(text: str) -> Task:
    """`mqar:length=64,pairs=12` as a task."""
    from intarsia.tasks import make_task

    name, _, given = text.partition(":")
    options: dict[str, Any] = {}
    for part in given.split(",") if given else ():
        option, equals, value = part.partition("=")
        if not equals or not option or not value:
            raise ConfigError(f"--tasks takes NAME:option=value,option=value; got {text!r}")
        options[option] = _value(value)
    try:
        return make_task(name, options)
    except ConfigError as error:
        raise ConfigError(f"--tasks {text}: {error}{_takes(name)}") from None


def _takes(name: str) -> str:
    """How a task is written, if there is one of that name."""
    from dataclasses import MISSING, fields

    from intarsia.tasks import names, task

    if name not in names():
        return ""
    found = [f for f in fields(task(name)) if f.init]
    needed = [f.name for f in found if f.default is MISSING and f.default_factory is MISSING]
    others = [f.name for f in found if f.name not in needed]
    written = name + (":" + ",".join(f"{option}=…" for option in needed) if needed else "")
    return f"; write {written}" + (f" (and, if you like, {', '.join(others)})" if others else "")


def _value(text: str) -> Any:
    """A number, true, false, none, or text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _learned(run: Path, exam: dict[str, Any] | None) -> Task:
    """The task that a model learned in a comparison."""
    from intarsia.tasks import make_task, names

    if exam is None:
        raise ConfigError(
            f"the model in {run} did not learn a task: say what to examine it on, for instance --tasks "
            f"mqar:length=64 (there are {', '.join(names())})"
        )
    return make_task(exam["task"], exam["options"])


def _split(name: str) -> Any:
    """The name of a split; `Task.examples` knows which there are."""
    return name


def _options(task: Task) -> dict[str, Any]:
    """The options that say which task it is, without those that were left open."""
    from dataclasses import asdict

    return {name: value for name, value in asdict(task).items() if value is not None}


def _described(task: Task, answers: Answers) -> dict[str, Any]:
    counts = {name: value for name, value in answers.to_dict().items() if name != "by_sequence"}
    return {"task": task.type, "options": _options(task), "vocabulary": task.vocab_size, **counts}


def _interval(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"


def _show_examples(model: Any, task: Task, seed: int, count: int, split: str, *, to_stderr: bool) -> None:
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
        say(f"{task.type} {row}")
        for name, tokens in (("reads", inputs), ("asked", targets), ("says", answered)):
            say(f"  {name:<6} {task.show(tokens[row])}")
