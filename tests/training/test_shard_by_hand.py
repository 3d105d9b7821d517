"""`fully_shard` as docs/training.md shows it: two processes, a bfloat16 model, float32 parts gathered apart."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.mixers import float32_parts
from intarsia.model import ExpertsConfig, FeedForwardConfig, ModelConfig
from support.mixer_cases import CASES, D_MODEL, build

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "support" / "sharding_worker.py"
# One of each mixer of which something stays float32, and softmax attention of both kinds.
MIXERS = (
    "kda", "gdn", "deltaproduct", "gated deltanet 2", "comba", "rwkv7", "mamba", "mamba2", "longhorn", "gla", "trnn",
    "performer", "attention gated, each head normed", "mla rotated", "fox", "path",
)  # fmt: skip


def config() -> ModelConfig:
    names = {f"m{i}": CASES[case] for i, case in enumerate(MIXERS)}
    return ModelConfig(
        vocab_size=64,
        d_model=D_MODEL,
        depth=len(MIXERS),
        layout=" ".join(names),
        mixers=names,
        feed_forward=FeedForwardConfig(16),
        experts=ExpertsConfig(num_experts=4, d_hidden=8, num_active=2, bias_update_rate=0),
        dense_layers=len(MIXERS) - 2,
    )


def example() -> str:
    """The example of the page, which is run as it stands."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (source,) = (
        block for block in re.findall(r"```python run\n(.*?)```", page, re.S) if "fully_shard" in block
    )
    return source


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), example(), json.dumps(config().to_dict())],
            env={**environment, "WORLD_SIZE": "2", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            found.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return found


def test_it_computes_what_one_process_computes(reports: list[dict[str, Any]]) -> None:
    """Both processes read the same tokens: the mean of two equal gradients is each, to the bit."""
    for found in reports:
        assert found["sharded"]
        for key in ("weights", "gradients 0", "weights 0", "gradients 1", "weights 1"):
            assert found[key] == [], key
        ours, theirs = found["losses"][::2], found["losses"][1::2]
        assert ours == theirs
        assert ours[1] < ours[0]


def test_the_parts_that_must_stay_float32_do(reports: list[dict[str, Any]]) -> None:
    for found in reports:
        names = set(found["float32"])
        for layer, case in enumerate(MIXERS):
            decays = {name for name in names if name.startswith(f"blocks.{layer}.mixer.decay.")}
            softmax = case.partition(" ")[0] in ("attention", "mla", "fox", "path", "performer")
            assert bool(decays) != softmax, case
        assert {name for name in names if ".decay." not in name} == {
            f"blocks.{layer}.feed_forward.router.weight" for layer in (len(MIXERS) - 2, len(MIXERS) - 1)
        }


def test_a_sharded_model_decodes(reports: list[dict[str, Any]]) -> None:
    for found in reports:
        # bfloat16 layers, computed in other pieces.
        assert found["decoding"] < 0.05


def test_a_model_sharded_on_the_meta_device_gets_its_weights_by_seed(reports: list[dict[str, Any]]) -> None:
    assert [found["from meta"] for found in reports] == [[], []]


def test_float32_weights_in_bfloat16_products(reports: list[dict[str, Any]]) -> None:
    for found in reports:
        assert found["mixed"] == pytest.approx(found["losses"][1], rel=0.02)
        assert found["mixed dtypes"] == ["torch.float32"]
        assert found["mixed gradients"]


@pytest.mark.parametrize("case", CASES)
def test_what_keeps_float32_stands_apart(case: str) -> None:
    """Each module that keeps float32 has parameters of one dtype, as `fully_shard` wants a group to have."""
    mixer = build(case).to(torch.bfloat16)
    parts = float32_parts(mixer)
    assert all({parameter.dtype for parameter in part.parameters()} == {torch.float32} for part in parts)
    held = {id(parameter) for part in parts for parameter in part.parameters()}
    for name, parameter in mixer.named_parameters():
        assert (parameter.dtype == torch.float32) == (id(parameter) in held), name
