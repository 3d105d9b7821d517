"""A model that is being trained, with all that trains it."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.data import Batch
from intarsia.model import LanguageModel, ModelConfig
from intarsia.training.compilation import check_compiler, telling_what_cannot_be_compiled
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes, shard
from intarsia.training.optimizers import Optimizers, build_optimizers
from intarsia.training.step import StepResult, train_step


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
        """Learn from a batch, after `done` steps; see `train_step`."""
        self.model.train()
        if self.config.compile:
            with telling_what_cannot_be_compiled():
                return train_step(self.model, self.optimizers, self.config, batch, done, self.processes)
        return train_step(self.model, self.optimizers, self.config, batch, done, self.processes)
