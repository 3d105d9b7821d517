"""Weights of eight bits with scales of blocks: the numbers that transformers makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import intarsia
from intarsia.checkpoints.float8 import dequantised
from intarsia.checkpoints.opening import load_config
from intarsia.errors import CheckpointError, UnsupportedError
from intarsia.model import InferenceModel
from support.checkpoint_cases import CASES, Case, their_class, their_folder, tokens

pytest.importorskip("transformers")

BLOCK = [4, 4]
LARGEST = 448.0
"""Of float8_e4m3."""
QUANTISED: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK,
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
NAMES = ["deepseek_v3-low", "minimax_m2-", "qwen3_5_moe-"]
cases = pytest.mark.parametrize("case", [case for case in CASES if str(case) in NAMES], ids=str)


def blocks_of(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The weight in eight bits and its scales, block by block."""
    N, K = weight.shape[-2:]
    numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = weight.new_empty(*weight.shape[:-2], -(-N // rows), -(-K // columns))
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            here = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale = weight[here].abs().amax((-2, -1)) / LARGEST
            scales[..., i, j] = scale
            numbers[here] = (weight[here] / scale[..., None, None]).to(torch.float8_e4m3fn)
    return numbers, scales


def quantised_folder(case: Case, path: Path, runtime: bool = False) -> Path:
    """The case with its linear maps in eight bits, where the blocks divide them."""
    folder = their_folder(case, path, runtime)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        weight = tensors[name]
        maps = ("_proj.weight", "_proj", ".w1.weight", ".w2.weight", ".w3.weight")
        if weight.dim() > 1 and ".layers." in name and name.endswith(maps):
            if any(size % by for size, by in zip(weight.shape[-2:], BLOCK, strict=True)):
                continue
            tensors[name], tensors[name + "_scale_inv"] = blocks_of(weight, *BLOCK)
    assert sum(name.endswith("_scale_inv") for name in tensors) > 5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, quantization_config=QUANTISED)
    return folder


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@cases
def test_the_numbers_are_those_that_transformers_makes(case: Case, tmp_path: Path) -> None:
    folder = quantised_folder(case, tmp_path)
    theirs = their_class(case, case.model).from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    model = intarsia.load(folder, torch.float32)
    with torch.no_grad():
        expected, got = theirs.eval()(tokens(20)).logits, model(tokens(20)).logits
        unquantised = intarsia.load(their_folder(case, tmp_path / "wide"))(tokens(20)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert (expected - unquantised).abs().max() > 1e-2 * expected.abs().max()
    intarsia.save(model, tmp_path / "again", case.family)
    assert torch.equal(intarsia.load(tmp_path / "again")(tokens(20)).logits, model(tokens(20)).logits)


@cases
def test_both_layouts_and_packing_on_the_way_give_the_same(case: Case, tmp_path: Path) -> None:
    released, modules = quantised_folder(case, tmp_path / "r"), quantised_folder(case, tmp_path / "m", True)
    model = intarsia.load(released)
    for name, tensor in intarsia.load(modules).state_dict().items():
        # Gate and up share no block where their size divides.
        assert torch.equal(tensor, model.state_dict()[name]), name
    whole, streamed = InferenceModel(model, "int8"), intarsia.load(released, weights="int8")
    assert torch.equal(streamed(tokens(9)).logits, whole(tokens(9)).logits)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(9, 10), (8, 16), (3, 5, 7)])
def test_blocks_may_be_cut_off_and_read_in_parts(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numbers, scales = blocks_of(weight, 4, 3)
    got = dequantised(numbers, scales, (4, 3))
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        *stack, i, j = index
        expected = numbers.float()[tuple(index)] * scales[(*stack, i // 4, j // 3)]
        assert got[tuple(index)] == expected
    assert torch.equal(dequantised(numbers[..., 3:6, :], scales, (4, 3), 3), got[..., 3:6, :])


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weight_block_size": [4, 8]}, CheckpointError, "no scales of blocks"),
        ({"weight_block_size": [4]}, CheckpointError, "two sizes"),
        ({"weight_block_size": None}, UnsupportedError, "without blocks"),
        ({"activation_scheme": "static"}, UnsupportedError, "activation_scheme"),
        ({"quant_method": "awq"}, UnsupportedError, "quant_method"),
        ({"fmt": "e5m2"}, UnsupportedError, "fmt"),
        ({"rounding": "stochastic"}, UnsupportedError, "rounding"),
    ],
)
def test_what_cannot_be_read_is_named(
    changes: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    folder = quantised_folder(next(case for case in CASES if str(case) == NAMES[0]), tmp_path)
    change(folder, quantization_config={**QUANTISED, **changes})
    with pytest.raises(error, match=match):
        intarsia.load(folder)


def test_a_scale_that_is_missing_leaves_numbers_that_are_no_weights(tmp_path: Path) -> None:
    folder = quantised_folder(next(case for case in CASES if str(case) == NAMES[0]), tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({name: x for name, x in tensors.items() if name != lost}, path)
    with pytest.raises(CheckpointError, match="float8_e4m3fn, which are no weights"):
        intarsia.load(folder)


def test_kimi_k2_is_deepseek_v3_with_one_turn_for_a_ramp(tmp_path: Path) -> None:
    """Both ends of its ramp are pairs that turn once; rounded outwards they are two."""
    folder = their_folder(next(case for case in CASES if str(case) == "deepseek_v3-stretched"), tmp_path)
    yarn = {
        "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    change(folder, model_type="kimi_k2", rope_parameters=None, rope_scaling=yarn, rope_theta=50000.0)
    mixer = load_config(folder).mixers["mla"]
    assert (mixer.yarn.fast, mixer.yarn.slow, mixer.yarn_logits) == (1.0, 1.0, 1.0)  # type: ignore[attr-defined]
    with torch.no_grad():
        got = intarsia.load(folder)(tokens(40)).logits
    change(folder, model_type="deepseek_v3")
    theirs = their_class(CASES[0], "DeepseekV3ForCausalLM").from_pretrained(
        folder, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs.eval()(tokens(40)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
