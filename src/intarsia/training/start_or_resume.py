"""Training a language model, from its configuration to a directory with the result: whether a run begins, goes on or
is done already. The loop itself is `Trainer`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from intarsia.data import TokenDataset, Tokenizer
from intarsia.errors import CheckpointError, ConfigError
from intarsia.jobs.progress import NoProgress, Progress
from intarsia.jobs.signals import StopRequest
from intarsia.model import ModelConfig
from intarsia.model.fingerprint import changes, fingerprint
from intarsia.training.beginning import Beginning
from intarsia.training.checkpoint import Checkpoints, found_steps
from intarsia.training.config import SCHEDULE_FIELDS, TrainConfig
from intarsia.training.distributed import Processes, join_processes
from intarsia.training.lineage import Parent, adopt, branch_off
from intarsia.training.result import TrainResult
from intarsia.training.run_directory import RunDirectory, compare
from intarsia.training.schedule import first_difference
from intarsia.training.trainer import Trainer

Resume = Literal["auto", "always", "never"]


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    dataset: TokenDataset,
    tokenizer: Tokenizer | None,
    directory: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    label: str = "Training",
    resume: Resume = "auto",
    device: str = "auto",
    parent: Parent | None = None,
    beginning: Beginning | None = None,
) -> TrainResult:
    """Train a model from scratch, or go on where an earlier call stopped.

    `directory` is laid out as `RunDirectory` says. A run that is finished is not done again: its result is
    returned. On one process a resumed run gives the same numbers, to the bit, as one that was never stopped.

    Ctrl-C and SIGTERM end the run after the current step with a checkpoint, and the result says
    `finished=False`; a second Ctrl-C raises KeyboardInterrupt at once. Under `torchrun` all processes call
    this alike.

    Args:
        tokenizer: saved with the model, if given.
        progress: where to show how far the run is; nowhere by default.
        label: what to call the run there.
        resume: "auto" goes on from the newest checkpoint, or starts; "always" insists on a checkpoint;
            "never" insists on a directory without a run.
        device: "auto", "cpu", "cuda" or "cuda:N".
        parent: go on from a checkpoint of another run of the same model and data, with other settings. What
            was done before counts: steps are those of both together.
        beginning: a model whose weights a new run begins with, in place of drawn ones; in one process.

    Raises:
        ConfigError: the configurations, the data and the processes do not fit together.
        CheckpointError: another process is at work in the directory; it holds a run of another configuration,
            of other data or of other code (the message says which); a checkpoint is damaged or cannot be
            written; or `resume` or `parent` cannot be had.
        TrainingError: the loss or the gradient became NaN or infinite. The message names the step and the
            last checkpoint, which stays.
    """
    run = RunDirectory(Path(directory))
    if dataset.vocab_size > model_config.vocab_size:
        raise ConfigError(
            f"the data have a vocabulary of {dataset.vocab_size} and the model one of "
            f"{model_config.vocab_size}: give the model at least as many"
        )
    if parent is not None and beginning is not None:
        raise ConfigError("a run goes on from a checkpoint or begins with the weights of a model, not both")
    if resume not in ("auto", "always", "never"):
        raise ConfigError(f"resume must be auto, always or never; got {resume!r}")
    if parent is not None and parent.run.resolve() == run.path.resolve():
        raise ConfigError(f"a run that goes on from {parent} needs a directory of its own: say which (--out)")
    if resume == "never" and run.config.exists():
        raise CheckpointError(
            f"{run.path} holds a run already: resume it, remove it, or choose another directory"
        )

    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(device))
        if beginning is not None and processes.world_size > 1:
            raise ConfigError("a run begins with a model's weights in one process: run it without torchrun")
        tell = _teller(progress, processes)
        now = _identity(model_config, train_config, dataset, beginning)
        before = processes.first(run.read)
        if before is not None:
            _check_is_wanted(run, before, now, parent)
            if run.result.exists():
                _check_is_finished(run, before, now)
                return TrainResult.load(run.path)
        record = _record(run, before, now, parent, processes, tell)
        stack.enter_context(_own_random_generators(train_config.seed, processes))
        shown = progress if progress is not None and processes.is_main else NoProgress()
        trainer = Trainer(model_config, train_config, dataset, tokenizer, run, processes, shown, tell)
        # Nothing is written before everything is known to fit together, and everybody has looked.
        processes.first(lambda: stack.enter_context(run.locked()))
        saved = _find_checkpoint(run, record, trainer, tell)
        if resume == "always" and saved is None:
            raise CheckpointError(f"{run.path} holds no checkpoint to resume from")
        trainer.record = record
        if saved is not None:
            trainer.restore(saved["step"], saved)
        elif beginning is not None:
            beginning.fill(trainer.model)
        processes.first(lambda: run.claim(record))
        stop = stack.enter_context(StopRequest(shown.note))
        return trainer.run_all(label, stop)


def _identity(
    model: ModelConfig, config: TrainConfig, dataset: TokenDataset, beginning: Beginning | None
) -> dict[str, Any]:
    """What makes a run the run that it is."""
    data = {"corpus": dataset.corpus, "tokenizer": dataset.tokenizer, "fingerprint": dataset.fingerprint}
    began = {} if beginning is None else {"beginning": beginning.record}
    return {"format": 2, "model": model.to_dict(), "train": config.to_dict(), "data": data, **began}


def _check_is_wanted(
    run: RunDirectory, before: dict[str, Any], now: dict[str, Any], parent: Parent | None
) -> None:
    run.check(before, now)
    if parent is not None and not parent.is_that_of(before.get("lineage")):
        lineage = before.get("lineage")
        origin = "by itself" if lineage is None else f"from step {lineage['step']} of {lineage['run']}"
        raise CheckpointError(
            f"{run.path} holds a run already, which began {origin}: choose another directory for one that goes on "
            f"from {parent}"
        )


def _check_is_finished(run: RunDirectory, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError where a finished run is wanted with another schedule: what was trained is not undone."""
    differences = [d for d in compare(before, now) if d.field in SCHEDULE_FIELDS]
    if differences:
        listed = "".join(f"\n  {one}" for one in differences)
        steps = ", ".join(map(str, found_steps(run.checkpoints))) or "none"
        raise CheckpointError(
            f"{run.path} holds a run that is finished, and was to end otherwise:{listed}\n"
            f"Start another from one of its checkpoints (of the steps: {steps}) in a directory of its own: "
            f"`--from {run.path}@STEP`."
        )


