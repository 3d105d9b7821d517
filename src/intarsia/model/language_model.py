"""The language model: embedding, blocks, norm, head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from intarsia.errors import ShapeError
from intarsia.layers.books import PAGE_SIZE, Books
from intarsia.layers.cost import Cost
from intarsia.layers.narrow import NarrowLinear
from intarsia.layers.packed import PackedLinear
from intarsia.layers.side import SideName, SideResults
from intarsia.layers.states import State
from intarsia.mixers import MixerConfig
from intarsia.mixers.base import Layer
from intarsia.model import initialization
from intarsia.model.attention_residuals import AttentionResidual
from intarsia.model.block import Block, BlockOutput, norm_of, stream_cost, stream_norm_of
from intarsia.model.config import ModelConfig
from intarsia.model.cost import FeedForwardCost, LayerCost, ModelCost
from intarsia.model.experts import Experts
from intarsia.model.feed_forward import feed_forward_of
from intarsia.model.gated_streams import GatedStreams
from intarsia.model.loss import IGNORED, chunked_cross_entropy, cross_entropy_of
from intarsia.model.states import ModelPool, ModelStates
from intarsia.ops.sequences import Sequences

GRAPHS = 128
"""Of compiled blocks, the most that there may be."""


class ModelOutput(NamedTuple):
    """What a forward pass returns; what does not apply is None."""

    logits: Tensor | None
    """`[B, T, V]` float32, with `last_only` `[B, 1, V]`, or `[1, count, V]` of a packed row; without targets."""
    nll: Tensor | None
    """`[B, T]` float32, nats; with targets."""
    states: ModelStates | None
    """With states given."""
    side: tuple[SideResults, ...] | None = None
    """Of each layer, with `side` given."""


class LanguageModel(nn.Module):
    """A language model of the layers that its configuration lists.

    The weights of a new model are not yet those to train from: call `init_weights`, or load a checkpoint. To
    build a model without memory for its weights, build it under `torch.device("meta")`.

    Set `activation_checkpointing` to recompute each block in the backward pass instead of keeping what it
    computed: about a third more work, and memory of one block instead of all.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed = nn.Embedding(
            config.vocab_size, config.d_model, _weight=torch.empty(config.vocab_size, config.d_model)
        )
        if not self.embed.weight.is_meta:  # there PyTorch would import its compiler to draw nothing
            self.embed.reset_parameters()
        self.embed_norm = norm_of(config) if config.embed_norm else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.output_sources = (
            None if config.attention_residuals is None else AttentionResidual(config.d_model, config.norm_eps)
        )
        self.output_streams = (
            None
            if config.gated_streams is None
            else GatedStreams(config.d_model, *config.gated_streams, writes=False)
        )
        self.norm = stream_norm_of(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's, where the configuration ties them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Leaving the meta device makes new parameters, one for each place.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def init_weights(self, seed: int) -> None:
        """Fill all parameters from `seed` and their names, and all buffers.

        `intarsia.model.initialization` states the policy.
        """
        config = self.config
        parts = sum(2 if config.has_feed_forward(layer) else 1 for layer in range(config.depth))
        initialization.init_weights(self, seed, std=config.init_std, depth=parts / 2)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        states: ModelStates | None = None,
        seqs: Sequences | None = None,
        last_only: bool | Sequence[int] = False,
        side: tuple[SideName, ...] = (),
        layers: Sequence[Layer[Any]] | None = None,
    ) -> ModelOutput:
        """Logits of the next tokens, or the negative log-likelihood of the targets.

        Args:
            tokens: `[B, T]` int64.
            targets: `[B, T]` int64, the token after each token; -100 where there is none. Such tokens do not count as
                load of the experts that serve them.
            states: what was remembered of the tokens before; `init_states` at the beginning.
            seqs: where sequences begin in a packed row (`B == 1`); nothing crosses from one to the next. With states
                the row holds what comes next of each of their sequences, which may be nothing.
            last_only: logits of the last token of each sequence alone; or, of sequences in a row, of so many of the
                last ones of each.
            side: the names of what layers are to tell beside their outputs (`SideResults`).
            layers: what computes each layer's mixer, as `InferenceModel` has it; the mixers themselves by default.

        Raises:
            ShapeError: the arguments do not fit together.
            PoolError: the states are in pools that have no room. Nothing has been written then.
        """
        self._check_targets(tokens, targets, last_only)
        # A token that is not predicted from moves no expert's bias.
        counted = None if targets is None or self.config.experts is None else targets != IGNORED
        x, after, beside = self.hidden(tokens, states, seqs, last_only, side, layers, counted)
        if targets is None:
            return ModelOutput(self._as_float(self.head(x)), None, after, beside)
        if isinstance(self.head, PackedLinear):
            nll = cross_entropy_of(self.head, x, targets)
        else:
            narrow = self.head.narrow if isinstance(self.head, NarrowLinear) else None
            nll = chunked_cross_entropy(x, self.head.weight, targets, narrow=narrow)
        return ModelOutput(None, nll, after, beside)

    def hidden(
        self,
        tokens: Tensor,
        states: ModelStates | None = None,
        seqs: Sequences | None = None,
        last_only: bool | Sequence[int] = False,
        side: tuple[SideName, ...] = (),
        layers: Sequence[Layer[Any]] | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, ModelStates | None, tuple[SideResults, ...] | None]:
        """What the head is given, `[B, T, D]`; and the states and side results of `forward`, whose arguments and errors
        these are.

        Args:
            counted: `[B, T]` bool, which tokens count as load of the experts that serve them; None for all.
        """
        places = self.check(tokens, states, seqs, last_only)
        x = self.embedded(tokens)
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and states is None
        new_states: list[State] = []
        told: list[SideResults] = []
        handed = None
        for layer, block in enumerate(self.blocks):
            if recompute:
                out = cast(Block, block).forward_and_recompute(x, seqs, counted, side, handed)
            else:
                state = None if states is None else states.layers[layer]
                mixer = None if layers is None else layers[layer]
                out = block(x, state, seqs, counted, side, mixer, handed)
            x, handed = out.y, out.handed
            told.append(out.side)
            new_states += [] if out.state is None else [out.state]
        x = x if last_only is False else x[:, places]
        if self.output_sources is not None:
            x, _ = self.output_sources(x)
        if self.output_streams is not None:
            x = self.output_streams(self.norm(x))
        else:
            x = self.norm(x if self.config.hyper_connections is None else x.mean(2))
        x = x if self.config.head_scale == 1 else self.config.head_scale * x
        after = None if states is None else ModelStates(tuple(new_states))
        return x, after, tuple(told) if side else None

    def embedded(self, tokens: Tensor) -> Tensor:
        """What the first block is given of tokens `[B, T]`: `[B, T, D]`, with hyper-connections `[B, T, N, D]`, with
        attention residuals `[B, T, 1, D]`."""
        x: Tensor = self.embed(tokens)
        x = x if self.config.embed_scale == 1 else self.config.embed_scale * x
        x = x if self.embed_norm is None else self.embed_norm(x)
        hyper = self.config.hyper_connections
        x = x if self.output_sources is None else x.unsqueeze(2)
        return x if hyper is None else x.unsqueeze(2).expand(-1, -1, hyper.streams, -1)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch.compile compute the blocks where gradients are recorded; the backward pass too.

        All blocks share one function, and blocks of one kind a graph, for all lengths. Of packed sequences there is a
        graph for each power of two up to their number (`Sequences.filled_up`). Compiling begins with the first forward
        pass. Results differ in rounding.

        Args:
            backend: of torch.compile.
        """
        whole = torch.compile(Block.compute, backend=backend, dynamic=True, fullgraph=True)

        def compiled(*arguments: Any) -> BlockOutput:
            # PyTorch gives up after eight graphs of a function. These are as many as there are kinds and powers of two.
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                output: BlockOutput = whole(*arguments)
            return output

        for block in self.blocks:
            cast(Block, block).compiled = compiled

    def init_states(self, batch_size: int) -> ModelStates:
        """The states of `batch_size` sequences that have not begun."""
        return ModelStates(tuple(cast(Block, block).mixer.init_state(batch_size) for block in self.blocks))

    def new_pool(self, slots: int, tokens: int = 0, page_size: int = PAGE_SIZE) -> ModelPool:
        """Room for the states of `slots` sequences, which go on in place; and, in layers whose states grow, for
        `tokens` tokens of all of them together, in pages of `page_size`. Layers that keep the same tokens share a page
        table."""
        books = Books(slots, page_size)
        return ModelPool(
            books, tuple(cast(Block, block).mixer.pool_in(books, tokens) for block in self.blocks)
        )

    def cost(self) -> ModelCost:
        """Parameters, FLOPs and state bytes, from the dimensions alone."""
        layers = tuple(cast(Block, block).cost() for block in self.blocks)
        weight_bytes = self.embed.weight.element_size()
        c = self.config
        return ModelCost(c.vocab_size, c.d_model, c.tie_embeddings, layers, weight_bytes, *_outer(c))

    @torch.no_grad()
    def update_router_bias(self, side: Sequence[SideResults], process_group: Any = None) -> Tensor | None:
        """Move the bias of experts that served too few tokens up and of the others down.

        For after each optimizer step. In a distributed run the loads are summed over `process_group` (None:
        all processes), which every process must call.

        Args:
            side: of each layer, with the `load` of those that have experts (`forward(side=("load",))`).

        Returns:
            The loads of all processes, `[layers with experts, E]` float32, or None for a model without experts.

        Raises:
            ShapeError: a layer with experts and no load, or the other way round.
        """
        feed_forwards = [cast(Block, block).feed_forward for block in self.blocks]
        if [isinstance(part, Experts) for part in feed_forwards] != [told.load is not None for told in side]:
            raise ShapeError("give the load of every layer that has experts, and of no other: side=('load',)")
        routers = [part.router for part in feed_forwards if isinstance(part, Experts)]
        if not routers:
            return None
        loads = torch.stack([told.load for told in side if told.load is not None])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(loads, group=process_group)
        for router, load in zip(routers, loads, strict=True):
            router.bias.add_(router.config.bias_update_rate * (load.mean() - load).sign())
        return loads

    @staticmethod
    def _as_float(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def _check_targets(tokens: Tensor, targets: Tensor | None, last_only: object) -> None:
        if targets is None:
            return
        if targets.shape != tokens.shape or targets.dtype != torch.int64:
            raise ShapeError(
                f"targets must be {list(tokens.shape)} int64, as the tokens; got {list(targets.shape)} {targets.dtype}"
            )
        if last_only:
            raise ShapeError("last_only is for logits: the targets of all tokens were given")

    def check(
        self,
        tokens: Tensor,
        states: ModelStates | None,
        seqs: Sequences | None,
        last_only: bool | Sequence[int],
    ) -> list[int] | slice:
        """The places along T whose logits are wanted.

        Raises:
            ShapeError, PoolError: what `forward` raises of these arguments, before a layer's pool has gone on.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ShapeError(f"tokens must be [B, T] int64; got {list(tokens.shape)} {tokens.dtype}")
        if states is not None and len(states.layers) != len(self.blocks):
            raise ShapeError(
                f"the states are of {len(states.layers)} layers and the model has {len(self.blocks)}"
            )
        if seqs is not None and (tokens.shape[0] != 1 or tokens.shape[1] != seqs.total):
            raise ShapeError(f"seqs describes tokens [1, {seqs.total}]; got {list(tokens.shape)}")
        if not isinstance(last_only, bool):
            if seqs is None or len(last_only) != seqs.count:
                raise ShapeError(
                    f"numbers of last tokens are wanted of each sequence of a row; got {last_only}"
                )
            last: list[int] | slice = _last_places(seqs, last_only)
        elif last_only and seqs is not None:
            last = _last_places(seqs, (1,) * seqs.count)
        else:
            last = slice(-1 if last_only else 0, None)
        if states is not None:
            states.check_room((tokens.shape[1],) * tokens.shape[0] if seqs is None else seqs.lengths)
        return last


