"""The decode step: every implementation against the operators' float64 reference, on pools of states."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import (
    NEW,
    DecodeStep,
    Gate,
    Slots,
    StatePool,
    gated_delta_rule,
    linear_attention,
    native,
    short_convolution,
)
from support.budget import assert_within_budget, rounded
from support.linear_inputs import log_decay

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def impl(step_impl: str) -> str:
    """Each implementation of the step."""
    return step_impl


FLOAT32 = frozenset({"g", "A_log", "dt_bias", "board", "conv"})


@dataclass(frozen=True)
class Layer:
    """What a step is made of, beside its weights."""

    heads: int = 2
    group: int = 2
    key_dim: int = 24
    value_dim: int = 40
    decay: str = "channel"
    gate: str = "softplus"
    erases: bool = True
    beta_max: float | None = 2.0
    normalize: bool = True
    conv_size: int | None = 4
    activation: str | None = "silu"
    output_gate: str | None = "sigmoid"
    """None: no norm at all."""

    @property
    def value_heads(self) -> int:
        return self.heads * self.group

    @property
    def channels(self) -> int:
        return 2 * self.heads * self.key_dim + self.value_heads * self.value_dim

    def gate_of(self, x: Tensors) -> Gate | None:
        if self.gate == "none":
            return None
        return Gate(x["A_log"], x["dt_bias"], -5.0 if self.gate == "bounded" else None)

    def step(self, x: Tensors, impl: str) -> DecodeStep:
        return DecodeStep(
            heads=self.heads, key_dim=self.key_dim, value_heads=self.value_heads, value_dim=self.value_dim,
            decay=self.decay, gate=self.gate_of(x), erases=self.erases, beta_max=self.beta_max,
            normalize=self.normalize, conv_weight=x.get("conv_weight"), activation=self.activation,
            norm_weight=x.get("norm_weight"), norm_eps=1e-5,
            norm_gate=None if self.output_gate in (None, "none") else self.output_gate,
            impl=impl,
        )  # fmt: skip

    def inputs(self, tokens: int, slots: int, regime: Any = "resets", seed: int = 0) -> Tensors:
        """Rows, weights and the content of a pool, in float64."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        HV, K, V = self.value_heads, self.key_dim, self.value_dim
        x = {"qkv": normal(tokens, self.channels), "board": normal(slots, HV, K, V)}
        widths = {"none": None, "fixed": (HV,), "head": (tokens, HV), "channel": (tokens, HV * K)}
        if shape := widths[self.decay]:
            x["g"] = normal(*shape) if self.gate != "none" else log_decay(shape, regime, generator)
        if self.gate != "none":
            x["A_log"], x["dt_bias"] = (
                0.5 * normal(HV),
                normal(HV * (K if self.decay == "channel" else 1)) - 2,
            )
        if self.erases:
            x["beta"] = (
                normal(tokens, HV) if self.beta_max else torch.rand(tokens, HV, generator=generator).double()
            )
        if self.conv_size:
            x["conv"] = normal(slots, self.conv_size - 1, self.channels)
            x["conv_weight"] = 0.5 * normal(self.channels, self.conv_size)
        if self.output_gate:
            x["norm_weight"] = 1 + 0.3 * normal(V)
        if self.output_gate not in (None, "none"):
            x["z"] = normal(tokens, HV * V)
        if not self.normalize:  # or the delta rule would blow up what it should erase
            x["qkv"] *= 0.1
        return x


def rows_of(x: Tensors) -> Tensors:
    return {name: x[name] for name in ("g", "beta", "z") if name in x}


def pool_of(x: Tensors) -> StatePool:
    wide = torch.promote_types(x["board"].dtype, torch.float32)
    return StatePool(x["board"].to(wide).clone(), x["conv"].to(wide).clone() if "conv" in x else None)


def contents(pool: StatePool) -> list[Tensor]:
    return [pool.board] if pool.conv is None else [pool.board, pool.conv]


def run(layer: Layer, impl: str, slots: Slots, **x: Tensor) -> list[Tensor]:
    """Outputs and the whole pool behind the step."""
    pool = pool_of(x)
    o = layer.step(x, impl)(x["qkv"], pool, slots, **rows_of(x))
    return [o, *contents(pool)]


