"""A model that is being trained, and one optimizer step of it: forward and backward over the micro-batches, clipping,
update.

Nothing in a step waits for the device: a GPU is given the next step's work while it is still at this one's. What a step
measured is read afterwards (`StepResult`).
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from intarsia.data import Batch
from intarsia.errors import TrainingError
from intarsia.layers.narrow import Narrowed
from intarsia.layers.side import SideName, SideResults
from intarsia.model import LanguageModel, ModelConfig
from intarsia.model.loss import IGNORED
from intarsia.ops import Sequences
from intarsia.training.compilation import check_compiler, telling_what_cannot_be_compiled
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes, shard
from intarsia.training.optimizers import Optimizers, build_optimizers
from intarsia.training.qk_clip import clip_logits
from intarsia.training.schedule import multiplier


@dataclass(frozen=True)
class StepResult:
    """What a step measured, over all processes.

    The numbers may still be in the making when the step returns: who reads one waits until they are there. Reading any
    of them raises a TrainingError where the loss or the gradient was not finite, in all processes alike.
    """

    step: int
    """From 1."""
    tokens: int
    lr: float
    """The peak learning rate times the schedule's multiplier."""
    numbers: Tensor
    """`[4]` float64 on the host: what the properties below read."""
    ready: torch.cuda.Event | None = None
    """When a GPU has written them."""

    @property
    def nll(self) -> float:
        """Sum of the negative log-likelihoods of the step's tokens, in nats, before the update."""
        return self._read()[0]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def gradient_norm(self) -> float:
        """Before clipping."""
        return self._read()[1]

    @property
    def max_logit(self) -> float | None:
        """The largest attention logit, where QK-clip watches."""
        return None if math.isnan(largest := self._read()[2]) else largest

    @property
    def clipped_heads(self) -> int | None:
        """How many heads were rescaled, where QK-clip watches."""
        return None if math.isnan(clipped := self._read()[3]) else int(clipped)

    def _read(self) -> list[float]:
        if self.ready is not None:
            self.ready.synchronize()
        numbers: list[float] = self.numbers.tolist()
        for what, value in (("loss", numbers[0]), ("gradient norm", numbers[1])):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {what} of step {self.step} is {value} (learning rate {self.lr:.3g})"
                )
        return numbers


