"""What a model is: frozen dataclasses that can be written as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from intarsia.errors import ConfigError, OptionError, did_you_mean
from intarsia.mixers import MixerConfig, config_from_dict, config_to_dict

RoutingWeights = Literal["unbiased", "biased"]
ExpertScores = Literal["sigmoid", "softmax"]
ExpertActivation = Literal["swiglu", "clamped"]
NormPlacement = Literal["before", "after", "stream"]
C = TypeVar("C")


@dataclass(frozen=True)
class FeedForwardConfig:
    """SwiGLU: `down(silu(gate(x)) * up(x))`, `d_hidden` wide inside."""

    d_hidden: int

    def __post_init__(self) -> None:
        _check_counts(self, "d_hidden")


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts as in DeepSeek-V3 (section 2.1.2) and Kimi, and with the options of other models.

    `num_active` of the `num_experts` SwiGLU experts of width `d_hidden` serve a token, and `num_shared` more
    serve every token (as one SwiGLU of width `num_shared * d_hidden`).

    Experts are chosen by score plus a bias that load balancing alone moves, by `bias_update_rate` per
    optimizer step. With `num_groups > 1` they come from the `num_active_groups` groups whose two best biased
    scores have the largest sums.

    `routing_weights` says what an expert's output is multiplied with: its score without the bias
    (`"unbiased"`: the papers and transformers) or with it (`"biased"`: Kimi-Linear's released code adds the
    bias in place). The weights of a token's experts are divided by their sum where `normalize` says so, and
    then multiplied by `routed_scaling_factor`.

    `scores` are the router's: `"sigmoid"` of each expert, or `"softmax"` over all (Qwen3-Next, MiniMax-01, gpt-oss).
    `shared_gate` multiplies the shared experts with a sigmoid of the token (Qwen3-Next). `biases` gives the router and
    the routed experts biases (gpt-oss). `activation` is `"swiglu"`, or gpt-oss's `"clamped"`:
    `(clamp(up, ±7) + 1) * g * sigmoid(1.702 g)` with `g = min(gate, 7)`.
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
    activation: ExpertActivation = "swiglu"

    def __post_init__(self) -> None:
        _check_counts(self, "num_experts", "d_hidden", "num_active", "num_groups", "num_active_groups")
        _check_counts(self, "num_shared", least=0)
        _check_reals(self, "routed_scaling_factor")
        if self.bias_update_rate != 0:
            _check_reals(self, "bias_update_rate")
        _check_flags(self, "normalize", "shared_gate", "biases")
        _check_choice(self, "routing_weights", get_args(RoutingWeights))
        _check_choice(self, "scores", get_args(ExpertScores))
        _check_choice(self, "activation", get_args(ExpertActivation))
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

    def __post_init__(self) -> None:
        _check_counts(self, "vocab_size", "d_model", "depth")
        _check_counts(self, "dense_layers", least=0)
        _check_reals(self, "norm_eps", "init_std", "residual_scale")
        _check_flags(self, "tie_embeddings", "zero_centered_norms")
        if not isinstance(self.feed_forward, FeedForwardConfig):
            raise ConfigError(f"feed_forward must be a FeedForwardConfig; got {self.feed_forward!r}")
        if self.experts is not None and not isinstance(self.experts, ExpertsConfig):
            raise ConfigError(f"experts must be an ExpertsConfig or None; got {self.experts!r}")
        if not isinstance(self.mixers, Mapping) or not self.mixers:
            raise ConfigError("mixers must map each name in the layout to a mixer configuration")
        for name, mixer in self.mixers.items():
            if not isinstance(mixer, MixerConfig):
                raise ConfigError(f"mixers[{name!r}] must be a mixer configuration; got {mixer!r}")
        object.__setattr__(self, "mixers", MappingProxyType(dict(self.mixers)))
        for name in parse_layout(self.layout):
            if name not in self.mixers:
                raise OptionError(f"the layout names {unknown(name, self.mixers, 'mixer')}", ("layout",))
        self._check_norm_placement()

    def _check_norm_placement(self) -> None:
        choices = get_args(NormPlacement)
        if isinstance(self.norm_placement, Mapping):
            object.__setattr__(self, "norm_placement", MappingProxyType(dict(self.norm_placement)))
            for name in self.norm_placement:
                if name not in self.mixers:
                    raise OptionError(
                        f"norm_placement names {unknown(name, self.mixers, 'mixer')}",
                        ("norm_placement", name),
                    )
        for name in self.mixers:
            if (placement := self.placement_of(name)) not in choices:
                raise OptionError(
                    f"norm_placement must be {' or '.join(map(repr, choices))}, or a table of mixers' names and"
                    f" these; got {placement!r}",
                    ("norm_placement",),
                )

    def placement_of(self, name: str) -> NormPlacement:
        """Where the norms stand in the blocks whose mixer has this name."""
        if isinstance(self.norm_placement, Mapping):
            return self.norm_placement.get(name, "before")
        return self.norm_placement

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of each layer's mixer, first layer first."""
        pattern = parse_layout(self.layout)
        return (pattern * math.ceil(self.depth / len(pattern)))[: self.depth]

    def has_experts(self, layer: int) -> bool:
        """Whether the layer (counted from 0) has a mixture of experts in place of the feed-forward."""
        return self.experts is not None and layer >= self.dense_layers

    def replace(self, **changes: Any) -> ModelConfig:
        """This configuration with some fields changed."""
        _check_names(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-able values; `from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["mixers"] = {name: config_to_dict(mixer) for name, mixer in self.mixers.items()}
        values["feed_forward"] = dataclasses.asdict(self.feed_forward)
        values["experts"] = None if self.experts is None else dataclasses.asdict(self.experts)
        if isinstance(self.norm_placement, Mapping):
            values["norm_placement"] = dict(self.norm_placement)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value cannot be right. Where it is one option's, an
                OptionError whose `path` says which.
        """
        values = dict(_mapping(values, cls.__name__))
        if "mixers" in values:
            mixers = _mapping(values["mixers"], "mixers")
            values["mixers"] = {name: _mixer(name, mixers) for name in mixers}
        for name, part in (("feed_forward", FeedForwardConfig), ("experts", ExpertsConfig)):
            if values.get(name) is not None:
                try:
                    values[name] = _from_dict(part, values[name])
                except OptionError as error:
                    raise error.under((name,)) from None
        return _from_dict(cls, values)

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


def _mixer(name: str, mixers: Mapping[str, Any]) -> MixerConfig:
    """The mixer that a model calls `name`."""
    options = mixers[name]
    if isinstance(options, Mapping) and "type" not in options:
        # Changes to a mixer that the model does not have: mistyped, or new.
        others = [other for other in mixers if isinstance(mixers[other], Mapping) and "type" in mixers[other]]
        raise OptionError(
            f"the model has no mixer {name!r}{did_you_mean(name, others)} (a new one needs a 'type', the name of its "
            "layer in `intarsia mixers`)",
            ("mixers", name),
        )
    try:
        return config_from_dict(options)
    except OptionError as error:
        # The name of the layer says enough, unless the model calls it otherwise.
        own = "" if options.get("type", name) == name else f"mixers.{name}: "
        raise OptionError(f"{own}{error}", ("mixers", name, *error.path)) from None


def _from_dict(cls: type[C], values: Any) -> C:
    values = _mapping(values, cls.__name__)
    _check_names(cls, values)
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**values)


def _mapping(values: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} must be a table of names and values; got {values!r}")
    return values


def _check_names(cls: type, values: Iterable[str]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise OptionError(f"{cls.__name__} was given {unknown(name, known, 'option')}", (name,))


def _check_counts(config: Any, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(
                f"{_label(config, name)} must be a whole number of at least {least}; got {value!r}", (name,)
            )


def _check_reals(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or value <= 0:
            raise OptionError(f"{_label(config, name)} must be a positive number; got {value!r}", (name,))


def _check_flags(config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise OptionError(
                f"{_label(config, name)} must be true or false; got {getattr(config, name)!r}", (name,)
            )


def _check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    if getattr(config, name) not in choices:
        raise OptionError(
            f"{_label(config, name)} must be {' or '.join(map(repr, choices))}; got {getattr(config, name)!r}",
            (name,),
        )


def _label(config: Any, name: str) -> str:
    return f"{type(config).__name__}.{name}"