def specification(layer: Layer, slots: Slots, **x: Tensor) -> list[Tensor]:
    """The same by the operators, in float64, a sequence after the other."""
    H, HV, K, V = layer.heads, layer.value_heads, layer.key_dim, layer.value_dim
    pool, fresh, outputs = pool_of(x), pool_of(x), []
    ends = list(itertools.accumulate(slots.lengths))
    for read, write, length, end in zip(slots.read, slots.write, slots.lengths, ends, strict=True):
        place = slice(end - length, end)
        board, conv = (
            None
            if tensor is None
            else torch.zeros_like(tensor[:1])
            if read == NEW
            else tensor[read : read + 1]
            for tensor in (pool.board, pool.conv)
        )
        qkv = x["qkv"][None, place]
        if conv is not None:
            qkv, conv = short_convolution(
                qkv,
                x["conv_weight"],
                activation=layer.activation,
                initial_state=conv,
                output_final_state=True,
            )
            fresh.conv[write] = conv[0]
        q, k, v = qkv.split([H * K, H * K, HV * V], dim=-1)
        g = x.get("g")
        if g is not None and layer.decay != "fixed":
            g = g[None, place].unflatten(-1, (HV, K)) if layer.decay == "channel" else g[None, place]
        given = {"beta": x["beta"][None, place], "beta_max": layer.beta_max} if layer.erases else {}
        o, board = (gated_delta_rule if layer.erases else linear_attention)(
            q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V)), g, **given,
            normalize=layer.normalize, gate=layer.gate_of(x), initial_state=board, output_final_state=True,
            impl="reference",
        )  # fmt: skip
        fresh.board[write] = board[0]
        if layer.output_gate:
            o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * x["norm_weight"]
        if "z" in x:
            z = x["z"][None, place].view(o.shape)
            o = o * (torch.sigmoid(z) if layer.output_gate == "sigmoid" else z * torch.sigmoid(z))
        outputs.append(o.flatten(2)[0])
    return [torch.cat(outputs), *contents(fresh)]


LAYERS = {
    "kda": Layer(),
    "kda bounded, swish": Layer(group=1, gate="bounded", output_gate="swish", beta_max=1.0),
    "gdn": Layer(decay="head", output_gate="swish", beta_max=1.0),
    "gdn log-decays": Layer(decay="head", gate="none", beta_max=None, output_gate="none"),
    "deltanet": Layer(decay="none", gate="none", conv_size=2),
    "retnet": Layer(decay="fixed", gate="none", erases=False, beta_max=None, normalize=False, conv_size=None),
    "gla": Layer(gate="none", erases=False, beta_max=None, activation=None, output_gate=None),
    "bare": Layer(gate="none", conv_size=None, output_gate=None),
    "many taps": Layer(conv_size=7),
    "one tap": Layer(conv_size=1),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
SLOTS = Slots(read=[4, NEW, 0, 3, 0], write=[4, 1, 6, 2, 5], lengths=[1, 3, 17, 1, 8])


@every_layer
@pytest.mark.parametrize("slots", [Slots([0]), Slots([3, 5, 0]), SLOTS], ids=["one", "three", "mixed"])
def test_equals_the_operators(impl: str, name: str, slots: Slots) -> None:
    layer = LAYERS[name]
    x = layer.inputs(slots.tokens, slots=7)
    for got, expected in zip(run(layer, impl, slots, **x), specification(layer, slots, **x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None)
@given(data=st.data())
def test_equals_the_operators_whatever_the_shape(impl: str, data: st.DataObject) -> None:
    decay = data.draw(st.sampled_from(["none", "fixed", "head", "channel"]))
    erases = data.draw(st.booleans())
    layer = Layer(
        heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 3)),
        key_dim=data.draw(st.integers(1, 70)),
        value_dim=data.draw(st.integers(1, 140)),
        decay=decay,
        gate=data.draw(st.sampled_from(["none", "softplus", "bounded"]))
        if decay in ("head", "channel")
        else "none",
        erases=erases,
        beta_max=data.draw(st.sampled_from([None, 1.0, 2.0])) if erases else None,
        normalize=data.draw(st.booleans()),
        conv_size=data.draw(st.sampled_from([None, 1, 2, 3, 4, 5])),
        activation=data.draw(st.sampled_from([None, "silu"])),
        output_gate=data.draw(st.sampled_from([None, "none", "sigmoid", "swish"])),
    )
    room = data.draw(st.integers(1, 6))
    write = data.draw(st.lists(st.integers(0, room - 1), min_size=1, max_size=room, unique=True))
    free = sorted(set(range(room)) - set(write))
    read = [data.draw(st.sampled_from([slot, NEW, *free])) for slot in write]
    slots = Slots(read, write, [data.draw(st.integers(1, 10)) for _ in write])
    x = layer.inputs(slots.tokens, room, seed=data.draw(st.integers(0, 99)))
    for got, expected in zip(run(layer, impl, slots, **x), specification(layer, slots, **x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"one tap"}))  # whose convolution keeps nothing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["kda", "strong", "all lost"])
