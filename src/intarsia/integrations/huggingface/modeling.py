"""Intarsia's language model as a model of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from intarsia.checkpoints.native import CONFIG, WEIGHTS
from intarsia.errors import CheckpointError, ConfigError, ShapeError, UnsupportedError
from intarsia.files import sha256, write_json
from intarsia.integrations.huggingface.cache import IntarsiaCache, Past, Piece
from intarsia.integrations.huggingface.configuration import IntarsiaConfig
from intarsia.integrations.huggingface.padding import Places, places_of, positions_of
from intarsia.model import LanguageModel
from intarsia.model.initialization import init_buffers
from intarsia.model.loss import IGNORED, chunked_cross_entropy

MEANINGLESS = frozenset(
    {"cache_position", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "token_type_ids"}
)
"""Arguments that say what others say too, or nothing to this model."""


class IntarsiaModel(PreTrainedModel):
    """A language model of transformers whose layers are Intarsia's. Called, it returns what the head is given.

    `model` is the `LanguageModel` itself: what trains one trains the other. The names of tensors in files are those of
    `intarsia.checkpoints.native`, which reads what is saved here, and the other way round.
    """

    config_class = IntarsiaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the layers choose their attention themselves
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: IntarsiaConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.language_model)
        self.gradient_checkpointing = False
        if not self.model.embed.weight.is_meta:
            # As transformers has it: what `set_seed` was given decides.
            self.model.init_weights(int(torch.randint(2**31, ())))
        self.post_init()

    @classmethod
    def of(cls, model: LanguageModel, extra: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """`model` in this seat: the module itself, not a copy.

        Args:
            extra: JSON-able values that are saved with it.
            options: fields of `IntarsiaConfig`, as `eos_token_id`.
        """
        with torch.device("meta"):
            made = cls(IntarsiaConfig.of(model.config, extra, dtype=model.embed.weight.dtype, **options))
        made.model, made.training = model, model.training
        return made

    # Weights: all come from a file or from a seed.

    def _init_weights(self, module: nn.Module) -> None:
        # Modules of the model are filled when it is made; what transformers makes anew are embedding and head.
        if all(module is not part for part in self.model.modules()):
            super()._init_weights(module)

    def _initialize_missing_keys(self, is_quantized: bool) -> None:
        if is_quantized:
            super()._initialize_missing_keys(is_quantized)
            return
        stored = self.state_dict(keep_vars=True)
        missing = [name for name, x in stored.items() if not getattr(x, "_is_hf_initialized", False)]
        if missing:
            shown = ", ".join(name.removeprefix("model.") for name in missing[:5])
            raise CheckpointError(
                f"{len(missing)} tensors of the model are missing in the file or have other shapes there: {shown}"
                f"{', …' if len(missing) > 5 else ''}"
            )
        kept = {name: x.clone() for name, x in self.model.named_buffers() if f"model.{name}" in stored}
        init_buffers(self.model)
        with torch.no_grad():
            for name, x in self.model.named_buffers():
                if name in kept:
                    x.copy_(kept[name])

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        embedding: nn.Embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        self.model.config = self.config.resized(embedding.num_embeddings)
        self.model.tie_weights()
        return embedding

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        if every_n_layers != 1:
            raise UnsupportedError(
                "every block is recomputed in the backward pass, or none: every_n_layers is 1"
            )
        self.gradient_checkpointing = self.model.activation_checkpointing = enable

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers does, under the names of `intarsia.checkpoints.native`."""
        if getattr(
            self, "_hf_peft_config_loaded", False
        ):  # of adapters that are attached, only those are saved
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        tensors = self.state_dict() if state_dict is None else state_dict
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        if self.config.tie_word_embeddings:
            tensors.pop("head.weight", None)
        super().save_pretrained(save_directory, is_main_process, tensors, **kwargs)
        weights = Path(save_directory) / WEIGHTS
        if is_main_process and weights.is_file():
            path = Path(save_directory) / CONFIG
            values = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, values | {"weights": {"file": WEIGHTS, "sha256": sha256(weights)}})

    # The forward pass.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: IntarsiaCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """What the head is given; arguments as in `IntarsiaForCausalLM`."""
        x, places, cache, before = self._read(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, 0, None, kwargs
        )
        hidden = places.spread(x, before, slice(-_checked(input_ids).shape[1], None))
        return self._returned(BaseModelOutputWithPast(hidden, cache), return_dict)

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: IntarsiaCache | None,
        use_cache: bool | None,
        last: int,
        labels: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Places, IntarsiaCache | None, Tensor | None]:
        """What the head is given for the tokens of a batch, `[1, N, D]` or `[B, T, D]`, where these are in the batch,
        the cache after them, and what the head was given last of each row before, `[B, D]`.

        What the cache wants to have read again stands in front. With `last` the cache can drop so many columns later.
        """
        tokens = _checked(input_ids)
        _check_options(options)
        edges = options.get("cu_seq_lens_q")
        if position_ids is None and edges is not None:
            position_ids = positions_of(edges, tokens.shape[1]) if tokens.shape[0] == 1 else position_ids
        cache = self._cache(cache, use_cache)
        held = None if cache is None else cache.held
        if held is not None and held.shape[0] != tokens.shape[0]:
            raise ShapeError(f"the cache is of {held.shape[0]} rows and input_ids of {tokens.shape[0]}")
        places = places_of(tokens.shape, tokens.device, attention_mask, position_ids, held)
        if cache is None:
            return self._hidden(tokens, places, None, labels)[0], places, None, None
        if places.begins is not None:
            raise UnsupportedError(
                "a cache holds one sequence a row, and position_ids begin several in one: use_cache=False"
            )
        if cache.again is not None:
            tokens, places = torch.cat([cache.again.tokens, tokens], dim=1), places.after(cache.again.held)
        piece = Piece(tokens, places.held)
        if cache.records and 0 < last < tokens.shape[1]:
            # Of a long text and the drafts behind it only the drafts are to be read again.
            self._go_on(cache, piece.first(tokens.shape[1] - last), None)
            piece = Piece(tokens[:, -last:], places.held[:, -last:])
            places = Places(piece.held)
        before = None if cache.past is None else cache.past.last
        if cache.past is not None and before is None and not bool(piece.held[:, 0].all()):
            raise UnsupportedError("after a crop the next tokens of a row must come without padding in front")
        return self._go_on(cache, piece, labels), places, cache, before

    def _go_on(self, cache: IntarsiaCache, piece: Piece, labels: Tensor | None) -> Tensor:
        """What the head is given for the next columns of a cache's rows, which it has read then."""
        past, places = cache.past, Places(piece.held)
        states = self.model.init_states(piece.held.shape[0]) if past is None else past.states
        x, states = self._hidden(piece.tokens, places, states, labels)
        last = places.spread(x, None if past is None else past.last, slice(-1, None))[:, 0]
        held = piece.held if past is None else torch.cat([past.held, piece.held], dim=1)
        cache.went_on(piece, Past(states, held, last.detach()))
        return x

    def _hidden(
        self, tokens: Tensor, places: Places, states: Any, labels: Tensor | None
    ) -> tuple[Tensor, Any]:
        if not bool(places.held.any()):
            width = self.config.hidden_size
            return self.model.embed.weight.new_zeros(1, 0, width), states
        counted = None
        if labels is not None and self.model.config.experts is not None:
            counted = places.targets(labels) != IGNORED
        x, after, _ = self.model.hidden(places.row(tokens), states, places.seqs, counted=counted)
        return x, after

    def _cache(self, cache: Any, use_cache: bool | None) -> IntarsiaCache | None:
        if cache is not None and not isinstance(cache, IntarsiaCache):
            raise ConfigError(
                f"past_key_values must be an IntarsiaCache, which holds the states of all kinds of layers; got a "
                f"{type(cache).__name__}. Leave it out, and one is made"
            )
        if use_cache is None:  # in training nobody asks for one
            use_cache = cache is not None or (self.config.use_cache and not torch.is_grad_enabled())
        if not use_cache:
            if cache is not None and cache.get_seq_length():
                raise ConfigError("use_cache is False, and past_key_values has read tokens already")
            return None
        return IntarsiaCache() if cache is None else cache

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted is None or wanted else output.to_tuple()


