"""One layer of the model: tokens exchange information, then each is worked on alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from intarsia.layers.norm import RMSNorm
from intarsia.layers.states import State
from intarsia.mixers import Mixer
from intarsia.model.config import ModelConfig
from intarsia.model.cost import LayerCost
from intarsia.model.experts import Experts
from intarsia.model.feed_forward import SwiGLU
from intarsia.ops.sequences import Sequences


class Block(nn.Module):
    """Residual block: `x += mixer(norm(x))`, then `x += feed_forward(norm(x))`, or with the norms where
    `ModelConfig.norm_placement` wants them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.name = config.layers[layer]
        self.placement, self.residual_scale = config.placement_of(self.name), config.residual_scale
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps, config.zero_centered_norms)
        options = config.mixers[self.name].at_layer(layer, config.depth)
        self.mixer: Mixer[Any] = options.build(config.d_model, norm_eps=config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps, config.zero_centered_norms)
        self.feed_forward: SwiGLU | Experts
        if config.experts is not None and config.has_experts(layer):
            self.feed_forward = Experts(config.d_model, config.experts)
        else:
            self.feed_forward = SwiGLU(config.d_model, config.feed_forward.d_hidden)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        seqs: Sequences | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """`[B, T, D]` to the same; the mixer's next state where one was given. `counted` is for `Experts`."""
        h = x if self.placement == "after" else self.mixer_norm(x)
        state = None if state is None else state.recordable()
        mixed, state = self.mixer(h, state, seqs)
        x = self._add(x, h, mixed, self.mixer_norm)
        h = x if self.placement == "after" else self.feed_forward_norm(x)
        y = self.feed_forward(h, counted) if isinstance(self.feed_forward, Experts) else self.feed_forward(h)
        return self._add(x, h, y, self.feed_forward_norm), state

    def _add(self, x: Tensor, h: Tensor, y: Tensor, norm: RMSNorm) -> Tensor:
        """The residual stream `x` with the output `y` of what was given `h`."""
        if self.placement == "after":
            return x + norm(y)
        return (x if self.placement == "before" else self.residual_scale * h) + y

    def forward_and_recompute(
        self, x: Tensor, seqs: Sequences | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """The same without state; the backward pass computes everything but `x` again."""
        y: Tensor = checkpoint(
            self._output,
            x,
            seqs,
            counted,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=self._contexts,
        )
        return y

    def _output(self, x: Tensor, seqs: Sequences | None, counted: Tensor | None) -> Tensor:
        y: Tensor = self(x, None, seqs, counted)[0]
        return y

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The contexts of the first computation and of the second."""
        counted = self.feed_forward.uncounted() if isinstance(self.feed_forward, Experts) else nullcontext()
        return nullcontext(), counted

    def cost(self) -> LayerCost:
        """Parameters, FLOPs and state bytes."""
        norms = self.mixer_norm.weight.numel() + self.feed_forward_norm.weight.numel()
        return LayerCost(self.name, self.mixer.cost(), self.feed_forward.cost(), norms)
