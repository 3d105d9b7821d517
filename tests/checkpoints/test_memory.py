"""How much memory loading takes beside the weights that stay."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from intarsia.checkpoints.family import written
from intarsia.checkpoints.plan import stored
from intarsia.checkpoints.registry import family
from intarsia.checkpoints.rows import Either, indexed
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig
from intarsia.model import ExpertsConfig, FeedForwardConfig, LanguageModel, ModelConfig

BESIDE = 1 << 30

CONFIG = ModelConfig(
    vocab_size=80_000, d_model=2048, depth=2, layout="gdn attention",
    mixers={
        "gdn": GatedDeltaNetConfig(4, 64),
        "attention": AttentionConfig(
            8, 64, 2, rope=0.25, qk_norm="head", zero_centered_qk_norm=True, output_gate=True
        ),
    },
    feed_forward=FeedForwardConfig(8),
    experts=ExpertsConfig(
        num_experts=64, d_hidden=1024, num_active=2, scores="softmax", shared_gate=True, bias_update_rate=0
    ),
    dense_layers=0, tie_embeddings=False, norm_eps=1e-6, zero_centered_norms=True,
)  # fmt: skip
"""1.2 billion parameters, most of them experts and embeddings; the experts of a layer are 0.8 GB in bfloat16."""

LOAD = """
import resource, sys, torch, intarsia
import intarsia.checkpoints.opening
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, weights = peak(), sys.argv[2]
if weights == "converted":
    from intarsia.checkpoints.convert import convert
    convert(sys.argv[1], sys.argv[1] + "-int8", "intarsia", weights="int8")
    kept = 0
elif weights == "none":
    model = intarsia.load(sys.argv[1], dtype=torch.bfloat16)
    kept = sum(p.nbytes for p in model.parameters())
else:
    model = intarsia.load(sys.argv[1], weights=weights)
    kept = model.weight_bytes
print(peak() - before, kept)
"""


def write_holes(folder: Path, layout: int) -> int:
    """The model as a file of the right size that has nothing but holes, which read as zeros; its bytes."""
    of = family("qwen3_5_moe")
    with torch.device("meta"):
        ours = stored(LanguageModel(CONFIG).bfloat16())
    shapes: dict[str, list[int]] = {}
    for each in of.rows(CONFIG):
        for row in each.layouts[layout] if isinstance(each, Either) else (each,):
            given = [
                ours[name] if index is None else ours[name][index] for name, index in map(indexed, row.ours)
            ]
            for name, tensor in zip(row.theirs, row.how.save(given), strict=True):
                shapes[name] = list(tensor.shape)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written(of, CONFIG)))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "layout"),
    [("none", -1), ("int8", 0), ("converted", 0)],
    ids=["as it is, stacked", "int8, apart", "int8 in files"],
)
def test_less_than_a_gigabyte_beside_what_stays(tmp_path: Path, layout: int, weights: str) -> None:
    """Of a checkpoint of 2.3 GB: were it read as a whole, or a layer's experts made floats, it would be more."""
    size = write_holes(tmp_path / "model", layout)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model"), weights],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, kept = map(int, done.stdout.split())
    assert size > 2.2e9
    assert kept >= {"none": 0.9, "int8": 0.5, "converted": 0}[weights] * size
    assert peak - kept < BESIDE, f"{(peak - kept) / 1e9:.2f} GB beside {kept / 1e9:.2f} GB that stay"
