"""What holds for every mixer: chunked = recurrent = cached = packed = split; causality; gradients; cost."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.layers.convolution import ShortConvolution
from intarsia.layers.float32 import KeepsFloat32
from intarsia.layers.growing import GrowingTensor
from intarsia.mixers import Mixer, names
from intarsia.ops import Sequences
from support.budget import STAGES, assert_within_budget
from support.device import device
from support.mixer_cases import CASES, D_MODEL, build

LENGTHS = [1, 63, 64, 65, 1000]
every_mixer = pytest.mark.parametrize("case", CASES)


def inputs(T: int, B: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def in_pieces(mixer: Mixer, x: Tensor, lengths: list[int]) -> Tensor:
    """Run x piece by piece with a state handed on."""
    state = mixer.init_state(x.shape[0])
    outputs = []
    for piece in x.split(lengths, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    assert state is not None
    assert state.tokens == (x.shape[1],) * x.shape[0]
    return torch.cat(outputs, dim=1)


def kept_float32(mixer: Mixer) -> set[str]:
    """The names of the parameters that are never narrower than float32."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in mixer.named_modules()
        if isinstance(module, KeepsFloat32)
        for name in module.float32_names
        if name in module._parameters
    }


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_every_mixer_of_the_registry_is_tested() -> None:
    assert {config.type for config in CASES.values()} == {*names(), "learned-decay"}


@every_mixer
@pytest.mark.parametrize("T", LENGTHS)
def test_cached_equals_uncached(case: str, T: int) -> None:
    mixer, x = build(case), inputs(T)
    y, state = mixer(x)
    assert state is None
    close(in_pieces(mixer, x, [T]), y)
    if T > 1:
        close(in_pieces(mixer, x, [T - 1, 1]), y)


@every_mixer
def test_prefill_and_decoding_need_no_memory(case: str) -> None:
    with torch.no_grad():
        for device, mode in (("meta", nullcontext()), ("cpu", FakeTensorMode())):
            with mode:
                with torch.device(device):
                    mixer = CASES[case].build(D_MODEL)
                state = mixer.init_state(2)
                for T in (9, 1, 3):
                    y, state = mixer(torch.empty(2, T, D_MODEL, device=device), state)
                    assert y.shape == (2, T, D_MODEL)
                assert state is not None
                assert state.tokens == (13, 13)


@every_mixer
def test_one_token_at_a_time_equals_all_at_once(case: str) -> None:
    mixer, x = build(case), inputs(70)
    close(in_pieces(mixer, x, [1] * 70), mixer(x)[0])


@every_mixer
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 80), min_size=1, max_size=5))
def test_a_sequence_can_be_split_anywhere(case: str, cuts: list[int]) -> None:
    mixer, x = build(case), inputs(sum(cuts))
    close(in_pieces(mixer, x, cuts), mixer(x)[0])


@every_mixer
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 80), min_size=1, max_size=5).filter(any))
def test_packed_sequences_do_not_see_each_other(case: str, lengths: list[int]) -> None:
    mixer, x = build(case), inputs(sum(lengths), B=1)
    y, _ = mixer(x, seqs=Sequences(tuple(lengths)))
    close(y, torch.cat([mixer(part)[0] for part in x.split([n for n in lengths if n], dim=1)], dim=1))