def test_keeps_the_error_budget(impl: str, name: str, dtype: torch.dtype, regime: Any, trial: int) -> None:
    layer = replace(LAYERS[name], key_dim=128, value_dim=72)
    slots = Slots([0, 2], lengths=[1, 20])
    assert_within_budget(
        functools.partial(run, layer, impl, slots),
        functools.partial(specification, layer, slots),
        layer.inputs(slots.tokens, slots=3, regime=regime, seed=trial),
        dtype,
        terms=layer.key_dim,
        float32=FLOAT32,
    )


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_does_not_depend_on_its_batch_nor_on_the_cuts(
    impl: str, name: str, dtype: torch.dtype
) -> None:
    """To the bit: alone or with others, one token a call or all at once, on one thread or two."""
    layer = replace(LAYERS[name], heads=4, key_dim=64, value_dim=72)
    x = rounded(layer.inputs(SLOTS.tokens, slots=7), dtype, FLOAT32)
    together = run(layer, impl, SLOTS, **x)
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    assert all(map(torch.equal, together, run(layer, impl, SLOTS, **x)))
    torch.set_num_threads(before)
    step, fixed = layer.step(x, impl), layer.decay == "fixed"
    ends = list(itertools.accumulate(SLOTS.lengths))
    for read, write, length, end in zip(SLOTS.read, SLOTS.write, SLOTS.lengths, ends, strict=True):
        pool = pool_of(x)
        outputs = []
        for token in range(end - length, end):
            slots = Slots([read if token == end - length else write], [write])
            rows = {n: r if fixed and n == "g" else r[token : token + 1] for n, r in rows_of(x).items()}
            outputs.append(step(x["qkv"][token : token + 1], pool, slots, **rows))
        assert torch.equal(torch.cat(outputs), together[0][end - length : end])
        for alone, all_of_them in zip(contents(pool), together[1:], strict=True):
            assert torch.equal(alone[write], all_of_them[write])


@pytest.mark.parametrize("name", ["kda", "gdn", "retnet", "one tap"])
@pytest.mark.parametrize("lengths", [None, [1, 9] * 20], ids=["a token each", "mixed"])
def test_many_sequences_equal_one_at_a_time(impl: str, name: str, lengths: list[int] | None) -> None:
    """To the bit; of many sequences several heads are worked on together."""
    layer = replace(LAYERS[name], heads=9)
    slots = Slots(list(reversed(range(40))), lengths=lengths)
    x = rounded(layer.inputs(slots.tokens, slots=40), torch.bfloat16, FLOAT32)
    together = run(layer, impl, slots, **x)
    step, pool, outputs = layer.step(x, impl), pool_of(x), []
    for slot, rows in zip(slots.read, torch.arange(slots.tokens).split(list(slots.lengths)), strict=True):
        of_tokens = {n: r if layer.decay == "fixed" and n == "g" else r[rows] for n, r in rows_of(x).items()}
        outputs.append(step(x["qkv"][rows], pool, Slots([slot], lengths=[len(rows)]), **of_tokens))
    assert all(map(torch.equal, together, [torch.cat(outputs), *contents(pool)]))


