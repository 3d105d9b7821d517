"""Mixture of experts: many small feed-forwards of which a few serve each token.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) and Kimi Linear: fine-grained experts beside shared ones,
sigmoid scores, and balance kept by a bias that takes part in the choice alone and never in a gradient
(arXiv 2408.15664).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intarsia.layers.filling import FillsItself, GeneratorOf
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.norm import RMSNorm
from intarsia.layers.packed import Packing, packed, refuse_training, stand_in
from intarsia.layers.side import SideName, SideResults
from intarsia.model.config import ExpertsConfig, FeedForwardConfig
from intarsia.model.cost import FeedForwardCost
from intarsia.model.feed_forward import activate, feed_forward_of, relu_squared
from intarsia.model.grouped import grouped_linear
from intarsia.ops import PackedWeights, packed_linear
from intarsia.ops.precision import product_dtype, without_autocast


class Router(FillsItself, KeepsFloat32):
    """Chooses the experts of each token and says how much each counts. Float32 throughout.

    Parameters: `weight` `[E, D]`, and with `config.biases` the `logit_bias` `[E]`.
    Buffers: `bias` `[E]`, added to the scores when experts are chosen.
    """

    float32_names: ClassVar[tuple[str, ...]] = ("weight", "logit_bias", "bias")
    bias: Tensor

    def __init__(self, d_model: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, d_model, dtype=torch.float32))
        self.logit_bias = (
            nn.Parameter(torch.zeros(config.num_experts, dtype=torch.float32)) if config.biases else None
        )
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, D]` to the chosen experts `[N, num_active]` int64 and their weights, as many, float32."""
        config = self.config
        with without_autocast(x):
            logits = F.linear(x.to(self.weight.dtype), self.weight, self.logit_bias)
            scores = logits.sigmoid() if config.scores == "sigmoid" else logits.softmax(-1)
            biased = scores + self.bias
            chosen = self._eligible(biased.detach()).topk(config.num_active, dim=-1, sorted=False).indices
            weights = (biased if config.routing_weights == "biased" else scores).gather(1, chosen)
            if config.normalize:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return chosen, weights * config.routed_scaling_factor

    def _eligible(self, biased: Tensor) -> Tensor:
        """The biased scores with -inf for the experts of groups that a token does not use."""
        config = self.config
        if config.num_active_groups == config.num_groups:
            return biased
        grouped = biased.unflatten(-1, (config.num_groups, -1))
        strength = grouped.topk(2, dim=-1).values.sum(-1)
        used = strength.topk(config.num_active_groups, dim=-1, sorted=False).indices
        idle = torch.ones_like(strength, dtype=torch.bool).scatter(-1, used, False)
        return grouped.masked_fill(idle.unsqueeze(-1), -torch.inf).flatten(-2)

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        """Normal weights, no bias."""
        self.weight.normal_(0, std, generator=generator_of("weight"))
        if self.logit_bias is not None:
            self.logit_bias.zero_()

    def init_own_buffers(self) -> None:
        """No bias."""
        self.bias.zero_()


