"""flash-linear-attention's functions against a loop over the recurrence, written for these tests alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.integrations import fla
from intarsia.integrations.fla import common
from intarsia.ops import gated_delta_rule
from support.budget import assert_within_budget
from support.fla_loops import HV, B, H, K, T, close, loop, tensors


def retention(heads: int) -> Tensor:
    return (1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))).log()


def lightning(heads: int) -> Tensor:
    return -torch.arange(heads, dtype=torch.float64) * 8 / heads * (1 - 3 / 10)


# By name: the positional arguments after q, k, v, the keywords, and the decay and the erasing that they mean.
Case = Callable[[dict[str, Tensor]], tuple[list[Any], dict[str, Any], Tensor | None, Tensor | None]]
CASES: dict[str, Case] = {
    "kda": lambda x: ([x["gk"], x["beta"]], {}, x["gk"], x["beta"]),
    "gated_delta_rule": lambda x: ([x["g"]], {"beta": x["beta"]}, x["g"][..., None], x["beta"]),
    "gdn": lambda x: ([x["g"]], {"beta": x["beta"]}, x["g"][..., None], x["beta"]),
    "delta_rule": lambda x: ([x["beta"]], {}, None, x["beta"]),
    "gla": lambda x: ([x["gk"]], {}, x["gk"], None),
    "simple_gla": lambda x: ([x["g"]], {}, x["g"][..., None], None),
    "retention": lambda x: ([], {}, retention(H).expand(B, T, H)[..., None], None),
    "lightning_attn": lambda x: ([3, 10], {}, lightning(H).expand(B, T, H)[..., None], None),
    "linear_attn": lambda x: ([], {"normalize": False}, None, None),
}
GROUPED = {"kda", "gated_delta_rule", "gdn"}


def rule(name: str) -> str:
    """`"gla"` of `"fused_recurrent_gla"`."""
    return name.removeprefix("fused_").removeprefix("chunk_").removeprefix("recurrent_")


def takes(name: str, keyword: str) -> bool:
    return keyword in inspect.signature(getattr(fla, name)).parameters


NAMES = [name for name in fla.__all__ if rule(name) in CASES]
REVERSIBLE = [name for name in NAMES if takes(name, "reverse")]
TRANSPOSABLE = [name for name in NAMES if takes(name, "state_v_first")]
Parts = tuple[
    Callable[..., Any], dict[str, Tensor], list[Any], dict[str, Any], "Tensor | None", "Tensor | None"
]


def case(name: str, rows: int = B) -> Parts:
    x = tensors(HV if rule(name) in GROUPED else H)
    x = {n: t if n == "state" else t[:rows] for n, t in x.items()}
    return getattr(fla, name), x, *CASES[rule(name)](x)


def test_all_rules_are_here() -> None:
    assert len(NAMES) == 23


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_each_rule_equals_the_loop(name: str, scale: float | None) -> None:
    f, x, more, keywords, g, beta = case(name)
    o, state = f(
        x["q"],
        x["k"],
        x["v"],
        *more,
        scale=scale,
        initial_state=x["state"],
        output_final_state=True,
        **keywords,
    )
    expected, final = loop(x["q"], x["k"], x["v"], g, beta, x["state"], K**-0.5 if scale is None else scale)
    # The fixed decays are float32, as in flash-linear-attention.
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5}
        if "retention" in name or "lightning" in name
        else {"rtol": 1e-9, "atol": 1e-9}
    )
    torch.testing.assert_close(o, expected, **tolerance)
    torch.testing.assert_close(state, final, **tolerance)
    assert f(x["q"], x["k"], x["v"], *more, **keywords)[1] is None


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_are_apart(name: str) -> None:
    f, row, more, keywords, _, _ = case(name, rows=1)
    states = torch.cat([row["state"], row["state"][:1] * 2])
    edges = [0, 5, 20, T]

    def cut(value: Any, a: int, b: int) -> Any:
        return value[:, a:b] if isinstance(value, Tensor) else value

    reverse = {"reverse": True} if name in REVERSIBLE else {}
    for option in ({}, reverse):
        o, final = f(
            row["q"], row["k"], row["v"], *more, initial_state=states, output_final_state=True,
            cu_seqlens=torch.tensor(edges), **keywords, **option,
        )  # fmt: skip
        for i, (a, b) in enumerate(pairwise(edges)):
            part, state = f(
                *(cut(y, a, b) for y in (row["q"], row["k"], row["v"], *more)),
                initial_state=states[i : i + 1], output_final_state=True,
                **{n: cut(y, a, b) for n, y in keywords.items()}, **option,
            )  # fmt: skip
            close(o[:, a:b], part)
            close(final[i : i + 1], state)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_reverse_runs_from_the_end(name: str) -> None:
    f, x, more, keywords, g, beta = case(name)
    o, state = f(
        x["q"],
        x["k"],
        x["v"],
        *more,
        initial_state=x["state"],
        output_final_state=True,
        reverse=True,
        **keywords,
    )
    back = [y if y is None else y.flip(1) for y in (x["q"], x["k"], x["v"], g, beta)]
    expected, final = loop(*back, x["state"], K**-0.5)
    torch.testing.assert_close(o, expected.flip(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:transpose_state_layout")
@pytest.mark.parametrize("keyword", ["state_v_first", "transpose_state_layout"])
@pytest.mark.parametrize("name", TRANSPOSABLE)
def test_states_with_the_values_first(name: str, keyword: str) -> None:
    f, x, more, keywords, _, _ = case(name)
    args = (x["q"], x["k"], x["v"], *more)
    o, state = f(*args, initial_state=x["state"], output_final_state=True, **keywords)
    turned = f(*args, initial_state=x["state"].mT, output_final_state=True, **keywords, **{keyword: True})
    close(turned[0], o)
    close(turned[1], state.mT)


def test_keys_are_normalised_on_request() -> None:
    x = tensors()
    args = (x["q"], 3 * x["k"], x["v"], x["gk"], x["beta"])
    o, _ = fla.chunk_kda(*args, use_qk_l2norm_in_kernel=True)
    expected, _ = loop(F.normalize(args[0], dim=-1), F.normalize(args[1], dim=-1), *args[2:], None, K**-0.5)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("negative", [False, True])
def test_kda_makes_its_gates(lower_bound: float | None, negative: bool) -> None:
    x = tensors()
    raw, logits = x["gk"] * 2, x["beta"] * 4 - 2
    A_log, dt_bias = torch.linspace(-1, 1, HV).double(), torch.linspace(-1, 1, HV * K).double()
    shifted = raw + dt_bias.view(HV, K)
    rate = A_log.exp()[:, None]
    g = -rate * F.softplus(shifted) if lower_bound is None else lower_bound * torch.sigmoid(rate * shifted)
    beta = torch.sigmoid(logits) * (1 + negative)
    expected, _ = loop(x["q"], x["k"], x["v"], g, beta, None, K**-0.5)
    for f in (fla.chunk_kda, fla.fused_recurrent_kda):
        o, _ = f(
            x["q"], x["k"], x["v"], raw, logits, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
            lower_bound=lower_bound, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=negative,
        )  # fmt: skip
        close(o, expected)
    close(fla.fused_kda_gate(raw, A_log, dt_bias, lower_bound, torch.float64), g)
    assert fla.fused_kda_gate(raw.bfloat16(), A_log, dt_bias).dtype == torch.float32


def test_a_bounded_gate_needs_no_rate() -> None:
    raw = tensors()["gk"]
    close(fla.fused_kda_gate(raw, lower_bound=-5.0, output_dtype=torch.float64), -5 * torch.sigmoid(raw))


def test_gated_deltanet_makes_its_gate() -> None:
    x = tensors()
    A_log, dt_bias = torch.linspace(-1, 1, HV).double(), torch.linspace(-1, 1, HV).double()
    g = -A_log.exp() * F.softplus(x["g"] + dt_bias)
    close(fla.fused_gdn_gate(x["g"], A_log, dt_bias, torch.float64), g)
    gates: dict[str, Any] = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    args = (x["q"], x["k"], x["v"])
    expected, _ = loop(*args, g[..., None], x["beta"], None, K**-0.5)
    close(fla.chunk_gated_delta_rule(*args, x["g"], x["beta"], **gates)[0], expected)
    close(fla.fused_recurrent_gated_delta_rule(*args, x["g"], beta=x["beta"], **gates)[0], expected)


IN_KERNEL: dict[str, Any] = {
    "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": True,
}  # fmt: skip
RAW = {"kda": "gk", "gated_delta_rule": "g", "gdn": "g"}


def in_kernel(name: str, **x: Tensor) -> tuple[Tensor, Tensor]:
    """The function `name` with everything left to it; `g` is the raw decay, of heads or channels."""
    o, state = getattr(fla, name)(
        x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], A_log=x["A_log"], dt_bias=x["dt_bias"],
        output_final_state=True, **IN_KERNEL,
    )  # fmt: skip
    return o, state


def beforehand(**x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the loop, from what flash-linear-attention documents."""

    def unit(y: Tensor) -> Tensor:
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    g = x["g"][..., None] if x["g"].dim() == 3 else x["g"]
    raw = g + x["dt_bias"].view(HV, -1)
    g = -x["A_log"].exp().view(HV, 1) * F.softplus(raw)
    return loop(unit(x["q"]), unit(x["k"]), x["v"], g, 2 * torch.sigmoid(x["beta"]), None, K**-0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in NAMES if rule(name) in RAW])