def test_only_the_slots_that_are_written_change(impl: str) -> None:
    layer = LAYERS["kda"]
    x = layer.inputs(SLOTS.tokens, slots=9)
    pool, into = pool_of(x), pool_of(layer.inputs(1, slots=7, seed=1))
    untouched = [t.clone() for t in contents(pool)], [t.clone() for t in contents(into)]
    step = layer.step(x, impl)
    o = step(x["qkv"], pool, SLOTS, **rows_of(x), into=into)
    assert all(map(torch.equal, contents(pool), untouched[0]))
    others = [slot for slot in range(7) if slot not in SLOTS.write]
    for now, then in zip(contents(into), untouched[1], strict=True):
        assert torch.equal(now[others], then[others])
    expected = run(layer, impl, SLOTS, **x)
    assert torch.equal(o, expected[0])
    for now, then in zip(contents(into), expected[1:], strict=True):
        assert torch.equal(now[list(SLOTS.write)], then[list(SLOTS.write)])


def test_a_state_takes_the_bytes_that_it_must() -> None:
    layer = Layer(heads=2, group=3, key_dim=16, value_dim=24, conv_size=4)
    pool = layer.step(layer.inputs(1, 1), "torch").new_pool(5)
    assert pool.nbytes == 5 * 4 * (6 * 16 * 24 + 3 * layer.channels)
    assert pool.slots == 5
    assert not any(x.any() for x in contents(pool))


def test_rows_with_gaps_and_of_other_dtypes(impl: str) -> None:
    layer = LAYERS["kda"]
    slots = Slots([0, 1])
    x = rounded(layer.inputs(2, slots=2), torch.bfloat16, FLOAT32)
    expected = run(layer, impl, slots, **x)
    apart = {name: x[name].repeat_interleave(2, dim=1)[:, ::2] for name in ("qkv", "g", "beta", "z")}
    assert not apart["qkv"].is_contiguous()
    for got, right in zip(run(layer, impl, slots, **{**x, **apart}), expected, strict=True):
        assert torch.equal(got, right)
    wide = {name: x[name].float() for name in ("beta", "z", "conv_weight", "norm_weight")}
    for got, right in zip(run(layer, impl, slots, **{**x, **wide}), expected, strict=True):
        assert torch.equal(got, right)
    assert expected[0].dtype == torch.bfloat16


def test_writes_where_it_is_told(impl: str) -> None:
    layer, slots = LAYERS["kda"], Slots([0, 1])
    x = layer.inputs(2, slots=2)
    expected = run(layer, impl, slots, **x)[0]
    for out in (torch.empty_like(expected), torch.empty(2, 320, dtype=torch.float64)[:, ::2]):
        assert layer.step(x, impl)(x["qkv"], pool_of(x), slots, **rows_of(x), out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one sequence"),
        (([0, -2],), "no slot -2 to read"),
        (([0, NEW],), "no slot -1 to write"),
        (([0, 1], [0, -3]), "no slot -3 to write"),
        (([0, 1, 2], [4, 3, 4]), "slot 4 is written by two"),
        (([0, 0],), "slot 0 is written by two"),
        (([0, 1], [0]), "got 2, 1 and 2"),
        (([0, 1], None, [1]), "got 2, 2 and 1"),
        (([0, 1], None, [1, 0]), "at least one token; got 0"),
    ],
)
def test_slots_that_cannot_be_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Slots(*arguments)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (Slots([7]), "no slot 7 to read: the pool has 7"),
        (Slots([0], [9]), "no slot 9 to write"),
        (Slots([0, 1], [1, 0]), "slot 0 is read by one sequence and written by another"),
        (Slots([2, 2], [2, 5]), "slot 2 is read by one"),
    ],
)
def test_slots_that_the_pool_cannot_serve_are_named_and_nothing_is_written(
    impl: str, slots: Slots, message: str
) -> None:
    layer = LAYERS["kda"]
    x = layer.inputs(slots.tokens, slots=7)
    pool = pool_of(x)
    kept = [t.clone() for t in contents(pool)]
    step = layer.step(x, impl)
    with pytest.raises(ConfigError, match=message):
        step(x["qkv"], pool, slots, **rows_of(x))
    assert all(map(torch.equal, contents(pool), kept))


