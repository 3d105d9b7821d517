"""The table of implementations: every row of every operator gives what the reference gives, and says what it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.ops import (
    DecodeStep,
    Gate,
    Slots,
    blocks_loss,
    compressed_attention,
    dplr_rule,
    explain,
    gated_delta_rule,
    gated_rms_norm,
    indexer_loss,
    l2norm,
    latent_attention,
    lightning_indexer,
    linear_attention,
    log_sum_exp,
    native,
    pack_weights,
    packed_linear,
    pick_blocks,
    short_convolution,
    softmax_attention,
    softmax_gradient,
    sparse_attention,
    sparse_latent_attention,
    swiglu,
)
from intarsia.ops.available import available
from intarsia.ops.choice import Implementation, table
from intarsia.ops.explain import OPERATORS
from intarsia.ops.table import TABLE

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
NOT_YET = "triton"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def calls(dtype: torch.dtype = torch.float64) -> dict[str, Call]:
    """A call of each operator that is a function."""
    B, T, H, K, V = 2, 5, 2, 3, 4
    q, k, v = (normal(B, T, H, n, seed=n, dtype=dtype) for n in (K, K, V))
    k = F.normalize(k, dim=-1)
    g, beta = -normal(B, T, H, K, dtype=dtype).square(), torch.sigmoid(normal(B, T, H, dtype=dtype))
    state = {"initial_state": normal(B, H, K, V), "output_final_state": True}
    x, weight = normal(B, T, 6, dtype=dtype), normal(6, 4, dtype=dtype)
    past = {"initial_state": normal(B, 3, 6, dtype=dtype), "output_final_state": True}
    picked = torch.tensor([[0, -1], [0, -1], [1, -1], [0, 1], [0, 2]])[None, :, None].repeat(B, 1, 1, 1)
    z, scale = normal(B, T, H, V, seed=1, dtype=dtype), normal(V, dtype=dtype)
    return {
        "gated_delta_rule": (gated_delta_rule, (q, k, v, g, beta), state),
        "linear_attention": (linear_attention, (q, k, v, g), state),
        "dplr_rule": (dplr_rule, (q, k, v, beta[..., None] * k, k, g), {"output_final_state": True}),
        "softmax_attention": (softmax_attention, (q, k, v), {"window": 3}),
        "latent_attention": (latent_attention, (q, x, normal(H, 5, 5, seed=2, dtype=dtype)), {}),
        "lightning_indexer": (lightning_indexer, (q, k[:, :, 0], beta), {"count": 3}),
        "compressed_attention": (
            compressed_attention,
            (q, k[:, :2], v[:, :2]),
            {"stride": 2, "tokens": (T, T)},
        ),
        "pick_blocks": (pick_blocks, (q, k), {"count": 2, "block": 2}),
        "blocks_loss": (blocks_loss, (q, k[:, :, 0], q, k), {"block": 2}),
        "indexer_loss": (indexer_loss, (q, k[:, :, 0], beta, q, k, picked), {}),
        "sparse_attention": (sparse_attention, (q, k, v, picked), {"block": 2}),
        "sparse_latent_attention": (
            sparse_latent_attention,
            (q, x, normal(H, 5, 5, seed=2, dtype=dtype), picked),
            {"block": 2},
        ),
        "short_convolution": (short_convolution, (x, weight), {"activation": "silu", **past}),
        "gated_rms_norm": (gated_rms_norm, (v, z, scale), {"eps": 1e-5, "gate": "swish"}),
        "l2norm": (l2norm, (q,), {}),
        "swiglu": (swiglu, (v, z), {}),
        "log_sum_exp": (log_sum_exp, (x[0],), {}),
        "softmax_gradient": (
            softmax_gradient,
            (x[0], x[0].logsumexp(1), torch.arange(-1, 4), z[0, :, 0, 0]),
            {},
        ),
        "packed_linear": (packed_linear, (x, pack_weights(normal(7, 6), "float32")), {}),
    }


def step(impl: str = "auto") -> tuple[DecodeStep, dict[str, Any]]:
    H, K, V = 2, 3, 4
    made = DecodeStep(
        heads=H, key_dim=K, value_heads=H, value_dim=V, decay="head", gate=Gate(normal(H)), beta_max=1.0,
        normalize=True, conv_weight=normal(2 * H * K + H * V, 4), activation="silu", norm_weight=normal(V),
        norm_gate="sigmoid", impl=impl,
    )  # fmt: skip
    pool = made.new_pool(3, dtype=torch.float64)
    pool.board.copy_(normal(*pool.board.shape))
    rows = {"g": normal(5, H), "beta": normal(5, H), "z": normal(5, H * V)}
    return made, {
        "qkv": normal(5, made.channels),
        "pool": pool,
        "slots": Slots([2, 0], lengths=[3, 2]),
        **rows,
    }


def results(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


FUNCTIONS = sorted(set(TABLE) - {"decode_step"})


def test_every_operator_of_the_table_can_be_explained() -> None:
    assert {name for name, _ in OPERATORS.values()} == set(TABLE)
    assert set(calls()) == set(FUNCTIONS)


@pytest.mark.parametrize(
    ("operator", "impl"), [(name, impl) for name in FUNCTIONS for impl in available(name)]
)
def test_every_row_gives_what_the_reference_gives(operator: str, impl: str) -> None:
    function, arguments, options = calls()[operator]
    near = 1e-10
    if impl not in available(operator, dtype=torch.float64):
        function, arguments, options = calls(torch.float32)[operator]
        near = 1e-5
    got = results(function(*arguments, **options, impl=impl))
    expected = results(function(*arguments, **options, impl="reference"))
    torch.testing.assert_close(got, expected, rtol=near, atol=near)
    assert explain(function, *arguments, **options, impl=impl).impl == impl


@pytest.mark.parametrize("impl", available("decode_step"))
def test_every_row_of_the_step_gives_what_the_reference_gives(impl: str) -> None:
    made, rows = step(impl)
    exact, exact_rows = step("reference")
    torch.testing.assert_close(made(**rows), exact(**exact_rows), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(rows["pool"].board, exact_rows["pool"].board, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(rows["pool"].conv, exact_rows["pool"].conv, rtol=1e-10, atol=1e-10)
    assert explain(made, **rows).impl == impl
    out = torch.empty(5, 8, dtype=torch.float64)
    assert exact(**exact_rows, out=out) is out


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_every_operator_uses_the_same_words(operator: str) -> None:
    function, arguments, options = calls(torch.float32)[operator]
    choice = explain(function, *arguments, **options)
    assert choice.impl == available(operator)[0]
    everywhere = {each.name for row in TABLE.values() for each in row.implementations} | {NOT_YET}
    assert set(choice.rejected) | {choice.impl} == everywhere
    assert choice.rejected["reference"] == "only runs when named"
    there = re.escape(f"there are auto, {', '.join(TABLE[operator].names)}")
    with pytest.raises(ConfigError, match=f"{operator} has no impl='fastest'; {there}"):
        function(*arguments, **options, impl="fastest")
    with pytest.raises(UnsupportedError, match=f"no Triton kernels of our own yet; {there}"):
        function(*arguments, **options, impl=NOT_YET)
    for name in everywhere - set(TABLE[operator].names) - {NOT_YET}:
        with pytest.raises(UnsupportedError, match=f"impl='{name}': {operator} has none; {there}"):
            function(*arguments, **options, impl=name)


def test_a_step_is_explained_before_it_is_made_and_for_a_call() -> None:
    options = {"heads": 2, "key_dim": 3, "value_heads": 2, "value_dim": 4}
    assert explain(DecodeStep, **options).impl == available("decode_step")[0]
    made, rows = step()
    elsewhere = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in rows.items()}
    elsewhere["pool"] = made.new_pool(3, dtype=torch.float64, device="meta")
    assert explain(made, **elsewhere).impl == "torch"
    if not native.missing_reason():
        assert "torch.float64 on meta" in explain(made, **elsewhere).rejected["cpu"]
        named, _ = step("cpu")
        with pytest.raises(UnsupportedError, match=r"cannot serve .* decode_step: .* on meta"):
            named(**elsewhere)


def test_a_step_is_faster_only_where_it_was_written_for() -> None:
    x = normal(2, 8)
    kernels = native.missing_reason() is None
    assert DecodeStep.is_faster(1, x, None) == kernels
    assert not DecodeStep.is_faster(33, x)
    assert not DecodeStep.is_faster(1, x.to("meta"))
    assert not DecodeStep.is_faster(1, x.clone().requires_grad_())


def test_explain_names_the_operators_that_it_knows() -> None:
    with pytest.raises(ConfigError, match=r"explain\(\) knows gated_delta_rule, .*; got"):
        explain(torch.add, 1, 2)


def test_the_first_that_serves_is_chosen_and_those_before_it_are_told() -> None:
    told: list[str] = []
    rows = (
        Implementation("small", lambda n: n + 1, lambda n: "too large" if n > 9 else None, passed_over=told.append),
        Implementation("named", lambda n: -n, automatic=False),
        Implementation("odd", lambda n: 2 * n, lambda n: None if n % 2 else "even", rounding="a lot"),
    )  # fmt: skip
    operator = table({"count": rows, "other": (Implementation("else", abs),)}, {"later": "wait"})["count"]
    assert operator.choose(3).run(3) == 4
    assert operator.choose(11).run(11) == 22
    assert operator.choose(11, "named").run(11) == -11
    assert told == ["too large"]
    choice = operator.explain(11)
    assert choice.rounding == "a lot"
    assert choice.rejected == {
        "small": "too large", "named": "only runs when named", "else": "count has none", "later": "wait",
    }  # fmt: skip
    assert str(choice).startswith("odd: the fastest that serves this call; it rounds a lot\n")
    with pytest.raises(UnsupportedError, match=r"no implementation serves .* count: .*too large.*even"):
        operator.choose(12)
    with pytest.raises(UnsupportedError, match="impl='odd' cannot serve this call of count: even"):
        operator.choose(12, "odd")
