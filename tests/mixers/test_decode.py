"""The delta-rule mixers made ready for inference, where a few tokens go through the decode step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.mixers import Mixer
from intarsia.ops import DecodeStep, native
from support.budget import assert_within_budget
from support.mixer_cases import CASES, D_MODEL, build

pytestmark = pytest.mark.skipif(
    native.missing_reason() is not None, reason="without kernels the operators compute every token"
)
every_case = pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith(("kda", "gdn", "deltanet"))]
)


def inputs(T: int, B: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def in_pieces(mixer: Mixer, x: Tensor, lengths: list[int]) -> Tensor:
    state, ready, outputs = mixer.init_state(x.shape[0]), mixer.for_inference(), []
    for piece in x.split(lengths, dim=1):
        y, state = ready(piece, state)
        outputs.append(y)
    assert state.tokens == (x.shape[1],) * x.shape[0]
    return torch.cat(outputs, dim=1)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call that went through the decode step."""
    seen: list[int] = []
    call = DecodeStep.__call__

    def counted(self: DecodeStep, qkv: Tensor, pool: Any, slots: Any, **rows: Any) -> Tensor:
        seen.append(max(slots.lengths))
        return call(self, qkv, pool, slots, **rows)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
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
def test_keeps_the_error_budget(case: str, dtype: torch.dtype, steps: list[int], trial: int) -> None:
    def run(x: Tensor, **weights: Tensor) -> list[Tensor]:
        mixer = build(case, x.dtype, trial)
        mixer.load_state_dict({name.replace("|", "."): w for name, w in weights.items()}, strict=True)
        with torch.no_grad():
            return [mixer(x)[0] if x.dtype == torch.float64 else in_pieces(mixer, x, [40, *[1] * 20])]

    weights = {name.replace(".", "|"): w for name, w in build(case, seed=trial).state_dict().items()}
    float32 = frozenset(name for name in weights if name.endswith(("A_log", "dt_bias")))
    assert_within_budget(
        run, run, {"x": inputs(60, seed=trial), **weights}, dtype, float32=float32, inside=True
    )
    assert len(steps) == 20


@every_case
@torch.no_grad()
def test_states_are_values_and_keep_their_form(case: str) -> None:
    mixer, x = build(case, torch.float32), inputs(3, dtype=torch.float32)
    ready = mixer.for_inference()
    _, state = ready(x, mixer.init_state(2))
    kept = {name: t.clone() for name, t in state.tensors().items()}
    first, after = ready(x[:, :1], state)
    second, _ = ready(5 * x[:, :1], state)
    assert torch.equal(ready(x[:, :1], state)[0], first)
    assert not torch.equal(first, second)
    assert after.nbytes() == state.nbytes() == mixer.init_state(2).nbytes()
    for name, t in state.tensors().items():
        assert torch.equal(t, kept[name])
        assert after.tensors()[name].shape == t.shape
        assert after.tensors()[name].dtype == torch.float32


@pytest.mark.parametrize("how", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
@torch.no_grad()
def test_can_be_copied_and_sent(how: Callable[[Any], Any]) -> None:
    mixer, x = build("gdn"), inputs(1)
    ready = mixer.for_inference()
    y, _ = ready(x, mixer.init_state(2))
    assert torch.equal(how(ready)(x, mixer.init_state(2))[0], y)


@torch.no_grad()
def test_a_step_is_of_the_weights_as_they_were_and_the_layer_of_those_that_are() -> None:
    mixer, x = build("kda"), inputs(1)
    ready, state = mixer.for_inference(), mixer.init_state(2)
    before, _ = ready(x, state)
    for name in ("conv.weight", "norm.weight", "decay.A_log", "decay.dt_bias"):
        mixer.get_parameter(name).mul_(0.5)
    assert torch.equal(ready(x, state)[0], before)
    after, _ = mixer.for_inference()(x, state)
    torch.testing.assert_close(after, mixer(x, state)[0], rtol=1e-9, atol=1e-9)
    assert not torch.equal(after, before)


def test_weights_that_are_elsewhere_make_no_step() -> None:
    mixer = build("gdn")
    mixer.norm.weight = torch.nn.Parameter(mixer.norm.weight.data.as_subclass(_Divided))
    assert mixer.for_inference() is mixer


class _Divided(Tensor):
    """A weight that another process may hold."""