def test_sequences_may_change_places_between_two_pools(impl: str) -> None:
    layer = LAYERS["gdn"]
    slots = Slots([0, 1], [1, 0])
    x = layer.inputs(2, slots=2)
    pool, into = pool_of(x), pool_of(x)
    o = layer.step(x, impl)(x["qkv"], pool, slots, **rows_of(x), into=into)
    straight = run(layer, impl, Slots([0, 1]), **x)
    assert torch.equal(o, straight[0])
    assert torch.equal(into.board, straight[1].flip(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 9)}, r"qkv must be .*got \[2, 9\]"),
        ({"qkv": torch.zeros(1, 256)}, "qkv must be"),
        ({"g": torch.zeros(2, 4)}, "g must be"),
        ({"g": None}, "g is missing"),
        ({"beta": torch.zeros(2, 3)}, "beta must be"),
        ({"z": None}, "z is missing"),
        ({"z": torch.zeros(2, 159)}, "z must be"),
        ({"out": torch.zeros(2, 159)}, "out must be"),
        ({"out": torch.zeros(2, 160).double()}, "out must be torch.float32"),
        ({"pool": StatePool(torch.zeros(2, 4, 24, 40))}, "the pool must have .* and no conv of"),
        ({"pool": StatePool(torch.zeros(2, 4, 40, 24), torch.zeros(2, 3, 256))}, "board .slots, 4, 40, 24"),
        ({"into": StatePool(torch.zeros(2, 4, 24, 40))}, "no conv"),
        ({"pool": StatePool(torch.zeros(2, 4, 24, 40).double(), torch.zeros(2, 3, 256).double())}, "float64"),
    ],
)
def test_rows_and_pools_that_do_not_fit_are_named(impl: str, change: dict[str, Any], message: str) -> None:
    layer, slots = LAYERS["kda"], Slots([0, 1])
    x = {name: tensor.float() for name, tensor in layer.inputs(2, slots=2).items()}
    arguments = {"qkv": x["qkv"], "pool": pool_of(x), "slots": slots, **rows_of(x), **change}
    with pytest.raises(ShapeError, match=message):
        layer.step(x, impl)(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_heads": 3}, "multiple of heads"),
        ({"decay": "some"}, "decay must be one of"),
        ({"impl": "fast"}, "no impl='fast'; there are auto, cpu, torch, reference"),
        ({"norm_gate": "tanh"}, "norm_gate must be one of"),
        ({"norm_gate": "swish"}, "needs norm_weight"),
        ({"beta_max": -1.0}, "beta_max"),
        ({"beta_max": 1.0, "erases": False}, "a rule that erases"),
        ({"conv_weight": torch.zeros(9, 4)}, "conv_weight must be"),
        ({"norm_weight": torch.zeros(9)}, "norm_weight must be"),
        ({"gate": Gate(torch.zeros(2))}, "needs a raw g"),
        ({"gate": Gate(torch.zeros(3)), "decay": "head"}, "A_log must be"),
    ],
)
def test_options_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    options = {"heads": 2, "key_dim": 8, "value_heads": 2, "value_dim": 8, **change}
    with pytest.raises((ConfigError, ShapeError), match=message):
        DecodeStep(**options)


def test_pools_that_cannot_be_are_named() -> None:
    board = torch.zeros(3, 2, 8, 4)
    for arguments, message in (
        ((board[0],), "board must be"),
        ((board.bfloat16(),), "states are float32"),
        ((board.mT,), "board must be contiguous"),
        ((board, torch.zeros(2, 8, 3)), "with 3 slots"),
        ((board, torch.zeros(3, 8, 3).double()), "as board is"),
        ((board, torch.zeros(3, 3, 8).mT), "conv must be contiguous"),
    ):
        with pytest.raises(ShapeError, match=message):
            StatePool(*arguments)


def test_what_the_kernels_cannot_read_is_refused_by_name_and_served_by_auto() -> None:
    layer, slots = LAYERS["bare"], Slots([0])
    x = {name: tensor.half() for name, tensor in layer.inputs(1, slots=1).items()}
    expected = run(layer, "torch", slots, **x)
    for got, right in zip(run(layer, "auto", slots, **x), expected, strict=True):
        assert torch.equal(got, right)
    if not native.missing_reason():
        with pytest.raises(UnsupportedError, match=r"got torch\.float16 on cpu"):
            run(layer, "cpu", slots, **x)
