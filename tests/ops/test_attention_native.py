"""What the native kernels of softmax attention promise to the bit, and their errors against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.ops import (
    BlockTable,
    Paged,
    Sequences,
    attention_cpu,
    explain,
    latent_attention,
    native,
    softmax_attention,
)
from intarsia.ops.attention_call import LatentCall, latent_call

pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="no kernels")
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 63, 64, 255, 256, 300, 600])),
        min_size=1,
        max_size=3,
    ).filter(lambda each: any(new for new, _ in each)),
    heads=st.sampled_from([(1, 1), (4, 2), (5, 1), (33, 1)]),
    dims=st.sampled_from([(32, 32), (16, 72), (40, 8), (64, 96), (264, 72)]),
    window=st.sampled_from([None, 1, 30, 300]),
    with_sinks=st.booleans(),
    page_size=st.sampled_from([1, 16, 100]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_query_depends_on_what_it_sees_alone(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    window: int | None,
    with_sinks: bool,
    page_size: int,
    dtype: torch.dtype,
) -> None:
    (H, HKV), (K, V) = heads, dims
    news, lengths = [n for n, _ in sequences], [n + past for n, past in sequences]
    q = normal(1, sum(news), H, K, seed=0, dtype=dtype)
    k = tuple(normal(1, S, HKV, K, seed=n + 1, dtype=dtype) for n, S in enumerate(lengths))
    v = tuple(normal(1, S, HKV, V, seed=n + 9, dtype=dtype) for n, S in enumerate(lengths))
    options = {"window": window, "sinks": normal(H, seed=5, dtype=torch.float32) if with_sinks else None}
    seqs = Sequences(tuple(news))
    o = softmax_attention(q, k, v, cu_seqlens=seqs, impl="cpu", **options)  # type: ignore[arg-type]

    exact = softmax_attention(q, k, v, cu_seqlens=seqs, impl="reference", **options)  # type: ignore[arg-type]
    # In bfloat16 the weights are rounded and the result is: half a spacing each, and the sums are float32.
    allowed = 3e-6 if dtype == torch.float32 else 2.0**-7
    assert (o - exact).abs().max() <= allowed * max(float(x.abs().max()) for x in v if x.numel())

    for n, part in enumerate(q.split(news, dim=1)):
        if not part.shape[1]:
            continue
        alone = softmax_attention(part, k[n], v[n], impl="cpu", **options)  # type: ignore[arg-type]
        assert torch.equal(alone, o.split(news, dim=1)[n])
        # Token by token: nothing of a later key.
        for t in {0, part.shape[1] // 2, part.shape[1] - 1}:
            seen = lengths[n] - news[n] + t + 1
            one = softmax_attention(part[:, t : t + 1], k[n][:, :seen], v[n][:, :seen], impl="cpu", **options)  # type: ignore[arg-type]
            assert torch.equal(one, alone[:, t : t + 1])
        spoiled_k, spoiled_v = k[n].clone(), v[n].clone()
        spoiled_k[:, -1], spoiled_v[:, -1] = torch.nan, torch.inf
        still = softmax_attention(part, spoiled_k, spoiled_v, impl="cpu", **options)  # type: ignore[arg-type]
        assert torch.equal(still[:, :-1], alone[:, :-1])

    table, pages_k, pages_v = [], [], []
    for n, S in enumerate(lengths):
        own = []
        for begin in range(0, S, page_size):
            own.append(len(pages_k))
            for pages, x in ((pages_k, k), (pages_v, v)):
                part = x[n][0, begin : begin + page_size]
                page = part.new_full((page_size, *part.shape[1:]), torch.nan)
                page[: len(part)] = part
                pages.append(page)
        table.append(own[::-1])
    # The pages of a sequence lie the other way round.
    for own in table:
        for i, page in enumerate(own[: len(own) // 2]):
            other = own[len(own) - 1 - i]
            for pages in (pages_k, pages_v):
                pages[page], pages[other] = pages[other], pages[page]
    blocks = BlockTable(table, lengths, page_size)
    paged = softmax_attention(
        q, Paged(torch.stack(pages_k), blocks), Paged(torch.stack(pages_v), blocks), cu_seqlens=seqs, impl="cpu",
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert torch.equal(paged, o)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 3, 40])
def test_threads_change_no_bit(T: int, dtype: torch.dtype) -> None:
    q = normal(2, T, 4, 64, seed=0, dtype=dtype)
    k, v = (normal(2, 1500, 2, 64, seed=n, dtype=dtype) for n in (1, 2))
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(softmax_attention(q, k, v, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(o, outputs[0]) for o in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 5])
def test_latents_in_pieces_are_those_in_one(T: int, dtype: torch.dtype) -> None:
    H, own, shared, rank, V = 3, 16, 8, 32, 24
    q = normal(1, T, H, own + shared, seed=0, dtype=dtype)
    latents = normal(1, 300, rank + shared, seed=1, dtype=dtype)
    up = normal(H, own + V, rank, seed=2, dtype=dtype) / rank**0.5
    o = latent_attention(q, latents, up, impl="cpu")
    exact = latent_attention(q, latents, up, impl="reference")
    assert (o - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2.0**-5)
    for t in range(T):
        one = latent_attention(q[:, t : t + 1], latents[:, : 300 - T + t + 1], up, impl="cpu")
        # The products around the kernel are PyTorch's, which may round one row otherwise than several.
        torch.testing.assert_close(one, o[:, t : t + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_a_long_piece_is_its_tokens_one_by_one(heads: tuple[int, int], dtype: torch.dtype) -> None:
    # So many queries that a thread has several parts of each head, and blocks of which some see a part.
    (H, HKV), T, S = heads, 200, 700
    q = normal(1, T, H, 40, seed=0, dtype=dtype)
    k, v = normal(1, S, HKV, 40, seed=1, dtype=dtype), normal(1, S, HKV, 24, seed=2, dtype=dtype)
    o = softmax_attention(q, k, v, impl="cpu")
    exact = softmax_attention(q, k, v, impl="reference")
    assert (o - exact).abs().max() <= (3e-6 if dtype == torch.float32 else 2.0**-7) * float(v.abs().max())
    for t in (0, 11, 64, 130, T - 1):
        seen = S - T + t + 1
        assert torch.equal(
            softmax_attention(q[:, t : t + 1], k[:, :seen], v[:, :seen], impl="cpu"), o[:, t : t + 1]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_chunks_than_there_is_room_for(dtype: torch.dtype) -> None:
    # What chunks give is added up in several turns.
    q = normal(1, 31, 4, 32, seed=0, dtype=dtype)
    k, v = (normal(1, 24_000, 4, n, seed=n, dtype=dtype) for n in (32, 96))
    o = softmax_attention(q, k, v, impl="cpu")
    exact = softmax_attention(q.double(), k.double(), v.double(), impl="torch")
    assert (o - exact).abs().max() <= (3e-6 if dtype == torch.float32 else 2.0**-7) * float(v.abs().max())
    assert torch.equal(o[:, 7:9], softmax_attention(q[:, 7:9], k[:, : -31 + 9], v[:, : -31 + 9], impl="cpu"))


def test_where_keys_lie_apart_from_values() -> None:
    q, x = normal(1, 1, 2, 32, seed=0, dtype=torch.float32), normal(1, 32, 2, 32, seed=1, dtype=torch.float32)
    pages, table = x[0].unflatten(0, (2, 16)), BlockTable([[0, 1]], [32], 16)
    other = Paged(pages.flip(0), BlockTable([[1, 0]], [32], 16))
    for k, v in ((Paged(pages, table), other), (Paged(pages, table), x), (x, other)):
        assert explain(softmax_attention, q, k, v).impl == "torch"
        torch.testing.assert_close(softmax_attention(q, k, v), softmax_attention(q, x, x))
        with pytest.raises(UnsupportedError, match="pages of one table"):
            softmax_attention(q, k, v, impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_made_of_latents_a_block_at_a_time(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    H, own, shared, rank, V, T, S = 3, 16, 8, 64, 24, 150, 1000
    q = normal(1, T, H, own + shared, seed=0, dtype=dtype)
    latents = normal(1, S, rank + shared, seed=1, dtype=dtype)
    up = normal(H, own + V, rank, seed=2, dtype=dtype) / rank**0.5
    call = latent_call(q, latents, up)
    assert attention_cpu.worth_expanding(call, T)
    assert not attention_cpu.worth_expanding(call, 20)
    monkeypatch.setattr(attention_cpu, "EXPANDED", 1)
    o = latent_attention(q, latents, up, impl="cpu")
    exact = latent_attention(q, latents, up, impl="reference")
    made = exact.abs().max()
    # Keys and values are rounded once more than where they are made whole.
    assert (o - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2.0**-5) * made
    # One block, which needs nothing carried, and four.
    monkeypatch.setattr(attention_cpu, "EXPANDED", 1 << 30)
    torch.testing.assert_close(latent_attention(q, latents, up, impl="cpu"), o)
    # Nothing of later ones; and the same of pages, and beside another sequence.
    spoiled = latents.clone()
    spoiled[:, -1] = torch.nan
    assert torch.equal(latent_attention(q, spoiled, up, impl="cpu")[:, :-1], o[:, :-1])
    monkeypatch.setattr(attention_cpu, "EXPANDED", 1)
    padded = torch.nn.functional.pad(latents[0], (0, 0, 0, 8), value=torch.nan).unflatten(0, (-1, 16))
    table = BlockTable([list(range(len(padded)))[::-1]], [S], 16)
    assert torch.equal(latent_attention(q, Paged(padded.flip(0), table), up, impl="cpu"), o)
    # A sequence that brings a few tokens gets what it gets alone (but for the rounding of PyTorch's products), and
    # nothing is made of its past.
    few = latent_attention(q[:, -3:], latents[:, :200], up, impl="cpu")
    one = latent_attention(q[:, -1:], latents, up, impl="cpu")
    both = torch.cat([q[:, -3:], q, q[:, -1:]], dim=1)
    in_pages = Paged(padded.flip(0), BlockTable(table.pages.repeat(3, 1), [200, S, S], 16))
    expanded, whose = attention_cpu._expanded, []

    def watched(call: LatentCall, n: int, q: torch.Tensor) -> torch.Tensor:
        whose.append(n)
        return expanded(call, n, q)

    monkeypatch.setattr(attention_cpu, "_expanded", watched)
    for keys in ((latents[:, :200], latents, latents), in_pages):
        several = latent_attention(both, keys, up, cu_seqlens=Sequences((3, T, 1)), impl="cpu")
        torch.testing.assert_close(several[:, :3], few)
        assert torch.equal(several[:, 3:-1], o)
        torch.testing.assert_close(several[:, -1:], one)
    assert whose == [1, 1]


def test_who_serves_what() -> None:
    q, k = normal(1, 2, 2, 8, seed=0, dtype=torch.float32), normal(1, 30, 2, 8, seed=1, dtype=torch.float32)
    assert explain(softmax_attention, q, k, k).impl == "cpu"
    whole = explain(softmax_attention, k, k, k)
    assert whole.impl == "torch"
    assert "whole sequences" in whole.rejected["cpu"]
    assert explain(softmax_attention, q.requires_grad_(), k, k).impl == "torch"
    with pytest.raises(UnsupportedError, match="no gradients"):
        softmax_attention(q, k, k, impl="cpu")
    q = q.detach()
    with pytest.raises(UnsupportedError, match="forget gate"):
        softmax_attention(q, k, k, log_gate=torch.zeros(1, 30, 2, dtype=torch.float64), impl="cpu")
    with pytest.raises(UnsupportedError, match="keys in the dtype of q"):
        softmax_attention(q, k.bfloat16(), k.bfloat16(), impl="cpu")


def test_compiles() -> None:
    q, k = normal(1, 2, 2, 32, seed=0, dtype=torch.float32), normal(1, 30, 2, 32, seed=1, dtype=torch.float32)

    def apply(q: Tensor, k: Tensor) -> Tensor:
        with torch.no_grad():
            return softmax_attention(q * 2, k, k, impl="cpu") + 1

    compiled = torch.compile(apply, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k), apply(q, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_that_a_window_has_left_are_not_asked_for(dtype: torch.dtype) -> None:
    q = normal(1, 2, 2, 32, seed=0, dtype=dtype)
    k, v = (normal(1, 40, 2, 32, seed=n, dtype=dtype) for n in (1, 2))
    expected = softmax_attention(q, k, v, window=10, impl="cpu")
    # Of pages of 8 the first three hold nothing that the last two queries see.
    table = BlockTable([[-1, -1, -1, 0, 1]], lengths=[40], page_size=8, first=[24])
    pages = (Paged(x[0, 24:].unflatten(0, (2, 8)), table) for x in (k, v))
    assert torch.equal(softmax_attention(q, *pages, window=10, impl="cpu"), expected)
