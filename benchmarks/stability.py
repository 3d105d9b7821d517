"""Does a model train stably, and has it learned more than counts of words can tell?

    python benchmarks/stability.py [--preset kimi-linear-tiny] [--steps 2000] [--out FILE.json]

Trains on the standard library's sources in float32 and in bfloat16, and compares the held-out bits per byte
with those of unigram and bigram counts of the same tokens. A run whose loss or gradient becomes NaN or
infinite stops with an error. "Largest jump" is how far the smoothed loss ever rose above its lowest value so
far, in nats: what is usually called a loss spike.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import machine, options_parser, table, write_results
from intarsia.data import open_corpus, open_tokenizer, prepare
from intarsia.model import presets
from intarsia.training import NGrams, RichProgress, TrainConfig, read_metrics, train


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--preset", default="kimi-linear-tiny")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--precisions", default="float32,bf16")
    parser.add_argument("--directory", help="where to keep the runs; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(options.directory or temporary)
        corpus = open_corpus("python-stdlib", heldout=0.1)
        tokenizer = open_tokenizer(
            f"bpe:{options.vocabulary}", corpus=corpus, directory=directory / "tokenizer"
        )
        dataset = prepare(corpus, tokenizer, directory / "data")
        rows: list[dict[str, Any]] = []
        for precision in options.precisions.split(","):
            config = TrainConfig(
                steps=options.steps, rows=options.rows, length=options.length, precision=precision,
                warmup_steps=options.steps // 20, qk_clip=100.0, checkpoint_every=200, log_every=1,
            )  # fmt: skip
            model = presets.get(options.preset, vocab_size=tokenizer.vocab_size)
            with RichProgress() as progress:
                run = directory / f"{options.preset}-{precision}"
                result = train(model, config, dataset, tokenizer, run, progress=progress, label=precision)
            losses = np.array(
                [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
            )
            smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
            rows.append(
                {
                    "model": f"{options.preset} {precision}",
                    "steps": options.steps,
                    "held-out bits per byte": result.evaluation.bits_per_byte
                    if result.evaluation
                    else math.nan,
                    "first loss": float(losses[0]),
                    "last loss": float(smooth[-1]),
                    "largest jump": float((smooth - np.minimum.accumulate(smooth)).max()),
                }
            )
        counts = NGrams.count(dataset.train)
        for name, baseline in (("unigram counts", counts.unigram), ("bigram counts", counts.bigram)):
            bits = baseline(dataset.heldout).bits_per_byte
            rows.append({**dict.fromkeys(rows[0], ""), "model": name, "held-out bits per byte": bits})
        table(rows)
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name not in ("directory", "out")}
        write_results(options.out, {"machine": machine(), "options": settings, "rows": rows})


if __name__ == "__main__":
    main()