def test_what_is_done_in_kernel_keeps_the_budget(name: str, dtype: torch.dtype) -> None:
    x = tensors()
    raw = RAW[rule(name)]
    inputs = {
        "q": 3 * x["q"], "k": 3 * x["k"], "v": x["v"], "g": 2 * x[raw] + 1, "beta": 4 * x["beta"] - 2,
        "A_log": torch.linspace(-1, 1, HV).double(),
        "dt_bias": torch.linspace(-1, 1, HV * K if raw == "gk" else HV).double(),
    }  # fmt: skip
    assert_within_budget(
        functools.partial(in_kernel, name), beforehand, inputs, dtype, float32=frozenset({"A_log", "dt_bias"})
    )


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "use_gate_in_kernel")])
def test_what_is_done_in_kernel_is_left_to_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def operator(*args: Any, **options: Any) -> Any:
        given.update(options)
        return gated_delta_rule(*args, **options)

    monkeypatch.setattr(common, "gated_delta_rule", operator)
    x = tensors()
    f, args = getattr(fla, name), (x["q"], x["k"], x["v"], x[RAW[rule(name)]])
    rate = torch.zeros(1, 1, HV, 1)  # as the checkpoints have it
    f(*args, beta=x["beta"], A_log=rate, **IN_KERNEL)
    assert given["normalize"]
    assert given["beta_max"] == 2
    assert given["gate"].A_log.shape == (HV,)
    f(*args, beta=x["beta"], use_beta_sigmoid_in_kernel=True)
    assert not given["normalize"]
    assert given["beta_max"] == 1
    assert given["gate"] is None
    f(*args, beta=x["beta"])
    assert given["beta_max"] is None


