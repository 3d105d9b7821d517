"""What has cost others days, family by family."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import intarsia
import intarsia.model
from intarsia.checkpoints.options import Options
from intarsia.checkpoints.plan import chosen
from intarsia.checkpoints.registry import family
from intarsia.checkpoints.rows import indexed
from intarsia.errors import CheckpointError, UnsupportedError
from intarsia.mixers import AttentionConfig
from intarsia.model import LanguageModel, presets
from support.checkpoint_cases import CASES, their_folder, their_model, tokens

pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"
KIMI = next(case for case in CASES if str(case) == "kimi_linear-grouped")
OSS = next(case for case in CASES if case.family == "gpt_oss")

RELEASED_KIMI: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "vocab_size": 163840,
    "hidden_size": 2304, "head_dim": 72, "intermediate_size": 9216, "moe_intermediate_size": 1024,
    "num_hidden_layers": 27, "num_attention_heads": 32, "num_key_value_heads": 32, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mla_use_nope": True,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [n for n in range(1, 27) if n % 4], "head_dim": 128, "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "num_experts": 256, "num_experts_per_token": 8, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid", "num_expert_group": 1,
    "topk_group": 1, "use_grouped_topk": True, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu", "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0, "model_max_length": 1048576, "dtype": "bfloat16", "eos_token_id": 163586,
}  # fmt: skip


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, **changes}


def config_of(values: dict[str, Any]) -> Any:
    options = Options(values, "config.json")
    config = family(values["model_type"]).read(options)
    options.finish()
    return config


def test_the_released_kimi_linear_is_the_published_shape() -> None:
    """Its lists count layers from 1; transformers' default puts full attention elsewhere."""
    from intarsia.checkpoints.family import told
    from intarsia.model.published import kimi_linear_48b_a3b

    config = config_of(RELEASED_KIMI)
    assert [n for n, name in enumerate(config.layers) if name == "mla"] == [3, 7, 11, 15, 19, 23, 26]
    assert told(config) == told(kimi_linear_48b_a3b())


@pytest.mark.parametrize(
    "lists",
    [
        {"full_attn_layers": [0, 4], "kda_layers": [1, 2, 3]},
        {"full_attn_layers": [4], "kda_layers": [1, 2]},
        {"full_attn_layers": [4], "kda_layers": [1, 2, 3, 4]},
    ],
    ids=["from 0", "one is missing", "one is both"],
)
def test_lists_of_layers_that_cannot_be_are_refused(lists: dict[str, Any]) -> None:
    linear = {**RELEASED_KIMI["linear_attn_config"], **lists}
    with pytest.raises(UnsupportedError, match="layer"):
        config_of(changed(RELEASED_KIMI, num_hidden_layers=4, linear_attn_config=linear))
    with pytest.raises(UnsupportedError, match="different layers"):
        config_of(changed(RELEASED_KIMI, layer_types=["linear_attention"] * 27))


def test_the_released_kimi_linear_has_20493_tensors(tmp_path: Path) -> None:
    """All names and shapes of the release; then the same model of narrow widths, with every one of them, is loaded."""
    names = {
        indexed(name)[0]
        for row in chosen(family("kimi_linear").rows(config_of(RELEASED_KIMI)))
        for name in row.theirs
    }
    assert len(names) == 20_493
    layer = "model.layers.26.block_sparse_moe"
    assert {f"{layer}.experts.255.w2.weight", f"{layer}.gate.e_score_correction_bias"} <= names
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.25.self_attn.A_log"} <= names
    narrow = changed(
        RELEASED_KIMI, vocab_size=40, hidden_size=8, intermediate_size=6, moe_intermediate_size=4,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2,
        v_head_dim=4,
        linear_attn_config={**RELEASED_KIMI["linear_attn_config"], "head_dim": 4, "num_heads": 2},
    )  # fmt: skip
    model = intarsia.model.LanguageModel(config_of(narrow)).bfloat16()
    model.init_weights(0)
    intarsia.save(model, tmp_path, "kimi_linear")
    with (tmp_path / WEIGHTS).open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header.keys() - {"__metadata__"} == names
    assert header["model.layers.0.self_attn.A_log"]["shape"] == [1, 1, 2, 1]
    assert header["model.layers.0.self_attn.q_conv1d.weight"]["shape"] == [8, 1, 4]
    again = intarsia.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_layouts_may_be_mixed(tmp_path: Path) -> None:
    """As a merge of adapters leaves them: convolutions joined, experts each for itself; and A_log flat."""
    folder = their_folder(KIMI, tmp_path / "released")
    expected = intarsia.load(folder)(tokens(9)).logits
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if ".q_conv1d" in name]:
        parts = [tensors.pop(name.replace(".q_", f".{x}_")) for x in "qkv"]
        tensors[name.replace(".q_conv1d", ".conv1d")] = torch.cat(parts)
    for name in [name for name in tensors if name.endswith("A_log")]:
        tensors[name] = tensors[name].flatten()
    save_file(tensors, folder / WEIGHTS)
    assert torch.equal(intarsia.load(folder)(tokens(9)).logits, expected)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = their_folder(KIMI, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.2.block_sparse_moe.experts.4.w3.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"1 tensors in all: model\.layers\.2\..*experts\.4\.w3\.weight is missing"
    ):
        intarsia.load(folder)


