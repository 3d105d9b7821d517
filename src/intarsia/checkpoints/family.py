"""What a family of published models is: how its options and names translate into ours and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from intarsia.checkpoints.options import Options
from intarsia.checkpoints.rows import Rows
from intarsia.errors import IntarsiaError, UnsupportedError
from intarsia.mixers import MixerConfig
from intarsia.mixers.base import NormedConfig
from intarsia.model.config import ModelConfig

M = TypeVar("M", bound=MixerConfig)


@dataclass(frozen=True)
class Family:
    """A family of published models. One file in `families/` each, and a line in `registry.CHECKPOINTS`."""

    name: str
    """The `model_type` that is written."""
    title: str
    """For the table of the documentation: the models that people know."""
    model_types: tuple[str, ...]
    """The values of `model_type` that are read, a multimodal model's own among them."""
    architecture: str
    """transformers' class for it, which is written."""
    read: Callable[[Options], ModelConfig]
    """Their options to our configuration. Raises UnsupportedError for a part that the model does not have."""
    write: Callable[[ModelConfig], dict[str, Any]] | None
    """The other way round; what a family cannot say is found by reading it again. None: a family that is only read."""
    rows: Callable[[ModelConfig], Rows]
    """The table of names, for a model of this configuration."""
    mixers: tuple[str, ...] = ()
    """The mixers that its layers can have, of a family that is written."""
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Beginnings of names in their files that are not of the text model, and what they are; with a dot before it, a
    part that stands anywhere in a name."""
    computed: tuple[str, ...] = ()
    """Ends of names in their files of what is computed anew, whatever a file says."""
    unties: bool = False
    """Whether transformers' class does not tie its head to the embedding, whatever its options say: what is tied here
    is written as two that are equal."""
    around: Mapping[str, Any] | None = None
    """Of a text model that transformers has only inside a multimodal one: what `config.json` says beside its options,
    which stand in `text_config`. Names that begin with `model.` are written with `model.language_model.`."""
    missing: str = ""
    """For the documentation: what is not built yet."""
    oracle: str = "transformers"
    """Whose logits ours are compared with."""

    @property
    def short(self) -> str:
        """The name in the registry, which is that of its file."""
        return self.read.__module__.rpartition(".")[2]

    def as_written(self, config: ModelConfig) -> ModelConfig:
        """The model of this configuration as it is in their files."""
        return config.replace(tie_embeddings=False) if self.unties and config.tie_embeddings else config


class OtherFamilyError(UnsupportedError):
    """A model that a family cannot say.

    Attributes:
        distance: how far it is from one that it can: layers with mixers that the family does not have, and then what
            else differs.
    """

    def __init__(self, message: str, distance: tuple[float, float]) -> None:
        super().__init__(message)
        self.distance = distance


def written(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The options of a model in the family's own words.

    Raises:
        OtherFamilyError: it is no model of this family, or has an option that the family cannot say.
    """
    config, title = family.as_written(config), f"this model cannot be written as {family.short}"
    if family.write is None:
        raise OtherFamilyError(f"{title}, which is only read", (math.inf, 0))
    kinds = [type(config.mixers[name]).type for name in config.layers]
    strange = [layer for layer, kind in enumerate(kinds) if kind not in family.mixers]
    if strange:
        where = f"layer {strange[0]} is {kinds[strange[0]]!r}"
        raise OtherFamilyError(
            f"{title}: {where}, and the family has {', '.join(family.mixers)}", (len(strange), 0)
        )
    try:
        values = family.write(config)
        again = family.read(Options(values, f"config.json of {family.name}"))
    except IntarsiaError as error:
        # A kind of layer or experts that it has not, or a value that cannot be: more than another value.
        raise OtherFamilyError(f"{title}: {error}", (0, config.depth)) from error
    wanted, got = told(config), told(again)
    differing = [name for name in wanted if wanted[name] != got.get(name)]
    if differing:
        name = differing[0]
        message = f"{title}: {name} is {wanted[name]} and the family has {got.get(name)}"
        raise OtherFamilyError(message, (0, len(differing)))
    # Nothing is said of tokens, which else would be those of the family's best-known model.
    silent = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    values = {"architectures": [family.architecture], **silent, **values, "model_type": family.name}
    if family.around is None:
        return values
    inside = {name: value for name, value in values.items() if name != "architectures"}
    outer = {name: values[name] for name in ("architectures", "tie_word_embeddings")}
    return {**outer, **family.around, "text_config": inside}


