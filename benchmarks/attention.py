"""Softmax attention to cached keys: how much of the memory's speed one query reaches, and PyTorch beside it.

    python benchmarks/attention.py [--cases mha,gqa,mqa,mla] [--lengths 32768] [--pieces 512,2048] [--out FILE.json]

One query reads every key and value once, so it can be no faster than reading them. How fast memory can be read is
measured here by a plain sum over a buffer larger than the caches; the caches of keys of a round are together larger
too, and each is used once a round. A piece of a prompt has the queries of many tokens, and is limited by arithmetic.

The peer is `scaled_dot_product_attention`, whose keys lie as it reads them best, `[B, heads, S, channels]`, with a mask
for a piece. Of latents it does what PyTorch has: for a query all heads look at them as one key head (absorbed), for a
piece keys and values are made of them first. All run in turn, so that a slow phase of the machine meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import in_turn, machine, median, options_parser, peak_memory, stopwatch, table, write_results
from intarsia.ops import latent_attention, native, softmax_attention
from intarsia.ops.attention_torch import visible
from intarsia.ops.keys import BlockTable, Keys, Paged

BYTES = 256 << 20
"""Of the keys and values of a round together: several times the caches."""
PAGE = 16

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Heads of queries and of keys, and channels; or latents of `rank` channels and `shared` ones."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    rank: int = 0
    shared: int = 0

    def entry_numbers(self) -> int:
        """What is kept of a token."""
        if self.rank:
            return self.rank + self.shared
        return self.key_heads * (self.key_dim + self.value_dim)


CASES = {
    "mha": Case(16, 16, 128, 128),
    "mha-64": Case(16, 16, 64, 64),
    "gqa": Case(32, 8, 128, 128),
    "mqa": Case(16, 1, 128, 128),
    "mla": Case(16, 1, 192, 128, rank=512, shared=64),
}


class Caches:
    """Several caches of one case, and the rounds over them."""

    def __init__(self, case: Case, dtype: torch.dtype, length: int, count: int) -> None:
        self.case, self.dtype, self.length, self.count = case, dtype, length, count
        c = case
        shapes = [(c.rank + c.shared,)] if c.rank else [(c.key_heads, c.key_dim), (c.key_heads, c.value_dim)]
        self.kept = [tuple(self._random(1, length, *shape) for shape in shapes) for _ in range(count)]
        self.up = None
        if c.rank:
            self.up = self._random(c.heads, c.key_dim - c.shared + c.value_dim, c.rank) * c.rank**-0.5

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)

    def queries(self, tokens: int) -> Tensor:
        return self._random(1, tokens, self.case.heads, self.case.key_dim)

    def ours(self, q: Tensor, impl: str, paged: bool = False) -> Run:
        kept: list[tuple[Keys, ...]] = [_paged(each) if paged else each for each in self.kept]
        if self.up is None:
            return lambda: [softmax_attention(q, k, v, impl=impl) for k, v in kept]
        up = self.up
        return lambda: [latent_attention(q, latents, up, impl=impl) for (latents,) in kept]

    def torchs(self, q: Tensor) -> Run:
        T, c = q.shape[1], self.case
        mask = visible(T, self.length, None, q.device) if T > 1 else None
        q = q.transpose(1, 2).contiguous()
        if self.up is None:
            kept = [tuple(x.transpose(1, 2).contiguous() for x in each) for each in self.kept]
            gqa = c.heads != c.key_heads
            return lambda: [
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa) for k, v in kept
            ]
        own, up, scale = c.key_dim - c.shared, self.up, c.key_dim**-0.5
        w_k, w_v = up.split([own, up.shape[1] - own], dim=1)

        def absorbed(latents: Tensor) -> Tensor:
            wide = torch.cat([q[..., :own] @ w_k, q[..., own:]], dim=-1)
            logits = wide[0, :, 0] @ latents[0].mT * scale
            return logits.softmax(-1) @ latents[0, :, : c.rank] @ w_v.mT

        def expanded(latents: Tensor) -> Tensor:
            k = torch.cat(
                [
                    latents[:, None, :, : c.rank] @ w_k.mT,
                    latents[:, None, :, c.rank :].expand(-1, c.heads, -1, -1),
                ],
                -1,
            )
            v = F.pad(latents[:, None, :, : c.rank] @ w_v.mT, (0, max(k.shape[-1] - c.value_dim, 0)))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[..., : c.value_dim]

        return lambda: [(absorbed if T == 1 else expanded)(latents) for (latents,) in self.kept]


def _paged(tensors: tuple[Tensor, ...]) -> tuple[Keys, ...]:
    """The entries in pages that lie in no order."""
    count = tensors[0].shape[1] // PAGE
    order = torch.randperm(count)
    table = BlockTable(order[None], (count * PAGE,), PAGE)
    found = []
    for x in tensors:
        pages = torch.empty_like(x[0].unflatten(0, (-1, PAGE)))
        pages[order] = x[0].unflatten(0, (-1, PAGE))
        found.append(Paged(pages, table))
    return tuple(found)


def measure(
    name: str, dtype: torch.dtype, length: int, tokens: int, seconds: float, bandwidth: Callable[[], float]
) -> list[dict[str, Any]]:
    case = CASES[name]
    read = case.entry_numbers() * length * dtype.itemsize
    caches = Caches(case, dtype, length, max(1, BYTES // read) if tokens == 1 else 1)
    q = caches.queries(tokens)
    runs = {"intarsia": caches.ours(q, "cpu"), "torch": caches.torchs(q)}
    if tokens == 1:
        runs["intarsia, pages"] = caches.ours(q, "cpu", paged=True)
    for run in runs.values():
        run()
    times = in_turn({key: stopwatch(run) for key, run in runs.items()}, seconds)
    peaks = {key: peak_memory(run) for key, run in runs.items()} if tokens > 1 else {}
    speed = bandwidth() if tokens == 1 else None
    found = []
    for key, values in times.items():
        took = median(values) / caches.count
        row = {
            "case": name,
            "dtype": str(dtype).removeprefix("torch."),
            "keys": length,
            "queries": tokens,
            "implementation": key,
            "milliseconds": 1e3 * took,
            "ratio_to_torch": median(values) / median(times["torch"]),
            "runs": len(values),
        }
        if speed is not None:
            row |= {"GB/s": read / took / 1e9, "share_of_bandwidth": read / took / speed}
        else:
            # Of each pair that is looked at: a multiplication and an addition for each channel of key and value.
            pairs = tokens * (length - tokens) + tokens * (tokens + 1) / 2
            work = 2 * case.heads * pairs * (case.key_dim + case.value_dim)
            row |= {"GFLOP/s": work / took / 1e9, "peak_MiB": peaks[key]}
        found.append(row)
    return found


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--lengths", default="32768")
    parser.add_argument("--pieces", default="512,2048", help="the tokens of a prompt's piece; empty: none")
    parser.add_argument("--no-decoding", action="store_true", help="pieces alone")
    parser.add_argument("--seconds", type=float, default=2, help="for each comparison")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    native.native()
    buffer = torch.ones(BYTES // 4)

    def bandwidth() -> float:
        times = in_turn({"sum": stopwatch(buffer.sum)}, 0.3)["sum"]
        return buffer.nbytes / median(times)

    pieces = [] if options.no_decoding else [1]
    pieces += [int(n) for n in options.pieces.split(",") if n]
    results = []
    for tokens in pieces:
        of_piece = []
        for name in options.cases.split(","):
            for dtype in options.dtypes.split(","):
                for length in options.lengths.split(","):
                    of_piece += measure(
                        name, getattr(torch, dtype), int(length), tokens, options.seconds, bandwidth
                    )
        table(of_piece)
        results += of_piece
    if options.out:
        write_results(options.out, {"machine": machine(), "results": results})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
