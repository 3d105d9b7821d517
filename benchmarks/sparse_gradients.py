"""Gradients of sparse attention: the native kernels beside the form in PyTorch's operations, in turn in one run.

    python benchmarks/sparse_gradients.py [--length 1024] [--out FILE.json]

A forward and a backward pass of attention to what was picked, one whole sequence, an eighth of it read by each token,
in float32: of grouped attention (16 heads over 4 key-value heads of 64 channels) with tokens, pools of 4 and blocks of
32, picked by groups or by each head, and of latents (16 heads over 128 + 32 channels). What is picked is random. Full
attention by PyTorch's own kernels stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.ops import softmax_attention, sparse_attention, sparse_latent_attention

H, HKV, K = 16, 4, 64
RANK, SHARED = 128, 32


def any_picked(T: int, groups: int, read: int, block: int) -> Tensor:
    """For each token its own block and others before it, `[1, T, groups, read / block]`."""
    count = read // block
    score = torch.rand(T, groups, -(-T // block))
    number, own = torch.arange(score.shape[-1]), torch.arange(T)[:, None, None] // block
    score = score.masked_fill(number > own, -1.0).masked_fill(number == own, 2.0)
    best = score.topk(count, dim=-1)
    picked = best.indices.masked_fill(best.values < 0, T).sort(dim=-1).values
    return picked.masked_fill(picked == T, -1).to(torch.int32)[None]


def passes(attend: Callable[..., Tensor], *given: Tensor) -> Callable[[], Any]:
    """A forward and a backward pass."""
    inputs = [x.requires_grad_() for x in given]
    d_o = torch.randn_like(attend(*inputs))
    return lambda: torch.autograd.grad(attend(*inputs), inputs, d_o)


def runs(T: int) -> dict[str, dict[str, Callable[[], Any]]]:
    read = T // 8
    q, k, v = torch.randn(1, T, H, K), torch.randn(1, T, HKV, K), torch.randn(1, T, HKV, K)
    asked, latents = torch.randn(1, T, H, K + SHARED), torch.randn(1, T, RANK + SHARED)
    up = torch.randn(H, 2 * K, RANK) * RANK**-0.5
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, groups, block in (
        ("grouped, pools of 4", 1, 4), ("grouped, blocks of 32", HKV, 32), ("each head, blocks of 32", H, 32),
    ):  # fmt: skip
        picked = any_picked(T, groups, read, block)
        found[name] = {
            impl: passes(
                lambda q, k, v, p=picked, b=block, i=impl: sparse_attention(q, k, v, p, block=b, impl=i),
                q,
                k,
                v,
            )
            for impl in ("cpu", "torch")
        }
    picked = any_picked(T, 1, read, 1)
    found["latents, tokens"] = {
        impl: passes(
            lambda q, k, u, i=impl: sparse_latent_attention(q, k, u, picked, impl=i), asked, latents, up
        )
        for impl in ("cpu", "torch")
    }
    found["full attention"] = {"torch": passes(softmax_attention, q, k, v)}
    return found


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=25.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measured = runs(options.length)
    timers = {(name, impl): stopwatch(run) for name, each in measured.items() for impl, run in each.items()}
    for timer in timers.values():
        timer()
    times = {key: 1e3 * median(found) for key, found in in_turn(timers, options.seconds).items()}
    rows = []
    for name, each in measured.items():
        ours, theirs = times.get((name, "cpu")), times[name, "torch"]
        rows.append(
            {
                "tokens": options.length,
                "attention": name,
                "native, ms": ours if "cpu" in each else None,
                "PyTorch, ms": theirs,
                "times faster": None if ours is None else theirs / ours,
            }
        )
    table(rows)
    if options.out:
        write_results(options.out, {"machine": machine(), "results": rows})


if __name__ == "__main__":
    main()
