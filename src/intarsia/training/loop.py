"""Training a language model, from its configuration to a directory with the result."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from intarsia.checkpoints.native import save_model
from intarsia.data import BatchLoader, TokenDataset, Tokenizer
from intarsia.errors import CheckpointError, ConfigError, TrainingError
from intarsia.model import LanguageModel, ModelConfig
from intarsia.training.checkpoint import Checkpoints
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes, join_processes, shard
from intarsia.training.evaluate import Evaluation, evaluate, first_documents
from intarsia.training.metrics import Metrics
from intarsia.training.optimizers import build_optimizers
from intarsia.training.progress import NoProgress, Progress
from intarsia.training.qk_clip import watch_logits
from intarsia.training.result import TrainResult
from intarsia.training.run_directory import RunDirectory
from intarsia.training.signals import StopRequest
from intarsia.training.step import StepResult, all_finite, train_step

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
        trainer = _Trainer(model_config, train_config, dataset, tokenizer, run, processes, shown)
        # Nothing is written before everything is known to fit together, and everybody has looked.
        _lock(run, processes, stack)
        if processes.is_main:
            run.claim(identity)
        trainer.restore(resume)
        stop = stack.enter_context(StopRequest(shown.note))
        return trainer.run_all(label, stop)


@dataclass
class _Tally:
    """The numbers that a run carries from step to step, and through its checkpoints."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    batches: str = ""
    line_nll: float = 0.0
    """Of the steps since the last line of metrics; so is all that is called `line`."""
    line_tokens: int = 0
    line_seconds: float = 0.0
    line_max_logit: float | None = None
    line_clipped_heads: int = 0
    loss: float = 0.0

    def add(self, result: StepResult, digest: str, seconds: float) -> None:
        self.step += 1
        self.tokens += result.tokens
        self.seconds += seconds
        self.batches = hashlib.sha256((self.batches + digest).encode()).hexdigest()
        self.line_nll += result.nll
        self.line_tokens += result.tokens
        self.line_seconds += seconds
        self.loss = self.line_nll / self.line_tokens
        if result.max_logit is not None:
            self.line_max_logit = max(result.max_logit, self.line_max_logit or result.max_logit)
            self.line_clipped_heads += result.clipped_heads or 0

    def start_line(self) -> None:
        self.line_nll, self.line_tokens, self.line_seconds = 0.0, 0, 0.0
        self.line_max_logit, self.line_clipped_heads = None, 0


