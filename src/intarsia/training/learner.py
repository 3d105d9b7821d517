"""A model that is being trained, and one optimizer step of it: forward and backward over the micro-batches, clipping,
update.

Nothing in a step waits for the device: a GPU is given the next step's work while it is still at this one's. What a step
measured is read afterwards (`StepResult`).
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator
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
from intarsia.training.indexers import indexer_parameters, train_indexers_alone
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
    """`[7]` float64 on the host: what the properties below read."""
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
        """Before clipping, of all parameters but those of indexers."""
        return self._read()[1]

    @property
    def max_logit(self) -> float | None:
        """The largest attention logit, where QK-clip watches."""
        return None if math.isnan(largest := self._read()[2]) else largest

    @property
    def clipped_heads(self) -> int | None:
        """How many heads were rescaled, where QK-clip watches."""
        return None if math.isnan(clipped := self._read()[3]) else int(clipped)

    @property
    def indexer_gradient_norm(self) -> float | None:
        """Before clipping, of the parameters of indexers; None without any."""
        return None if (norm := self._read()[4]) < 0 else norm

    @property
    def indexer_loss(self) -> float | None:
        """How far the scores of indexers are from attention, in nats: the mean over tokens and layers; None without any
        that learns."""
        return None if math.isnan(loss := self._read()[5]) else loss

    @property
    def picked_share(self) -> float | None:
        """The share of what full attention would give that stands in what indexers pick: the mean over layers and over
        the tokens that have more to see than is picked. None where there are none, or nobody watched."""
        return None if math.isnan(share := self._read()[6]) else share

    def _read(self) -> list[float]:
        if self.ready is not None:
            self.ready.synchronize()
        numbers: list[float] = self.numbers.tolist()
        found = (("loss", numbers[0]), ("gradient norm", numbers[1]), ("indexers' gradient norm", numbers[4]))
        for what, value in found:
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
            ConfigError: it is to be compiled, and there is no compiler; or there is nothing that is to be trained.
        """
        if config.compile:
            check_compiler(processes.device)
        # Made whole in every process: the weights of each parameter come from the seed and its name.
        model = LanguageModel(model_config)
        model.init_weights(config.seed)
        if config.trains == "indexers":
            train_indexers_alone(model)
        model.to(processes.device)
        model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            model.compile_blocks()
        shard(model, processes)
        return cls(model, build_optimizers(model, config), config, processes)

    def step(self, batch: Batch, done: int, watch: bool = False) -> StepResult:
        """Update the model with this process's rows of a batch, after `done` steps. `watch`: measure what indexers
        pick, too, which takes as long as full attention.

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
        nll, side = self._gradients(batch, tokens, watch)
        # Apart: how far indexers go must not depend on the model's gradient, nor the other way round.
        rest, indexers = self._parts
        norm, indexer_norm = (self._clipped(parameters) for parameters in (rest, indexers))
        scale = multiplier(config, done)
        self.optimizers.set_multiplier(scale)
        self.optimizers.step()
        if config.trains == "all":
            model.update_router_bias(side)
        clip = None if config.qk_clip is None else clip_logits(model, side, config.qk_clip, processes)
        largest, clipped = (torch.full_like(nll, math.nan),) * 2 if clip is None else clip
        if not indexers:
            indexer_norm = torch.full_like(norm, -1)
        measured = (nll, norm, largest, clipped, indexer_norm, *self._of_indexers(side, watch))
        numbers = torch.stack([x.double() for x in measured])
        return StepResult(done + 1, tokens, config.lr * scale, *_on_the_host(numbers))

    @cached_property
    def _parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that the model's loss trains, and those of indexers."""
        of_indexers = indexer_parameters(self.model)
        rest = [p for name, p in self.model.named_parameters() if name not in of_indexers]
        return rest, list(of_indexers.values())

    def _clipped(self, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of their gradient, before it was clipped."""
        norm = gradient_norm(parameters, self.processes.device)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        return norm

    def _of_indexers(self, side: list[SideResults], watch: bool) -> tuple[Tensor, Tensor]:
        """`StepResult.indexer_loss` and `picked_share`, or NaN."""
        nothing = torch.full((), math.nan, dtype=torch.float64, device=self.processes.device)
        told = [each.divergence.double() for each in side if each.divergence is not None]
        if not told:
            return nothing, nothing
        total = self.processes.sum(torch.stack(told).sum())
        loss = total / (len(told) * self.config.tokens_per_step)
        if not watch:
            return loss, nothing
        # Of every process, whether it has something to tell or not.
        total = nothing.new_zeros(2)
        for each in side:
            if each.picked is not None:
                total[0] += each.picked.nansum()
                total[1] += each.picked.isfinite().sum()
        share, count = self.processes.sum(total).unbind()
        return loss, share / count

    def _gradients(self, batch: Batch, tokens: int, watch: bool) -> tuple[Tensor, list[SideResults]]:
        """Compute them; the sum of the likelihoods over all processes, and the side results of this one's rows."""
        config, processes, device = self.config, self.processes, self.processes.device
        model = self.model
        if self._narrowed is not None:
            model = self._narrowed.of(model).train()
            self._narrowed.refresh()
        wanted: tuple[SideName, ...] = ("load", "loss", "divergence", *(("picked",) if watch else ()))
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


def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of the gradient of all of them together, over all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).to(device)
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