def test_mxfp4_experts_become_the_numbers_that_transformers_reads(tmp_path: Path) -> None:
    """Blocks of 32 numbers with a scale, all sixteen of four bits and scales from 2^-20 to 2^4."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    E, D, F = 3, 64, 32
    case_config = {
        **OSS.options, "hidden_size": D, "intermediate_size": F, "num_local_experts": E, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    folder = their_folder(type(OSS)("gpt_oss", "mxfp4", OSS.config, OSS.model, case_config), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    wanted: dict[str, Tensor] = {}
    for layer in range(2):
        for name, rows, inputs in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            full = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[full]
            blocks = torch.randint(256, (E, rows, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(107, 132, (E, rows, inputs // 32), generator=generator, dtype=torch.uint8)
            tensors |= {f"{full}_blocks": blocks, f"{full}_scales": scales}
            # [E, inputs, rows], gate and up in turn
            wanted[full] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).mT
    save_file(tensors, folder / WEIGHTS)
    path = folder / "config.json"
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    model = intarsia.load(folder)
    for layer in range(2):
        of = model.blocks[layer].feed_forward
        gate_up = wanted[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        assert torch.equal(of.gate_up[:, :F], gate_up[:, ::2])
        assert torch.equal(of.gate_up[:, F:], gate_up[:, 1::2])
        assert torch.equal(of.down, wanted[f"model.layers.{layer}.mlp.experts.down_proj"])


def test_no_base_of_rotation_is_no_rotation() -> None:
    """OLMo-Hybrid's release has none."""
    base = {"model_type": "olmo_hybrid", "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 4}
    base |= {"num_attention_heads": 4, "intermediate_size": 8}
    for rope, share in (
        (None, 0.0),
        ({"rope_type": "default", "rope_theta": None}, 0.0),
        ({"rope_theta": 1e5}, 1.0),
    ):
        config = config_of({**base, "rope_parameters": rope})
        attention = config.mixers["attention"]
        assert isinstance(attention, AttentionConfig)
        assert attention.rope == share
        # K is three quarters of a head's share of the width, V twice that.
        assert (config.mixers["gdn"].head_dim, config.mixers["gdn"].value_dim) == (12, 24)
        assert config.mixers["gdn"].negative_eigenvalues
        assert config.mixers["gdn"].norm_eps == 1e-5


def test_rotations_are_read_in_the_old_spelling_too() -> None:
    old = {
        "model_type": "qwen3_next", "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000000, "partial_rotary_factor": 0.25,
        "rope_scaling": None, "full_attention_interval": 4, "num_experts": 16,
    }  # fmt: skip
    config = config_of(old)
    assert config.layers == ("gdn", "gdn", "gdn", "attention") * 2
    assert config.mixers["attention"].rotated == 64
    assert config.mixers["attention"].rope_theta == 1e7


def test_layers_that_predict_several_tokens_are_left_out(tmp_path: Path) -> None:
    """DeepSeek numbers them behind the model's own."""
    case = next(case for case in CASES if case.family == "deepseek_v3")
    folder = their_folder(case, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / WEIGHTS)
    with pytest.warns(UserWarning, match="several tokens"):
        model = intarsia.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens(5)).logits, their_model(case)(tokens(5)).logits, rtol=0, atol=1e-4
        )


def test_transformers_cannot_tie_kimi_linear(tmp_path: Path) -> None:
    """It writes both tensors, and they differ: neither is right."""
    case = type(KIMI)(
        "kimi_linear", "tied", KIMI.config, KIMI.model, {**KIMI.options, "tie_word_embeddings": True}
    )
    with pytest.raises(CheckpointError, match="ties the head to the embedding"):
        intarsia.load(their_folder(case, tmp_path))


def test_what_is_tied_here_is_written_for_kimi_linear_as_two(tmp_path: Path) -> None:
    """As it is trained here: without experts, and with a head that is the embedding."""
    from transformers import AutoModelForCausalLM

    model = LanguageModel(presets.get("kimi-linear-nano", vocab_size=64)).eval()
    assert model.config.tie_embeddings
    model.init_weights(0)
    intarsia.save(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = model(tokens(30)).logits
        torch.testing.assert_close(theirs(tokens(30)).logits, wanted, rtol=1e-4, atol=1e-4)
        again = intarsia.load(tmp_path)
        torch.testing.assert_close(again(tokens(30)).logits, wanted, rtol=1e-5, atol=1e-5)
    assert not again.config.tie_embeddings
    assert model.config.tie_embeddings