class _Trainer:
    """A run in progress."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        dataset: TokenDataset,
        tokenizer: Tokenizer | None,
        run: RunDirectory,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.config, self.dataset, self.tokenizer = config, dataset, tokenizer
        self.run, self.processes, self.progress = run, processes, progress
        self.loader = BatchLoader(
            dataset.train,
            rows=config.rows_per_rank(processes.world_size),
            length=config.length,
            seed=config.data_seed,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        # Made whole in every process: the weights of each parameter come from the seed and its name.
        self.model = LanguageModel(model_config)
        self.model.init_weights(config.seed)
        self.model.to(processes.device)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.watched = watch_logits(self.model) if config.qk_clip is not None else []
        shard(self.model, processes)
        self.optimizers = build_optimizers(self.model, config)
        self.checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints, processes)
        self.tally = _Tally()
        self.evaluation: Evaluation | None = None

    def restore(self, resume: Resume) -> None:
        """Go to the newest checkpoint, if there is one."""
        step = self.checkpoints.latest()
        if step is None and resume == "always":
            raise CheckpointError(f"{self.run.path} holds no checkpoint to resume from")
        if step is not None:
            saved = self.checkpoints.load(step, self.model, self.optimizers)
            self.loader.load_state_dict(saved["loader"])
            self.tally = _Tally(**saved["tally"])

    def run_all(self, label: str, stop: StopRequest) -> TrainResult:
        """All steps that are left, with what comes between and after them."""
        config, tally = self.config, self.tally
        self.progress.begin(label, config.steps, tally.step)
        try:
            with self._open_metrics() as metrics:
                while True:
                    last = tally.step == config.steps
                    stopping = not last and self._agreed(stop.requested)
                    # Before the evaluation, when stopping: whoever asks to stop does not want to wait. What
                    # is due and missing is done first of all when the run goes on.
                    if self._due(config.eval_every, last) and not stopping:
                        self._evaluate(metrics)
                    if not last and (stopping or self._due(config.checkpoint_every)):
                        self._save(metrics)
                    if last or stopping:
                        break
                    self._step(metrics)
            if last:
                return self._finish()
            self.progress.note(f"Stopped after step {tally.step} of {config.steps}.")
            return self._result(finished=False)
        finally:
            self.progress.end()

    def _step(self, metrics: Metrics) -> None:
        tally = self.tally
        began = time.perf_counter()
        batch = self.loader.next()
        self.model.train()
        try:
            result = train_step(
                self.model, self.optimizers, self.config, batch, tally.step, self.processes, self.watched
            )
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._advice()}") from None
        tally.add(result, batch.digest, time.perf_counter() - began)
        speed = tally.line_tokens / tally.line_seconds
        self.progress.advance(tally.step, {"loss": tally.loss, "tokens/s": speed})
        if tally.step % self.config.log_every == 0 or tally.step == self.config.steps:
            values: dict[str, Any] = {
                "loss": tally.loss,
                "gradient_norm": result.gradient_norm,
                "lr": self.config.lr * result.multiplier,
                "tokens": tally.tokens,
                "epoch": self.loader.epochs,
                "batches": tally.batches,
                "seconds": tally.seconds,
                "tokens_per_second": speed,
            }
            if tally.line_max_logit is not None:
                values |= {"max_logit": tally.line_max_logit, "clipped_heads": tally.line_clipped_heads}
            metrics.write("train", tally.step, values)
            tally.start_line()

    def _evaluate(self, metrics: Metrics) -> None:
        """Evaluate the model as it is, unless that was done before a checkpoint that the run went on from."""
        step, heldout = self.tally.step, self.dataset.heldout
        if not heldout.documents or self.config.eval_documents == 0:
            return
        if self.processes.gather(metrics.has("eval", step))[0]:
            return
        self.evaluation = evaluate(
            self.model,
            heldout,
            length=self.config.length,
            documents=first_documents(heldout, self.config.eval_documents, self.config.eval_bytes),
            precision=self.config.precision,
            processes=self.processes,
        )
        if not np.all(np.isfinite(self.evaluation.nll)):
            raise TrainingError(
                f"the likelihood of held-out text after step {step} is not finite. {self._advice()}"
            )
        if self.processes.is_main:
            self.evaluation.save(self.run.evaluation(step))
        metrics.write("eval", step, self.evaluation.summary())

    def _save(self, metrics: Metrics) -> None:
        """Write a checkpoint of this step, unless there is one. The metrics so far are part of it."""
        step = self.tally.step
        if step == 0 or step == self.checkpoints.latest():
            return
        # A finite loss may have been followed by an update that was not: such weights must replace no good
        # ones.
        if self._agreed(not all_finite(self.model)):
            raise TrainingError(f"the weights after step {step} are not finite. {self._advice()}")
        metrics.flush()
        trainer = {"loader": self.loader.state_dict(), "tally": asdict(self.tally)}
        self.checkpoints.save(step, self.model, self.optimizers, trainer)

    def _finish(self) -> TrainResult:
        """Write the model and the result."""
        model = _whole(self.model, self.processes)
        if self.processes.is_main:
            save_model(self.run.model, model, self.tokenizer, extra={"step": self.tally.step})
            self._result(finished=True).save()
        self.processes.barrier()
        return TrainResult.load(self.run.path)

    def _result(self, finished: bool) -> TrainResult:
        tally = self.tally
        return TrainResult(
            directory=self.run.path,
            finished=finished,
            step=tally.step,
            loss=tally.loss,
            tokens=tally.tokens,
            seconds=tally.seconds,
            batches=tally.batches,
            evaluation=self.evaluation if finished else None,
        )

    def _open_metrics(self) -> Metrics:
        """The metrics file; in other processes than the first, one that swallows everything."""
        if not self.processes.is_main:
            return Metrics(None, self.tally.step)
        events = self.run.tensorboard if self.config.tensorboard else None
        return Metrics(self.run.metrics, self.tally.step, events)

    def _due(self, every: int | None, last: bool = False) -> bool:
        return last or (every is not None and self.tally.step > 0 and self.tally.step % every == 0)

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes so; the same answer in all."""
        return bool(self.processes.maximum(torch.tensor(float(wish), device=self.processes.device)))

    def _advice(self) -> str:
        step = self.checkpoints.latest()
        kept = (
            "There is no checkpoint"
            if step is None
            else f"The last checkpoint is kept: {self.checkpoints.path(step)}"
        )
        return f"{kept}. Try a lower learning rate or a longer warm-up."


def _identity(model: ModelConfig, config: TrainConfig, dataset: TokenDataset) -> dict[str, Any]:
    """What makes a run the run that it is."""
    data = {"corpus": dataset.corpus, "tokenizer": dataset.tokenizer, "fingerprint": dataset.fingerprint}
    return {"format": 1, "model": model.to_dict(), "train": config.to_dict(), "data": data}


def _whole(model: LanguageModel, processes: Processes) -> LanguageModel:
    """The model with plain tensors on the CPU, in the first process; anything in the others."""
    if processes.world_size == 1:
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = LanguageModel(model.config)
    if processes.is_main:
        whole.load_state_dict(state)
    return whole


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
