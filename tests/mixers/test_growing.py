"""States that grow: going back, sharing memory, and what of it cannot be."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import ShapeError, UnsupportedError
from intarsia.layers.growing import GrowingState
from intarsia.ops import Sequences
from support.device import device
from support.mixer_cases import CASES, D_MODEL, build

GROWING = [case for case in CASES if isinstance(build(case).init_state(1), GrowingState)]
every_growing = pytest.mark.parametrize("case", GROWING)


def tokens(T: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(1, 70, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x[:, :T].to(device())


def in_sequences(case: str, lengths: tuple[int, ...], grad: bool = False) -> GrowingState:
    """The state of sequences that begin alike."""
    mixer = build(case)
    x = torch.cat([tokens(n) for n in lengths], dim=1)
    with torch.set_grad_enabled(grad):
        _, state = mixer(x, mixer.init_state(len(lengths)), Sequences(lengths))
    assert isinstance(state, GrowingState)
    return state


@every_growing
def test_a_state_that_went_back_goes_on_as_if_it_had_never_been_further(case: str) -> None:
    mixer, state, wanted = build(case), in_sequences(case, (30, 8, 20)), (11, 8, 1)
    if state.form.fixed or state.form.rewritten:
        with pytest.raises(UnsupportedError, match="keep the state of the place"):
            state.truncated(wanted)
        return
    kept = {name: tensor.clone() for name, tensor in state.tensors().items()}
    back, x = state.truncated(wanted), torch.cat([tokens(4, seed) for seed in (1, 2, 3)])
    assert back.tokens == wanted
    y, after = mixer(x, back)
    expected, _ = mixer(x, in_sequences(case, wanted))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert after.tokens == (15, 12, 5)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, kept[name])


@every_growing
def test_going_back_to_where_a_state_is_changes_nothing(case: str) -> None:
    state = in_sequences(case, (3, 50))
    assert state.truncated((3, 50)) is state
    for wrong, message in (
        ((4, 50), "sequence 0 has seen 3"),
        ((-1, 50), "cannot go back"),
        ((3,), "2 sequences"),
    ):
        with pytest.raises(ShapeError, match=message):
            state.truncated(wrong)


def test_a_window_goes_back_as_long_as_it_has_let_nothing_go() -> None:
    state = in_sequences("window", (48, 5))
    assert state.truncated((2, 0)).tokens == (2, 0)
    with pytest.raises(UnsupportedError, match="keeps the last 48"):
        in_sequences("window", (49, 5)).truncated((48, 5))


@every_growing
def test_sequences_apart_share_their_memory(case: str) -> None:
    """To select and to put together copies no entry."""
    state = in_sequences(case, (30, 8))
    forked = state.select([1, 1, 0])
    assert forked.tokens == (8, 8, 30)
    together = GrowingState.concatenate([forked, state])
    assert together.tokens == (8, 8, 30, 30, 8)
    for name in state.form.growing:
        own = state.tensors()[f"{name}.1"].data_ptr()
        for other in (forked.tensors(), together.tensors()):
            assert other[f"{name}.0"].data_ptr() == own
            assert other[f"{name}.1"].data_ptr() == own


@every_growing
def test_the_size_is_that_of_the_tokens_of_each_sequence(case: str) -> None:
    cost = build(case).cost()
    state = in_sequences(case, (60, 8, 1))
    assert state.nbytes() == sum(cost.state_bytes(n) for n in (60, 8, 1))
    weight = next(build(case).parameters())
    assert state.nbytes() == sum(state.form.nbytes(n, weight) for n in (60, 8, 1))


@every_growing
def test_states_of_different_mixers_do_not_come_together(case: str) -> None:
    state = in_sequences(case, (3,))
    others = [in_sequences(other, (3,)) for other in ("mla", "window")]
    for other in (*others, build("kda").init_state(1)):
        if isinstance(other, GrowingState) and other.form == state.form:
            continue
        with pytest.raises(ShapeError, match="different forms"):
            GrowingState.concatenate([state, other])


@every_growing
def test_a_state_of_another_dtype_is_refused_before_it_is_written(case: str) -> None:
    mixer = build(case)
    if all(entry.dtype is not None for entry in mixer.memory.growing.values()):
        return
    state, x = mixer.init_state(1), tokens(3)
    pool = mixer.new_pool(1, 20)
    view = pool.view([pool.take()])
    narrow = mixer.float()
    for held in (state, view):
        with pytest.raises(ShapeError, match=r"in torch.float64 and the input is torch.float32"):
            narrow(x.float(), held)
    assert pool.tokens([0]) == (0,)
    assert view.tokens == (0,)
