"""Language models: their configuration, blocks, experts, loss and cost; `presets` names some."""

from intarsia.model import presets
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, ModelConfig
from intarsia.model.cost import ModelCost
from intarsia.model.initialization import init_weights
from intarsia.model.language_model import LanguageModel, ModelOutput, ModelStates, cost_of
from intarsia.model.matching import match_parameters

__all__ = [
    "ExpertsConfig",
    "FeedForwardConfig",
    "LanguageModel",
    "ModelConfig",
    "ModelCost",
    "ModelOutput",
    "ModelStates",
    "cost_of",
    "init_weights",
    "match_parameters",
    "presets",
]
