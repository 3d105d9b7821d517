"""What a run learns, and what it is scored on: text or a task."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from intarsia.checkpoints.native import load_model, save_model
from intarsia.data import TokenDataset, load_tokenizer
from intarsia.errors import TrainingError
from intarsia.jobs.child import Channel
from intarsia.jobs.ranks import my_rank, together
from intarsia.ladder.run_folder import RunFolder
from intarsia.ladder.run_spec import RunSpec, TaskLesson, TextLesson
from intarsia.model import ModelConfig
from intarsia.tasks import make_task
from intarsia.tasks.exam import examine
from intarsia.training import TrainConfig, evaluate, train
from intarsia.training.lineage import Parent
from intarsia.training.run_directory import RunDirectory
from intarsia.training.task_loop import train_on_task


def learn(folder: RunFolder, spec: RunSpec, device: str, channel: Channel) -> dict[str, Any] | None:
    """Make the run in its folder. What comes out, for `outcome.json`; None if it was interrupted.

    Raises:
        TrainingError: the model came apart.
    """
    if isinstance(spec.lesson, TextLesson):
        return _learn_text(folder, spec, spec.lesson, device, channel)
    return _learn_task(folder, spec, spec.lesson, device, channel)


def _learn_text(
    folder: RunFolder, spec: RunSpec, lesson: TextLesson, device: str, channel: Channel
) -> dict[str, Any] | None:
    config = TrainConfig.from_dict(dict(spec.train))
    dataset = TokenDataset(lesson.dataset)
    tokenizer = load_tokenizer(dataset.directory / "tokenizer")
    # A run that has begun knows by itself where.
    begun = RunDirectory(folder.train).config.exists()
    parent = None if begun or spec.branches_from is None else Parent.parse(spec.branches_from)
    with together(spec.processes, "intarsia.ladder.worker", folder.path):
        result = train(
            ModelConfig.from_dict(spec.model),
            config,
            dataset,
            tokenizer,
            folder.train,
            progress=channel,
            device=spec.device,
            parent=parent,
        )
    if my_rank():
        return None  # the first of the processes has the model, and scores it
    if not result.finished:
        return None
    channel.send(event="stage", stage="scoring documents")
    evaluation = evaluate(
        load_model(folder.model, device=device),
        dataset.heldout,
        length=config.length,
        documents=lesson.documents,
        tokens_per_document=lesson.tokens_per_document,
        tokenizer=tokenizer,
        precision=config.precision,
    )
    if not np.all(np.isfinite(evaluation.nll)):
        raise TrainingError("the trained model's likelihood of some held-out document is not finite")
    evaluation.save(folder.evaluation)
    return {
        "bits_per_byte": evaluation.bits_per_byte,
        "batches": result.batches,
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
    }


def _learn_task(
    folder: RunFolder, spec: RunSpec, lesson: TaskLesson, device: str, channel: Channel
) -> dict[str, Any] | None:
    config, task = TrainConfig.from_dict(dict(spec.train)), lesson.made
    result = train_on_task(
        ModelConfig.from_dict(spec.model),
        config,
        task,
        examples=lesson.examples,
        examine_every=lesson.examine_every,
        progress=channel,
        device=device,
    )
    if not result.finished:
        return None
    test, turns = None, []
    if spec.role == "judged":
        channel.send(event="stage", stage="the test")
        test = examine(
            result.model,
            task,
            seed=config.data_seed,
            examples=lesson.examples,
            split="test",
            rows=config.rows,
        )
        for turn in lesson.turns:
            found = examine(
                result.model,
                make_task(lesson.task, {**lesson.options, **turn}),
                seed=config.data_seed,
                examples=lesson.examples,
                split="test",
                rows=config.rows,
            )
            turns.append({"options": dict(turn), "test": found.to_dict()})
    described = {"task": lesson.task, "options": dict(lesson.options), "seed": config.data_seed}
    save_model(folder.model, result.model, extra={"step": result.steps, "exam": described})
    return {
        "validation": result.validation.to_dict(),
        "test": None if test is None else test.to_dict(),
        "turns": turns,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "curve": [asdict(point) for point in result.curve],
    }
