"""One optimizer step: forward and backward over the micro-batches, clipping, update."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from intarsia.data import Batch
from intarsia.errors import TrainingError
from intarsia.layers.side import SideName, SideResults
from intarsia.model import LanguageModel
from intarsia.model.loss import IGNORED
from intarsia.ops import Sequences
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes
from intarsia.training.optimizers import Optimizers
from intarsia.training.precision import autocast
from intarsia.training.qk_clip import clip_logits
from intarsia.training.schedule import multiplier


@dataclass(frozen=True)
class StepResult:
    """What a step measured, over all processes."""

    nll: float
    """Sum of the negative log-likelihoods of the step's tokens, in nats, before the update."""
    tokens: int
    gradient_norm: float
    """Before clipping."""
    multiplier: float
    """Of the peak learning rate."""
    max_logit: float | None = None
    """The largest attention logit, where QK-clip watches."""
    clipped_heads: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens


def train_step(
    model: LanguageModel,
    optimizers: Optimizers,
    config: TrainConfig,
    batch: Batch,
    step: int,
    processes: Processes,
) -> StepResult:
    """Update the model with a batch.

    The loss is the mean over the tokens of the whole step, of all micro-batches and all processes. So their
    number changes nothing but rounding.

    Args:
        batch: this process's rows.
        step: how many steps were finished before.

    Raises:
        TrainingError: the loss or the gradient is not finite, or no token of the whole step has a target. The weights
            are then as before the step. Raised by all processes alike.
    """
    tokens = int(processes.sum((batch.targets != IGNORED).sum().to(processes.device)))
    if not tokens:
        raise TrainingError(
            f"step {step + 1} has nothing to learn from: all {batch.targets.numel()} targets are {IGNORED}, which "
            "means that there is none"
        )
    optimizers.zero_grad()
    nll = torch.zeros((), dtype=torch.float64, device=processes.device)
    wanted: tuple[SideName, ...] = (
        ("load", "loss") if config.qk_clip is None else ("load", "loss", "largest_logits")
    )
    side = [SideResults()] * model.config.depth
    for part_tokens, part_targets, seqs in micro_batches(batch, config.length, config.micro_rows):
        with autocast(config.precision, processes.device), _outputs_are_not_changed():
            out = model(
                part_tokens.to(processes.device),
                targets=part_targets.to(processes.device),
                seqs=seqs,
                side=wanted,
            )
        losses = [told.loss for told in out.side if told.loss is not None]
        # FSDP averages gradients over processes where their sum is meant.
        (sum(losses, out.nll.sum()) * (processes.world_size / tokens)).backward()
        nll += out.nll.detach().double().sum()
        side = [before.merged(told.detached()) for before, told in zip(side, out.side, strict=True)]
    total = float(processes.sum(nll))
    _check_finite("loss", total, step, config)

    norm = gradient_norm(model)
    _check_finite("gradient norm", float(norm), step, config)
    if config.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
    scale = multiplier(config, step)
    optimizers.set_multiplier(scale)
    optimizers.step()
    model.update_router_bias(side)
    clip = None if config.qk_clip is None else clip_logits(model, side, config.qk_clip, processes)
    largest, clipped = (None, None) if clip is None else (float(clip[0]), int(clip[1]))
    return StepResult(total, tokens, float(norm), scale, largest, clipped)


def micro_batches(batch: Batch, length: int, rows: int | None) -> Iterator[tuple[Tensor, Tensor, Sequences]]:
    """The tokens, targets and sequences of `rows` rows of `length` tokens at a time; of all at once if
    None."""
    size = batch.tokens.shape[1] if rows is None else rows * length
    starts = batch.seqs.starts
    for start in range(0, batch.tokens.shape[1], size):
        # Rows start new sequences, so no sequence is cut here.
        first, last = bisect_left(starts, start), bisect_left(starts, start + size)
        part = slice(start, start + size)
        yield batch.tokens[:, part], batch.targets[:, part], Sequences(batch.seqs.lengths[first:last])


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of the gradient of all parameters together, over all processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_finite(model: nn.Module) -> bool:
    """Whether all parameters that this process holds are finite."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return bool(torch.stack([part.isfinite().all() for part in parts]).all())


@contextmanager
def _outputs_are_not_changed() -> Iterator[None]:
    """Without FSDP's warning that an output which is a view must not be changed in place: it is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
        yield


def _check_finite(what: str, value: float, step: int, config: TrainConfig) -> None:
    if not math.isfinite(value):
        rate = config.lr * multiplier(config, step)
        raise TrainingError(f"the {what} of step {step + 1} is {value} (learning rate {rate:.3g})")