class Experts(FillsItself):
    """A mixture of SwiGLU experts, or such without a gate, in place of a feed-forward.

    Parameters: `gate_up` `[E, 2 F, W]` (the gate's rows first; without a gate `[E, F, W]`) and `down` `[E, W, F]`, with
    `F = config.d_hidden` and `W = config.d_latent`, or D where that is None; with `config.biases` also `gate_up_bias`
    `[E, 2 F]` and `down_bias` `[E, D]`.
    Modules: `router`, `shared` (a feed-forward or None), `shared_gate` (`[D]` to one number, or None), and the maps
    `latent_down` and `latent_up` from D to W and back, or None, with `latent_norm` before the second, or None.

    The tokens are sorted by expert, so that each expert works on all of its tokens at once.
    """

    side_results: ClassVar[tuple[SideName, ...]] = ("load",)

    def __init__(self, d_model: int, config: ExpertsConfig, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        self.router = Router(d_model, config)
        width, rows = config.d_latent or d_model, (config.matrices - 1) * config.d_hidden
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, rows, width))
        self.down = nn.Parameter(torch.empty(config.num_experts, width, config.d_hidden))
        self.latent_down = self.latent_up = self.latent_norm = None
        if config.d_latent is not None:
            self.latent_down = nn.Linear(d_model, width, bias=False)
            self.latent_up = nn.Linear(width, d_model, bias=False)
            self.latent_norm = RMSNorm(width, norm_eps) if config.latent_norm else None
        self.gate_up_bias = self.down_bias = None
        if config.biases:
            self.gate_up_bias = nn.Parameter(torch.empty(config.num_experts, 2 * config.d_hidden))
            self.down_bias = nn.Parameter(torch.empty(config.num_experts, d_model))
        self.shared = feed_forward_of(d_model, _shared_of(config)) if config.num_shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if config.shared_gate else None
        self.reset_parameters()

    @property
    def residual_outputs(self) -> tuple[str, ...]:
        """What writes to the residual stream beside the shared experts."""
        return ("down",) if self.latent_up is None else ("latent_up",)

    def forward(
        self, x: Tensor, counted: Tensor | None = None, side: tuple[SideName, ...] = ()
    ) -> Tensor | tuple[Tensor, SideResults]:
        """`[..., D]` to the same, with the load beside it where `side` asks for it. `counted` `[...]` says which tokens
        count as load; None: all."""
        tokens = x.flatten(0, -2)
        chosen, weights = self.router(tokens)
        if self.latent_down is None or self.latent_up is None:
            y = self._routed(tokens, chosen, weights).view(x.shape)
        else:
            y = self._routed(self.latent_down(tokens), chosen, weights)
            y = self.latent_up(y if self.latent_norm is None else self.latent_norm(y)).view(x.shape)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)
        return (y, SideResults(load=self._load(chosen, counted))) if side else y

    def _routed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, of `[N, W]` as much."""
        (N, W), active = x.shape, self.config.num_active
        by_expert, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(self.config.num_experts, device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True)
        dtype = product_dtype(x)
        # A copy per chosen expert and then a permutation: both gradients are sums in a fixed order.
        copies = x.to(dtype).unsqueeze(1).expand(N, active, W).reshape(N * active, W)
        h = grouped_linear(copies.index_select(0, order), self.gate_up.to(dtype), ends)
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias.to(dtype)[by_expert]
        y = grouped_linear(_activate(h, self.config), self.down.to(dtype), ends)
        if self.down_bias is not None:
            y = y + self.down_bias.to(dtype)[by_expert]
        places = torch.arange(N * active, device=x.device)
        y = y.index_select(0, torch.empty_like(order).scatter_(0, order, places)).view(N, active, W)
        return (y * weights.unsqueeze(-1)).sum(1).to(dtype)

    def packed(self, packing: Packing) -> nn.Module:
        """The same for inference, with packed weights."""
        if not packing.packs(self.gate_up):
            return packed(self, packing)
        return PackedExperts.of(self, packing)

    def _load(self, chosen: Tensor, counted: Tensor | None) -> Tensor:
        """How many tokens the chosen experts `[N, active]` are given, `[E]` float32."""
        served = torch.ones_like(chosen) if counted is None else counted.reshape(-1, 1).expand_as(chosen)
        load = torch.zeros(self.config.num_experts, device=chosen.device)
        # Whole numbers: in any order the sum is the same.
        return load.index_add_(0, chosen.flatten(), served.flatten().to(load.dtype))

    def init_own_weights(self, generator_of: GeneratorOf, std: float) -> None:
        """Normal weights."""
        self.gate_up.normal_(0, std, generator=generator_of("gate_up"))
        self.down.normal_(0, std, generator=generator_of("down"))
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                bias.zero_()

    def cost(self) -> FeedForwardCost:
        """The router scores every expert; `num_active` of them and the shared ones work."""
        config = self.config
        d_model, width = self.router.weight.shape[1], self.down.shape[1]
        expert, router = config.matrices * width * config.d_hidden, d_model * config.num_experts
        gate = d_model if config.shared_gate else 0
        latent = 0 if config.d_latent is None else 2 * d_model * width
        always = config.matrices * d_model * config.shared_width + router + gate + latent
        norm = width if config.latent_norm else 0
        working = config.num_active * expert + always
        total = config.num_experts * expert + always
        biases = 2 * config.d_hidden + width if config.biases else 0
        router_bias = config.num_experts if config.biases else 0
        return FeedForwardCost(
            total + config.num_experts * biases + router_bias + norm,
            working + config.num_active * biases + router_bias + norm,
            2 * working,
            active_share=config.num_active / config.num_experts,
        )


class PackedExperts(Experts):
    """Experts whose weights are packed: of those that are chosen each is read once, without a copy.

    `gate_up` and `down` stand for the weights' shapes; their numbers are NaN.
    """

    @classmethod
    def of(cls, experts: Experts, packing: Packing) -> PackedExperts:
        """The experts of a layer, packed; router and shared gate are shared with it."""
        made = packed(experts, packing)
        made.__class__ = cls
        assert isinstance(made, PackedExperts)
        made.packed_gate_up, made.packed_down = packing.pack(experts.gate_up), packing.pack(experts.down)
        made._parameters = {
            **experts._parameters,
            "gate_up": stand_in(made.packed_gate_up, experts.gate_up.dtype),
            "down": stand_in(made.packed_down, experts.down.dtype),
        }
        return made

    packed_gate_up: PackedWeights
    packed_down: PackedWeights

    @property
    def are_plain(self) -> bool:
        """Whether they are SwiGLUs without biases, beside shared ones that nothing gates: what `RowProgram` has."""
        config = self.config
        plain = config.activation == "swiglu" and config.limit is None and config.d_latent is None
        plain = plain and not config.biases and self.shared_gate is None
        return plain and all(each.device.type == "cpu" for each in self.all_packed())

    def train(self, mode: bool = True) -> PackedExperts:
        """Only `eval`; UnsupportedError where it is asked to train."""
        refuse_training(mode)
        return super().train(mode)

    def all_packed(self) -> tuple[PackedWeights, ...]:
        """Its packed weights."""
        return self.packed_gate_up, self.packed_down

    def _routed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        (N, W), active = x.shape, self.config.num_active
        experts = chosen.flatten()
        h = packed_linear(x.repeat_interleave(active, dim=0), self.packed_gate_up, matrix_of_row=experts)
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias.to(h.dtype)[experts]
        y = packed_linear(_activate(h, self.config), self.packed_down, matrix_of_row=experts)
        if self.down_bias is not None:
            y = y + self.down_bias.to(y.dtype)[experts]
        return (y.view(N, active, W) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _activate(h: Tensor, config: ExpertsConfig) -> Tensor:
    """`[N, 2 F]`, the gate first, to `[N, F]`; without a gate `[N, F]` to the same."""
    if config.activation == "relu2":
        return relu_squared(h)
    gate, up = h.chunk(2, dim=-1)
    return activate(gate, up, config)


def _shared_of(config: ExpertsConfig) -> FeedForwardConfig:
    """The shared experts as one feed-forward."""
    return FeedForwardConfig(
        config.shared_width,
        config.limit,
        config.activation,
        sharpness=config.sharpness,
        up_limit=config.up_limit,
    )
