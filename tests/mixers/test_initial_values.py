"""A mixer can be used as it was made: what it begins with, on its own, in a plain PyTorch model and after the meta
device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.float32 import KeepsFloat32
from intarsia.mixers import Mixer
from support.mixer_cases import CASES, D_MODEL

every_mixer = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _memory_full_of_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what nobody fills is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tokens(T: int = 40) -> Tensor:
    return torch.randn(2, T, D_MODEL, generator=torch.Generator().manual_seed(0))


def conv_of(mixer: Mixer) -> ShortConvolution:
    """Its short convolution, or that of its part."""
    return next(module for module in mixer.modules() if isinstance(module, ShortConvolution))


@every_mixer
def test_alone_as_it_was_made(case: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        mixer = CASES[case].build(D_MODEL)
        y, _ = mixer(tokens())
        y.square().mean().backward()
        assert y.isfinite().all()
        assert 1e-4 < y.std() < 10
        for name, parameter in mixer.named_parameters():
            assert parameter.isfinite().all(), name
            assert (parameter.grad is None) == name.startswith(mixer.untrained), name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        for name, buffer in mixer.named_buffers():
            assert not buffer.isnan().any(), name


def between(low: float, high: float) -> Callable[[Tensor, Mixer], bool]:
    return lambda values, _: bool(((values >= low - 1e-6) & (values <= high + 1e-6)).all())


def spread(low: float, high: float, least: float) -> Callable[[Tensor, Mixer], bool]:
    """Between both, and drawn: not all near one number."""
    return lambda values, _: between(low, high)(values, _) and bool(values.std() > least)


def equal(number: float) -> Callable[[Tensor, Mixer], bool]:
    return lambda values, _: bool((values == number).all())


def within_fan_in(weight: Tensor, _: Mixer) -> bool:
    """PyTorch's own: uniform in ±1/sqrt(inputs)."""
    bound = weight.shape[1] ** -0.5
    return spread(-bound, bound, 0.4 * bound)(weight, _)


def time_steps(dt_bias: Tensor, _: Mixer) -> bool:
    """Log-uniform in [0.001, 0.1], of which the mean is 0.0215 and the median 0.01."""
    return between(1e-3, 1e-1)(F.softplus(dt_bias), _)


def published(values: Tensor, reference: Tensor) -> bool:
    return torch.allclose(values, reference.expand_as(values), atol=1e-6)


# What a parameter begins with: by the mixer's name and the parameter's, the first that fits.
RULES: list[tuple[str, Callable[[Tensor, Mixer], bool]]] = [
    (r"mamba:.*A_log", lambda v, _: published(v.exp(), torch.arange(1, v.shape[1] + 1.0))),
    (r"kda bounded.*A_log", equal(0)),
    (r".*A_log", lambda v, _: between(1, 16)(v.exp(), _)),
    (r"longhorn:.*dt_bias", equal(0)),
    (r".*dt_bias", time_steps),
    (r".*\bD", equal(1)),
    (r"(msa of each head, all normed|qsa.*):(indexer\.)?(q_norm|k_norm)\.weight", equal(0)),
    (r"nsa.*:compress_[kv]\.places", equal(0)),
    (r"nsa.*:compress_[kv]\.(up|down)", within_fan_in),
    (r"dsa of pools:indexer\.pool_places", equal(0)),
    (r".*zero|.*gated, each head normed:.*norm\.weight", equal(0)),
    (r".*norm\.weight", equal(1)),
    (r".*conv\.(weight|bias)", lambda v, m: spread(-(b := conv_of(m).weight.shape[1] ** -0.5), b, 0.1)(v, m)),
    (r"(gla|trnn).*decay.*bias", equal(0)),
    # RWKV-7's table of initial values: decays from slow to fast, w in (0.545, 1).
    (r"rwkv7:.*decay.*bias", spread(-8, 3, 1.0)),
    (r"rwkv7:rate_bias", spread(-0.7, 0.4, 0.05)),
    (r"(rwkv7|channel-mix):shift", spread(0, 1, 0.1)),
    (r"rwkv7:removal", spread(0.66, 0.76, 0.01)),
    (r"rwkv7:replacement", equal(1.02)),
    (r"rwkv7:bonus", equal(-0.04)),
    (r"comba:feedback|comba without.*:feedback", equal(1)),
    (r"comba:correction", equal(1)),
    (r".*sinks", spread(-0.2, 0.2, 0.001)),
    (r"learned-decay.*:.*w", between(2, 6)),
    (r".*\.bias", equal(0)),
    (r".*\.weight", within_fan_in),
]  # fmt: skip


