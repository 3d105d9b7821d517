"""flash-linear-attention behind the operators: what is asked of it, what comes back, and when it is taken."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from intarsia.errors import UnsupportedError
from intarsia.ops import (
    Gate,
    Sequences,
    dplr_rule,
    explain,
    gated_delta_rule,
    linear_attention,
    linear_fla,
)
from intarsia.ops.linear_call import LinearCall, linear_call
from intarsia.ops.linear_reference import reference
from support.fla_signatures import READ_FROM_KWARGS, SIGNATURES, VERSION
from support.fla_stand_in import StandIn
from support.linear_inputs import linear_inputs

INSTALLED = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None
needs_fla = pytest.mark.skipif(not INSTALLED, reason="flash-linear-attention and Triton are not installed")
RULES = ("delta", "additive", "general")
DECAYS = ("none", "fixed", "head", "channel")
FEW, MANY = 7, linear_fla.RECURRENT + 6
TENSORS = ("q", "k", "v", "g", "beta", "a", "b", "initial_state")


def call_of(
    rule: str, decay: str, T: int, lengths: tuple[int, ...] | None = None, **options: Any
) -> LinearCall:
    count = None if lengths is None else len(lengths)
    inputs = linear_inputs(
        B=2 if lengths is None else 1, T=T, H=2, HV=4, K=5, V=3, decay=decay, sequences=count
    )
    given = {name: None if x is None else x.float() for name, x in inputs.items()}
    if rule != "delta":
        given.pop("beta")
    if rule == "general":
        other = linear_inputs(B=2, T=T, K=5, seed=5)["k"][: given["k"].shape[0]].float()
        given["a"], given["b"] = 0.3 * given["k"], other
    seqs = None if lengths is None else Sequences(lengths)
    return linear_call(**given, cu_seqlens=seqs, **{"output_final_state": True, **options})


def close(got: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [FEW, MANY])
@pytest.mark.parametrize("packed", [False, True])
def test_asks_for_what_the_reference_computes(rule: str, decay: str, T: int, packed: bool) -> None:
    lengths = (0, T - 3, 0, 3) if packed else None
    stand_in = StandIn()
    call = call_of(rule, decay, T, lengths, scale=0.3)
    close(linear_fla.compute(call, stand_in), reference(call))
    names = {"delta": "gated_delta_rule", "additive": "simple_gla", "general": "dplr_delta_rule"}
    if decay == "channel":
        names |= {"delta": "kda", "additive": "gla"}
    longest = T - 3 if packed else T
    form = "fused_recurrent" if longest <= linear_fla.RECURRENT else "chunk"
    assert [name for name, _ in stand_in.calls] == [f"{form}_{names[rule]}"]


@pytest.mark.parametrize("rule", ["delta", "additive"])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("T", [FEW, MANY])
@pytest.mark.parametrize(("bound", "beta_max"), [(None, 1.0), (-4.0, 2.0), (-8.0, 1.5)])
def test_gates_lengths_and_strengths(
    rule: str, decay: str, T: int, bound: float | None, beta_max: float
) -> None:
    gate = Gate(torch.linspace(-1, 1, 4), torch.linspace(-2, 2, 20 if decay == "channel" else 4), bound)
    for each in (gate, dataclasses.replace(gate, dt_bias=None)):
        options = {"gate": each, "normalize": True, **({"beta_max": beta_max} if rule == "delta" else {})}
        call = call_of(rule, decay, T, **options)
        close(linear_fla.compute(call, StandIn()), reference(call))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", DECAYS)
def test_without_a_state(rule: str, decay: str) -> None:
    call = call_of(rule, decay, MANY, (0, MANY))
    begins = dataclasses.replace(call, initial_state=None)
    close(linear_fla.compute(begins, StandIn()), reference(begins))
    silent = dataclasses.replace(begins, output_final_state=False)
    o, final = linear_fla.compute(silent, StandIn())
    assert final is None
    torch.testing.assert_close(o, reference(silent)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_of_all_inputs_and_no_second_ones(rule: str, decay: str) -> None:
    call = call_of(rule, decay, FEW, (3, 0, FEW - 3))
    leaves = {n: getattr(call, n).requires_grad_() for n in TENSORS if getattr(call, n) is not None}

    def gradients(found: tuple[Tensor, Tensor | None], **options: Any) -> tuple[Tensor, ...]:
        o, final = found
        assert final is not None
        weights = torch.linspace(-1, 2, o.numel()).view(o.shape)
        return torch.autograd.grad(
            (o * weights).sum() + final.square().sum(), list(leaves.values()), **options
        )

    got = gradients(linear_fla.compute(call, stand_in := StandIn()))
    assert stand_in.calls[0][0].startswith("chunk")  # their recurrent forms have no gradients
    for name, a, b in zip(leaves, got, gradients(reference(call)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    with pytest.raises(UnsupportedError, match="chunked' gives second ones too"):
        gradients(linear_fla.compute(call, StandIn()), create_graph=True)


def test_dtypes_of_inputs_and_results() -> None:
    call = call_of("delta", "channel", FEW)
    half = dataclasses.replace(call, q=call.q.bfloat16(), k=call.k.bfloat16(), v=call.v.bfloat16())
    o, final = linear_fla.compute(half, stand_in := StandIn())
    assert final is not None
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert stand_in.calls[0][1]["q"].dtype == torch.bfloat16
    mixed = dataclasses.replace(half, v=call.v)
    o, _ = linear_fla.compute(mixed, stand_in)
    assert o.dtype == torch.float32 == stand_in.calls[1][1]["q"].dtype


def test_one_tensor_of_edges_for_the_same_sequences() -> None:
    stand_in = StandIn()
    for _ in range(2):
        linear_fla.compute(call_of("delta", "channel", MANY, (2, MANY - 2)), stand_in)
    (_, first), (_, second) = stand_in.calls
    assert first["cu_seqlens"] is second["cu_seqlens"]  # theirs are caches by identity
    assert first["cu_seqlens_cpu"].tolist() == [0, 2, MANY]


def test_what_it_does_not_compute() -> None:
    call = call_of("delta", "channel", FEW)
    assert linear_fla.refuse_form(call) is None
    assert "tensors are on cpu" in (linear_fla.refuse(call) or "")
    wide = dataclasses.replace(call, q=call.q.double())
    assert "float64" in (linear_fla.refuse_form(wide) or "")
    long = torch.zeros(1, 1, 1, 257)
    assert "256 channels at most, and these have 257" in (
        linear_fla.refuse_form(linear_call(long, long, long)) or ""
    )
    assert "16-bit" in (linear_fla.refuse_form(call_of("general", "head", MANY)) or "")
    assert linear_fla.refuse_form(call_of("general", "head", FEW)) is None
    assert linear_fla.refuse_observer() is None
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in (linear_fla.refuse_observer() or "")
    with FakeTensorMode():
        assert "follows the call" in (linear_fla.refuse_observer() or "")


def test_float32_only_where_pytorch_may_round_it() -> None:
    call = call_of("delta", "channel", FEW)
    assert "TF32" in (linear_fla.refuse_precision(call) or "")
    half = dataclasses.replace(call, q=call.q.half(), k=call.k.half(), v=call.v.half())
    assert linear_fla.refuse_precision(half) is None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert linear_fla.refuse_precision(call) is None
    finally:
        torch.set_float32_matmul_precision(before)


PACKAGE = {
    "__init__.py": "__version__ = {version!r}\n",
    "ops/__init__.py": "",
    **{
        f"ops/{module}.py": "".join(
            f"def {name}(**_): ...\n" for name, home in linear_fla.FUNCTIONS.items() if home == module
        )
        for module in set(linear_fla.FUNCTIONS.values())
    },
}

Chosen = Callable[..., list[str]]


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chosen]:
    """What runs on a GPU, and why it is not flash-linear-attention, where a version of that is installed."""

    def forget() -> None:
        linear_fla._load.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
            del sys.modules[name]

    def run(version: str | None, broken: str = "") -> list[str]:
        for name, text in PACKAGE.items() if version is not None else ():
            file = tmp_path / "fla" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.format(version=version) + broken)
        monkeypatch.syspath_prepend(tmp_path)
        forget()
        with FakeTensorMode():
            x = torch.empty(1, 99, 2, 16, dtype=torch.bfloat16, device="cuda")
            wide = torch.empty(1, 99, 2, 16, device="cuda")
        choices = (
            explain(gated_delta_rule, x, x, x),
            explain(linear_attention, x, x, x),
            explain(dplr_rule, x, x, x, x, x),
            explain(gated_delta_rule, wide, wide, wide),
        )
        return [f"{choice.impl} {choice.rejected.get('fla')}" for choice in choices]

    yield run
    forget()


def test_auto_takes_it_on_a_gpu(chosen: Chosen) -> None:
    delta, additive, general, wide = chosen(VERSION)
    assert delta == additive == general == "fla None"
    assert wide.startswith("chunked it rounds float32 to TF32")


@pytest.mark.parametrize(
    ("version", "broken", "reason"),
    [
        ("0.5.1", "", "flash-linear-attention 0.5.1 is too old: pip install 'fla-core>=0.6'"),
        (VERSION, "import no_such_driver\n", "flash-linear-attention does not load (No module named 'no_such_driver')"),
        (VERSION, "raise RuntimeError('0 active drivers')\n", "does not load (RuntimeError: 0 active drivers)"),
    ],
)  # fmt: skip
def test_says_why_it_is_not_there(chosen: Chosen, version: str, broken: str, reason: str) -> None:
    for line in chosen(version, broken):
        assert line.startswith("chunked ")
        assert reason in line


@pytest.mark.skipif(INSTALLED, reason="it is installed")
def test_says_that_it_is_not_installed(chosen: Chosen) -> None:
    assert chosen(None)[0] == "chunked flash-linear-attention is not installed: pip install fla-core"
    with pytest.raises(UnsupportedError, match="pip install fla-core"):
        linear_fla.functions()


def test_is_one_operator_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setattr(linear_fla, "functions", lambda: stand_in)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def operator(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
        return linear_fla.fla(
            linear_call(q, k, v, g, beta, initial_state=state, output_final_state=True, scale=0.5)
        )

    torch._dynamo.reset()
    compiled = torch.compile(operator, backend=backend, fullgraph=True, dynamic=True)
    for T in (FEW, MANY):
        call = call_of("delta", "head", T)
        x = [getattr(call, n) for n in ("q", "k", "v", "g", "beta", "initial_state")]
        close(compiled(*x), reference(dataclasses.replace(call, scale=0.5)))
    assert len(graphs) == 1


@needs_fla
def test_the_recorded_signatures_are_theirs() -> None:
    functions = linear_fla.functions()
    assert set(functions) == set(SIGNATURES)
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        found = [("**" if p.kind is p.VAR_KEYWORD else "") + p.name for p in parameters]
        assert found == SIGNATURES[name], name
        assert name not in READ_FROM_KWARGS or found[-1] == "**kwargs"


@needs_fla
@pytest.mark.slow
def test_their_kernels_by_the_interpreter() -> None:
    script = Path(__file__).parents[1] / "support" / "fla_interpreter.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = [line.split("\t") for line in done.stdout.splitlines()]
    errors = {name: float(error) for name, _, error in results if not error.startswith("not interpreted")}
    assert max(errors.values()) < 1e-5
    # The interpreter does not gather, which the bounded gate of KDA and the chunks of the general rule need.
    left_out = {name for name, _, error in results if error.startswith("not interpreted")}
    assert all(name.startswith(("general", "delta channel bounded")) for name in left_out)