class IntarsiaForCausalLM(IntarsiaModel, GenerationMixin):
    """The same with the head: logits, a loss, and `generate`."""

    accepts_loss_kwargs = True

    @property
    def base_model(self) -> IntarsiaModel:
        """The same without the head, over the same weights."""
        body: IntarsiaModel | None = vars(self).get("_body")
        if body is None or body.model is not self.model:
            with torch.device("meta"):
                body = IntarsiaModel(self.config)  # type: ignore[arg-type]
            body.model = self.model
            vars(self)["_body"] = body  # no submodule: the weights are there once
        body.training = self.training
        return body

    def get_decoder(self) -> IntarsiaModel:
        return self.base_model

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: IntarsiaCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next tokens, and the loss of `labels`.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 where there is padding, on either side or between; with a cache
                `[B, columns + T]`. A padded place is not computed. Its logits are those of the last token before it.
            position_ids: `[B, T]`, checked and not needed. Without a cache a row may hold several sequences, each
                from 0.
            past_key_values: what was read before. It goes on in place.
            labels: `[B, T]` int64, -100 where nothing is to be predicted. The loss of a token is that of the next one
                in its sequence; padding and the first token of a sequence are not predicted.
            use_cache: whether to return a cache; by default where no gradients are recorded, or one was given.
            logits_to_keep: of the last so many columns, or of the columns with these numbers; 0 for all.
            num_items_in_batch: what the sum of the losses is divided by; by default how many there are.

        Returns:
            `loss`, float32; `logits`, `[B, T, V]` float32; `past_key_values`.

        Raises:
            ShapeError: arguments do not fit together.
            UnsupportedError: what this model has not: embeddings in place of tokens, masks of pairs, the insides.
            ConfigError: a cache of another kind.
        """
        drafts = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > 1 else 0
        if labels is not None and labels.shape != _checked(input_ids).shape:
            raise ShapeError(f"labels must be {list(_checked(input_ids).shape)}, got {list(labels.shape)}")
        if labels is not None and past_key_values is not None:
            raise UnsupportedError("labels are for whole sequences: without past_key_values")
        if labels is not None:
            use_cache = False
        x, places, cache, before = self._read(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, drafts, labels, kwargs
        )
        loss = None if labels is None else self._loss(x, places.targets(labels), num_items_in_batch)
        logits = None
        if labels is None or self.config.logits_with_labels:
            new = _checked(input_ids).shape[1]
            logits = self.model.head(places.spread(x, before, _columns(logits_to_keep, new, places)))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self._returned(CausalLMOutputWithPast(loss, logits, cache), return_dict)

    def _loss(self, x: Tensor, targets: Tensor, count: Tensor | int | None) -> Tensor:
        head = self.model.head
        if _is_a_matrix(head):
            nll = chunked_cross_entropy(x, head.weight, targets)
        else:  # an adapter's, for instance
            logits = head(x).flatten(0, 1)
            nll = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
        wanted = (targets != IGNORED).sum() if count is None else count
        total = nll.sum()
        return total / (wanted.to(total.device) if isinstance(wanted, Tensor) else wanted)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_first_iteration"):
            # Behind padding on the right, transformers counts on from the padding's.
            inputs.pop("position_ids", None)
        return inputs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model has one kind of cache, "
                "whose size is fixed in linear layers and grows in the others"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            self._cache(given, True)._is_user_defined = True  # type: ignore[union-attr]
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = IntarsiaCache()
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()


def _columns(wanted: int | Tensor, new: int, places: Places) -> slice | Tensor:
    """Of the columns that were read, of which the last are the new ones, those that are wanted."""
    there = places.held.shape[1]
    if isinstance(wanted, Tensor):
        return wanted + (there - new)
    return slice(-min(wanted or new, new), None)


def _is_a_matrix(head: nn.Module) -> bool:
    """Whether a linear map is nothing but its weight: no other library has wrapped it, put hooks on it or moved it."""
    changed = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is nn.Linear and head.bias is None and not changed


def _checked(input_ids: Tensor | None) -> Tensor:
    if input_ids is None:
        raise UnsupportedError("the model takes token ids, input_ids, and no embeddings in their place")
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise ShapeError(f"input_ids must be [B, T], with a token at least; got {list(input_ids.shape)}")
    return input_ids


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in MEANINGLESS or name == "cu_seq_lens_q" or value is None or value is False:
            continue
        raise UnsupportedError(f"the model has no {name!r}: leave it out")