@every_mixer
@settings(max_examples=12)
@given(
    pieces=st.lists(st.lists(st.integers(0, 70), min_size=3, max_size=3), min_size=1, max_size=4).filter(
        lambda pieces: all(map(any, zip(*pieces, strict=True)))
    ),
    grad=st.booleans(),
)
def test_sequences_of_different_lengths_continue_together(
    case: str, pieces: list[list[int]], grad: bool
) -> None:
    """Each as if it were alone; one that brings no token keeps its state to the bit."""
    mixer = build(case)
    rows = [inputs(sum(lengths), B=1, seed=n).split(lengths, dim=1) for n, lengths in enumerate(pieces)]
    together = mixer.init_state(len(pieces))
    alone = [mixer.init_state(1) for _ in pieces]
    with torch.set_grad_enabled(grad):
        for parts, lengths in zip(zip(*rows, strict=True), zip(*pieces, strict=True), strict=True):
            before = together
            y, together = mixer(torch.cat(parts, dim=1), before, Sequences(lengths))
            for n, (part, got) in enumerate(zip(parts, y.split(lengths, dim=1), strict=True)):
                if part.shape[1]:
                    expected, alone[n] = mixer(part, alone[n])
                    close(got, expected)
            assert together.tokens == tuple(seen + n for seen, n in zip(before.tokens, lengths, strict=True))
            for n, length in enumerate(lengths):
                now, earlier = (state.select([n]).tensors() for state in (together, before))
                for name, tensor in alone[n].tensors().items():
                    assert length or torch.equal(now[name], earlier[name])
                    close(now[name], tensor)