def told(config: ModelConfig) -> dict[str, Any]:
    """All that a configuration says of what is computed, in one way."""
    values: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "d_model", "depth", "tie_embeddings", "norm_eps", "zero_centered_norms", "residual_scale",
            "norm", "embed_norm", "hyper_connections", "embed_scale", "branch_scale", "head_scale",
            "attention_residuals",
        )
    }  # fmt: skip
    there = [layer for layer in range(config.depth) if config.has_feed_forward(layer)]
    dense = [layer for layer in there if not config.has_experts(layer)]
    values["layers with a feed-forward"], values["layers without experts"] = there, dense
    if dense:
        values["feed_forward"] = config.feed_forward
    if config.experts is not None and len(dense) < len(there):
        # How experts are balanced in training is nobody else's business, and shared ones are one feed-forward.
        experts = dataclasses.replace(config.experts, bias_update_rate=0)
        if experts.num_shared:
            experts = dataclasses.replace(experts, num_shared=1, d_shared=experts.shared_width)
        values["experts"] = experts
    for layer, name in enumerate(config.layers):
        mixer = config.mixers[name].at_layer(layer, config.depth)
        values[f"the mixer of layer {layer}"] = _spelled_out(mixer, config.norm_eps)
        values[f"the norms of layer {layer}"] = config.placement_of(name)
    return values


_DEFAULTS = {
    "head_v_dim": "value_dim",
    "num_v_heads": "value_heads",
    "num_kv_heads": "kv_heads",
    "scale": "logit_scale",
}
"""Options that may be None, and the properties that say what they are then."""


def _spelled_out(mixer: MixerConfig, norm_eps: float) -> MixerConfig:
    """The options with nothing left to defaults that depend on others."""
    fields = {field.name for field in dataclasses.fields(mixer)}
    values = {
        name: getattr(mixer, of) for name, of in _DEFAULTS.items() if name in fields and hasattr(mixer, of)
    }
    if isinstance(mixer, NormedConfig):
        values["norm_eps"] = mixer.own_eps(norm_eps)
    return dataclasses.replace(mixer, **values)


def only_mixer(config: ModelConfig, kind: type[M]) -> M:
    """The options of the layers of this kind.

    Raises:
        UnsupportedError: there are none, or they differ.
    """
    found = {mixer for name in config.layers if type(mixer := config.mixers[name]) is kind}
    if len(found) != 1:
        how = "has no layer" if not found else f"has {len(found)} different layers"
        raise UnsupportedError(f"the model {how} of the mixer {kind.type!r}")
    return found.pop()


def names_of(config: ModelConfig, kinds: Mapping[type[MixerConfig], str]) -> list[str]:
    """What each layer is called by the class of its mixer.

    Raises:
        UnsupportedError: a layer whose mixer is none of these.
    """
    names = []
    for layer, name in enumerate(config.layers):
        kind = type(config.mixers[name])
        if kind not in kinds:
            raise UnsupportedError(
                f"layer {layer} is {kind.type!r}, and the family has {', '.join(k.type for k in kinds)}"
            )
        names.append(kinds[kind])
    return names


def layout_of(kinds: list[str], names: Mapping[str, str], options: Options) -> str:
    """The layout of layers that are called `kinds` there, `names` saying what we call them.

    Raises:
        UnsupportedError: a kind of layer that is not among them.
    """
    for layer, kind in enumerate(kinds):
        if kind not in names:
            raise options.unsupported(f"layer {layer} is {kind!r}; known are {', '.join(names)}")
    return " ".join(names[kind] for kind in kinds)