def _last_places(seqs: Sequences, counts: Sequence[int]) -> list[int]:
    """Where the last `counts` tokens of each sequence stand in the row."""
    short = next(
        (n for n, (has, wanted) in enumerate(zip(seqs.lengths, counts, strict=True)) if has < wanted), None
    )
    if short is not None:
        has = f"{seqs.lengths[short]} tokens" if seqs.lengths[short] else "no token"
        raise ShapeError(
            f"sequence {short} of the row has {has}, and last_only wants the last "
            f"{'one' if counts[short] == 1 else counts[short]} of each"
        )
    ends = (start + length for start, length in zip(seqs.starts, seqs.lengths, strict=True))
    return [place for end, n in zip(ends, counts, strict=True) for place in range(end - n, end)]


def cost_of(config: ModelConfig, dtype: torch.dtype | None = None) -> ModelCost:
    """The cost of a model that is not built: of each kind of layer one is, without memory for its weights.

    Args:
        dtype: of the weights; PyTorch's default.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    with torch.device("meta"):
        dense = feed_forward_of(config.d_model, config.feed_forward).cost()
        sparse = dense if config.experts is None else Experts(config.d_model, config.experts).cost()
    layers = []
    for layer, name in enumerate(config.layers):
        mixer = config.mixers[name].at_layer(layer, config.depth)
        feed_forward = sparse if config.has_experts(layer) else dense
        norms = 2
        if not config.has_feed_forward(layer):
            feed_forward, norms = FeedForwardCost.nothing(), 1
        cost = _mixer_cost(mixer, config.d_model, dtype)
        norms *= _stream_norm_size(config)
        layers.append(LayerCost(name, cost, feed_forward, norms, stream_cost(config, layer)))
    c = config
    return ModelCost(c.vocab_size, c.d_model, c.tie_embeddings, tuple(layers), dtype.itemsize, *_outer(c))


def _norm_size(config: ModelConfig) -> int:
    """Parameters of a norm."""
    return config.d_model * (2 if config.norm == "layer" else 1)


def _stream_norm_size(config: ModelConfig) -> int:
    """Parameters of a norm of the residual stream, or of several."""
    return _norm_size(config) * (1 if config.gated_streams is None else config.gated_streams[0])


def _outer(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the norms behind the blocks and the embedding, and of what reads the sources or streams behind the
    blocks; and FLOPs per token of its products."""
    size, flops = _stream_norm_size(config) + (_norm_size(config) if config.embed_norm else 0), 0
    if config.attention_residuals is not None:
        size += AttentionResidual.parameters_of(config.d_model)
    if config.gated_streams is not None:
        size += GatedStreams.parameters_of(config.d_model, *config.gated_streams, writes=False)
        flops = GatedStreams.flops_of(config.d_model, *config.gated_streams, writes=False)
    return size, flops


def _mixer_cost(options: MixerConfig, d_model: int, dtype: torch.dtype) -> Cost:
    try:
        return _known_mixer_cost(options, d_model, dtype)
    except TypeError:  # the options of another package's mixer need not be hashable
        return _known_mixer_cost.__wrapped__(options, d_model, dtype)


@functools.lru_cache(maxsize=1024)
def _known_mixer_cost(options: MixerConfig, d_model: int, dtype: torch.dtype) -> Cost:
    """What a mixer costs whose weights are of this dtype. Models have few kinds and many layers."""
    with torch.device("meta"):
        return options.build(d_model).to(dtype).cost()
