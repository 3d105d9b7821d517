"""What a model costs: parameters, FLOPs per token, bytes of state.

FLOPs are the model's own: a multiplication and an addition are two, and what is recomputed (activation
checkpointing, the logits of the chunked loss) is not counted again. Products with weights and the exchange
between tokens are counted; norms, activations, gates and the embedding's look-up are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from intarsia.layers.cost import Cost
from intarsia.model.machine import Machine


@dataclass(frozen=True)
class FeedForwardCost:
    """What a feed-forward or a mixture of experts costs; it does not depend on the length."""

    parameters: int
    active_parameters: int
    """Those that serve one token."""
    forward_flops_per_token: int
    active_share: float = 1.0
    """Of the experts that tokens choose from, the share that serves one token."""

    @classmethod
    def nothing(cls) -> FeedForwardCost:
        """Of a block without one."""
        return cls(0, 0, 0)

    def parameters_read(self, tokens: int) -> float:
        """Those that serve any of so many tokens, each of which chooses its experts at random."""
        idle = self.parameters - self.active_parameters
        return self.parameters - idle * (1 - self.active_share) ** (tokens - 1)


@dataclass(frozen=True)
class LayerCost:
    """What one block costs; the layer's name is that in the layout."""

    name: str
    mixer: Cost
    feed_forward: FeedForwardCost
    norm_parameters: int
    streams: FeedForwardCost = FeedForwardCost(0, 0, 0)
    """Of its hyper-connections, or attention residuals."""

    @property
    def parameters(self) -> int:
        """All parameters of the block."""
        return self.feed_forward.parameters + self._always

    @property
    def active_parameters(self) -> int:
        """Those that serve one token."""
        return self.feed_forward.active_parameters + self._always

    @property
    def _always(self) -> int:
        return self.mixer.parameters + self.norm_parameters + self.streams.parameters

    def parameters_read(self, tokens: int) -> float:
        """Those that serve any of so many tokens."""
        return self.feed_forward.parameters_read(tokens) + self._always

    @property
    def flops_beside_mixer(self) -> int:
        """FLOPs per token of all but the mixer."""
        return self.feed_forward.forward_flops_per_token + self.streams.forward_flops_per_token

    def forward_flops_per_token(self, length: int) -> float:
        """FLOPs of a forward pass per token of a sequence of `length` tokens."""
        return self.mixer.forward_flops_per_token(length) + self.flops_beside_mixer


@dataclass(frozen=True)
class ModelCost:
    """What a language model costs."""

    vocab_size: int
    d_model: int
    tied: bool
    layers: tuple[LayerCost, ...]
    weight_bytes: int = 4
    """Of one parameter."""
    outer_norms: int = 0
    """Parameters of the norms outside of the layers, and of what reads several streams behind them."""
    outer_flops: int = 0
    """FLOPs per token of what reads several streams behind the layers."""

    @property
    def embedding_parameters(self) -> int:
        """The embedding and the head; tied, they are one matrix."""
        return self.vocab_size * self.d_model * (1 if self.tied else 2)

    @property
    def non_embedding_parameters(self) -> int:
        """All others: what the arms of a comparison are matched in."""
        return sum(layer.parameters for layer in self.layers) + self.outer_norms

    @property
    def parameters(self) -> int:
        """All parameters; tied ones once."""
        return self.embedding_parameters + self.non_embedding_parameters

    def parameters_by_part(self) -> dict[str, int]:
        """All parameters by what they are for."""
        streams = sum(layer.streams.parameters for layer in self.layers)
        return {
            "embeddings": self.embedding_parameters,
            "mixers": sum(layer.mixer.parameters for layer in self.layers),
            "feed-forwards": sum(layer.feed_forward.parameters for layer in self.layers),
            "norms": sum(layer.norm_parameters for layer in self.layers) + self.outer_norms,
            **({"residual streams": streams} if streams else {}),
        }

    @property
    def active_parameters(self) -> int:
        """Those that compute one token: all but idle experts and the embedding, of which it reads one row.

        The head counts, and so does the embedding where it is the head.
        """
        blocks = sum(layer.active_parameters for layer in self.layers)
        return blocks + self.outer_norms + self.vocab_size * self.d_model

    @property
    def active_non_embedding_parameters(self) -> int:
        """Those of `non_embedding_parameters` that compute one token."""
        return self.active_parameters - self.vocab_size * self.d_model

    def forward_flops_per_token(self, length: int) -> float:
        """FLOPs of a forward pass per token of a sequence of `length` tokens, logits at every token."""
        blocks = sum(layer.forward_flops_per_token(length) for layer in self.layers)
        return blocks + self.outer_flops + 2 * self.vocab_size * self.d_model

    def training_flops_per_token(self, length: int) -> float:
        """Three forward passes' worth: each product `A B` costs two of its size in the backward pass."""
        return 3 * self.forward_flops_per_token(length)

    def state_bytes(self, length: int, batch: int = 1) -> int:
        """Bytes of all layers' states after `length` tokens of `batch` sequences."""
        return sum(layer.mixer.state_bytes(length, batch) for layer in self.layers)

    def keys_read(self, length: int) -> int:
        """Entries of all layers' states that the last of `length` tokens reads."""
        return sum(layer.mixer.keys_read(length) for layer in self.layers)

    def pool_bytes(self, lengths: Iterable[int], page_size: int) -> int:
        """Bytes of all layers' pools that hold sequences of these lengths and nothing more, in pages of so many
        entries."""
        sizes = tuple(lengths)
        return sum(layer.mixer.pool_bytes(sizes, page_size) for layer in self.layers)

    def parameters_read(self, tokens: int) -> float:
        """Parameters that serve any of so many tokens: the fewer experts are idle, the more tokens there are."""
        blocks = sum(layer.parameters_read(tokens) for layer in self.layers)
        return blocks + self.outer_norms + self.vocab_size * self.d_model

    def decode_seconds(self, machine: Machine, length: int, batch: int = 1) -> float:
        """The least time in which a machine can compute the last of `length` tokens of each of `batch` sequences, all
        at once: weights are read once, states for each."""
        flops = (
            self.outer_flops
            + 2 * self.vocab_size * self.d_model
            + sum(layer.mixer.last_token_flops(length) + layer.flops_beside_mixer for layer in self.layers)
        )
        state = sum(layer.mixer.bytes_read(length) + layer.mixer.bytes_written() for layer in self.layers)
        weights = self.weight_bytes * self.parameters_read(batch)
        return machine.seconds(batch * flops, weights + batch * state)

    def prefill_seconds(self, machine: Machine, length: int, batch: int = 1) -> float:
        """The least time in which a machine can read `batch` prompts of `length` tokens, with logits of the last."""
        head = 2 * self.vocab_size * self.d_model
        flops = batch * (length * (self.forward_flops_per_token(length) - head) + head)
        weights = self.weight_bytes * self.parameters_read(batch * length)
        return machine.seconds(flops, weights + self.state_bytes(length, batch))

    def training_tokens_per_second(self, machine: Machine, length: int) -> float:
        """The most tokens that a machine can train on in a second, in batches so large that weights and what the
        optimizer keeps are read for free."""
        return 1 / machine.seconds(self.training_flops_per_token(length), 0)
