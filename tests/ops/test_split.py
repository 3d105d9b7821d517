"""The native forward pass of few heads on many threads: columns of the state or segments of time side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.ops import gated_delta_rule, linear_attention
from support.budget import assert_within_budget
from support.linear_inputs import linear_inputs

THREADS = (2, 8)
WIDTHS = (80, 32)
"""Of values: the wide ones are cut into columns, narrow ones into segments of time where threads are many."""


@pytest.fixture(autouse=True)
def native_only(impl: str) -> Iterator[None]:
    if impl != "cpu":
        pytest.skip("only the native kernels share out their work themselves")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_head(T: int, **shape: Any) -> dict[str, Tensor | None]:
    return linear_inputs(T=T, H=1, HV=1, **shape)


def run(threads: int, erases: bool = True, **inputs: Any) -> tuple[Tensor, Tensor]:
    torch.set_num_threads(threads)
    if not erases:
        inputs = {name: tensor for name, tensor in inputs.items() if name != "beta"}
    operator = gated_delta_rule if erases else linear_attention
    o, state = operator(**inputs, output_final_state=True, impl="cpu")
    assert state is not None
    return o, state


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("erases", [True, False])
@pytest.mark.parametrize("V", WIDTHS)
def test_any_number_of_threads_computes_the_same(threads: int, decay: str, erases: bool, V: int) -> None:
    inputs = one_head(1291, K=48, V=V, decay=decay)
    for one, many in zip(run(1, erases, **inputs), run(threads, erases, **inputs), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-10)


def test_states_follow_through_many_segments() -> None:
    """Of five, each begins with what all before it add up to: without decay nothing of that is forgotten."""
    inputs = one_head(2700, K=16, V=32, decay="none")
    for one, many in zip(run(1, False, **inputs), run(8, False, **inputs), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("V", WIDTHS)
def test_the_error_budget_is_kept(threads: int, dtype: torch.dtype, V: int, trial: int) -> None:
    inputs = one_head(1291, K=32, V=V, seed=trial)
    assert_within_budget(lambda **x: run(threads, **x), lambda **x: run(1, **x), inputs, dtype)


def test_packed_sequences_are_cut_by_their_own_lengths() -> None:
    inputs = one_head(2000, K=16, V=32, sequences=3)
    edges = torch.tensor([0, 100, 1950, 2000])
    for one, many in zip(run(1, cu_seqlens=edges, **inputs), run(8, cu_seqlens=edges, **inputs), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("threads", THREADS)
def test_gradients_follow(threads: int) -> None:
    inputs = {name: x for name, x in one_head(1100, K=16, V=32).items() if x is not None}
    gradients = []
    for count in (1, threads):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, state = run(count, **leaves)
        gradients.append(torch.autograd.grad((o * o).sum() + state.sum(), list(leaves.values())))
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("V", WIDTHS)
def test_repeatable_and_causal_to_the_bit(threads: int, V: int) -> None:
    inputs = {name: x.float() for name, x in one_head(2100, K=32, V=V).items() if x is not None}
    o, state = run(threads, **inputs)
    again, state_again = run(threads, **inputs)
    assert torch.equal(o, again)
    assert torch.equal(state, state_again)
    for cut in (1, 640, 1001):
        changed = {
            name: x if name == "initial_state" else torch.cat([x[:, :cut], x[:, cut:].flip(1)], dim=1)
            for name, x in inputs.items()
        }
        assert torch.equal(run(threads, **changed)[0][:, :cut], o[:, :cut])
