"""The short convolution against PyTorch's own, and its states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops import short_convolution


def oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    W = weight.shape[1]
    return F.conv1d(F.pad(x.mT, (W - 1, 0)), weight[:, None], groups=x.shape[2]).mT


@given(T=st.integers(1, 20), W=st.integers(1, 5), D=st.integers(1, 4))
def test_equals_a_depthwise_convolution(T: int, W: int, D: int) -> None:
    x, weight = torch.randn(2, T, D, dtype=torch.float64), torch.randn(D, W, dtype=torch.float64)
    y, state = short_convolution(x, weight)
    assert state is None
    torch.testing.assert_close(y, oracle(x, weight))
    torch.testing.assert_close(short_convolution(x, weight, activation="silu")[0], F.silu(oracle(x, weight)))


@given(T=st.integers(2, 12), cut=st.integers(1, 11), W=st.integers(1, 5))
def test_can_be_split_anywhere(T: int, cut: int, W: int) -> None:
    cut = min(cut, T - 1)
    x, weight = torch.randn(2, T, 3, dtype=torch.float64), torch.randn(3, W, dtype=torch.float64)
    y_1, state = short_convolution(x[:, :cut], weight, output_final_state=True)
    y_2, final = short_convolution(x[:, cut:], weight, initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([y_1, y_2], 1), oracle(x, weight))
    torch.testing.assert_close(final, short_convolution(x, weight, output_final_state=True)[1])


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5), state=st.booleans())
def test_packed_sequences_do_not_see_each_other(lengths: list[int], state: bool) -> None:
    x, weight = torch.randn(1, sum(lengths), 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    initial = torch.randn(len(lengths), 3, 3, dtype=torch.float64) if state else None
    edges = torch.tensor([0, *lengths]).cumsum(0)
    y, final = short_convolution(x, weight, initial_state=initial, output_final_state=state, cu_seqlens=edges)
    for n, part in enumerate(x.split(lengths, dim=1)):
        alone = short_convolution(
            part,
            weight,
            initial_state=None if initial is None else initial[n : n + 1],
            output_final_state=state,
        )
        torch.testing.assert_close(y[:, edges[n] : edges[n + 1]], alone[0])
        if state:
            torch.testing.assert_close(final[n : n + 1], alone[1])


def test_the_future_changes_no_bit_of_the_past_and_nans_stay_in_their_sequence() -> None:
    x, weight = torch.randn(1, 10, 3), torch.randn(3, 4)
    changed = x.clone()
    changed[:, 5:] = torch.nan
    assert torch.equal(short_convolution(x, weight)[0][:, :5], short_convolution(changed, weight)[0][:, :5])
    packed = short_convolution(changed.flip(1), weight, cu_seqlens=torch.tensor([0, 5, 10]))[0]
    assert torch.isfinite(packed[:, 5:]).all()


def test_gradients_and_dtypes() -> None:
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    edges = torch.tensor([0, 1, 6])
    assert torch.autograd.gradcheck(
        lambda *a: short_convolution(*a, activation="silu", cu_seqlens=edges)[0], (x, weight)
    )
    y, state = short_convolution(x.bfloat16(), weight.float(), output_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state is not None
    assert state.dtype == torch.float32


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(1, 4, 3), torch.zeros(3, 4)
    with pytest.raises(ShapeError, match=r"weight \[D, W\]"):
        short_convolution(x, weight.mT)
    with pytest.raises(ShapeError, match="initial_state must be"):
        short_convolution(x, weight, initial_state=torch.zeros(1, 3, 4))
    with pytest.raises(ConfigError, match="activation"):
        short_convolution(x, weight, activation="relu")  # type: ignore[arg-type]
