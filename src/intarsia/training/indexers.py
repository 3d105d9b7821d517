"""Which parameters are those of indexers, which learn by a loss of their own."""

from __future__ import annotations

from torch import nn

from intarsia.errors import ConfigError
from intarsia.mixers import Mixer


def indexer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that no gradient of the model's loss reaches, by name."""
    places = tuple(
        f"{place}.{part}."
        for place, module in model.named_modules()
        if isinstance(module, Mixer)
        for part in module.untrained
    )
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(places)}


def learning_layers(model: nn.Module) -> int:
    """How many layers have an indexer that learns."""
    mixers = (module for module in model.modules() if isinstance(module, Mixer))
    return sum("divergence" in mixer.side_results for mixer in mixers)


def train_indexers_alone(model: nn.Module) -> None:
    """Freeze everything else.

    Raises:
        ConfigError: there is nothing to train.
    """
    if not learning_layers(model):
        raise ConfigError(
            "trains='indexers' needs a layer whose indexer learns (dsa, msa or qsa, with an index_loss above 0), and "
            "the model has none"
        )
    learning = indexer_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
