"""A training run in progress: its parts, its steps, and what comes between them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from intarsia.checkpoints.native import save_model
from intarsia.data import BatchLoader, TokenDataset, Tokenizer
from intarsia.errors import TrainingError
from intarsia.jobs.progress import Progress
from intarsia.jobs.signals import StopRequest
from intarsia.model import LanguageModel, ModelConfig
from intarsia.training.checkpoint import Checkpoints
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes
from intarsia.training.evaluate import Evaluation, evaluate, first_documents
from intarsia.training.learner import Learner, StepResult, all_finite
from intarsia.training.metrics import Lines, Metrics
from intarsia.training.result import TrainResult
from intarsia.training.run_directory import RunDirectory
from intarsia.training.schedule import stable_until


@dataclass
class Tally:
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
    line_steps: int = 0
    line_indexer_loss: float | None = None
    loss: float = 0.0

    def done(self, result: StepResult, digest: str) -> None:
        """Another step is done; what it measured comes later."""
        self.step += 1
        self.tokens += result.tokens
        self.batches = hashlib.sha256((self.batches + digest).encode()).hexdigest()

    def spent(self, seconds: float) -> None:
        """So long it took."""
        self.seconds += seconds
        self.line_seconds += seconds

    def read(self, result: StepResult) -> None:
        """What a step measured, which may be waited for. In the order of the steps."""
        self.line_nll += result.nll
        self.line_tokens += result.tokens
        self.loss = self.line_nll / self.line_tokens
        if result.max_logit is not None:
            self.line_max_logit = max(result.max_logit, self.line_max_logit or result.max_logit)
            self.line_clipped_heads += result.clipped_heads or 0
        self.line_steps += 1
        if result.indexer_loss is not None:
            self.line_indexer_loss = result.indexer_loss + (self.line_indexer_loss or 0.0)

    @property
    def indexer_loss(self) -> float:
        """`StepResult.indexer_loss`, the mean over the line's steps."""
        return (self.line_indexer_loss or 0.0) / max(self.line_steps, 1)

    def start_line(self) -> None:
        self.line_nll, self.line_tokens, self.line_seconds = 0.0, 0, 0.0
        self.line_max_logit, self.line_clipped_heads = None, 0
        self.line_steps, self.line_indexer_loss = 0, None


