"""What a model is: frozen dataclasses that can be written as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from intarsia.errors import ConfigError, OptionError, did_you_mean
from intarsia.mixers import MixerConfig, config_from_dict, config_to_dict
from intarsia.settings import Readers, check_bounds, check_names, read, settle_types

RoutingWeights = Literal["unbiased", "biased"]
ExpertScores = Literal["sigmoid", "softmax"]
Activation = Literal["swiglu", "clamped", "situ", "relu2"]
NormPlacement = Literal["before", "after", "stream"]
Norm = Literal["rms", "layer"]
READERS: Readers = MappingProxyType({MixerConfig: config_from_dict})


@dataclass(frozen=True)
class FeedForwardConfig:
    """SwiGLU: `down(silu(gate(x)) * up(x))`, `d_hidden` wide inside. With a `limit`, the gate is at most that, and up
    within ± that (GLM-5.3). `gate_scale` and `scale` are factors of what the gate's matrix gives and of the whole
    (Falcon-H1). With another `activation`, `g` and `u` being what the matrices of gate and up give:

    * `"clamped"`: `(clamp(u, ±limit) + 1) * h * sigmoid(sharpness h)` with `h = min(g, limit)`; the limit is 7 where
      none is given (gpt-oss, MiniMax-M3)
    * `"situ"`: `a tanh(g / a) sigmoid(g) * b tanh(u / b)`, `a` being the `limit`, 1 where none is given, and `b` the
      `up_limit`; without one it is `u` itself (Kimi K3)
    * `"relu2"`: `relu(u)²`, without a gate (Nemotron)
    """

    d_hidden: int
    limit: float | None = None
    activation: Activation = "swiglu"
    gate_scale: float = 1.0
    scale: float = 1.0
    sharpness: float = 1.702
    up_limit: float | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        check_bounds(self, "d_hidden", least=1)
        check_bounds(self, "gate_scale", "scale", above=0)
        if self.activation != "swiglu" and (self.gate_scale, self.scale) != (1, 1):
            raise ConfigError("gate_scale and scale are those of swiglu, and the activation is another")
        _check_activation(self)


def _check_activation(config: FeedForwardConfig | ExpertsConfig) -> None:
    """That the options of an activation can be, and are not those of another."""
    check_bounds(config, "sharpness", above=0)
    if config.sharpness != 1.702 and config.activation != "clamped":
        raise ConfigError("sharpness is that of the clamped activation, and this is another")
    if config.limit is not None:
        check_bounds(config, "limit", above=0)
        if config.activation == "relu2":
            raise ConfigError("limit is of activations with a gate, and relu2 has none")
    if config.up_limit is not None:
        check_bounds(config, "up_limit", above=0)
        if config.activation != "situ":
            raise ConfigError("up_limit is that of situ, and the activation is another")


@dataclass(frozen=True)
class HyperConnectionsConfig:
    """Several residual streams (`intarsia.model.hyper_connections`): how many, and how often and with which epsilon the
    matrix that mixes them is normalised.

    With a `rank` nothing mixes them: each is normed, and read through gates of that rank
    (`intarsia.model.gated_streams`; Qwen3.8-Flash-Next)."""

    streams: int = 4
    iterations: int = 20
    eps: float = 1e-6
    rank: int | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        check_bounds(self, "streams", "iterations", least=1)
        check_bounds(self, "eps", least=0)
        if self.rank is not None:
            check_bounds(self, "rank", least=1)


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts as in DeepSeek-V3 (section 2.1.2) and Kimi, and with the options of other models.

    `num_active` of the `num_experts` SwiGLU experts of width `d_hidden` serve a token, and `num_shared` more
    serve every token (as one SwiGLU of width `num_shared * d_hidden`, or `d_shared` where that is given).

    Experts are chosen by score plus a bias that load balancing alone moves, by `bias_update_rate` per
    optimizer step. With `num_groups > 1` they come from the `num_active_groups` groups whose two best biased
    scores have the largest sums.

    `routing_weights` says what an expert's output is multiplied with: its score without the bias
    (`"unbiased"`: the papers and transformers) or with it (`"biased"`: Kimi-Linear's released code adds the
    bias in place). The weights of a token's experts are divided by their sum where `normalize` says so, and
    then multiplied by `routed_scaling_factor`.

    `scores` are the router's: `"sigmoid"` of each expert, or `"softmax"` over all (Qwen3-Next, MiniMax-01, gpt-oss).
    `shared_gate` multiplies the shared experts with a sigmoid of the token (Qwen3-Next). `biases` gives the router and
    the routed experts biases (gpt-oss). `activation`, `limit`, `sharpness` and `up_limit` are those of
    `FeedForwardConfig`, of routed experts and of shared ones. With `d_latent` the routed experts work in so many
    dimensions, between two maps of the layer (Nemotron 3 Super); `latent_norm` puts an RMSNorm before the second
    (Kimi K3).
    """

    num_experts: int
    d_hidden: int
    num_active: int
    num_shared: int = 1
    routed_scaling_factor: float = 1.0
    normalize: bool = True
    routing_weights: RoutingWeights = "unbiased"
    num_groups: int = 1
    num_active_groups: int = 1
    bias_update_rate: float = 1e-3
    scores: ExpertScores = "sigmoid"
    shared_gate: bool = False
    biases: bool = False
    activation: Activation = "swiglu"
    d_shared: int | None = None
    limit: float | None = None
    d_latent: int | None = None
    sharpness: float = 1.702
    up_limit: float | None = None
    latent_norm: bool = False

    def __post_init__(self) -> None:
        settle_types(self)
        _check_activation(self)
        if self.biases and self.activation == "relu2":
            raise ConfigError("experts with the activation relu2 have no biases")
        if self.d_latent is not None:
            check_bounds(self, "d_latent", least=1)
        elif self.latent_norm:
            raise ConfigError("latent_norm is of experts in a latent space: d_latent is None")
        counts = ("num_experts", "d_hidden", "num_active", "num_groups", "num_active_groups")
        check_bounds(self, *counts, least=1)
        check_bounds(self, "num_shared", "bias_update_rate", least=0)
        if self.d_shared is not None:
            check_bounds(self, "d_shared", least=1)
            if not self.num_shared:
                raise ConfigError("d_shared is the width of the shared experts: num_shared is 0")
        check_bounds(self, "routed_scaling_factor", above=0)
        if self.shared_gate and not self.num_shared:
            raise ConfigError("shared_gate needs shared experts: num_shared is 0")
        if self.num_experts % self.num_groups:
            raise ConfigError(f"{self.num_experts} experts do not divide into {self.num_groups} equal groups")
        if self.num_active_groups > self.num_groups:
            raise ConfigError(
                f"num_active_groups ({self.num_active_groups}) is above num_groups ({self.num_groups})"
            )
        eligible = self.num_active_groups * self.num_experts // self.num_groups
        if self.num_active > eligible:
            raise ConfigError(f"num_active ({self.num_active}) is above the {eligible} eligible experts")
        if self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise ConfigError("a group is scored by its two best experts: each needs at least two")

    @property
    def matrices(self) -> int:
        """How many matrices an expert has: without a gate there is one less."""
        return 2 if self.activation == "relu2" else 3

    @property
    def shared_width(self) -> int:
        """How wide the shared experts are together."""
        return self.num_shared * self.d_hidden if self.d_shared is None else self.d_shared


