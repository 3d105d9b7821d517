"""Reading the options of a published `config.json`, so that none is passed over."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from intarsia.errors import CheckpointError, UnsupportedError

T = TypeVar("T")
Sparse = Literal["published", "dense"]

# What says nothing of what the model computes in inference.
_NAMES = """
_attn_implementation _commit_hash _name_or_path add_cross_attention architectures attention_dropout auto_map
aux_loss_alpha bad_words_ids base_model_tp_plan begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id dtype eos_token_id ep_size finetuning_task
gradient_checkpointing id2label image_token_id initializer_factor initializer_range is_decoder
is_encoder_decoder keys_to_ignore_at_inference label2id language mamba_ssm_dtype max_length
max_position_embeddings min_length model_max_length model_type mtp_num_hidden_layers
mtp_use_dedicated_embeddings num_nextn_predict_layers output_attentions output_hidden_states
output_router_logits pad_token_id prefix pretraining_tp problem_type pruned_heads return_dict
return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id seq_aux task_specific_params
text_config_dtype tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict video_token_id
vision_end_token_id vision_start_token_id
"""
HARMLESS = frozenset(_NAMES.split())

REQUIRED: Any = object()


class Options:
    """The options of a checkpoint. What is asked for is counted as read; `finish` raises for the rest.

    Args:
        values: of `config.json`, or of its part for the text model.
        where: the file, for messages.
        ignored: names that the caller says to pass over.
        sparse: what becomes of layers that choose what they attend to: `"published"` or `"dense"`.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        ignored: frozenset[str] = frozenset(),
        sparse: Sparse = "published",
    ) -> None:
        self.values, self.where, self.sparse = dict(values), where, sparse
        self._read = set(HARMLESS | ignored)

    def get(self, name: str, kind: type[T], default: Any = REQUIRED, *names: str) -> T:
        """The value of an option, `default` where it is not given. `names` are other spellings of it.

        Raises:
            CheckpointError: it is missing, or of another type.
        """
        spellings = (name, *names)
        self._read.update(spellings)
        found = [x for x in spellings if self.values.get(x) is not None]
        if not found:
            if default is REQUIRED:
                raise CheckpointError(f"{self.where} does not say {name!r}")
            value: T = default
            return value
        value = self.values[found[0]]
        if any(self.values[other] != value for other in found[1:]):
            raise CheckpointError(
                f"{self.where} says {' and '.join(found)}, which are the same, and they differ"
            )
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)  # type: ignore[call-arg]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.where}: {found[0]} must be {kind.__name__}; it is {value!r}")
        return value

    def maybe(self, name: str, kind: type[T], *names: str) -> T | None:
        """The same, None where it is not given or null."""
        value: T | None = self.get(name, kind, None, *names)
        return value

    def presume(self, **values: Any) -> None:
        """Take these where the file says nothing: the defaults of another class than the one that is asked next."""
        self.values = {**values, **self.values}

    def only(self, name: str, *allowed: Any, part: str) -> None:
        """An option that may be absent or one of `allowed`; `part` is what any other value would need.

        Raises:
            UnsupportedError: it is another.
        """
        self._read.add(name)
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise UnsupportedError(f"{self.where}: {name} is {value!r}, and the model has no {part} yet")

    def has(self, name: str) -> bool:
        """Whether an option is given and not null."""
        return self.values.get(name) is not None

    def asked(self, name: str) -> bool:
        """Whether somebody has read an option."""
        return name in self._read

    def within(self, name: str) -> Options:
        """The options under `name`, which must all be read too; empty where there are none."""
        self._read.add(name)
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where}: {name} must be an object; it is {value!r}")
        return Options(value, f"{self.where}: {name}")

    def unsupported(self, what: str) -> UnsupportedError:
        """The error of a part that is missing."""
        return UnsupportedError(f"{self.where}: {what}")

    def attends_to_all(self, count: int) -> bool:
        """Whether layers that attend to `count` tokens which they choose shall attend to all, as the caller has said.
        A warning says what that means."""
        if self.sparse == "published":
            return False
        warnings.warn(
            f"{self.where}: loaded as if its layers attended to all tokens, and not to {count} that an indexer "
            f"chooses: for texts of more than {count} tokens this is not the published model",
            stacklevel=2,
        )
        return True

    def finish(self) -> None:
        """Raise UnsupportedError for an option that nobody has read and that is not empty."""
        rest = {
            k: v for k, v in self.values.items() if k not in self._read and v not in (None, False, [], {}, "")
        }
        if rest:
            shown = ", ".join(f"{name} = {value!r}" for name, value in sorted(rest.items())[:5])
            raise UnsupportedError(
                f"{self.where} has options whose meaning is not known: {shown}. If they change nothing of what the "
                f"model computes, load it with ignore={sorted(rest)!r}"
            )


class Rotation:
    """How queries and keys are rotated: of `rope_parameters`, or of the older `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`.

    Attributes: `theta`; `share`, the part of the channels; `kind`, `"default"`, `"yarn"`, …; `more`, the options of
    that kind, to be read and finished.
    """

    def __init__(self, options: Options, theta: float | None = 10000.0, share: float = 1.0) -> None:
        given = options.within("rope_parameters")
        older = options.within("rope_scaling")
        self.more = given if given.values else older
        outside = options.maybe("rope_theta", float)
        found = self.more.maybe("rope_theta", float)
        self.theta = next((x for x in (found, outside, theta) if x is not None), None)
        part = options.maybe("partial_rotary_factor", float)
        inner = self.more.maybe("partial_rotary_factor", float)
        self.share = next(x for x in (inner, part, share) if x is not None)
        self.kind = self.more.get("rope_type", str, "default", "type")

    def plain(self) -> None:
        """Raise UnsupportedError unless it is an unstretched rotation."""
        if self.kind != "default":
            raise self.more.unsupported(
                f"rope_type is {self.kind!r}, and this family's rotations are not stretched here yet"
            )
        self.more.finish()
