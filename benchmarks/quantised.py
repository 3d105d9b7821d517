"""What do integer weights cost in quality? The perplexity of a trained model on held-out documents.

    python benchmarks/quantised.py [--preset kimi-linear-tiny] [--steps 2000] [--directory FOLDER] [--out FILE.json]

Trains on the standard library's sources (a run that is finished in the folder is taken as it is), packs the linear maps
of the model in each format, and judges all of them on the same held-out documents. The interval is over documents: of
the difference of a document's loss from that with weights in bfloat16.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import machine, options_parser, table, write_results
from intarsia.checkpoints.native import load_model
from intarsia.data import open_corpus, open_tokenizer, prepare
from intarsia.model import InferenceModel, LanguageModel, presets
from intarsia.ops.packed_weights import WeightFormat
from intarsia.training import RichProgress, TrainConfig, evaluate, train

FORMATS: tuple[tuple[WeightFormat, int | None, bool], ...] = (
    ("bfloat16", None, False),
    ("int8", None, False),
    ("int8", 64, False),
    ("int4", 128, False),
    ("int4", 128, True),
    ("int4", 64, False),
    ("int4", 64, True),
)
"""Formats, numbers that share a scale, and whether there are zero points."""


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--preset", default="kimi-linear-tiny")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=100, help="held-out ones to judge on")
    parser.add_argument("--directory", help="where to keep data and run; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(options.directory or temporary)
        corpus = open_corpus("python-stdlib", heldout=0.1)
        tokenizer = open_tokenizer(
            f"bpe:{options.vocabulary}", corpus=corpus, directory=directory / "tokenizer"
        )
        dataset = prepare(corpus, tokenizer, directory / "data")
        config = TrainConfig(
            steps=options.steps, rows=options.rows, length=options.length, warmup_steps=options.steps // 20,
            checkpoint_every=200,
        )  # fmt: skip
        run = directory / f"{options.preset}-{options.steps}"
        with RichProgress() as progress:
            train(
                presets.get(options.preset, vocab_size=tokenizer.vocab_size),
                config, dataset, tokenizer, run, progress=progress, label=options.preset,
            )  # fmt: skip
        model = load_model(run / "model").to(torch.bfloat16)
        documents = range(min(options.documents, dataset.heldout.documents))
        rows = judge(model, dataset.heldout, documents, options.length)
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name not in ("directory", "out")}
        write_results(options.out, {"machine": machine(), "options": settings, "rows": rows})


def judge(model: LanguageModel, split: Any, documents: range, length: int) -> list[dict[str, Any]]:
    """A row for each format."""
    rows: list[dict[str, Any]] = []
    baseline = None
    for format, group, zeros in FORMATS:
        packed = InferenceModel(model, format, group=group, zeros=zeros)
        found = evaluate(packed, split, length=length, documents=documents)
        baseline = baseline or found
        # Each document's surplus is weighed by its tokens, as in the mean that is compared.
        surplus = (found.nll - baseline.nll) / baseline.tokens.mean()
        error = 1.96 * surplus.std(ddof=1) / math.sqrt(len(surplus))
        rows.append(
            {
                "weights": format,
                "group": group or "row",
                "zero points": zeros,
                "megabytes": packed.weight_bytes / 1e6,
                "perplexity": math.exp(found.nll_per_token),
                "change, %": 100 * math.expm1(surplus.mean()),
                "plus or minus, %": 100 * float(np.asarray(error)),
                "tokens": int(found.tokens.sum()),
            }
        )
        table(rows[-1:], header=len(rows) == 1)
    return rows


if __name__ == "__main__":
    main()
