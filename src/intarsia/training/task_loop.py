"""Training a model on a task (`intarsia.tasks`), and examining what it has learned."""

from __future__ import annotations

import time
from dataclasses import dataclass

from intarsia.data import Batch
from intarsia.jobs.progress import NoProgress, Progress
from intarsia.jobs.signals import StopRequest
from intarsia.model import LanguageModel, ModelConfig
from intarsia.model.loss import IGNORED
from intarsia.ops import Sequences
from intarsia.tasks.base import Task
from intarsia.tasks.exam import Answers, check_vocabulary, examine
from intarsia.training.beginning import fill_from
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import join_processes
from intarsia.training.learner import Learner


@dataclass(frozen=True)
class TaskPoint:
    """What a model knew of the validation examples after so many steps."""

    step: int
    loss: float
    """Of the last step, in nats per answer."""
    answers: float
    """The share of right ones."""
    sequences: float
    """The share of those without a mistake."""


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A model that has learned from a task."""

    model: LanguageModel
    finished: bool
    """False: it was interrupted. There is no checkpoint to go on from: a run is short."""
    steps: int
    tokens: int
    seconds: float
    validation: Answers
    """Of the last validation."""
    curve: tuple[TaskPoint, ...]


def train_on_task(
    model_config: ModelConfig,
    config: TrainConfig,
    task: Task,
    *,
    examples: int = 256,
    examine_every: int = 50,
    progress: Progress | None = None,
    label: str = "Training",
    device: str = "auto",
    beginning: LanguageModel | None = None,
    until_perfect: bool = True,
) -> TaskResult:
    """Train a model from scratch on a task's training examples, in their order.

    Training ends when no validation example has a mistake, or with the configuration's steps. The seed of the data
    (`data_seed`) is that of the examples. Ctrl-C and SIGTERM end it after the current step.

    Args:
        config: with the task's length.
        examples: of validation.
        examine_every: steps between two validations.
        beginning: a model whose weights it begins with, in place of drawn ones; indexers keep theirs where it has none.
        until_perfect: whether training ends when there are no mistakes.

    Raises:
        ConfigError: the task does not fit the model, or asks nothing.
        CheckpointError: the weights to begin with are those of another model.
        TrainingError: the loss or the gradient became NaN or infinite.
    """
    check_vocabulary(task, model_config.vocab_size)
    shown = progress or NoProgress()
    curve: list[TaskPoint] = []
    seqs = Sequences((config.length,) * config.rows)
    began, loss, answers = time.perf_counter(), float("nan"), Answers((), ())
    with join_processes(device) as processes, StopRequest(shown.note, "Stopping after this step.") as stop:
        learner = Learner.new(model_config, config, processes)
        if beginning is not None:
            fill_from(learner.model, beginning.state_dict(), "the model to begin with")
        shown.begin(label, config.steps)
        for step in range(1, config.steps + 1):
            rows = range((step - 1) * config.rows, step * config.rows)
            inputs, targets = task.examples(config.data_seed, rows)
            # A few short rows may ask nothing: there is nothing to learn then, for any model.
            if (targets != IGNORED).any():
                batch = Batch(inputs.view(1, -1), targets.view(1, -1), seqs, text_bytes=0, digest="", epoch=0)
                loss = learner.step(batch, step - 1).loss
            shown.advance(
                step,
                {"loss": loss, "tokens/s": step * config.tokens_per_step / (time.perf_counter() - began)},
            )
            if stop.requested:
                break
            if step % examine_every == 0 or step == config.steps:
                answers = examine(
                    learner.model,
                    task,
                    seed=config.data_seed,
                    examples=examples,
                    split="validation",
                    rows=config.rows,
                )
                score = answers.score
                curve.append(TaskPoint(step, loss, score.token_accuracy, score.sequence_accuracy))
                if answers.perfect and until_perfect:
                    break
        shown.end()
    return TaskResult(
        model=learner.model,
        finished=not stop.requested,
        steps=step,
        tokens=step * config.tokens_per_step,
        seconds=time.perf_counter() - began,
        validation=answers,
        curve=tuple(curve),
    )
