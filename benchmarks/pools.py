"""What a step over a pool costs in Python, a layer and a sequence, of a model so small that little else is left.

    python benchmarks/pools.py [--out FILE]

A step brings one token of each sequence. Models of two and of ten layers of a kind tell what a layer adds and what a
step costs apart from its layers. Microseconds, the lowest of several rounds' means.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from common import machine, options_parser
from intarsia.files import write_json
from intarsia.mixers import mixer
from intarsia.model import FeedForwardConfig, InferenceModel, LanguageModel, ModelConfig
from intarsia.ops import Sequences

KINDS: dict[str, dict[str, Any]] = {
    "kda": {"num_heads": 1, "head_dim": 16},
    "lightning": {"num_heads": 1, "head_dim": 16},
    "mamba2": {"num_heads": 2, "head_dim": 16, "state_dim": 16},
    "rwkv7": {"num_heads": 1, "head_dim": 16, "decay_rank": 4, "rate_rank": 4, "gate_rank": 4},
    "attention": {"num_heads": 1, "head_dim": 16},
    "window": {"num_heads": 1, "head_dim": 16, "window": 32},
    "mla": {"num_heads": 1, "kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "v_dim": 16},
}
WIDTH, PAST, FEW, MANY = 32, 48, 2, 10


def model_of(kind: str, depth: int) -> InferenceModel:
    """A small model of `depth` layers of a kind."""
    config = ModelConfig(
        vocab_size=32, d_model=WIDTH, depth=depth, layout=kind,
        mixers={kind: mixer(kind)(**KINDS[kind])}, feed_forward=FeedForwardConfig(WIDTH),
    )  # fmt: skip
    model = LanguageModel(config)
    model.init_weights(0)
    return InferenceModel(model)


def step_time(model: InferenceModel, sequences: int, seconds: float) -> float:
    """Microseconds of a step of so many sequences."""
    pool = model.new_pool(sequences, sequences * (PAST + 4000))
    slots = [pool.take() for _ in range(sequences)]
    row = torch.randint(0, 32, (1, sequences * PAST), generator=torch.Generator().manual_seed(0))
    model(row, pool.view(slots), Sequences((PAST,) * sequences))
    tokens = row[:, :sequences].contiguous()
    best, steps, end = float("inf"), 5, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        for _ in range(steps):
            model(tokens, pool.view(slots), Sequences((1,) * sequences))
        best = min(best, (time.perf_counter() - begun) / steps)
    return best * 1e6


def main() -> None:
    """Print the table and write it."""
    parser = options_parser(__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print("| layer | sequences | us a layer | us a step besides |\n| --- | --- | --- | --- |")
    for kind in KINDS:
        models = [model_of(kind, depth) for depth in (FEW, MANY)]
        for sequences in options.sequences:
            few, many = (step_time(model, sequences, options.seconds) for model in models)
            layer = (many - few) / (MANY - FEW)
            rows.append(
                {"kind": kind, "sequences": sequences, "layer_us": layer, "step_us": few - FEW * layer}
            )
            print(f"| {kind} | {sequences} | {layer:.0f} | {few - FEW * layer:.0f} |", flush=True)
    if options.out:
        write_json(options.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
