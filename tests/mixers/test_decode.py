"""The delta-rule mixers without autograd, where a few tokens go through the decode step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

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
every_case = pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith(("kda", "gdn", "deltanet"))]
)


def inputs(T: int, B: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def in_pieces(mixer: Mixer, x: Tensor, lengths: list[int]) -> Tensor:
    state, outputs = mixer.init_state(x.shape[0]), []
    for piece in x.split(lengths, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    assert state.tokens == (x.shape[1],) * x.shape[0]
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


def by_optimizer(mixer: Mixer, name: str) -> None:
    weight = mixer.get_parameter(name)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1).step()


def by_loading(mixer: Mixer, name: str, assign: bool = False) -> None:
    mixer.load_state_dict({name: 0.7 * mixer.get_parameter(name)}, strict=False, assign=assign)


def by_replacing(mixer: Mixer, name: str) -> None:
    owner, _, own = name.rpartition(".")
    setattr(mixer.get_submodule(owner), own, torch.nn.Parameter(0.8 * mixer.get_parameter(name)))


def by_storage(mixer: Mixer, name: str) -> None:
    mixer.get_parameter(name).untyped_storage().copy_((2 * mixer.get_parameter(name)).untyped_storage())


CHANGES: dict[str, Callable[[Mixer, str], object]] = {
    "in place": lambda mixer, name: mixer.get_parameter(name).mul_(0.5),
    "in place through .data": lambda mixer, name: mixer.get_parameter(name).data.add_(1),
    "one number": lambda mixer, name: mixer.get_parameter(name).data.view(-1)[-1:].add_(1),
    ".data": lambda mixer, name: setattr(mixer.get_parameter(name), "data", 2 * mixer.get_parameter(name)),
    ".data with gaps": lambda mixer, name: setattr(
        mixer.get_parameter(name), "data", torch.stack([3 * mixer.get_parameter(name)] * 2, -1)[..., 0]
    ),
    "set_": lambda mixer, name: mixer.get_parameter(name).set_(2 * mixer.get_parameter(name)),
    "the storage": by_storage,
    "an optimizer": by_optimizer,
    "load_state_dict": by_loading,
    "load_state_dict, assign": lambda mixer, name: by_loading(mixer, name, assign=True),
    "a new parameter": by_replacing,
}


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_sees_weights_that_changed_in_any_way(how: str) -> None:
    mixer, x = build("kda"), inputs(1)
    _, start = mixer(inputs(3), mixer.init_state(2))
    last = mixer(x, start)[0]
    for name in ("conv.weight", "norm.weight", "decay.A_log", "decay.dt_bias"):
        CHANGES[how](mixer, name)
        with torch.enable_grad():
            expected = mixer(x, start)[0].detach()
        torch.testing.assert_close(mixer(x, start)[0], expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(expected, last)
        last = expected
    narrow = mixer.to(torch.bfloat16)
    assert narrow(x.bfloat16(), narrow.init_state(2))[0].dtype == torch.bfloat16


@torch.no_grad()
def test_makes_a_step_only_when_weights_have_changed() -> None:
    mixer, x = build("gdn"), inputs(1)
    state = mixer.init_state(2)
    _, state = mixer(x, state)
    step = mixer._step[1]
    mixer(x, state)
    mixer.conv.weight.data = mixer.conv.weight.data.clone()
    mixer(x, state)
    assert mixer._step[1] is step
    mixer.conv.weight.data[0, 0] = torch.nan  # which equals nothing, itself included
    mixer(x, state)
    step = mixer._step[1]
    mixer(x, state)
    assert mixer._step[1] is step


@torch.no_grad()
def test_weights_that_are_elsewhere_are_an_error() -> None:
    mixer, x = build("gdn"), inputs(1)
    _, state = mixer(x, mixer.init_state(2))
    mixer.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        mixer(x, state)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda mixer: pickle.loads(pickle.dumps(mixer))])
@torch.no_grad()
def test_a_mixer_that_has_decoded_can_be_copied(how: Callable[[Mixer], Mixer]) -> None:
    mixer, x = build("gdn"), inputs(1)
    y, _ = mixer(x, mixer.init_state(2))
    copied = how(mixer)
    assert torch.equal(copied(x, copied.init_state(2))[0], y)
    copied.conv.weight.zero_()
    assert not torch.equal(copied(x, copied.init_state(2))[0], y)
    assert torch.equal(mixer(x, mixer.init_state(2))[0], y)
