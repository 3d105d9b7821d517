"""One layer of the model: tokens exchange information, then each is worked on alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intarsia.layers.norm import LayerNorm, RMSNorm
from intarsia.layers.side import SideName, SideResults
from intarsia.layers.states import State
from intarsia.mixers import Mixer
from intarsia.mixers.base import HandedOn, Layer
from intarsia.model.attention_residuals import AttentionResidual, Grown
from intarsia.model.config import ModelConfig
from intarsia.model.cost import FeedForwardCost, LayerCost
from intarsia.model.experts import Experts
from intarsia.model.feed_forward import FeedForward, feed_forward_of
from intarsia.model.gated_streams import GatedStreams, StreamNorm, Written
from intarsia.model.hyper_connections import HyperConnection, Joined
from intarsia.ops.sequences import Sequences

Norm = RMSNorm | LayerNorm
Streams = HyperConnection | GatedStreams | AttentionResidual


def norm_of(config: ModelConfig) -> Norm:
    """A new norm of as many numbers as the model is wide."""
    if config.norm == "layer":
        return LayerNorm(config.d_model, config.norm_eps)
    return RMSNorm(config.d_model, config.norm_eps, config.zero_centered_norms)


def stream_norm_of(config: ModelConfig) -> Norm:
    """A new norm of the residual stream; where several are read through gates, of all of them."""
    if config.gated_streams is None:
        return norm_of(config)
    return StreamNorm(config.gated_streams[0], config.d_model, config.norm_eps, config.zero_centered_norms)


def streams_of(config: ModelConfig, layer: int, mixer: bool) -> Streams | None:
    """How the mixer or the feed-forward of a layer reads and writes the residual stream, where it is not one sum."""
    if config.attention_residuals is not None:
        begins = mixer and layer % config.attention_residuals == 0
        return AttentionResidual(config.d_model, config.norm_eps, begins)
    if config.gated_streams is not None:
        return GatedStreams(config.d_model, *config.gated_streams)
    hyper = config.hyper_connections
    return None if hyper is None else HyperConnection(config.d_model, hyper, config.norm_eps)


def stream_cost(config: ModelConfig, layer: int) -> FeedForwardCost:
    """What it costs to read and write the residual stream in a layer, where it is not one sum."""
    parts = 2 if config.has_feed_forward(layer) else 1
    D, groups_of = config.d_model, config.attention_residuals
    if groups_of is not None:
        # The feed-forward sees the group that its mixer has begun, too.
        sources = [1 + math.ceil(layer / groups_of), 2 + layer // groups_of][:parts]
        size = parts * AttentionResidual.parameters_of(D)
        return FeedForwardCost(size, size, sum(AttentionResidual.flops_of(D, n) for n in sources))
    if config.hyper_connections is None:
        return FeedForwardCost.nothing()
    if config.gated_streams is not None:
        size = parts * GatedStreams.parameters_of(D, *config.gated_streams)
        return FeedForwardCost(size, size, parts * GatedStreams.flops_of(D, *config.gated_streams))
    size = parts * HyperConnection.parameters_of(D, config.hyper_connections)
    flops = parts * HyperConnection.flops_of(D, config.hyper_connections)
    return FeedForwardCost(size, size, flops)


class BlockOutput(NamedTuple):
    """What a block returns."""

    y: Tensor
    """`[B, T, D]`"""
    state: State | None
    """The mixer's next state, where one was given."""
    side: SideResults
    """What was asked for, of mixer and feed-forward together."""
    handed: HandedOn | None = None
    """What the next block is to have as its `handed`."""


