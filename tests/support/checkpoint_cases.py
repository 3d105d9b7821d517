"""Tiny models of published families, made by transformers' own classes, of awkward sizes.

One line a family and variant: the classes of transformers, and the options that make it small. The sizes differ from
each other wherever they may, so that nothing fits by chance.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 61


@dataclass(frozen=True)
class Case:
    """A tiny model of a family; `config` and `model` are the names of transformers' classes."""

    family: str
    variant: str
    config: str
    model: str
    options: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}"


COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
LINEAR, FULL = "linear_attention", "full_attention"
QWEN = {
    **COMMON, "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20,
    "linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.3},
    "layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3,
}  # fmt: skip
QWEN_EXPERTS = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 28,
}  # fmt: skip

CASES = [
    Case(
        "qwen3_5", "tied", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM",
        {**QWEN, "intermediate_size": 52, "tie_word_embeddings": True},
    ),
    Case(
        "qwen3_5", "biased", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM",
        {**QWEN, "intermediate_size": 52, "attention_bias": True, "linear_conv_kernel_dim": 3},
    ),
    Case("qwen3_5_moe", "", "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**QWEN, **QWEN_EXPERTS}),
]  # fmt: skip


def their_model(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of the case, in evaluation mode, with weights that are large enough to tell everything,
    rounded to `dtype`."""
    model = _made(case)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


@cache
def _made(case: Case) -> Any:
    import transformers

    config = getattr(transformers, case.config)(**case.options)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, case.model)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *_corrections(model)):
            noise = torch.randn(tensor.shape, generator=generator)
            # Norms, decays and biases stay near what they begin with.
            tensor.copy_(tensor + 0.1 * noise if tensor.dim() == 1 else 0.15 * noise)
    return model


def _corrections(model: Any) -> list[Tensor]:
    """Buffers that files hold: of routers."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def their_folder(case: Case, path: Path, runtime: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """The case, saved by transformers in the released layout or in that of its modules."""
    their_model(case, dtype).save_pretrained(path, save_original_format=not runtime)
    return path


def tokens(count: int) -> Tensor:
    """`[2, count]`"""
    return torch.randint(VOCABULARY, (2, count), generator=torch.Generator().manual_seed(1))