@every_mixer
def test_begins_as_its_paper_says(case: str) -> None:
    torch.manual_seed(0)
    mixer = CASES[case].build(256)
    for name, parameter in mixer.named_parameters():
        rule = next((check for pattern, check in RULES if re.fullmatch(pattern, f"{case}:{name}")), None)
        assert rule is not None, f"no rule for {name}"
        assert rule(parameter.detach(), mixer), (name, parameter)


@every_mixer
def test_is_drawn_from_the_global_generator_as_pytorchs_modules_are(case: str) -> None:
    def made(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return CASES[case].build(D_MODEL).state_dict()

    first, again, other = made(1), made(1), made(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_mixer
def test_reset_parameters_fills_everything_again(case: str) -> None:
    """The convention of PyTorch's modules: each fills what belongs to it directly."""
    mixer = CASES[case].build(D_MODEL)
    with torch.no_grad():
        for tensor in (*mixer.parameters(), *mixer.buffers()):
            tensor.fill_(math.nan)
    for module in mixer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert mixer(tokens())[0].isfinite().all()


@every_mixer
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_from_the_meta_device_by_loading(case: str, assign: bool) -> None:
    made = CASES[case].build(D_MODEL)
    before = torch.get_rng_state()
    with torch.device("meta"):
        mixer = CASES[case].build(D_MODEL)
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn"
    assert all(tensor.is_meta for tensor in (*mixer.parameters(), *mixer.buffers()))
    if not assign:
        mixer.to_empty(device="cpu")
    mixer.load_state_dict(made.state_dict(), assign=assign)
    for (name, buffer), (_, fresh) in zip(mixer.named_buffers(), made.named_buffers(), strict=True):
        assert torch.equal(buffer, fresh), name
    assert torch.equal(mixer(tokens())[0], made(tokens())[0])


def test_a_buffer_that_is_saved_is_not_filled_when_it_moves() -> None:
    class Both(KeepsFloat32, Mixer):
        def __init__(self) -> None:
            super().__init__(d_model=1)
            self.register_buffer("saved", torch.empty(2))
            self.register_buffer("unsaved", torch.empty(2), persistent=False)
            self.reset_parameters()

        def init_own_buffers(self) -> None:
            self.saved.fill_(1)
            self.unsaved.fill_(2)

    module = Both()
    module.saved.fill_(5)
    module.unsaved.fill_(6)
    assert (module.double().saved == 5).all()
    assert (module.unsaved == 6).all()
    with torch.device("meta"):
        empty = Both()
    state = {"saved": torch.full((2,), 7.0)}
    empty.to_empty(device="cpu").load_state_dict(state)
    assert (empty.saved == 7).all()
    assert (empty.unsaved == 2).all()


def test_in_a_plain_pytorch_model() -> None:
    """The most natural use: a layer among PyTorch's, trained a few steps."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, D_MODEL)
            self.mixer = CASES["kda"].build(D_MODEL)
            self.head = nn.Linear(D_MODEL, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.head(h + self.mixer(h)[0])

    torch.manual_seed(0)
    model = Tagger()
    x = torch.randint(10, (4, 30))
    target = torch.cat([x[:, :1], x[:, :-1]], dim=1)  # the token before: only the mixer can know it
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), target.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