def _record(
    run: RunDirectory,
    before: dict[str, Any] | None,
    now: dict[str, Any],
    parent: Parent | None,
    processes: Processes,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """What is recorded of the run: what it is, by what code and machine, and where it branched off."""
    model = ModelConfig.from_dict(now["model"])
    now = {**now, "fingerprint": processes.first(lambda: fingerprint(model, processes.device).to_dict())}
    lineage = None if before is None else before.get("lineage")
    if before is None and parent is not None:
        lineage, notes = processes.first(lambda: branch_off(parent, run, now))
        for note in notes:
            tell(note)
    return {**now, "lineage": lineage, "history": []}


def _find_checkpoint(
    run: RunDirectory, record: dict[str, Any], trainer: Trainer, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """What the newest checkpoint says, if there is one; the run fits it, and the record has its history."""
    processes, checkpoints, lineage = trainer.processes, trainer.checkpoints, record["lineage"]
    checkpoints.remove_leftovers()
    if lineage is not None and checkpoints.latest() is None:
        # First it is said whose directory this is: whoever is killed while he copies can begin again.
        processes.first(lambda: run.claim(record))
        processes.first(lambda: adopt(lineage, run))
    step = checkpoints.latest()
    if step is None:
        return None
    saved = checkpoints.trainer(step)
    started = saved["run"]
    if lineage is not None and step == lineage["step"] and started.get("lineage") != lineage:
        return saved  # the parent's checkpoint: what may differ was looked at when the run branched off
    run.check(started, record)
    _check_schedule(run, checkpoints, started, record, step, 0 if lineage is None else lineage["step"])
    record["history"] = started.get("history", [])
    changed = [f"{d.name} {d.was} → {d.now}" for d in compare(started, record)]
    changed += _changed_arithmetic(run, started, record, step, tell)
    if changed:
        record["history"] = [*record["history"], {"step": step, "changed": changed}]
        tell(f"Going on from step {step} with {'; '.join(changed)}.")
    return saved


def _check_schedule(
    run: RunDirectory,
    checkpoints: Checkpoints,
    started: dict[str, Any],
    now: dict[str, Any],
    step: int,
    first: int,
) -> None:
    """Make sure that the steps that were done had the learning rates that the configuration of now gives them."""
    old, new = (TrainConfig.from_dict(one["train"]) for one in (started, now))
    differences = [d for d in compare(started, now) if d.field in SCHEDULE_FIELDS]
    if not differences:
        return
    listed = "".join(f"\n  {one}" for one in differences)
    if new.steps <= step:
        raise CheckpointError(f"{run.path} is at step {step} already:{listed}\nGive more steps than that.")
    other = first_difference(old, new, range(first, step))
    if other is None:
        return
    agreeing = [one for one in checkpoints.steps() if one <= other]
    advice = (
        f"Start another run from the checkpoint before: `--from {run.path}@{max(agreeing)}`, in a directory of its own."
        if agreeing
        else "No checkpoint from before is there: that needs a new run, in another directory."
    )
    raise CheckpointError(
        f"{run.path} is at step {step}, and from step {other + 1} on its learning rate was another than it would have "
        f"been with these settings:{listed}\n{advice}"
    )


def _changed_arithmetic(
    run: RunDirectory, started: dict[str, Any], record: dict[str, Any], step: int, tell: Callable[[str], None]
) -> list[str]:
    """What computes otherwise than when the checkpoint was written, apart from the code.

    Raises:
        CheckpointError: the code is another.
    """
    was, is_now = started["fingerprint"], record["fingerprint"]
    if was["code"] != is_now["code"]:
        listed = "".join(f"\n  {line}" for line in changes({"code": was["code"]}, {"code": is_now["code"]}))
        raise CheckpointError(
            f"the code that trained {run.path} up to step {step} has changed:{listed}\n"
            "A run of two codes is none that can be made again. Go back to the code of before, or let a run branch off "
            f"that records it: `--from {run.path}@{step}`, in another directory."
        )
    lines = changes({**was, "code": {}}, {**is_now, "code": {}})
    if lines:
        tell(
            "The numbers will differ in rounding from those of a run that was never stopped: other arithmetic."
        )
    return lines


def _teller(progress: Progress | None, processes: Processes) -> Callable[[str], None]:
    """How to tell the user something that must not be missed: by the progress, or by a warning where there is none."""

    def tell(text: str) -> None:
        if processes.is_main:
            if progress is None:
                warnings.warn(text, stacklevel=2)
            else:
                progress.note(text)

    return tell


@contextmanager
def _own_random_generators(seed: int, processes: Processes) -> Iterator[None]:
    """Global random generators that depend on the seed and the rank, and are put back at the end.

    Nothing in training draws from them today; what might one day is reproducible and is resumed.
    """
    devices = [processes.device] if processes.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed * 10_007 + processes.rank)
        yield
