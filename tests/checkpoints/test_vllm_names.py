"""What we write as `kimi_linear` and `qwen3_next` is what vLLM's loader fills its parameters with.

The facts were read from the sources of vLLM 0.32.0 (`vllm/models/kimi_k3/amd/linear.py` and `models/qwen3_next.py`, and
the layers that they use); a file of theirs is none of ours, and vLLM itself is not installed. Its parameters are listed
with the shapes that its modules have on one device. Several tensors of a file may be parts of one, one below the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import intarsia
from intarsia.checkpoints.tensor_folder import TensorFolder
from support.checkpoint_cases import CASES, Case, their_folder

pytest.importorskip("transformers")

Shape = tuple[int, ...]
Parameters = Iterator[tuple[str, Shape, tuple[str, ...]]]
"""A parameter of vLLM's, its shape, and the tensors that it is filled with; nothing: the one of its own name."""


def linear(name: str, rows: int, columns: int, *parts: str) -> tuple[str, Shape, tuple[str, ...]]:
    return f"{name}.weight", (rows, columns), tuple(f"{part}.weight" for part in parts)


def feed_forward(width: int, inner: int) -> Parameters:
    yield linear("gate_up_proj", 2 * inner, width, "gate_proj", "up_proj")
    yield linear("down_proj", width, inner)


def experts(count: int, width: int, inner: int, gate: str, up: str, down: str) -> Parameters:
    """Stacked; here each expert's share of the two stacks."""
    for n in range(count):
        yield linear(f"experts.w13[{n}]", 2 * inner, width, f"experts.{n}.{gate}", f"experts.{n}.{up}")
        yield linear(f"experts.w2[{n}]", width, inner, f"experts.{n}.{down}")


def under(prefix: str, parameters: Parameters) -> Parameters:
    for name, shape, parts in parameters:
        yield prefix + name, shape, tuple(prefix + part for part in parts)


def kimi_linear(c: dict[str, Any]) -> Parameters:
    D, F = c["hidden_size"], c.get("moe_intermediate_size", 0)
    kinds = c["linear_attn_config"]
    for layer in range(c["num_hidden_layers"]):
        here = f"model.layers.{layer}."
        # Layers are counted from 1 in the options.
        mixer = kimi_delta(c) if layer + 1 in kinds["kda_layers"] else kimi_latent(c)
        yield from under(f"{here}self_attn.", mixer)
        if layer < c["first_k_dense_replace"]:
            yield from under(f"{here}mlp.", feed_forward(D, c["intermediate_size"]))
        else:
            inside = f"{here}block_sparse_moe."
            yield from under(inside, iter([linear("gate", c["num_experts"], D)]))
            yield f"{inside}gate.e_score_correction_bias", (c["num_experts"],), ()
            latent = c.get("routed_expert_hidden_size")
            yield from under(inside, experts(c["num_experts"], latent or D, F, "w1", "w3", "w2"))
            if latent is not None:
                yield linear(f"{inside}routed_expert_down_proj", latent, D)
                yield linear(f"{inside}routed_expert_up_proj", D, latent)
            if c.get("latent_moe_use_norm"):
                yield f"{inside}routed_expert_norm.weight", (latent,), ()
            if c["num_shared_experts"]:
                shared = feed_forward(D, F * c["num_shared_experts"])
                yield from under(f"{inside}shared_experts.", shared)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{here}{norm}.weight", (D,), ()
        if "attn_res_block_size" in c:
            yield from under(here, (x for name in ("self_attention", "mlp") for x in residual(name, D)))
    if "attn_res_block_size" in c:
        yield from under("model.", residual("output_attn", D))


def residual(name: str, width: int) -> Parameters:
    yield f"{name}_res_norm.weight", (width,), ()
    yield linear(f"{name}_res_proj", 1, width)


def kimi_delta(c: dict[str, Any]) -> Parameters:
    of, D = c["linear_attn_config"], c["hidden_size"]
    H, K, W = of["num_heads"], of["head_dim"], of["short_conv_kernel_size"]
    P = H * K
    fused = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")
    if of.get("use_full_rank_gate"):
        yield linear("in_proj_qkvgfab", 4 * P + H + K, D, *fused, "g_proj")
    else:
        yield linear("in_proj_qkvgfab", 3 * P + H + K, D, *fused)
        yield linear("g_a_proj", K, D)
        yield linear("g_b_proj", P, K)
    yield "conv1d.weight", (3 * P, 1, W), tuple(f"{x}_conv1d.weight" for x in "qkv")
    yield "A_log", (H,), ()
    yield "dt_bias", (P,), ()
    yield linear("f_b_proj", P, K)
    yield "o_norm.weight", (K,), ()
    yield linear("o_proj", D, P)


