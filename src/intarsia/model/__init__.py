"""Language models: their configuration, blocks, experts, loss and cost; `presets` names some."""

from intarsia.model import presets
from intarsia.model.config import ExpertsConfig, FeedForwardConfig, HyperConnectionsConfig, ModelConfig
from intarsia.model.cost import ModelCost
from intarsia.model.inference_model import InferenceModel
from intarsia.model.initialization import init_weights
from intarsia.model.language_model import LanguageModel, ModelOutput, cost_of
from intarsia.model.matching import match_parameters
from intarsia.model.recorded import RecordedModel
from intarsia.model.states import ModelPool, ModelStates

__all__ = [
    "ExpertsConfig",
    "FeedForwardConfig",
    "HyperConnectionsConfig",
    "InferenceModel",
    "LanguageModel",
    "ModelConfig",
    "ModelCost",
    "ModelOutput",
    "ModelPool",
    "ModelStates",
    "RecordedModel",
    "cost_of",
    "init_weights",
    "match_parameters",
    "presets",
]
