"""Training a language model, from its configuration to a directory with the result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from intarsia.data import TokenDataset, Tokenizer
from intarsia.errors import CheckpointError, ConfigError
from intarsia.model import ModelConfig
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes, join_processes
from intarsia.training.progress import NoProgress, Progress
from intarsia.training.result import TrainResult
from intarsia.training.run_directory import RunDirectory
from intarsia.training.signals import StopRequest
from intarsia.training.trainer import Resume, Trainer


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

    Raises:
        ConfigError: the configurations, the data and the processes do not fit together.
        CheckpointError: another process is at work in the directory; it holds a run of another configuration
            or of other data (the message names the fields), a checkpoint is damaged, or `resume` cannot be
            had.
        TrainingError: the loss or the gradient became NaN or infinite. The message names the step and the
            last checkpoint, which stays.
    """
    run = RunDirectory(Path(directory))
    if dataset.vocab_size > model_config.vocab_size:
        raise ConfigError(
            f"the data have a vocabulary of {dataset.vocab_size} and the model one of "
            f"{model_config.vocab_size}: give the model at least as many"
        )
    if resume not in ("auto", "always", "never"):
        raise ConfigError(f"resume must be auto, always or never; got {resume!r}")
    if resume == "never" and run.config.exists():
        raise CheckpointError(
            f"{run.path} holds a run already: resume it, remove it, or choose another directory"
        )

    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(device))
        identity = _identity(model_config, train_config, dataset)
        run.check(identity)
        if run.result.exists():
            return TrainResult.load(run.path)
        stack.enter_context(_own_random_generators(train_config.seed, processes))
        shown = progress if progress is not None and processes.is_main else NoProgress()
        trainer = Trainer(model_config, train_config, dataset, tokenizer, run, processes, shown)
        # Nothing is written before everything is known to fit together, and everybody has looked.
        _lock(run, processes, stack)
        if processes.is_main:
            run.claim(identity)
        trainer.restore(resume)
        stop = stack.enter_context(StopRequest(shown.note))
        return trainer.run_all(label, stop)


def _identity(model: ModelConfig, config: TrainConfig, dataset: TokenDataset) -> dict[str, Any]:
    """What makes a run the run that it is."""
    data = {"corpus": dataset.corpus, "tokenizer": dataset.tokenizer, "fingerprint": dataset.fingerprint}
    return {"format": 1, "model": model.to_dict(), "train": config.to_dict(), "data": data}


def _lock(run: RunDirectory, processes: Processes, stack: ExitStack) -> None:
    """Lock the directory in the first process; raise in all processes alike if that cannot be."""
    problem = None
    if processes.is_main:
        try:
            stack.enter_context(run.locked())
        except CheckpointError as error:
            problem = str(error)
    if (first := processes.gather(problem)[0]) is not None:
        raise CheckpointError(str(first))


@contextmanager
def _own_random_generators(seed: int, processes: Processes) -> Iterator[None]:
    """Global random generators that depend on the seed and the rank, and are put back at the end.

    Nothing in training draws from them today; what might one day is reproducible and is resumed.
    """
    devices = [processes.device] if processes.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed * 10_007 + processes.rank)
        yield