def kimi_latent(c: dict[str, Any]) -> Parameters:
    D, H, rank, rope = (
        c[name] for name in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim")
    )
    queries, V = H * (c["qk_nope_head_dim"] + rope), c["v_head_dim"]
    if c.get("q_lora_rank") is None:
        yield linear("q_proj", queries, D)
        yield linear("kv_a_proj_with_mqa", rank + rope, D)
    else:
        low = c["q_lora_rank"]
        yield linear("fused_qkv_a_proj", low + rank + rope, D, "q_a_proj", "kv_a_proj_with_mqa")
        yield "q_a_layernorm.weight", (low,), ()
        yield linear("q_b_proj", queries, low)
    yield "kv_a_layernorm.weight", (rank,), ()
    yield linear("kv_b_proj", H * (c["qk_nope_head_dim"] + V), rank)
    if c.get("mla_use_output_gate"):
        yield linear("g_proj", H * V, D)
    yield linear("o_proj", D, H * V)


def qwen3_next(c: dict[str, Any]) -> Parameters:
    D = c["hidden_size"]
    for layer, kind in enumerate(c["layer_types"]):
        here = f"model.layers.{layer}."
        if kind == "linear_attention":
            yield from under(f"{here}linear_attn.", qwen_delta(c))
        else:
            yield from under(f"{here}self_attn.", qwen_attention(c))
        if layer in (c.get("mlp_only_layers") or ()):
            yield from under(f"{here}mlp.", feed_forward(D, c["intermediate_size"]))
        else:
            yield from under(f"{here}mlp.", qwen_experts(c))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{here}{norm}.weight", (D,), ()


def qwen_experts(c: dict[str, Any]) -> Parameters:
    D, E = c["hidden_size"], c["num_experts"]
    yield linear("gate", E, D)
    yield from experts(E, D, c["moe_intermediate_size"], "gate_proj", "up_proj", "down_proj")
    yield from under("shared_expert.", feed_forward(D, c["shared_expert_intermediate_size"]))
    yield linear("shared_expert_gate", 1, D)


def qwen_delta(c: dict[str, Any]) -> Parameters:
    D, H, HV = c["hidden_size"], c["linear_num_key_heads"], c["linear_num_value_heads"]
    keys, values = H * c["linear_key_head_dim"], HV * c["linear_value_head_dim"]
    # Interleaved by key heads in the file, and kept so: one part each.
    yield linear("in_proj_qkvz", 2 * keys + 2 * values, D)
    yield linear("in_proj_ba", 2 * HV, D)
    yield "conv1d.weight", (2 * keys + values, 1, c["linear_conv_kernel_dim"]), ()
    yield "A_log", (HV,), ()
    yield "dt_bias", (HV,), ()
    yield "norm.weight", (c["linear_value_head_dim"],), ()
    yield linear("out_proj", D, values)


def qwen_attention(c: dict[str, Any]) -> Parameters:
    D, H, HK, K = (
        c[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    # Twice as many heads of queries: a gate for each.
    yield linear("qkv_proj", (2 * H + 2 * HK) * K, D, "q_proj", "k_proj", "v_proj")
    yield "q_norm.weight", (K,), ()
    yield "k_norm.weight", (K,), ()
    yield linear("o_proj", D, H * K)


FAMILIES = {"kimi_linear": kimi_linear, "qwen3_next": qwen3_next}
WRITTEN = [case for case in CASES if case.family in FAMILIES]


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_every_parameter_is_filled_and_no_tensor_is_left(case: Case, tmp_path: Path) -> None:
    intarsia.save(intarsia.load(their_folder(case, tmp_path / "theirs")), tmp_path / "ours", case.family)
    c = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert c["architectures"] == [
        {"kimi_linear": "KimiLinearForCausalLM"}.get(case.family, "Qwen3NextForCausalLM")
    ]
    folder = TensorFolder(tmp_path / "ours")
    found = {name: folder.place(name).shape for name in folder.names}
    parameters = [*FAMILIES[case.family](c), *outer(c)]
    for name, shape, parts in parameters:
        shapes = [found.pop(part, None) for part in parts or (name,)]
        assert all(shapes), f"{name} is filled with {parts or name}, and the file has {shapes}"
        given = [x for x in shapes if x is not None]
        if name.endswith("A_log"):  # [1, 1, H, 1] in the first releases, which its loader takes too
            assert math.prod(given[0]) == shape[0]
            assert given[0] in (shape, (1, 1, *shape, 1))
            continue
        assert (sum(x[0] for x in given), *given[0][1:]) == shape, name
        assert len({x[1:] for x in given}) == 1, name
    assert not found, "of these vLLM knows nothing"


def outer(c: dict[str, Any]) -> Parameters:
    yield "model.embed_tokens.weight", (c["vocab_size"], c["hidden_size"]), ()
    yield "model.norm.weight", (c["hidden_size"],), ()
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], c["hidden_size"]), ()