class Block(nn.Module):
    """Residual block: `x += mixer(norm(x))`, then `x += feed_forward(norm(x))` if it has a feed-forward, or with the
    norms where `ModelConfig.norm_placement` wants them, and what is added times `ModelConfig.branch_scale`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.name = config.layers[layer]
        self.stream_cost = stream_cost(config, layer)
        self.mixer_streams = streams_of(config, layer, mixer=True)
        self.placement, self.residual_scale = config.placement_of(self.name), config.residual_scale
        self.branch_scale = config.branch_scale
        self.mixer_norm = stream_norm_of(config)
        options = config.mixers[self.name].at_layer(layer, config.depth)
        self.mixer: Mixer[Any] = options.build(config.d_model, norm_eps=config.norm_eps)
        self.feed_forward_norm = stream_norm_of(config) if config.has_feed_forward(layer) else None
        self.feed_forward_streams = (
            None if self.feed_forward_norm is None else streams_of(config, layer, mixer=False)
        )
        self.feed_forward: FeedForward | Experts | None
        if self.feed_forward_norm is None:
            self.feed_forward = None
        elif config.experts is not None and config.has_experts(layer):
            self.feed_forward = Experts(config.d_model, config.experts, config.norm_eps)
        else:
            self.feed_forward = feed_forward_of(config.d_model, config.feed_forward)
        self.compiled: Callable[..., BlockOutput] | None = None
        """What computes in place of `compute` while gradients are recorded (`LanguageModel.compile_blocks`)."""

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        seqs: Sequences | None = None,
        counted: Tensor | None = None,
        side: tuple[SideName, ...] = (),
        mixer: Layer[Any] | None = None,
        handed: HandedOn | None = None,
    ) -> BlockOutput:
        """`x` is `[B, T, D]`, of several residual streams or sources `[B, T, N, D]`. `counted` is for `Experts`; `side`
        names the side results that are wanted, which need the mixer itself; `mixer` is what computes it where it was
        made ready for inference; `handed` is what the block before passed on."""
        if self.compiled is None or state is not None or not torch.is_grad_enabled():
            return self.compute(x, state, seqs, counted, side, mixer, handed)
        seqs = None if seqs is None else seqs.filled_up()
        return self.compiled(self, x, None, seqs, counted, side, None, handed)

    def compute(
        self,
        x: Tensor,
        state: State | None = None,
        seqs: Sequences | None = None,
        counted: Tensor | None = None,
        side: tuple[SideName, ...] = (),
        mixer: Layer[Any] | None = None,
        handed: HandedOn | None = None,
    ) -> BlockOutput:
        """`forward`, uncompiled."""
        x, h, joined = self._entered(self.mixer_streams, x, self.mixer_norm)
        state = None if state is None else state.recordable()
        told, told_by_experts = SideResults(), SideResults()
        more: dict[str, Any] = {}
        if asked := _of_these(side, self.mixer.side_results):
            more["side"] = asked
        if self.mixer.hands_on:
            more["handed"] = HandedOn() if handed is None else handed
        mixed, state, *rest = (self.mixer if more or mixer is None else mixer)(h, state, seqs, **more)
        if asked:
            told = rest.pop(0)
        if self.mixer.hands_on:
            handed = rest.pop(0)
        x = self._add(x, h, mixed, self.mixer_norm) if joined is None else joined.with_output(mixed)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return BlockOutput(x, state, told, handed)
        x, h, joined = self._entered(self.feed_forward_streams, x, self.feed_forward_norm)
        if not isinstance(self.feed_forward, Experts):
            y = self.feed_forward(h)
        elif asked := _of_these(side, self.feed_forward.side_results):
            y, told_by_experts = self.feed_forward(h, counted, asked)
        else:
            y = self.feed_forward(h)
        x = self._add(x, h, y, self.feed_forward_norm) if joined is None else joined.with_output(y)
        return BlockOutput(x, state, told.beside(told_by_experts), handed)

    def _entered(
        self, streams: Streams | None, x: Tensor, norm: Norm
    ) -> tuple[Tensor, Tensor, Joined | Written | Grown | None]:
        """The residual stream, what a part of the block is given of it or of several, and what takes the output of
        several."""
        if isinstance(streams, GatedStreams):
            return x, *streams.enter(x, norm(x))
        joined = None
        if streams is not None:
            x, joined = streams(x)
        return x, x if self.placement == "after" else norm(x), joined

    def _add(self, x: Tensor, h: Tensor, y: Tensor, norm: Norm) -> Tensor:
        """The residual stream `x` with the output `y` of what was given `h`."""
        if self.placement == "after":
            return x + norm(y)
        if self.branch_scale != 1:
            y = self.branch_scale * y
        return (x if self.placement == "before" else self.residual_scale * h) + y

    def forward_and_recompute(
        self,
        x: Tensor,
        seqs: Sequences | None = None,
        counted: Tensor | None = None,
        side: tuple[SideName, ...] = (),
        handed: HandedOn | None = None,
    ) -> BlockOutput:
        """The same without state; the backward pass computes everything but `x` again."""
        output: BlockOutput = checkpoint(
            self, x, None, seqs, counted, side, None, handed, use_reentrant=False, preserve_rng_state=False
        )
        return output

    def cost(self) -> LayerCost:
        """Parameters, FLOPs and state bytes."""
        norms = [x for x in (self.mixer_norm, self.feed_forward_norm) if x is not None]
        size = sum(p.numel() for norm in norms for p in norm.parameters())
        feed_forward = FeedForwardCost.nothing() if self.feed_forward is None else self.feed_forward.cost()
        return LayerCost(self.name, self.mixer.cost(), feed_forward, size, self.stream_cost)


def _of_these(names: tuple[SideName, ...], had: tuple[SideName, ...]) -> tuple[SideName, ...]:
    return tuple(name for name in names if name in had)