@dataclass(frozen=True)
class ModelConfig:
    """A language model: `depth` blocks between an embedding and a head.

    `layout` names the mixer of each layer and is repeated to the depth, cutting the last repetition where it
    does not fit: `"kda kda kda mla"`, or shorter `"kda*3 mla"`. A layout that has as many names as there are
    layers is the exact list. `mixers` says what each name means.

    With `experts`, all layers but the first `dense_layers` have a mixture of experts in place of the
    feed-forward. `zero_centered_norms` makes the norms of blocks and output multiply with one plus their
    weight. `init_std` is the standard deviation of fresh weights (see `intarsia.model.initialization`).

    `norm_placement` says where the norms of a block stand: of all blocks, or by the name of their mixer (the rest is
    `"before"`). With `f` the mixer and then the feed-forward, and `s` the `residual_scale`:

    * `"before"`: `x + f(norm(x))`, nearly every model
    * `"after"`: `x + norm(f(x))`, OLMo 2 and the attention of OLMo-Hybrid
    * `"stream"`: `s h + f(h)` with `h = norm(x)`, MiniMax-01

    `norm` is what the norms of blocks and output are: `"rms"`, or `"layer"`, with a mean that is taken off and a bias
    (RWKV). `embed_norm` puts one behind the embedding as well. Blocks of the mixers in `mixer_only` have no
    feed-forward (Mamba; RWKV, whose channel mixing is a mixer here, since it sees the token before).
    `hyper_connections` makes several residual streams of one; norms stand before each part then. With
    `attention_residuals` each part is given a mixture of the embedding and of the sums of so many layers each
    (`intarsia.model.attention_residuals`), in place of one sum of all.

    The embedding is multiplied with `embed_scale`, what the head is given with `head_scale`, and with `branch_scale`
    what mixers and feed-forwards add to the residual stream, whose norms stand before them then (Granite, Falcon-H1).
    """

    vocab_size: int
    d_model: int
    depth: int
    layout: str
    mixers: Mapping[str, MixerConfig]
    feed_forward: FeedForwardConfig
    experts: ExpertsConfig | None = None
    dense_layers: int = 1
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    zero_centered_norms: bool = False
    init_std: float = 0.02
    norm_placement: NormPlacement | Mapping[str, NormPlacement] = "before"
    residual_scale: float = 1.0
    norm: Norm = "rms"
    embed_norm: bool = False
    mixer_only: tuple[str, ...] = ()
    hyper_connections: HyperConnectionsConfig | None = None
    embed_scale: float = 1.0
    branch_scale: float = 1.0
    head_scale: float = 1.0
    attention_residuals: int | None = None

    def __post_init__(self) -> None:
        settle_types(self, READERS)
        check_bounds(self, "vocab_size", "d_model", "depth", least=1)
        check_bounds(self, "dense_layers", least=0)
        check_bounds(self, "norm_eps", "init_std", "residual_scale", above=0)
        check_bounds(self, "embed_scale", "branch_scale", "head_scale", above=0)
        if not self.mixers:
            raise OptionError("must map each name in the layout to a mixer's options", ("mixers",))
        object.__setattr__(self, "mixers", MappingProxyType(dict(self.mixers)))
        for name in parse_layout(self.layout):
            if name not in self.mixers:
                raise OptionError(f"the layout names {unknown(name, self.mixers, 'mixer')}", ("layout",))
        before = {*map(self.placement_of, self.mixers)} == {"before"}
        if self.hyper_connections is not None and not before:
            raise OptionError("hyper-connections have norms before each part", ("norm_placement",))
        if self.gated_streams is not None and self.norm != "rms":
            raise OptionError("streams that are read through gates have RMS norms", ("norm",))
        if self.attention_residuals is not None:
            check_bounds(self, "attention_residuals", least=1)
            if self.hyper_connections is not None or not before:
                raise OptionError(
                    "is for one residual stream, with norms before each part", ("attention_residuals",)
                )
        if self.branch_scale != 1 and (
            self.hyper_connections is not None or self.attention_residuals is not None or not before
        ):
            raise OptionError("is for one residual stream, with norms before each part", ("branch_scale",))
        if self.norm == "layer" and self.zero_centered_norms:
            raise OptionError("layer norms are not zero-centred", ("zero_centered_norms",))
        for name in self.mixer_only:
            if name not in self.mixers:
                raise OptionError(f"mixer_only names {unknown(name, self.mixers, 'mixer')}", ("mixer_only",))
        if isinstance(self.norm_placement, Mapping):
            object.__setattr__(self, "norm_placement", MappingProxyType(dict(self.norm_placement)))
            for name in self.norm_placement:
                if name not in self.mixers:
                    raise OptionError(
                        f"norm_placement names {unknown(name, self.mixers, 'mixer')}",
                        ("norm_placement", name),
                    )

    def placement_of(self, name: str) -> NormPlacement:
        """Where the norms stand in the blocks whose mixer has this name."""
        if isinstance(self.norm_placement, Mapping):
            return self.norm_placement.get(name, "before")
        return self.norm_placement

    @property
    def gated_streams(self) -> tuple[int, int] | None:
        """How many streams are read through gates, and their rank."""
        hyper = self.hyper_connections
        return None if hyper is None or hyper.rank is None else (hyper.streams, hyper.rank)

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of each layer's mixer, first layer first."""
        pattern = parse_layout(self.layout)
        return (pattern * math.ceil(self.depth / len(pattern)))[: self.depth]

    def has_feed_forward(self, layer: int) -> bool:
        """Whether the layer (counted from 0) has a feed-forward, or experts, behind its mixer."""
        return self.layers[layer] not in self.mixer_only

    def has_experts(self, layer: int) -> bool:
        """Whether the layer (counted from 0) has a mixture of experts in place of the feed-forward."""
        return self.experts is not None and layer >= self.dense_layers and self.has_feed_forward(layer)

    def replace(self, **changes: Any) -> ModelConfig:
        """This configuration with some fields changed."""
        check_names(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-able values; `from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["mixers"] = {name: config_to_dict(mixer) for name, mixer in self.mixers.items()}
        values["feed_forward"] = dataclasses.asdict(self.feed_forward)
        values["mixer_only"] = list(self.mixer_only)
        for name in ("experts", "hyper_connections"):
            values[name] = None if values[name] is None else dataclasses.asdict(values[name])
        if isinstance(self.norm_placement, Mapping):
            values["norm_placement"] = dict(self.norm_placement)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            OptionError: a key is unknown or missing, or a value cannot be right. Its `path` says which.
        """
        if isinstance(values, Mapping):
            _check_mixers(values.get("mixers"))
        return read(cls, values, READERS)

    def __hash__(self) -> int:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, Mapping) else v for v in values))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled or deep-copied.
        return type(self).from_dict, (self.to_dict(),)


def parse_layout(layout: str) -> tuple[str, ...]:
    """The names in a layout, `"kda*3 mla"` written out.

    Raises:
        ConfigError: the layout is empty or a repetition is not a positive number.
    """
    if not isinstance(layout, str) or not layout.split():
        raise OptionError(
            f'the layout must name a mixer per layer, as in "kda kda kda mla"; got {layout!r}', ("layout",)
        )
    names: list[str] = []
    for word in layout.split():
        name, star, times = word.partition("*")
        if not name or (star and not (times.isdecimal() and int(times) > 0)):
            raise OptionError(
                f'cannot read {word!r} in the layout: write "name", or "name*3" for three', ("layout",)
            )
        names += [name] * (int(times) if star else 1)
    return tuple(names)


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """The end of an error message about a name that is not there, with the nearest one that is."""
    return f"an unknown {what} {name!r}{did_you_mean(name, sorted(known))}"


def _check_mixers(mixers: Any) -> None:
    """Find changes to a mixer that the model does not have: mistyped, or new."""
    if not isinstance(mixers, Mapping):
        return
    known = [
        name for name, options in mixers.items() if not isinstance(options, Mapping) or "type" in options
    ]
    for name in mixers:
        if name not in known:
            raise OptionError(
                f"the model has no mixer {name!r}{did_you_mean(name, known)} (a new one needs a 'type', the name of "
                "its layer in `intarsia mixers`)",
                ("mixers", name),
            )
