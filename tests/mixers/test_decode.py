"""The delta-rule mixers without autograd, where a few tokens go through the decode step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from intarsia.mixers import Mixer, delta
from intarsia.ops import native
from support.budget import assert_within_budget
from support.mixer_cases import CASES, D_MODEL, build

pytestmark = pytest.mark.skipif(
    native.missing_reason() is not None, reason="without kernels the operators compute every token"
)
every_case = pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("kda", "gdn"))])


def inputs(T: int, B: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def in_pieces(mixer: Mixer, x: Tensor, lengths: list[int]) -> Tensor:
    state, outputs = mixer.init_state(x.shape[0]), []
    for piece in x.split(lengths, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    assert state.tokens == x.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call that went through the decode step."""
    seen: list[int] = []
    decode = delta.DeltaMixer._decode

    def counted(
        self: delta.DeltaMixer, x: Tensor, state: delta.RecurrentState
    ) -> tuple[Tensor, delta.RecurrentState]:
        seen.append(x.shape[1])
        return decode(self, x, state)

    monkeypatch.setattr(delta.DeltaMixer, "_decode", counted)
    return seen


@every_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pieces_equal_all_at_once(case: str, mode: type, steps: list[int]) -> None:
    lengths = [3, 1, 1, 40, 1, 32, 33, 1]
    mixer, x = build(case), inputs(sum(lengths))
    with mode():
        expected = mixer(x)[0]
        assert not steps
        torch.testing.assert_close(in_pieces(mixer, x, lengths), expected, rtol=1e-9, atol=1e-9)
    assert steps == [3, 1, 1, 1, 32, 1]
    torch.testing.assert_close(in_pieces(mixer, x, lengths), expected, rtol=1e-9, atol=1e-9)
    assert len(steps) == 6  # with autograd the operators compute all of it


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_the_error_budget(case: str, dtype: torch.dtype, steps: list[int]) -> None:
    def run(x: Tensor, **weights: Tensor) -> list[Tensor]:
        mixer = build(case, x.dtype)
        mixer.load_state_dict({name.replace("|", "."): w for name, w in weights.items()}, strict=True)
        with torch.no_grad():
            return [mixer(x)[0] if x.dtype == torch.float64 else in_pieces(mixer, x, [40, *[1] * 20])]

    weights = {name.replace(".", "|"): w for name, w in build(case).state_dict().items()}
    float32 = frozenset(name for name in weights if name.endswith(("A_log", "dt_bias")))
    assert_within_budget(run, run, {"x": inputs(60), **weights}, dtype, float32=float32, inside=True)
    assert len(steps) == 20


@every_case
@torch.no_grad()
def test_states_are_values_and_keep_their_form(case: str) -> None:
    mixer, x = build(case, torch.float32), inputs(3, dtype=torch.float32)
    _, state = mixer(x, mixer.init_state(2))
    kept = {name: t.clone() for name, t in state.tensors().items()}
    first, after = mixer(x[:, :1], state)
    second, _ = mixer(5 * x[:, :1], state)
    assert torch.equal(mixer(x[:, :1], state)[0], first)
    assert not torch.equal(first, second)
    assert after.nbytes() == state.nbytes() == mixer.init_state(2).nbytes()
    for name, t in state.tensors().items():
        assert torch.equal(t, kept[name])
        assert after.tensors()[name].shape == t.shape
        assert after.tensors()[name].dtype == torch.float32


@torch.no_grad()
def test_sees_weights_that_changed_in_any_way() -> None:
    mixer, x = build("kda"), inputs(1)
    start = mixer.init_state(2)
    mixer(x, start)
    for change in (
        lambda w: w.mul_(0.5),
        lambda w: w.data.add_(1),
        lambda w: setattr(w, "data", 2 * w.data),
    ):
        for name in ("conv.weight", "norm.weight", "decay.A_log", "decay.dt_bias"):
            change(mixer.get_parameter(name))
            with torch.enable_grad():
                expected = mixer(x, start)[0].detach()
            torch.testing.assert_close(mixer(x, start)[0], expected, rtol=1e-9, atol=1e-9)
    narrow = mixer.to(torch.bfloat16)
    assert narrow(x.bfloat16(), narrow.init_state(2))[0].dtype == torch.bfloat16


@torch.no_grad()
def test_a_mixer_that_has_decoded_can_be_copied() -> None:
    mixer, x = build("gdn"), inputs(1)
    y, _ = mixer(x, mixer.init_state(2))
    copied = copy.deepcopy(mixer)
    assert torch.equal(copied(x, copied.init_state(2))[0], y)
    copied.conv.weight.zero_()
    assert torch.equal(mixer(x, mixer.init_state(2))[0], y)