@every_mixer
def test_a_packed_row_that_continues_has_the_gradients_of_its_sequences(case: str) -> None:
    mixer, lengths = build(case), (5, 0, 70, 1)
    x, past = inputs(sum(lengths), B=1).requires_grad_(), inputs(3, B=4, seed=1).requires_grad_()
    trained = {name: p for name, p in mixer.named_parameters() if not name.startswith(mixer.untrained)}
    results = []
    for packed in (True, False):
        _, state = mixer(past, mixer.init_state(4))
        assert state is not None
        if packed:
            y, _ = mixer(x, state, Sequences(lengths))
        else:
            y = torch.cat(
                [
                    mixer(part, state.select([n]))[0]
                    for n, part in enumerate(x.split(lengths, dim=1))
                    if part.shape[1]
                ],
                dim=1,
            )
        loss = (y * torch.linspace(-1, 1, y.shape[1], dtype=torch.float64)[:, None]).sum()
        forgets = case == "channel-mix without the shift"
        wanted = [x, past, *trained.values()]
        results.append(torch.autograd.grad(loss, wanted, materialize_grads=forgets))
    for name, got, expected in zip(["x", "past", *trained], *results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@every_mixer
def test_states_select_and_concatenate(case: str) -> None:
    """Whatever way sequences come together, each goes on as if it had stayed alone: forks too."""
    mixer = build(case)
    alone = [mixer(inputs(T, B=1, seed=T), mixer.init_state(1))[1] for T in (1, 40, 7)]
    together = type(alone[0]).concatenate(alone)
    assert together.tokens == (1, 40, 7)
    order = [2, 0, 2]
    picked, x = together.select(order), inputs(3, B=3)
    assert picked.tokens == (7, 1, 7)
    y, after = mixer(x, picked)
    assert after.tokens == (10, 4, 10)
    for n, number in enumerate(order):
        expected, state = mixer(x[n : n + 1], alone[number])
        close(y[n : n + 1], expected)
        for name, tensor in state.tensors().items():
            close(after.select([n]).tensors()[name], tensor)


@every_mixer
@pytest.mark.parametrize("ready", [False, True])
@torch.no_grad()
def test_a_pool_goes_on_as_values_do(case: str, ready: bool) -> None:
    """In place, after a fork, after sequences have been evicted and restored elsewhere: linear mixers to the bit."""
    mixer = build(case)
    layer = mixer.for_inference() if ready else mixer
    pool, slots = mixer.new_pool(6, 1000), [3, 0, 4]
    assert [pool.take(slot) for slot in slots] == slots
    value, number = mixer.init_state(3), iter(range(100))
    recurrent = value.kind == "recurrent"

    def check(got: Tensor, expected: Tensor) -> None:
        if recurrent:
            assert torch.equal(got, expected)
        else:
            close(got, expected)

    def go_on(*lengths: int) -> None:
        nonlocal value
        x = inputs(sum(lengths), B=1, seed=next(number))
        y, following = layer(x, pool.view(slots), Sequences(lengths))
        expected, value = layer(x, value, Sequences(lengths))
        check(y, expected)
        assert following.tokens == value.tokens == pool.tokens(slots)
        for name, tensor in value.tensors().items():
            check(following.tensors()[name], tensor)

    go_on(5, 70, 1)
    go_on(1, 1, 1)
    go_on(0, 3, 1)
    slots.append(pool.fork(0))
    value = value.select([0, 1, 2, 1])
    go_on(1, 2, 0, 40)
    evicted = pool.evict([3, 4])
    assert set(pool.free_slots) >= {3, 4}
    pool.take(3)
    view = pool.view([3])
    layer(inputs(4, B=1, seed=50), view)  # somebody else, meanwhile
    slots[0], slots[2] = pool.restore(evicted)
    assert set(slots) == {0, 1, 2, 4}
    go_on(1, 1, 1, 1)
    x = inputs(2, B=4, seed=60)
    y, following = layer(x, pool.view(slots))
    expected, value = layer(x, value)
    check(y, expected)
    for name, tensor in value.tensors().items():
        check(following.tensors()[name], tensor)
    if recurrent:
        assert pool.nbytes == 6 * mixer.cost().state_bytes(0)
    with pytest.raises(ConfigError, match="have gone on since"):
        layer(inputs(1, B=1), view)


@every_mixer
def test_wrong_slots_are_named(case: str) -> None:
    mixer = build(case)
    pool = mixer.new_pool(2)
    assert pool.take() == 0
    with pytest.raises(ConfigError, match="slot 0 is taken"):
        pool.take(0)
    with pytest.raises(ConfigError, match="slot 1 holds no sequence"):
        pool.view([0, 1])
    with pytest.raises(ConfigError, match="there is no slot 2"):
        pool.free(2)
    with pytest.raises(ConfigError, match="different slots"):
        pool.view([0, 0])
    assert pool.fork(0) == 1
    with pytest.raises(ConfigError, match="all 2 slots are taken"):
        pool.fork(0)
    pool.free(1)
    with pytest.raises(ShapeError, match="of 2 sequences; 1 slots"):
        pool.restore(mixer.init_state(2))
    with pytest.raises(ShapeError, match="the pool holds"):
        pool.restore(build(case, torch.float32).init_state(1))


@every_mixer
@torch.no_grad()
def test_made_ready_for_inference_it_computes_the_same(case: str) -> None:
    mixer, x = build(case), inputs(80)
    layer, state, outputs = mixer.for_inference(), mixer.init_state(2), []
    for piece in x.split([40, 1, 3, 33, 1, 1, 1], dim=1):
        y, state = layer(piece, state)
        outputs.append(y)
    close(torch.cat(outputs, dim=1), mixer(x)[0])
    close(layer(x)[0], mixer(x)[0])


@every_mixer
def test_wrong_selections_are_named(case: str) -> None:
    mixer = build(case)
    state = mixer.init_state(2)
    with pytest.raises(ShapeError, match="number 2 selected of a state of 2 sequences"):
        state.select([0, 2])
    with pytest.raises(ShapeError, match="no sequence selected"):
        state.select([])
    with pytest.raises(ShapeError, match="no state"):
        type(state).concatenate([])
    with pytest.raises(ShapeError, match="different forms"):
        type(state).concatenate([state, build(case, torch.bfloat16).init_state(1)])
    if state.kind == "recurrent":
        with pytest.raises(UnsupportedError, match="keep the state of the place"):
            state.truncated([0, 0])


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=10)
@given(cut=st.integers(1, 149))
def test_the_future_changes_no_bit_of_the_past(case: str, dtype: torch.dtype, cut: int) -> None:
    mixer, x = build(case, dtype), inputs(150, dtype=dtype)
    changed = x.clone()
    changed[:, cut:] = 5 * inputs(150, dtype=dtype, seed=1)[:, cut:]
    assert torch.equal(mixer(x)[0][:, :cut], mixer(changed)[0][:, :cut])