def test_a_gated_decay_of_each_head_besides_one_of_each_channel() -> None:
    x = tensors()
    A_log = torch.linspace(-1, 1, HV).double()
    total = (-A_log.exp() * F.softplus(x["g"]))[..., None] + x["gk"]
    o, _ = fla.fused_recurrent_gated_delta_rule(
        x["q"], x["k"], x["v"], x["g"], gk=x["gk"], beta=x["beta"], use_gate_in_kernel=True, A_log=A_log
    )
    close(o, loop(x["q"], x["k"], x["v"], total, x["beta"], None, K**-0.5)[0])


def test_gates_take_any_leading_dimensions() -> None:
    x = tensors()
    A_log = torch.linspace(-1, 1, HV)
    for gate, raw in ((fla.fused_kda_gate, x["gk"]), (fla.fused_gdn_gate, x["g"])):
        expected = gate(raw, A_log)
        torch.testing.assert_close(gate(raw[0, 0], A_log), expected[0, 0])
        torch.testing.assert_close(gate(raw[None], A_log), expected[None])


def test_a_decay_of_each_channel_besides_one_of_each_head() -> None:
    x = tensors()
    for g, total in ((x["g"], x["g"][..., None] + x["gk"]), (None, x["gk"])):
        o, _ = fla.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], g, gk=x["gk"], beta=x["beta"])
        close(o, loop(x["q"], x["k"], x["v"], total, x["beta"], None, K**-0.5)[0])


