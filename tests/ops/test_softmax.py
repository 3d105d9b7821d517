"""What a loss asks of the softmax over logits, against its formulas in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import log_sum_exp, native, softmax_gradient
from support.budget import assert_within_budget

exact = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
compiled = pytest.mark.skipif(native.missing_reason() is not None, reason="installed without the C++ kernels")


def inputs(N: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    return {
        "logits": logits.to(dtype),
        # Of more columns than these.
        "log_sum": torch.logaddexp(logits.logsumexp(1), torch.randn(N, generator=generator).double()),
        "gradient": torch.randn(N, generator=generator, dtype=torch.float64),
        "targets": torch.randint(-2, V + 2, (N,), generator=generator),
    }


def gradient(impl: str, targets: Tensor, **x: Tensor) -> list[Tensor]:
    return [softmax_gradient(x["logits"], x["log_sum"], targets, x["gradient"], impl=impl)]


def oracle(targets: Tensor, logits: Tensor, log_sum: Tensor, gradient: Tensor) -> list[Tensor]:
    at_target = torch.arange(logits.shape[1]) == targets[:, None]
    return [((logits - log_sum[:, None]).exp() - at_target.to(logits.dtype)) * gradient[:, None]]


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 100, 128, 257]))


@given(N=st.integers(1, 9), V=SIZES, seed=st.integers(0, 1000))
def test_equals_the_formulas(softmax_impl: str, N: int, V: int, seed: int) -> None:
    x = inputs(N, V, seed)
    exact(log_sum_exp(x["logits"], impl=softmax_impl), x["logits"].exp().sum(1).log())
    exact(gradient(softmax_impl, **x), oracle(**x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "V"), [(7, 1000), (300, 513), (2, 40000)])
def test_keeps_the_error_budget(softmax_impl: str, N: int, V: int, dtype: torch.dtype, trial: int) -> None:
    x = inputs(N, V, trial)
    assert_within_budget(
        lambda logits: [log_sum_exp(logits, impl=softmax_impl)],
        lambda logits: [logits.logsumexp(1)],
        {"logits": x["logits"]},
        dtype,
        stages=1,
        terms=V,
    )
    targets = x.pop("targets")
    assert_within_budget(
        functools.partial(gradient, softmax_impl, targets),
        functools.partial(oracle, targets),
        x,
        dtype,
        float32=frozenset({"log_sum", "gradient"}),
        stages=2,
        terms=1,
    )


def test_is_rounded_once(softmax_impl: str) -> None:
    x = inputs(50, 300, dtype=torch.bfloat16)
    (got,) = gradient(
        softmax_impl, **{**x, "log_sum": x["log_sum"].float(), "gradient": x["gradient"].float()}
    )
    wide = {name: t if name == "targets" else t.double() for name, t in x.items()}
    (expected,) = oracle(
        **{**wide, "log_sum": x["log_sum"].float().double(), "gradient": x["gradient"].float().double()}
    )
    # float32's own error can only tip what lies in the middle of two neighbours.
    assert (got == expected.bfloat16()).double().mean() > 0.998


def test_extreme_logits(softmax_impl: str) -> None:
    infinity = math.inf
    logits = torch.tensor(
        [
            [1e4, 0, -1e4],
            [-1e4, -1e4, -1e4],
            [-infinity, 2, 3],
            [-infinity] * 3,
            [infinity, 0, 1],
            [math.nan, 0, 1],
        ]
    ).repeat_interleave(7, dim=1)
    got = log_sum_exp(logits, impl=softmax_impl)
    torch.testing.assert_close(got, logits.double().logsumexp(1).float(), equal_nan=True)
    some = slice(0, 3)  # of the others infinite parts are no numbers
    x = {
        "logits": logits[some],
        "log_sum": got[some],
        "gradient": torch.ones(3),
        "targets": torch.tensor([0, 7, 20]),
    }
    torch.testing.assert_close(gradient(softmax_impl, **x), oracle(**x))


STRANGE = {
    "every other number": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "some columns of a wider matrix": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "one row for all": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("how", STRANGE)
def test_strides_do_not_matter(softmax_impl: str, how: str) -> None:
    x = inputs(6, 70)
    strange = STRANGE[how](x["logits"])
    plain = strange.clone(memory_format=torch.contiguous_format)
    exact(log_sum_exp(strange, impl=softmax_impl), log_sum_exp(plain, impl=softmax_impl))
    exact(
        gradient(softmax_impl, **{**x, "logits": strange}), gradient(softmax_impl, **{**x, "logits": plain})
    )
    one = x["gradient"][:1].expand(6)  # as the gradient of a sum comes
    exact(gradient(softmax_impl, **{**x, "gradient": one}), oracle(**{**x, "gradient": one}))


def test_threads_change_no_bit(softmax_impl: str) -> None:
    x = inputs(200, 700, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([log_sum_exp(x["logits"], impl=softmax_impl), *gradient(softmax_impl, **x)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        # PyTorch's own may round the ends of a thread's share in another way.
        torch.testing.assert_close(other, results[0])
        assert softmax_impl == "torch" or all(
            torch.equal(a, b) for a, b in zip(results[0], other, strict=True)
        )


def test_the_sum_can_be_differentiated_twice(softmax_impl: str) -> None:
    logits = inputs(3, 5)["logits"].requires_grad_()
    compute = functools.partial(log_sum_exp, impl=softmax_impl)
    assert torch.autograd.gradcheck(compute, (logits,))
    assert torch.autograd.gradgradcheck(compute, (logits,))


@compiled
def test_the_custom_operators_are_registered_as_torch_expects() -> None:
    x, operators = inputs(3, 5), torch.ops.intarsia
    torch.library.opcheck(operators.log_sum_forward.default, (x["logits"].clone().requires_grad_(),))
    arguments = (x["logits"], x["log_sum"], x["targets"], x["gradient"])
    torch.library.opcheck(operators.softmax_gradient.default, arguments)
    with pytest.raises(UnsupportedError, match="first derivatives"):
        softmax_gradient(x["logits"].requires_grad_(), *arguments[1:], impl="cpu").sum().backward()


def test_works_under_torch_compile(softmax_impl: str) -> None:
    x = inputs(6, 70)
    torch.compiler.reset()
    traced = torch.compile(
        lambda **x: [log_sum_exp(x["logits"], impl=softmax_impl), *gradient(softmax_impl, **x)],
        backend="aot_eager",
        fullgraph=True,
    )
    exact(traced(**x), [log_sum_exp(x["logits"], impl=softmax_impl), *gradient(softmax_impl, **x)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits must be \[N, V\]"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "floating-point"),
        ({"log_sum": torch.zeros(3)}, r"a number for each row of logits \[2, 3\]; got \[3\]"),
        ({"targets": torch.zeros(2)}, "int64"),
        ({"gradient": torch.zeros(2, 1)}, "a number for each row"),
        ({"impl": "fastest"}, "there are auto, cpu, torch"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    x = {"logits": torch.zeros(2, 3), "log_sum": torch.zeros(2), "gradient": torch.zeros(2)}
    with pytest.raises((ShapeError, ConfigError), match=message):
        softmax_gradient(**{**x, "targets": torch.zeros(2, dtype=torch.int64), **change})


def test_what_the_kernels_cannot_serve_falls_back_or_is_refused() -> None:
    assert log_sum_exp(torch.zeros(2, 3).half()).dtype == torch.float32
    assert log_sum_exp(torch.zeros(0, 3)).shape == (0,)
    if native.missing_reason():
        return
    with pytest.raises(UnsupportedError, match="nothing to compute"):
        log_sum_exp(torch.zeros(0, 3), impl="cpu")
    with pytest.raises(UnsupportedError, match=r"logits is torch\.float16"):
        log_sum_exp(torch.zeros(2, 3).half(), impl="cpu")