@every_mixer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("pieces", [[150], [1, 149], [140, 10]], ids=str)
def test_what_is_not_finite_reaches_no_earlier_token(case: str, bad: float, pieces: list[int]) -> None:
    """Not even within a block of tokens that are computed together. The other sequence of the batch keeps its bits."""
    mixer, x, token = build(case, torch.float32), inputs(150, dtype=torch.float32), 145
    changed = x.clone()
    changed[0, token:] = bad
    changed[0, 147] = x[0, 147]
    y, got = (in_pieces(mixer, each, pieces) for each in (x, changed))
    assert torch.equal(got[0, :token], y[0, :token])
    assert torch.equal(got[1], y[1])
    assert not got[0, token].isfinite().all() or bad == 3e38


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pieces", [[150], [100, 49, 1]], ids=str)
def test_keeps_the_error_budget_cached_or_not(
    case: str, dtype: torch.dtype, pieces: list[int], trial: int
) -> None:
    """The layer's own products round to its dtype, so the reference is the layer in float64 with the weights
    and inputs rounded, and the stages are products in a row: the input projections, convolution and norm,
    mixing, the output projection. Two mixers side by side scale what they read, what they project and what they give
    besides, and add it up."""

    def run(x: Tensor, **weights: Tensor) -> list[Tensor]:
        mixer = build(case, x.dtype, trial)
        mixer.load_state_dict({name.replace("|", "."): w for name, w in weights.items()}, strict=True)
        if x.dtype == torch.float64:
            return [mixer(x)[0]]
        return [in_pieces(mixer, x, pieces)]

    weights = {name.replace(".", "|"): w for name, w in build(case, seed=trial).state_dict().items()}
    float32 = frozenset(name.replace(".", "|") for name in kept_float32(build(case)))
    stages = STAGES + 4 if case.startswith("parallel") else STAGES
    given = {"x": inputs(150, seed=trial), **weights}
    assert_within_budget(run, run, given, dtype, float32=float32, inside=True, stages=stages)


