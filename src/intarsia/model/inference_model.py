"""A model made ready for inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from intarsia.model.language_model import LanguageModel, ModelOutput
from intarsia.model.states import ModelPool, ModelStates
from intarsia.ops import Sequences


class InferenceModel:
    """What computes the next tokens of a language model, with all that can be made once made at the beginning: the
    layers' decode steps, which hold copies of weights. When weights of `model` have changed, make another; to train,
    train `model`.

    Runs under `torch.inference_mode()` and in evaluation mode, and leaves the model in the mode that it was in.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.config = model, model.config
        with torch.no_grad():
            self._layers = tuple(block.mixer.for_inference() for block in model.blocks)  # type: ignore[operator,union-attr]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embed.weight.device

    def __call__(
        self,
        tokens: Tensor,
        states: ModelStates | None = None,
        seqs: Sequences | None = None,
        last_only: bool = True,
    ) -> ModelOutput:
        """The logits of the next tokens and the states after them, as `LanguageModel.forward` gives them."""
        with torch.inference_mode(), _evaluating(self.model):
            output: ModelOutput = self.model(
                tokens, states=states, seqs=seqs, last_only=last_only, layers=self._layers
            )
            return output

    def init_states(self, batch_size: int) -> ModelStates:
        """The states of `batch_size` sequences that have not begun."""
        return self.model.init_states(batch_size)

    def new_pool(self, slots: int, tokens: int = 0) -> ModelPool:
        """Room for the states of `slots` sequences, which go on in place; see `LanguageModel.new_pool`."""
        return self.model.new_pool(slots, tokens)


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode for so long."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
