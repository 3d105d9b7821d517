"""Small models of transformers with random weights, and how far a faster way through one may be from the exact one."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from support.budget import disturbed, factor

Tensors = dict[str, Tensor]
VOCABULARY, T = 97, 70  # more than a chunk
# All experts are chosen and all tokens attended to: choices between near equals would hide what is compared.
ANY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ANY |= {"num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
ANY |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
GDN = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
GDN |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
KDA = {"linear_num_heads": 2, "linear_head_dim": 8}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**MOE, "num_experts": 2, "shared_expert_intermediate_size": 16}
INDEX = {"index_topk": 256, "index_head_dim": 8, "index_n_heads": 2}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 256}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}

# Of each family: the class of its configuration, that of its model, and options.
HYBRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bailing_hybrid": (
        "BailingHybridConfig", "BailingHybridForCausalLM",
        {**ANY, **MLA, **MOE, "qk_rope_head_dim": 8, "head_dim": 16, "intermediate_size": 32,
         "num_local_experts": 2, "n_group": 1, "topk_group": 1},
    ),
    "glm5_next": (
        "Glm5NextConfig", "Glm5NextForConditionalGeneration",
        {"text_config": {**ANY, **KDA, **MLA, **MOE, **INDEX, "q_lora_rank": 16, "intermediate_size": 32,
                         "n_routed_experts": 2, "hc_mult": 2},
         "vision_config": {**VISION, "projection_intermediate_size": 16}},
    ),
    "kimi_linear": (
        "KimiLinearConfig", "KimiLinearForCausalLM",
        {**ANY, **KDA, **MLA, **MOE, "q_lora_rank": None, "qk_rope_head_dim": 8, "intermediate_size": 32,
         "num_local_experts": 2},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {**ANY, **GDN, "intermediate_size": 32}),
    "qwen3_5": (
        "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**ANY, **GDN, "head_dim": 16, "intermediate_size": 32}
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**ANY, **GDN, **SHARED, "head_dim": 16}
    ),
    "qwen3_next": (
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {**ANY, **GDN, **SHARED, "head_dim": 16, "intermediate_size": 32},
    ),
    "qwen4_exp": (
        "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM",
        {**ANY, **GDN, **SHARED, **INDEXER, "head_dim": 16, "indexer_compress_ratio": 4, "hc_count": 2,
         "hc_lowrank": 8},
    ),
}  # fmt: skip
DRAWS = 4
STAGES = 8
"""Products in a row: each of the two layers projects, mixes tokens, projects and has a feed-forward of two."""

DENSE = {**ANY, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 64}
DENSE.pop("layer_types")
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

# Models of softmax attention alone.
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**DENSE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DENSE, **SLIDING, "use_sliding_window": True}),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        {**DENSE, **SLIDING, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {**DENSE, **MLA, **MOE, "head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "qk_rope_head_dim": 8,
         "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "llama4_text": (
        "Llama4TextConfig", "Llama4ForCausalLM",
        {**DENSE, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 2,
         "attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"],
         "no_rope_layers": [1, 0]},
    ),
}  # fmt: skip
MODELS = HYBRIDS | OTHERS


def module(family: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{_package(family)}.modeling_{_package(family)}")


def _package(family: str) -> str:
    return "llama4" if family == "llama4_text" else family


def build(family: str) -> nn.Module:
    config, model, options = MODELS[family]
    configurations = importlib.import_module(
        f"transformers.models.{_package(family)}.configuration_{_package(family)}"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(module(family), model)(getattr(configurations, config)(**copy.deepcopy(options)))
    made.set_experts_implementation("eager")  # in float64 too
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return made.eval()


def widened(model: nn.Module) -> nn.Module:
    """The same model, so much wider that its results are exact."""
    dtype = next(model.parameters()).dtype
    return copy.deepcopy(model).to(torch.float64 if dtype == torch.float32 else torch.float32)


def tokens(rows: int = 2, length: int = T) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def around(model: nn.Module, compute: Callable[[nn.Module], Tensors]) -> list[Tensors]:
    """`compute` of the exact model, and of it with weights that have errors as rounding to its dtype makes them."""
    generator = torch.Generator().manual_seed(2)
    results = [compute(widened(model))]
    for _ in range(DRAWS):
        moved = widened(model)
        for parameter, narrow in zip(moved.parameters(), model.parameters(), strict=True):
            parameter.data = disturbed(narrow.data, narrow.dtype, generator).to(parameter.dtype)
        results.append(compute(moved))
    return results


def assert_close(got: Tensors, exact: Tensors, *moved: Tensors, dtype: torch.dtype) -> None:
    """The root mean square of each error keeps the budget of `support.budget` for what computes in `dtype`, given
    the draws `moved`."""
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        assert tensor.isfinite().all(), name
        right = exact[name].double()
        error = (tensor.double() - right).square().mean().sqrt()
        movement = torch.stack([draw[name].double() - right for draw in moved]).square().mean().sqrt()
        budget = movement * factor(dtype, dtype, stages=STAGES, inside=True)
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"