@every_mixer
def test_gradients_equal_those_of_one_token_at_a_time(case: str) -> None:
    T, names = 70, [name for name, _ in build(case).named_parameters()]
    results = []
    for pieces in (None, [1] * T):
        mixer, x = build(case), inputs(T).requires_grad_()
        y = mixer(x)[0] if pieces is None else in_pieces(mixer, x, pieces)
        (y * torch.linspace(-1, 1, T, dtype=torch.float64)[:, None]).sum().backward()
        results.append([x.grad, *(dict(mixer.named_parameters())[name].grad for name in names)])
    for name, got, expected in zip(["x", *names], *results, strict=True):
        assert (got is None) == name.startswith(mixer.untrained), name
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@every_mixer
def test_gradcheck(case: str) -> None:
    mixer, x = build(case), inputs(5, B=1).requires_grad_()
    parameters = dict(mixer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(parameters, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_costs_what_it_says(case: str, dtype: torch.dtype) -> None:
    mixer = build(case, dtype)
    cost = mixer.cost()
    assert cost.parameters == sum(p.numel() for p in mixer.parameters())
    state = mixer.init_state(3)
    assert state.nbytes() == cost.state_bytes(0, batch=3)
    for T in (1, 80):
        _, state = mixer(inputs(T, B=3, dtype=dtype), state)
    assert state.nbytes() == cost.state_bytes(81, batch=3)
    assert all(t.untyped_storage().nbytes() >= t.nbytes for t in state.tensors().values())


@every_mixer
@pytest.mark.parametrize("T", [256, 1024])
def test_flops_agree_with_a_count(case: str, T: int) -> None:
    """Projections to the digit. The exchange between tokens within the slack of how it is computed: kernels
    that skip no masked blocks and pad values to the keys' size count up to three times the causal half, and
    chunks add their own triangles."""
    # Without a device the operators run in their PyTorch form, whose products can be counted.
    mixer = build(case, torch.float32).to("meta")
    with FlopCounterMode(display=False) as count, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        mixer(inputs(T, B=1, dtype=torch.float32).to("meta"))
    counted = count.get_flop_counts()
    linear = sum(2 * T * m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    conv = sum(2 * T * m.weight.numel() for m in mixer.modules() if isinstance(m, ShortConvolution))
    cost = mixer.cost()
    assert cost.projection_flops * T == linear + conv
    products = counted["Global"]
    mixing = sum(products.values()) - linear
    stated = cost.mixing_flops(T) * T
    assert 0.6 * stated <= mixing <= 3 * stated, f"counted {mixing / T:.0f} a token, stated {stated / T:.0f}"


@every_mixer
def test_states_are_values(case: str) -> None:
    """A state that was used goes on to mean what it meant; two continuations of one state do not meet."""
    mixer, x = build(case), inputs(60)
    _, state = mixer(x[:, :30], mixer.init_state(2))
    assert state is not None
    kept = {name: t.clone() for name, t in state.tensors().items()}
    first, after = mixer(x[:, 30:], state)
    snapshot = state.snapshot()
    second, _ = mixer(5 * x[:, 30:], state)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, kept[name])
    assert torch.equal(mixer(x[:, 30:], state)[0], first)
    assert torch.equal(mixer(x[:, 30:], snapshot)[0], first)
    assert not torch.equal(first, second)
    assert (state.tokens, after.tokens) == ((30, 30), (60, 60))
    assert all(
        a.data_ptr() != b.data_ptr()
        for a, b in zip(snapshot.tensors().values(), state.tensors().values(), strict=True)
        if a.numel()
    )


@every_mixer
def test_autocast_keeps_the_state_float32_and_the_result_close(case: str) -> None:
    mixer, x = build(case, torch.float32), inputs(100, dtype=torch.float32)
    expected = mixer(x)[0]
    with torch.autocast(device().type, torch.bfloat16):
        y, state = mixer(x, mixer.init_state(2))
    if state.kind == "recurrent":
        assert all(t.dtype == torch.float32 for t in state.tensors().values())
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


@every_mixer
def test_cast_to_bfloat16_leaves_the_decay_float32(case: str) -> None:
    mixer = build(case).to(torch.bfloat16)
    for name, parameter in mixer.named_parameters():
        wide = name in kept_float32(mixer)
        assert wide or not name.endswith(("A_log", "dt_bias")), name
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


@every_mixer
def test_wrong_input_is_named(case: str) -> None:
    mixer, x = build(case), inputs(4)
    with pytest.raises(ShapeError, match=f"{D_MODEL}"):
        mixer(x[..., 1:])
    with pytest.raises(ShapeError, match="at least one token"):
        mixer(x[:, :0])
    with pytest.raises(ShapeError, match="seqs describes"):
        mixer(x, seqs=Sequences((8,)))
    with pytest.raises(ShapeError, match="3 sequences"):
        mixer(x, mixer.init_state(3))
    with pytest.raises(ShapeError, match="3 sequences and the input of 2"):
        mixer(x[:1], mixer.init_state(3), Sequences((1, 3)))


def test_a_growing_tensor_copies_only_when_it_must() -> None:
    start = GrowingTensor(torch.zeros(1, 0, 2))
    one = start.append(torch.ones(1, 1, 2))
    two = one.append(2 * torch.ones(1, 1, 2))
    assert two.content.data_ptr() == one.content.data_ptr()
    fork = one.append(3 * torch.ones(1, 1, 2))
    assert fork.content.data_ptr() != one.content.data_ptr()
    assert (len(start), len(one), len(two), len(fork)) == (0, 1, 2, 2)
    assert two.content[0, :, 0].tolist() == [1, 2]
    assert fork.content[0, :, 0].tolist() == [1, 3]
