"""Standard benchmarks: the tasks of EleutherAI's lm-eval-harness, asked of our models and of those that we load.

The harness brings data, prompts and metrics; the model answers through its own tokenizer (`harness_model`), with what
its files say stands before every text. Data sets come from this machine or from the hub, as the harness's tasks say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.errors import ConfigError, did_you_mean
from intarsia.extras import require
from intarsia.tasks.exam import CONFIDENCE, wilson

if TYPE_CHECKING:
    from intarsia.data import Tokenizer
    from intarsia.model import LanguageModel

PREFIX = "lm_eval:"
"""So a task of the harness begins among others."""


@dataclass(frozen=True)
class StandardTask:
    """A task, group or tag of the harness by its name, or by a YAML file on this machine."""

    name: str
    fewshot: int | None = None
    """Examples in the prompt; None: as the task says."""
    limit: int | None = None
    """Questions that are asked, from the first one on; None: all."""

    @classmethod
    def read(cls, text: str) -> StandardTask:
        """What `lm_eval:NAME,fewshot=5,limit=100` says.

        Raises:
            ConfigError: it is not of that form.
        """
        name, *given = text.removeprefix(PREFIX).split(",")
        options: dict[str, int] = {}
        for part in given:
            option, _, value = part.partition("=")
            if option not in ("fewshot", "limit") or not value.isascii() or not value.isdigit():
                raise ConfigError(
                    f"--tasks takes {PREFIX}NAME,fewshot=NUMBER,limit=NUMBER (the last two if you like), with a "
                    f"name of lm-eval's or a YAML file; got {text!r}"
                )
            options[option] = int(value)
        if not name or options.get("limit") == 0:
            raise ConfigError(f"--tasks {text}: {'a limit is at least 1' if name else 'the name is missing'}")
        return cls(name, **options)

    @property
    def asked(self) -> dict[str, Any]:
        """What says which exam it is, as in `intarsia.tasks.sheet`, but for the seed."""
        options = {"fewshot": self.fewshot, "limit": self.limit}
        return {
            "task": PREFIX + self.name,
            "options": {name: value for name, value in options.items() if value is not None},
            "split": "test",
            "examples": self.limit,
        }


def open_task(task: StandardTask) -> Any:
    """The task with its data, as the harness has it.

    Raises:
        MissingExtraError: the harness is not installed.
        ConfigError: there is no such task, or its data cannot be had.
    """
    manager = require("lm_eval.tasks", "ecosystem").TaskManager
    name, path = task.name, Path(task.name)
    if path.suffix in (".yaml", ".yml"):
        name = _name_in(path)
        tasks = manager(include_path=str(path.parent), include_defaults=False)
    else:
        tasks = manager()
    if name not in tasks.all_tasks:
        raise ConfigError(
            f"lm-eval has no task {name!r}{did_you_mean(name, tasks.all_tasks)}; a task of your own is named by its "
            "YAML file"
        )
    try:
        loaded = tasks.load([name])
    except Exception as error:  # whatever the libraries raise that fetch and read data
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the data of lm-eval's task {name!r} cannot be had: {reason} (they come from the Hugging Face hub or its "
            "cache, or from files that the task names)"
        ) from error
    for made in loaded["tasks"].values():
        if task.fewshot is not None:
            made.set_config(key="num_fewshot", value=task.fewshot)
        elif made.get_config("num_fewshot") is None:
            made.set_config(key="num_fewshot", value=0)
    return loaded


def examine_standard(
    model: LanguageModel,
    tokenizer: Tokenizer,
    opened: Any,
    *,
    begin: Sequence[int] = (),
    stop: Sequence[int] = (),
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What a model makes of a task.

    Args:
        opened: from `open_task`.
        begin: tokens before every text.
        stop: tokens that end one.
        limit: questions that are asked.
        seed: of the examples in the prompts.

    Returns:
        JSON-able: for each task its number of questions and each metric with its value and an interval of 95 % over the
        questions: Wilson's where a question is right or wrong, else the normal one of a mean; null for a metric
        that is no mean over questions.
    """
    harness, evaluator = require("lm_eval", "ecosystem"), require("lm_eval.evaluator", "ecosystem")
    from intarsia.inference.harness_model import HarnessModel

    for made in opened["tasks"].values():
        made.set_fewshot_seed(seed=seed)
    asked = HarnessModel(model, tokenizer, tuple(begin), frozenset(stop))
    was_training = model.training
    model.eval()
    try:
        found = evaluator.evaluate(lm=asked, task_dict=opened, limit=limit, bootstrap_iters=0)
    finally:
        model.train(was_training)
    results = {
        name: {
            "version": str(found["versions"].get(name)),
            "fewshot": found["n-shot"].get(name),
            "questions": len({sample["doc_id"] for sample in samples}),
            "metrics": _metrics(found["results"][name], samples),
        }
        for name, samples in found["samples"].items()
    }
    return {"lm_eval": harness.__version__, "confidence": CONFIDENCE, "results": results}


def _name_in(path: Path) -> str:
    """The task's name in a YAML file, which the harness's own loader reads later."""
    try:
        found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the task {path} cannot be read: {error}") from None
    if found is None:
        raise ConfigError(f"{path} is no task of lm-eval: it has no line `task: NAME`")
    return found[1]


def _metrics(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"acc,none": {"value": …, "interval": [low, high]}}`."""
    found = {}
    for name, value in values.items():
        metric, comma, kept = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            each = [sample[metric] for sample in samples if sample["filter"] == kept and metric in sample]
            found[name] = {"value": float(value), "interval": _interval(float(value), each)}
    return found


def _interval(value: float, each: Sequence[Any]) -> list[float] | None:
    if not each or not all(isinstance(one, int | float) for one in each):
        return None
    count, mean = len(each), math.fsum(each) / len(each)
    if not math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
        return None
    if set(map(float, each)) <= {0.0, 1.0}:
        return list(wilson(mean, count))
    if count == 1:
        return None
    from statistics import NormalDist, stdev

    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * stdev(map(float, each)) / math.sqrt(count)
    return [mean - half, mean + half]
