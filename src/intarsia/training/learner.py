"""A model that is being trained, with all that trains it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from intarsia.data import Batch
from intarsia.model import LanguageModel, ModelConfig
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes, shard
from intarsia.training.optimizers import Optimizers, build_optimizers
from intarsia.training.qk_clip import watch_logits
from intarsia.training.step import StepResult, train_step


@dataclass(frozen=True)
class Learner:
    """A model on its device, its optimizers, and what is watched while it learns."""

    model: LanguageModel
    optimizers: Optimizers
    watched: list[nn.Module]
    """The mixers whose logits QK-clip watches."""
    config: TrainConfig
    processes: Processes

    @classmethod
    def new(cls, model_config: ModelConfig, config: TrainConfig, processes: Processes) -> Learner:
        """A new model with the weights of the configuration's seed, ready for its first step."""
        # Made whole in every process: the weights of each parameter come from the seed and its name.
        model = LanguageModel(model_config)
        model.init_weights(config.seed)
        model.to(processes.device)
        model.activation_checkpointing = config.activation_checkpointing
        watched = watch_logits(model) if config.qk_clip is not None else []
        shard(model, processes)
        return cls(model, build_optimizers(model, config), watched, config, processes)

    def step(self, batch: Batch, done: int) -> StepResult:
        """Learn from a batch, after `done` steps; see `train_step`."""
        self.model.train()
        return train_step(self.model, self.optimizers, self.config, batch, done, self.processes, self.watched)