@dataclass(frozen=True)
class Learner:
    """A model on its device and its optimizers."""

    model: LanguageModel
    optimizers: Optimizers
    config: TrainConfig
    processes: Processes

    @classmethod
    def new(cls, model_config: ModelConfig, config: TrainConfig, processes: Processes) -> Learner:
        """A new model with the weights of the configuration's seed, ready for its first step.

        Raises:
            ConfigError: it is to be compiled, and there is no compiler.
        """
        if config.compile:
            check_compiler(processes.device)
        # Made whole in every process: the weights of each parameter come from the seed and its name.
        model = LanguageModel(model_config)
        model.init_weights(config.seed)
        model.to(processes.device)
        model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            model.compile_blocks()
        shard(model, processes)
        return cls(model, build_optimizers(model, config), config, processes)

    def step(self, batch: Batch, done: int) -> StepResult:
        """Update the model with this process's rows of a batch, after `done` steps.

        The loss is the mean over the tokens of the whole step, of all micro-batches and all processes. So their
        number changes nothing but rounding.

        Raises:
            TrainingError: no token of the whole step has a target; nothing has changed then. Raised by all processes
                alike.
            ConfigError: the model is to be compiled, and a layer of it cannot be.
        """
        config, model, processes = self.config, self.model, self.processes
        tokens = processes.count(int(np.count_nonzero(batch.targets.cpu().numpy() != IGNORED)))
        if not tokens:
            raise TrainingError(
                f"step {done + 1} has nothing to learn from: all {batch.targets.numel()} targets are {IGNORED}, which "
                "means that there is none"
            )
        self.optimizers.zero_grad()
        model.train()
        nll, side = self._gradients(batch, tokens)
        norm = gradient_norm(model)
        if config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
        scale = multiplier(config, done)
        self.optimizers.set_multiplier(scale)
        self.optimizers.step()
        model.update_router_bias(side)
        clip = None if config.qk_clip is None else clip_logits(model, side, config.qk_clip, processes)
        largest, clipped = (torch.full_like(nll, math.nan),) * 2 if clip is None else clip
        numbers = torch.stack([x.double() for x in (nll, norm, largest, clipped)])
        return StepResult(done + 1, tokens, config.lr * scale, *_on_the_host(numbers))

    def _gradients(self, batch: Batch, tokens: int) -> tuple[Tensor, list[SideResults]]:
        """Compute them; the sum of the likelihoods over all processes, and the side results of this one's rows."""
        config, processes, device = self.config, self.processes, self.processes.device
        model = self.model
        if self._narrowed is not None:
            model = self._narrowed.of(model).train()
            self._narrowed.refresh()
        wanted: tuple[SideName, ...] = ("load", "loss")
        if config.qk_clip is not None:
            wanted += ("largest_logits",)
        nll = torch.zeros((), dtype=torch.float64, device=device)
        side = [SideResults()] * self.model.config.depth
        inputs, targets = (_on_the_device(x, device) for x in (batch.tokens, batch.targets))
        for part, seqs in micro_batches(batch, config.length, config.micro_rows):
            # "bf16": matrix products read bfloat16 copies of float32 weights. The weights themselves, gradients and the
            # optimizer's state are float32, and layers keep float32 where they ask for it.
            bf16 = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
            told_why = telling_what_cannot_be_compiled() if config.compile else nullcontext()
            with bf16, _outputs_are_not_changed(), told_why:
                out = model(inputs[:, part], targets=targets[:, part], seqs=seqs, side=wanted)
            losses = [told.loss for told in out.side if told.loss is not None]
            # FSDP averages gradients over processes where their sum is meant.
            (sum(losses, out.nll.sum()) * (processes.world_size / tokens)).backward()
            nll += out.nll.detach().double().sum()
            side = [before.merged(told.detached()) for before, told in zip(side, out.side, strict=True)]
        return processes.sum(nll), side

    @cached_property
    def _narrowed(self) -> Narrowed | None:
        """What casts weights once a step. It is left to autocast where parameters come and go (FSDP), and where casts
        are in compiled graphs."""
        left = self.config.precision != "bf16" or self.processes.world_size > 1 or self.config.compile
        return None if left else Narrowed(torch.bfloat16)


def micro_batches(batch: Batch, length: int, rows: int | None) -> Iterator[tuple[slice, Sequences]]:
    """Which tokens, and the sequences in them, of `rows` rows of `length` tokens at a time; of all at once if None."""
    size = batch.tokens.shape[1] if rows is None else rows * length
    starts = batch.seqs.starts
    for start in range(0, batch.tokens.shape[1], size):
        # Rows start new sequences, so no sequence is cut here.
        first, last = bisect_left(starts, start), bisect_left(starts, start + size)
        yield slice(start, start + size), Sequences(batch.seqs.lengths[first:last])


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of the gradient of all parameters together, over all processes."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_finite(model: nn.Module) -> bool:
    """Whether all parameters that this process holds are finite."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return bool(torch.stack([part.isfinite().all() for part in parts]).all())


def _on_the_device(x: Tensor, device: torch.device) -> Tensor:
    # From ordinary memory a copy would wait until the device has done all before it.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _on_the_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The numbers where the host can read them, once what is returned beside them has happened."""
    if numbers.device.type != "cuda":
        return numbers, None
    host = torch.empty_like(numbers, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


@contextmanager
def _outputs_are_not_changed() -> Iterator[None]:
    """Without FSDP's warning that an output which is a view must not be changed in place: it is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
        yield
