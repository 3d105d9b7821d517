"""A model made ready for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from intarsia.layers.books import PAGE_SIZE
from intarsia.layers.packed import Packing, bytes_of_weights, packed, packed_child, refuse_training
from intarsia.layers.parted import Parted
from intarsia.model.block import Block
from intarsia.model.few_tokens import FewTokens
from intarsia.model.language_model import LanguageModel, ModelOutput
from intarsia.model.states import ModelPool, ModelStates
from intarsia.ops import Sequences
from intarsia.ops.packed_weights import WeightFormat


def packing_of_head(packing: Packing) -> Packing:
    """What becomes of the head where the other weights are packed so: a wrong logit is a wrong token, and the head is
    read as often as all the rest."""
    if packing.format != "int4":
        return packing
    return dataclasses.replace(packing, format="int8", group=None, zeros=False)


class InferenceModel:
    """What computes the next tokens of a language model, with all that can be made once made at the beginning: the
    layers' decode steps, which hold copies of weights, and weights that are packed. When weights of the model have
    changed, make another; to train, train the model.

    A few tokens, which is what decoding brings, go through `few_tokens`: programs of all that is done to each token
    alone, and the layers' exchanges between them. More go through the layers themselves.

    Runs under `torch.inference_mode()` and in evaluation mode, whatever mode the model is in.
    """

    def __init__(
        self,
        model: LanguageModel,
        weights: WeightFormat | Packing | None = None,
        *,
        group: int | None = None,
        zeros: bool = False,
    ) -> None:
        """
        Args:
            weights: what linear maps and experts are packed into, `"bfloat16"`, `"int8"`, ... ; embedding, norms,
                router, small gates and all that stays float32 are shared with the model, and with `"int4"` the head is
                int8. None: as they are. A `Packing` says all of it. The model itself is not kept: where nobody else has
                it, its weights go.
            group, zeros: of the integers, as in `pack_weights`.

        Raises:
            ConfigError: a format or group that cannot be.
        """
        self.config = model.config
        with torch.no_grad():
            packing = weights if isinstance(weights, Packing) else Packing(weights, group, zeros)
            self.model = packed(model, packing, keep=("head",))
            self.model._modules["head"] = packed_child(model.head, packing_of_head(packing))
            self.model.eval()
            # What computes each block's mixer, and what computes a few tokens, where there are kernels for it.
            self.layers = tuple(block.mixer.for_inference() for block in self._blocks)
            self.few_tokens = FewTokens.of(
                self._blocks, self.layers, self.model.norm, self.model.head, self.config.head_scale
            )

    @property
    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.model.blocks]

    @property
    def weight_bytes(self) -> int:
        """What all weights take, packed ones as they are packed, and the copies that layers have made of some."""
        layers: Sequence[object] = self.layers
        copies = [each for layer in layers if isinstance(layer, Parted) for each in layer.beside]
        return bytes_of_weights(self.model.modules(), copies)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embed.weight.device

    def __call__(
        self,
        tokens: Tensor,
        states: ModelStates | None = None,
        seqs: Sequences | None = None,
        last_only: bool | Sequence[int] = True,
    ) -> ModelOutput:
        """The logits of the next tokens and the states after them, as `LanguageModel.forward` gives them."""
        with torch.inference_mode():
            if self.few_tokens is not None and states is not None and self.few_tokens.takes(tokens):
                places = self.model.check(tokens, states, seqs, last_only)
                logits, after = self.few_tokens(self.model.embedded(tokens), states, seqs, places)
                return ModelOutput(logits, None, after)
            output: ModelOutput = self.model(
                tokens, states=states, seqs=seqs, last_only=last_only, layers=self.layers
            )
            return output

    def train(self, mode: bool = True) -> InferenceModel:
        """An inference model is always in evaluation mode.

        Raises:
            UnsupportedError: it is asked to train; the model that it was made of can.
        """
        refuse_training(mode)
        return self

    def init_states(self, batch_size: int) -> ModelStates:
        """The states of `batch_size` sequences that have not begun."""
        return self.model.init_states(batch_size)

    def new_pool(self, slots: int, tokens: int = 0, page_size: int = PAGE_SIZE) -> ModelPool:
        """Room for the states of `slots` sequences, which go on in place; see `LanguageModel.new_pool`."""
        return self.model.new_pool(slots, tokens, page_size)
