"""Grouped sparse attention in decoding: what one token costs behind a longer and longer cache, beside full attention.

    python benchmarks/sparse_blocks.py [--lengths 16384,65536,262144] [--paper 1048576] [--before] [--out FILE.json]

Of each mixer the choice of what is read, and attention to it: 32 heads over 2 key-value heads of 128 channels, one
sequence, bfloat16, entries in pages that lie in no order; options as published. All take turns in one run, and
before each something else is read, as other layers are in decoding: nothing of the cache is in the processor's caches.
Attention to what was picked should cost the same behind every length. The choices look at an entry of each token
(`msa`), or of each 4, 16 or 512 tokens: their growth stands apart. `--before` also runs each choice in PyTorch's
operations. Entries are those that a group of heads reads, of `moba` each head; bytes are those of all groups. Behind
each length, and behind `--paper` tokens, which are not measured, stands what the mixers' own costs say: bytes that
attention reads of the cache, and those that are looked at to choose, or compressed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common import cold, in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.mixers import AttentionConfig
from intarsia.mixers.dsa import DSAConfig
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.mixers.moba import MoBAConfig
from intarsia.mixers.msa import MSAConfig
from intarsia.mixers.nsa import NSAConfig
from intarsia.mixers.qsa import QSAConfig
from intarsia.ops import (
    BlockTable,
    Paged,
    compressed_attention,
    lightning_indexer,
    pick_blocks,
    softmax_attention,
    sparse_attention,
)

H, HKV, K = 32, 2, 128
PAGE = 16
MSA = MSAConfig(H, K, HKV, index_block_size=128, index_topk_blocks=16)
QSA = QSAConfig(H, K, HKV, rope=0.25, index_heads=16, index_budget=2048, index_ratio=4)
MOBA = MoBAConfig(H, K, HKV, block_size=512, top_k=4)
INFLLM2 = InfLLM2Config(H, K, HKV, rope=0.0)
NSA = NSAConfig(H, K, HKV)
DSA = DSAConfig(128, 512, 128, 64, 128, q_rank=1536, rotate=True, index_heads=64, index_dim=128, top_k=2048)
POOLED = DSAConfig(
    128, 512, 192, 0, 256, q_rank=1536, index_heads=64, index_dim=128, top_k=2048, index_pool=4
)
ON_PAPER = {
    "full attention": AttentionConfig(H, K, HKV), "msa": MSA, "qsa": QSA, "moba": MOBA, "infllm2": INFLLM2, "nsa": NSA,
    "dsa": DSA, "dsa, pooled": POOLED,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Something that is measured."""

    mixer: str
    what: str
    run: Callable[[], Tensor]
    entries: int
    nbytes: int
    """Of all entries that are read."""


