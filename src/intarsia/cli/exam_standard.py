"""The part of `intarsia exam` that asks lm-eval-harness's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.cli.output import show, table

if TYPE_CHECKING:
    from intarsia.inference.harness import StandardTask
    from intarsia.model import LanguageModel
    from intarsia.tasks.sheet import Sheet


def asked_of_harness(task: StandardTask, seed: int) -> dict[str, Any]:
    """What says which exam it is."""
    return {**task.asked, "seed": seed}


def open_missing(tasks: Sequence[StandardTask], seed: int, sheet: Sheet) -> list[tuple[dict[str, Any], Any]]:
    """The tasks that the sheet has not, with their data: what cannot be had is told before the weights are read."""
    from intarsia.inference.harness import open_task

    asked = [(asked_of_harness(task, seed), task) for task in tasks]
    return [(one, open_task(task)) for one, task in asked if sheet.find(one) is None]


def standard_entry(
    model: LanguageModel, place: Path, asked: Mapping[str, Any], opened: Any
) -> dict[str, Any]:
    """What a model makes of a task, as an entry of a sheet.

    Raises:
        DataError: there is no tokenizer with the model.
    """
    from intarsia.checkpoints import native
    from intarsia.data.published import conduct_of, load_tokenizer
    from intarsia.inference.harness import examine_standard

    tokenizer = load_tokenizer(place)
    ours = native.read_options(place).get("format") == native.FORMAT
    conduct = conduct_of(place / native.TOKENIZER if ours else place)
    begin, stop = conduct.begin, conduct.stop or frozenset([tokenizer.separator])
    if ours and not conduct.stop:
        begin = (tokenizer.separator,)  # a document of ours begins with it
    found = examine_standard(
        model,
        tokenizer,
        opened,
        begin=begin,
        stop=tuple(stop),
        limit=asked["examples"],
        seed=asked["seed"],
    )
    return {**asked, **found}


def show_standard(entries: Sequence[Any]) -> None:
    """A line for each metric of each task."""
    made = table("task", "questions", "in the prompt", "metric", "value", "95 %")
    for entry in entries:
        for name, result in entry["results"].items():
            for metric, counted in result["metrics"].items():
                interval = counted["interval"]
                made.add_row(
                    f"lm_eval:{name}",
                    f"{result['questions']:,}",
                    str(result["fewshot"]),
                    metric.removesuffix(",none"),
                    f"{counted['value']:.4g}",
                    "" if interval is None else f"{interval[0]:.4g} – {interval[1]:.4g}",
                )
    show(made)