class Trainer:
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
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.dataset, self.tokenizer = config, dataset, tokenizer
        self.run, self.processes, self.progress = run, processes, progress
        self.tell = tell  # what must not be missed, also where no progress is shown
        self.loader = BatchLoader(
            dataset.train,
            rows=config.rows_per_rank(processes.world_size),
            length=config.length,
            seed=config.data_seed,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        self.learner = Learner.new(model_config, config, processes)
        self.model, self.optimizers = self.learner.model, self.learner.optimizers
        self.checkpoints = Checkpoints(
            run.checkpoints,
            processes,
            config.keep_checkpoints,
            config.keep_every,
            stable_until(config) if config.keep_stable else None,
        )
        self.record: dict[str, Any] = {}
        """Of the run, as `config.json` has it and every checkpoint."""
        self.tally = Tally()
        self._unread: list[StepResult] = []
        self.evaluation: Evaluation | None = None
        self._known_lines: Lines | None = None

    def restore(self, step: int, saved: dict[str, Any]) -> None:
        """Go to the checkpoint of `step`, where `saved` is what `Checkpoints.trainer` gives of it."""
        self.checkpoints.load(step, self.model, self.optimizers, saved)
        self.loader.load_state_dict(saved["loader"])
        self.tally = Tally(**saved["tally"])
        self._known_lines = Lines(**saved["metrics"])

    def run_all(self, label: str, stop: StopRequest) -> TrainResult:
        """All steps that are left, with what comes between and after them."""
        config, tally = self.config, self.tally
        self.progress.begin(label, config.steps, tally.step)
        try:
            with self._open_metrics() as metrics:
                if metrics.gap is not None:
                    self.tell(metrics.gap)
                while True:
                    last = tally.step == config.steps
                    stopping = not last and self._agreed(stop.requested)
                    # Before the evaluation, when stopping: whoever asks to stop does not want to wait. What
                    # is due and missing is done first of all when the run goes on.
                    if self._due(config.eval_every, last) and not stopping:
                        self._evaluate(metrics)
                    if self._is_to_be_saved(last, stopping):
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
        is_line = (tally.step + 1) % self.config.log_every == 0 or tally.step + 1 == self.config.steps
        try:
            result = self.learner.step(batch, tally.step, watch=is_line)
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._advice()}") from None
        tally.done(result, batch.digest)
        self._unread.append(result)
        # A GPU is still at it, and is given the next step before its numbers are waited for.
        self._read(0 if is_line or self.processes.device.type == "cpu" else 1)
        tally.spent(time.perf_counter() - began)
        speed = tally.line_tokens / tally.line_seconds
        shown = {"loss": tally.loss, "tokens/s": speed}
        if tally.line_indexer_loss is not None:
            shown = {"loss": tally.loss, "indexer": tally.indexer_loss, "tokens/s": speed}
        self.progress.advance(tally.step, shown)
        if is_line:
            values: dict[str, Any] = {
                "loss": tally.loss,
                "gradient_norm": result.gradient_norm,
                "lr": result.lr,
                "tokens": tally.tokens,
                "epoch": self.loader.epochs,
                "batches": tally.batches,
                "seconds": tally.seconds,
                "tokens_per_second": speed,
            }
            if tally.line_max_logit is not None:
                values |= {"max_logit": tally.line_max_logit, "clipped_heads": tally.line_clipped_heads}
            if tally.line_indexer_loss is not None:
                values |= {
                    "indexer_loss": tally.indexer_loss,
                    "indexer_gradient_norm": result.indexer_gradient_norm,
                }
            if result.picked_share is not None:
                values["picked_share"] = result.picked_share
            metrics.write("train", tally.step, values)
            tally.start_line()

    def _read(self, left: int = 0) -> None:
        """Read what steps measured, of all but the last `left`."""
        while len(self._unread) > left:
            try:
                self.tally.read(self._unread.pop(0))
            except TrainingError as error:
                raise TrainingError(f"{error}. {self._advice()}") from None

    def _evaluate(self, metrics: Metrics) -> None:
        """Evaluate the model as it is, unless that was done before a checkpoint that the run went on from."""
        self._read()
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
        self._read()
        step = self.tally.step
        if step == 0 or step == self.checkpoints.latest():
            return
        # A finite loss may have been followed by an update that was not: such weights must replace no good
        # ones.
        if self._agreed(not all_finite(self.model)):
            raise TrainingError(f"the weights after step {step} are not finite. {self._advice()}")
        metrics.flush()
        trainer = {
            "run": self.record,
            "device": self.processes.device.type,
            "loader": self.loader.state_dict(),
            "tally": asdict(self.tally),
            "metrics": asdict(metrics.known),
        }
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
        return Metrics(self.run.metrics, self.tally.step, events, self._known_lines)

    def _is_to_be_saved(self, last: bool, stopping: bool) -> bool:
        if self.config.keep_stable and self.tally.step == self.checkpoints.keep_step:
            return True
        return not last and (stopping or self._due(self.config.checkpoint_every))

    def _due(self, every: int | None, last: bool = False) -> bool:
        return last or (every is not None and self.tally.step > 0 and self.tally.step % every == 0)

    def _agreed(self, wish: bool) -> bool:
        """Whether any process wishes so; the same answer in all."""
        return self.processes.count(int(wish)) > 0

    def _advice(self) -> str:
        step = self.checkpoints.latest()
        kept = (
            "There is no checkpoint"
            if step is None
            else f"The last checkpoint is kept: {self.checkpoints.path(step)}"
        )
        return f"{kept}. Try a lower learning rate or a longer warm-up."


def _whole(model: LanguageModel, processes: Processes) -> LanguageModel:
    """The model with plain tensors on the CPU, in the first process; anything in the others."""
    if processes.world_size == 1:
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = LanguageModel(model.config)
    if processes.is_main:
        whole.load_state_dict(state)
    return whole