def paged(tokens: int, stride: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Paged:
    """An entry of every `stride` tokens of one sequence, in pages that lie in no order."""
    each, count = max(PAGE // stride, 1), tokens // max(PAGE, stride)
    pages = torch.randn(count, each, *shape, dtype=dtype)
    return Paged(pages, BlockTable(torch.randperm(count)[None], (tokens // stride,), each))


def pair(tokens: int, stride: int) -> tuple[Paged, Paged]:
    """Keys and values, which lie in the same places as those of a pool do."""
    k = paged(tokens, stride, HKV, K)
    return k, Paged(torch.randn_like(k.pages), k.table)


def size_of(keys: Paged, entries: int) -> int:
    return int(entries * keys.pages[0, 0].nbytes)


def parts(length: int, impl: str) -> list[Part]:
    """What is measured behind so many tokens, the choices by this `impl`."""
    k, v = pair(length, 1)
    q = torch.randn(1, 1, H, K).to(torch.bfloat16)
    means = {n: paged(length, n, HKV, K, dtype=torch.float32) for n in (16, 512)}
    small_k, small_v = pair(length, 16)
    token_keys, pool_keys = paged(length, 1, 1, K), paged(length, 4, K)
    of_groups = torch.randn(1, 1, HKV, K).to(torch.bfloat16)
    of_pools = torch.randn(1, 1, QSA.index_heads, K).to(torch.bfloat16)
    seen: dict[str, Any] = {"tokens": (length,), "impl": impl}
    choices: dict[str, tuple[Callable[[], Tensor], int, Paged]] = {
        "msa": (
            lambda: pick_blocks(of_groups, token_keys, count=16, block=128, scale=1.0, **seen), 128, token_keys,
        ),
        "qsa": (
            lambda: lightning_indexer(of_pools, pool_keys, torch.ones(1, 1, 16), count=512, block=4, **seen),
            4, pool_keys,
        ),
        "moba": (lambda: pick_blocks(q, means[512], count=4, block=512, stride=512, **seen), 512, means[512]),
        "infllm2": (
            lambda: pick_blocks(
                q, means[16], count=64, block=64, groups=HKV, stride=16, width=32, score="softmax", first=1,
                last=32, **seen,
            ), 64, means[16],
        ),
        "nsa": (
            lambda: pick_blocks(
                q, small_k, count=16, block=64, groups=HKV, stride=16, width=32, score="softmax", pooling="sum",
                first=1, last=2, **seen,
            ), 64, small_k,
        ),
    }  # fmt: skip
    whole = 2 * size_of(k, length)
    found = [Part("full attention", "attention", lambda: softmax_attention(q, k, v), length, whole)]
    for mixer, (choose, block, keys) in choices.items():
        picked = choose()
        # Of each group; those of the last block behind the query's token are not there.
        read = int((picked[0, 0, 0] >= 0).sum()) * block
        count = keys.table.lengths[0]

        def attend(picked: Tensor = picked, block: int = block) -> Tensor:
            return sparse_attention(q, k, v, picked, block=block)

        # A group reads one key head; of as many groups as key heads each entry is read once.
        apart = max(picked.shape[2] // HKV, 1)
        found += [
            Part(mixer, "choice", choose, count, size_of(keys, count)),
            Part(mixer, "attention", attend, read, 2 * size_of(k, read) * apart),
        ]
    count = length // 16
    return [
        *found,
        Part(
            "nsa", "compressed",
            lambda: compressed_attention(q, small_k, small_v, stride=16, width=32, tokens=(length,)),
            count, 2 * size_of(small_k, count),
        ),
        Part(
            "nsa", "window", lambda: softmax_attention(q, k, v, window=NSA.window), NSA.window,
            2 * size_of(k, NSA.window),
        ),
    ]  # fmt: skip


def measure(length: int, seconds: float, before: bool) -> list[dict[str, Any]]:
    measured = {(p.mixer, p.what): p for p in parts(length, "auto")}
    if before:
        measured |= {(p.mixer, "choice in PyTorch"): p for p in parts(length, "torch") if p.what == "choice"}
    for part in measured.values():
        part.run()
    times = in_turn({key: cold(stopwatch(part.run)) for key, part in measured.items()}, seconds)
    full = median(times["full attention", "attention"])
    return [
        {
            "tokens": length,
            "mixer": mixer,
            "what": what,
            "milliseconds": 1e3 * median(times[mixer, what]),
            "entries read": part.entries,
            "MB read": part.nbytes / 1e6,
            "of full attention": median(times[mixer, what]) / full,
        }
        for (mixer, what), part in measured.items()
    ]


def on_paper(length: int) -> list[dict[str, Any]]:
    """What a token reads of one layer's cache, and the cache, by what the mixers state; bfloat16."""
    rows = []
    for name, config in ON_PAPER.items():
        with torch.device("meta"):
            layer = config.build(4096).to(torch.bfloat16)
        # What is not read whole is what attention picks of.
        kinds = layer.memory.entries(next(layer.parameters()))
        picked = [kind for kind in kinds if kind.reads is not None or name == "full attention"]
        read = layer.cost().bytes_read(length)
        attended = sum(kind.nbytes * kind.read(length) for kind in picked)
        rows.append(
            {
                "tokens": length,
                "mixer": name,
                "entries attended to": sum(kind.read(length) for kind in picked),
                "MB attended to": attended / 1e6,
                "MB to choose by": (read - attended) / 1e6,
                "MB of cache": layer.cost().state_bytes(length) / 1e6,
            }
        )
    return rows


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--lengths", default="16384,65536,262144")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--paper", type=int, default=1 << 20)
    parser.add_argument("--before", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results, paper = [], []
    lengths = [int(x) for x in options.lengths.split(",")]
    for number, length in enumerate(lengths):
        rows = measure(length, options.seconds, options.before)
        table(rows, header=number == 0)
        results += rows
    print()
    for number, length in enumerate([*lengths, options.paper]):
        rows = on_paper(length)
        table(rows, header=number == 0)
        paper += rows
    if options.out:
        write_results(options.out, {"machine": machine(), "results": results, "on paper": paper})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