def test_a_fixed_decay() -> None:
    x = tensors(H)
    gamma = torch.tensor([-0.1, -0.5], dtype=torch.float64)
    expected, _ = loop(x["q"], x["k"], x["v"], gamma.expand(B, T, H)[..., None], None, None, K**-0.5)
    for f in (fla.chunk_simple_gla, fla.fused_recurrent_simple_gla):
        close(f(x["q"], x["k"], x["v"], g_gamma=gamma)[0], expected)


@pytest.mark.parametrize(
    "f", [fla.chunk_linear_attn, fla.fused_recurrent_linear_attn, fla.fused_chunk_linear_attn]
)
def test_linear_attention_normalised(f: Callable[..., Any]) -> None:
    x = tensors(H)
    q, k, v = x["q"].exp(), x["k"].exp(), x["v"]
    weights = torch.einsum("bthk,bshk->bhts", q, k).tril()
    expected = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    o, (state, z) = f(q, k, v, output_final_state=True, normalize=True)
    close(o, expected)
    close(z, k.sum(1, keepdim=True))
    # In two pieces, with the pair between them.
    _, pair = f(q[:, :20], k[:, :20], v[:, :20], output_final_state=True, normalize=True)
    later, (end, total) = f(
        q[:, 20:], k[:, 20:], v[:, 20:], initial_state=pair, output_final_state=True, normalize=True
    )
    close(later, expected[:, 20:])
    close(end, state)
    close(total, z)


def test_linear_attention_normalises_by_default_where_the_original_does() -> None:
    defaults = {
        n: inspect.signature(getattr(fla, n)).parameters["normalize"].default for n in NAMES if "linear" in n
    }
    assert defaults == {
        "chunk_linear_attn": True, "fused_chunk_linear_attn": True, "fused_recurrent_linear_attn": False
    }  # fmt: skip


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gradients_flow(lower_bound: float | None) -> None:
    x = {n: t[:1, :9].requires_grad_() for n, t in tensors().items() if n not in ("g", "state")}
    A_log, dt_bias = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (HV, HV * K))

    def run(*args: Tensor) -> Tensor:
        q, k, v, g, beta, rate, bias = args
        return fla.chunk_kda(
            q, k, v, g, beta, use_gate_in_kernel=True, A_log=rate, dt_bias=bias, lower_bound=lower_bound,
            use_beta_sigmoid_in_kernel=True, use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(
        run, (*(x[n] for n in ("q", "k", "v", "gk", "beta")), A_log, dt_bias), fast_mode=True
    )


def test_the_short_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 20, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (
        torch.randn(5, 4, generator=generator).double(),
        torch.randn(5, generator=generator).double(),
    )
    padded = F.pad(x.mT, (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=5).mT) + residual
    for activation in ("silu", "swish"):
        o, state = fla.causal_conv1d(
            x, weight, bias, residual, output_final_state=True, activation=activation
        )
        close(o, expected)
        close(state, x[:, -4:].mT)
    y, state = fla.causal_conv1d(
        x[:, :2], weight, bias, residual[:, :2], output_final_state=True, activation="silu"
    )
    later, _ = fla.causal_conv1d(
        x[:, 2:], weight, bias, residual[:, 2:], initial_state=state, activation="silu"
    )
    close(torch.cat([y, later], 1), expected)
    row, cu_seqlens = x.reshape(1, 40, 5), torch.tensor([0, 20, 40])
    packed, states = fla.causal_conv1d(row, weight, output_final_state=True, cu_seqlens=cu_seqlens)
    close(packed.view(2, 20, 5), F.conv1d(padded, weight[:, None], groups=5).mT)
    close(states, x[:, -4:].mT)


def test_narrow_inputs_keep_their_dtype() -> None:
    x = tensors(dtype=torch.bfloat16)
    o, state = fla.chunk_kda(x["q"], x["k"], x["v"], x["gk"], x["beta"], output_final_state=True)
    assert state is not None
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", TRANSPOSABLE)
def test_the_old_name_of_a_layout_warns_and_does_not_go_with_the_new(name: str) -> None:
    f, x, more, keywords, _, _ = case(name)
    args = (x["q"], x["k"], x["v"], *more)
    with pytest.warns(DeprecationWarning, match="state_v_first") as caught:
        f(*args, **keywords, transpose_state_layout=True)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="give one of them"):
        f(*args, **keywords, state_v_first=True, transpose_state_layout=True)


