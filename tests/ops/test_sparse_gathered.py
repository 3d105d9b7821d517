"""The native gradients of attention to picked tokens, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.ops import Sequences, explain, native, sparse_attention, sparse_latent_attention
from support.budget import assert_within_budget

pytestmark = pytest.mark.skipif(bool(native.missing_reason()), reason="no native kernels")

SHAPES = {
    "grouped": (6, 2, 2, 9, 5, 1),
    "of each head, blocks": (4, 4, 4, 16, 16, 4),
    "one choice for all": (4, 2, 1, 33, 20, 3),
    "groups within a key head": (8, 2, 4, 3, 40, 2),
    "one key head": (5, 1, 1, 40, 70, 1),
}
"""Query heads, key heads, groups, K, V, and the tokens of a block."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picks(B: int, T: int, groups: int, block: int, most: int = 6) -> Tensor:
    """Of every query some blocks that it sees, the last one of all tokens not always among them; of some none."""
    generator = torch.Generator().manual_seed(T)
    rows = torch.full((B, T, groups, most), -1, dtype=torch.int64)
    for b in range(B):
        for t in range(T):
            for g in range(groups):
                count = int(torch.randint(0 if t % 5 == 0 else 1, most + 1, (1,), generator=generator))
                there = torch.randperm(t // block + 1, generator=generator)[:count].sort().values
                rows[b, t, g, : len(there)] = there
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_keep_the_error_budget(
    shape: str, packed: bool, dtype: torch.dtype, native_impl: str
) -> None:
    H, HKV, G, K, V, block = SHAPES[shape]
    B, T, seqs = (1, 70, Sequences((20, 0, 1, 49))) if packed else (2, 50, None)
    picked = picks(B, T, G, block)
    if seqs is not None:
        picked = torch.cat([picks(1, n, G, block) for n in seqs.lengths], dim=1)
    inputs = {
        name: normal(B, T, heads, size, seed=size)
        for name, heads, size in (("q", H, K), ("k", HKV, K), ("v", HKV, V))
    }

    def run(impl: str, **given: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given.values()]
        o = sparse_attention(*leaves, picked, block=block, cu_seqlens=seqs, impl=impl)
        weights = torch.linspace(-1, 1, V, dtype=torch.float64).to(o.dtype)
        return [o.detach(), *torch.autograd.grad((o * weights).sum(), leaves)]

    assert_within_budget(
        lambda **x: run(native_impl, **x),
        lambda **x: run("reference", **x),
        inputs,
        dtype,
        stages=3,
        inside=True,
    )


def test_latents_have_the_same_gradients_as_in_pytorch(native_impl: str) -> None:
    B, T, H, rank, shared, own, V = 2, 40, 3, 10, 4, 6, 5
    picked = picks(B, T, 1, 1)
    results = []
    for impl, dtype in ((native_impl, torch.float32), ("torch", torch.float64)):
        shapes = (B, T, H, own + shared), (B, T, rank + shared), (H, own + V, rank)
        leaves = [normal(*x, seed=n).to(dtype).requires_grad_() for n, x in enumerate(shapes)]
        o = sparse_latent_attention(*leaves, picked, impl=impl)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_any_number_of_threads_gives_the_same_bits(native_impl: str) -> None:
    picked, results, threads = picks(1, 300, 2, 4), [], torch.get_num_threads()
    given = [normal(1, 300, heads, 24, seed=heads).float() for heads in (4, 2, 2)]
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            leaves = [x.clone().requires_grad_() for x in given]
            o = sparse_attention(*leaves, picked, block=4, impl=native_impl)
            results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_was_not_picked_reaches_nothing(bad: float, native_impl: str) -> None:
    picked = torch.zeros(1, 60, 1, 2, dtype=torch.int32)
    picked[..., 1] = -1
    q, k, v = (normal(1, 60, 2, 8, seed=n).float() for n in range(3))
    k[:, 4:], v[:, 4:] = bad, bad
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = sparse_attention(*leaves, picked, block=4, impl=native_impl)
    d_q, d_k, d_v = torch.autograd.grad(o.sum(), leaves)
    assert all(x.isfinite().all() for x in (o, d_q, d_k, d_v))
    assert (d_k[:, 4:] == 0).all()
    assert (d_v[:, 4:] == 0).all()


def test_second_derivatives_are_pytorchs(native_impl: str) -> None:
    picked, found = picks(1, 20, 1, 2), []
    for impl in (native_impl, "torch"):
        q, k, v = (normal(1, 20, 2, 6, seed=n).float().requires_grad_() for n in range(3))
        o = sparse_attention(q, k, v, picked, block=2, impl=impl)
        (d_q,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(d_q.square().sum(), (q, k, v)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_whole_texts_are_trained_by_the_kernels_and_pieces_are_not() -> None:
    q, k, v = (normal(1, 30, 2, 8, seed=n).float().requires_grad_() for n in range(3))
    picked = picks(1, 30, 1, 1)
    assert explain(sparse_attention, q, k, v, picked).impl == "cpu"
    with pytest.raises(UnsupportedError, match="gradients of whole sequences"):
        sparse_attention(q[:, -3:], k, v, picked[:, -3:], impl="cpu")
