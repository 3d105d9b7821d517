"""Sparse attention in decoding: what one token costs behind a longer and longer cache, beside full attention.

    python benchmarks/sparse.py [--lengths 4096,16384,65536,262144] [--out FILE.json]

DeepSeek-V3.2's shape: 128 heads over latents of 512 + 64 channels, 64 index heads of 128, 2048 tokens picked; bfloat16,
one sequence, entries in pages that lie in no order. Three things are measured in turn: full latent attention, attention
to what was picked, and the indexer that picks it, whose keys are all read: its own growth stands apart. Bytes are what
must be read of the cache, by the cost that the mixer states. Before each run something else is read, so that nothing
is in the processor's caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common import cold, in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.mixers.dsa import DSAConfig
from intarsia.ops import latent_attention, lightning_indexer, sparse_latent_attention
from intarsia.ops.keys import BlockTable, Paged

PAGE = 16
CONFIG = DSAConfig(
    128, 512, 128, 64, 128, q_rank=1536, rotate=True, index_heads=64, index_dim=128, top_k=2048
)


def paged(length: int, channels: int) -> Paged:
    """Entries of one sequence in pages that lie in no order."""
    pages = torch.randn(length // PAGE, PAGE, channels, dtype=torch.bfloat16)
    return Paged(pages, BlockTable(torch.randperm(length // PAGE)[None], (length,), PAGE))


def measure(length: int, seconds: float) -> list[dict[str, Any]]:
    c = CONFIG

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(torch.bfloat16)

    latents, keys = paged(length, c.kv_rank + c.rope_dim), paged(length, c.index_dim)
    q, up = random(1, 1, c.num_heads, c.key_dim), random(c.num_heads, c.nope_dim + c.v_dim, c.kv_rank) * 0.04
    index = random(1, 1, c.index_heads, c.index_dim), keys, torch.randn(1, 1, c.index_heads)
    picked = lightning_indexer(*index, count=c.top_k)
    runs = {
        "full attention": lambda: latent_attention(q, latents, up),
        "attention to what was picked": lambda: sparse_latent_attention(q, latents, up, picked),
        "the indexer": lambda: lightning_indexer(*index, count=c.top_k),
    }
    read = {
        "full attention": (length, latents),
        "attention to what was picked": (min(length, c.top_k), latents),
        "the indexer": (length, keys),
    }
    for run in runs.values():
        run()
    times = in_turn({name: cold(stopwatch(run)) for name, run in runs.items()}, seconds)
    return [
        {
            "tokens": length,
            "what": name,
            "milliseconds": 1e3 * median(values),
            "entries read": read[name][0],
            "MB read": read[name][0] * read[name][1].pages[0, 0].nbytes / 1e6,
            "of full attention": median(values) / median(times["full attention"]),
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--lengths", default="4096,16384,65536,262144")
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    for number, length in enumerate(int(x) for x in options.lengths.split(",")):
        rows = measure(length, options.seconds)
        table(rows, header=number == 0)
        results += rows
    if options.out:
        write_results(options.out, {"machine": machine(), "results": results})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