def test_older_keywords_are_taken() -> None:
    x = tensors()
    args = (x["q"], x["k"], x["v"], x["gk"], x["beta"])
    close(fla.chunk_kda(*args, head_first=False, chunk_size=32)[0], fla.chunk_kda(*args)[0])


X = tensors()
ARGS = {
    "kda": (X["q"], X["k"], X["v"], X["gk"], X["beta"]),
    "gdn": (X["q"], X["k"], X["v"], X["g"], X["beta"]),
    "gla": (X["q"], X["k"], X["v"]),
}
REFUSALS = [
    (fla.chunk_kda, "kda", {"cp_context": object()}, UnsupportedError, "initial_state"),
    (fla.chunk_kda, "kda", {"return_intermediate_states": True}, UnsupportedError, "output_final_state"),
    (fla.chunk_kda, "kda", {"use_graph": True}, UnsupportedError, "leave it out"),
    (fla.chunk_kda, "kda", {"head_first": True}, UnsupportedError, "sequence first"),
    (fla.chunk_kda, "kda", {"no_such_option": 1}, TypeError, "no_such_option"),
    (fla.chunk_kda, "kda", {"use_gate_in_kernel": True}, ConfigError, "A_log"),
    (fla.chunk_kda, "kda", {"use_gate_in_kernel": True, "A_log": torch.zeros(3)}, ShapeError, "A_log"),
    (fla.chunk_kda, "kda", {"use_gate_in_kernel": True, "safe_gate": True}, ConfigError, "lower_bound"),
    (fla.chunk_kda, "kda", {"use_gate_in_kernel": True, "lower_bound": 5.0}, ConfigError, "negative"),
    (fla.chunk_kda, "kda", {"allow_neg_eigval": True}, ConfigError, "use_beta_sigmoid_in_kernel"),
    (fla.chunk_kda, "kda", {"cu_seqlens_cpu": torch.tensor([0, T])}, ConfigError, "cu_seqlens"),
    (fla.chunk_kda, "kda", {"state_v_first": True, "transpose_state_layout": True}, ConfigError, "old name"),
    (fla.chunk_kda, "kda", {"chunk_size": 16}, ConfigError, "chunk_size"),
    (fla.chunk_gated_delta_rule, "gdn", {"chunk_size": 128}, ConfigError, "chunk_size"),
    (fla.chunk_kda, "gdn", {}, ShapeError, "each channel"),
    (fla.chunk_gated_delta_rule, "kda", {}, ShapeError, "each head"),
    (fla.fused_recurrent_gated_delta_rule, "gdn", {}, ShapeError, "gk"),
    (fla.fused_recurrent_gla, "gla", {"gv": X["v"]}, UnsupportedError, "value channels"),
    (fla.chunk_retention, "gla", {"state_v_first": True}, TypeError, "state_v_first"),
    (fla.chunk_simple_gla, "gla", {"g": X["g"], "g_gamma": X["g"][0, 0]}, UnsupportedError, "g or g_gamma"),
    (fla.chunk_delta_rule, "gla", {"beta": X["v"]}, UnsupportedError, "beta"),
]  # fmt: skip


@pytest.mark.parametrize(("f", "args", "options", "error", "message"), REFUSALS)
def test_what_cannot_be_served_says_so(
    f: Callable[..., Any], args: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        f(*ARGS[args], **options)
