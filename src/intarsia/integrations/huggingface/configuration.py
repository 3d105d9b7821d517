"""A model's configuration as transformers reads and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

from intarsia.checkpoints.native import FORMAT, PACKED_VERSION, VERSION
from intarsia.errors import ConfigError
from intarsia.model import ModelConfig


class IntarsiaConfig(PreTrainedConfig):
    """What stands in `config.json`: of `intarsia.checkpoints.native` the whole, so that either reads what the other
    writes, and beside it what transformers and its users ask for."""

    model_type: ClassVar[str] = FORMAT
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    model: dict[str, Any] | None = None
    """The language model, as `ModelConfig.to_dict` has it."""
    extra: dict[str, Any] | None = None
    """What was saved with the model."""
    logits_with_labels: bool = True
    """Whether logits are returned beside a loss, as transformers does. The loss does not need them: without, a batch
    takes as much less memory as its tokens times the vocabulary."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.model is None:
            raise ConfigError(
                "an IntarsiaConfig describes a model: IntarsiaConfig(model=config.to_dict()) with a ModelConfig, or "
                "IntarsiaForCausalLM.of(model)"
            )
        config = ModelConfig.from_dict(self.model)
        shown = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.depth,
            "tie_word_embeddings": config.tie_embeddings,
        }
        for name, value in shown.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise ConfigError(f"{name} is {given} and the model's is {value}: change it in `model`")
            setattr(self, name, value)
        self.extra = {} if self.extra is None else self.extra
        if kwargs.get("version") == PACKED_VERSION:
            raise ConfigError(
                "the weights of this model are packed for decoding (`intarsia convert --weights`), which transformers "
                "does not read: give it the model that they were packed from"
            )
        for name in ("format", "version", "weights"):  # of the file, not of the model
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    @property
    def language_model(self) -> ModelConfig:
        """The configuration of the language model inside."""
        assert self.model is not None
        return ModelConfig.from_dict(self.model)

    def resized(self, vocab_size: int) -> ModelConfig:
        """Make the vocabulary this large, here and in the configuration inside, which is returned."""
        config = self.language_model.replace(vocab_size=vocab_size)
        self.model, self.vocab_size = config.to_dict(), vocab_size
        return config

    def to_dict(self) -> dict[str, Any]:
        written: dict[str, Any] = super().to_dict()
        return written | {"format": FORMAT, "version": VERSION}

    @classmethod
    def of(
        cls, config: ModelConfig, extra: Mapping[str, Any] | None = None, **options: Any
    ) -> IntarsiaConfig:
        """Of the configuration of a language model. `options` are the other fields."""
        made: IntarsiaConfig = cls(model=config.to_dict(), extra=dict(extra or {}), **options)
        return made

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of weights that are not always float32."""
        dtype = getattr(torch, self.dtype) if isinstance(self.dtype, str) else self.dtype
        return torch.get_default_dtype() if dtype is None else dtype
