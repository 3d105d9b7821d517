"""The linear-attention models of transformers on Intarsia's operators: same results, and back again."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intarsia.integrations
from intarsia.errors import MissingExtraError, UnsupportedError
from intarsia.ops import native
from support.transformers_models import (
    HYBRIDS,
    VOCABULARY,
    T,
    Tensors,
    around,
    assert_close,
    build,
    module,
    tokens,
)

pytest.importorskip("transformers", minversion="5.15")
from intarsia.integrations import transformers as integration

FAMILIES = [family for family in integration.FAMILIES if integration._module(family) is not None]
ONE_OF_EACH = [family for family in ("olmo_hybrid", "kimi_linear") if family in FAMILIES]  # of each rule


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(tokens()).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def nothing_stays() -> Any:
    yield
    assert not integration._REPLACEMENTS._calls
    assert not integration._REPLACEMENTS._made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of a sequence each call of our operators got."""
    calls: list[int] = []

    def count(name: str) -> None:
        operator = getattr(integration, name)

        def counting(q: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(q.shape[1])
            return operator(q, *args, **kwargs)

        monkeypatch.setattr(integration, name, counting)

    count("gated_delta_rule")
    count("_decode")
    return calls


@pytest.mark.parametrize("family", integration.FAMILIES)
def test_every_family_has_a_model_here(family: str) -> None:
    assert family in HYBRIDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree(family: str, dtype: torch.dtype, counted: list[int]) -> None:
    model = build(family).to(dtype)

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensors:
        return {"logits": model(tokens()).logits}

    expected = around(model, logits)
    assert not counted
    with intarsia.integrations.accelerate_transformers():
        got = logits(model)
    assert counted == [T]
    assert got["logits"].dtype == dtype
    assert_close(got, *expected, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_agrees(family: str, dtype: torch.dtype, counted: list[int]) -> None:
    model = build(family).to(dtype)
    prompt = tokens(length=20)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0  # a shorter prompt, padded on the left
    forced = tokens(length=9).tolist()

    def generate(model: nn.Module, given: bool) -> Any:
        """Greedily, or with what is continued by each token `given`, so that roundings choose no token."""
        choose = {"prefix_allowed_tokens_fn": lambda row, sofar: [forced[row][len(sofar) - 20]]}
        return model.generate(
            prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **(choose if given else {}),
        )  # fmt: skip

    def logits(model: nn.Module) -> Tensors:
        return {"logits": torch.stack(generate(model, True).logits)}

    expected = around(model, logits)
    assert not counted
    with intarsia.integrations.accelerate_transformers():
        got = logits(model)
        # Without the kernels the originals take the single tokens.
        assert counted == [20] + [1] * (7 if native.missing_reason() is None else 0)
        greedy = generate(model, False)
    assert_close(got, *expected, dtype=dtype)
    if dtype == torch.float32:
        assert greedy.sequences.tolist() == generate(model, False).sequences.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree(family: str, dtype: torch.dtype, counted: list[int]) -> None:
    model = build(family).to(dtype).train()
    expected = around(model, gradients)
    assert not counted
    with intarsia.integrations.accelerate_transformers():
        got = gradients(model)
    assert counted == [T]
    assert_close(got, *expected, dtype=dtype)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_gradients_of_a_single_token_agree(family: str, counted: list[int]) -> None:
    """Which decoding has no use for, so that it may take another way."""
    hf, name = module(family), integration.FAMILIES[family][1]
    x = {n: normal(i, 2, 1, 2, 8) for i, n in enumerate(("query", "key", "value", "g"))}
    x |= {"beta": normal(4, 2, 1, 2).sigmoid(), "initial_state": normal(5, 2, 2, 8, 8)}
    x["g"] = -x["g"].abs() if family == "kimi_linear" else -x["g"].abs()[..., 0]

    def run(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        rule = getattr(hf, name)
        o, state = rule(**inputs, output_final_state=True, use_qk_l2norm_in_kernel=True)
        return o, state

    def gradients_of(names: list[str]) -> tuple[Tensor, ...]:
        inputs = {n: t.clone().requires_grad_(n in names) for n, t in x.items()}
        return torch.autograd.grad(sum(y.sum() for y in run(**inputs)), [inputs[n] for n in names])

    for names in (["initial_state"], list(x)):
        expected = gradients_of(names)
        with intarsia.integrations.accelerate_transformers():
            torch.testing.assert_close(gradients_of(names), expected, rtol=1e-4, atol=1e-5)
    with intarsia.integrations.accelerate_transformers():
        torch.testing.assert_close(run(**x), run(**{n: t.requires_grad_() for n, t in x.items()}))
    assert len(counted) == (4 if native.missing_reason() is None else 3)


def test_gradients_agree_with_checkpointing_and_autocast() -> None:
    model = build("qwen3_next").train()
    # The old name, from version 6 on the new one.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    exact = gradients(copy.deepcopy(model).double())
    _, *moved = around(copy.deepcopy(model).to(torch.bfloat16), gradients)
    with torch.autocast("cpu", torch.bfloat16), intarsia.integrations.accelerate_transformers():
        got = gradients(model)
    assert_close(got, exact, *moved, dtype=torch.bfloat16)


PACKED = [9, 30, 1, 30]
PACKINGS = {
    "cu_seq_lens_q": torch.tensor([0, *PACKED]).cumsum(0).int(),
    "seq_idx": torch.repeat_interleave(torch.arange(len(PACKED)), torch.tensor(PACKED))[None].int(),
}


def packing(*names: str, **options: Any) -> dict[str, Any]:
    """What a model is told of a packed row. `use_cache=False`: else their softmax attention mixes the sequences."""
    positions = torch.cat([torch.arange(n) for n in PACKED])[None]
    return {"position_ids": positions, "use_cache": False} | {n: PACKINGS[n] for n in names} | options


@pytest.mark.parametrize("names", [("cu_seq_lens_q",), ("seq_idx",), ("cu_seq_lens_q", "seq_idx")])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in integration.MIXING])
def test_packed_sequences_are_kept_apart(family: str, names: tuple[str, ...]) -> None:
    model = build(family)
    row = tokens(1, sum(PACKED))
    with torch.no_grad():
        apart = torch.cat([model(part).logits for part in row.split(PACKED, 1)], 1)
        with intarsia.integrations.accelerate_transformers():
            together = model(row, **packing(*names)).logits
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_packed_sequences_are_kept_apart_in_training() -> None:
    model = build("olmo_hybrid").train()
    row = tokens(1, sum(PACKED))

    def gradients_of(*logits: Tensor) -> Tensor:
        model.zero_grad()
        torch.cat(logits, 1).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    apart = gradients_of(*(model(part).logits for part in row.split(PACKED, 1)))
    with intarsia.integrations.accelerate_transformers():
        together = gradients_of(model(row, **packing("cu_seq_lens_q")).logits)
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5 * apart.abs().max().item())


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_what_would_mix_packed_sequences_is_refused(name: str) -> None:
    row = tokens(1, sum(PACKED))
    with intarsia.integrations.accelerate_transformers():
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            build("qwen3_next")(row, **packing(name, use_cache=True))
        for family in integration.MIXING & set(FAMILIES):
            with pytest.raises(UnsupportedError, match=f"attention layers of {family}"):
                build(family)(row, **packing(name))


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_one_sequence_is_not_a_packing(family: str) -> None:
    model = build(family)
    row = tokens(1, 20)
    with torch.no_grad(), intarsia.integrations.accelerate_transformers():
        got = model(row, cu_seq_lens_q=torch.tensor([0, 20]), seq_idx=torch.zeros(1, 20)).logits
        torch.testing.assert_close(got, model(row).logits)


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_export_gets_the_original_and_compile_ours(family: str, counted: list[int]) -> None:
    hf = module(family)
    name = integration.FAMILIES[family][0]
    q, k, v = (normal(i, 1, 9, 2, 8) for i in range(3))
    g = -normal(3, 1, 9, 2, *[8] * (family == "kimi_linear")).abs()
    beta = normal(4, 1, 9, 2).sigmoid()

    class Layer(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return getattr(hf, name)(*inputs[:3], g=inputs[3], beta=inputs[4], use_qk_l2norm_in_kernel=True)[
                0
            ]

    expected = Layer()(q, k, v, g, beta)
    with intarsia.integrations.accelerate_transformers():
        exported = torch.export.export(Layer(), (q, k, v, g, beta))
        assert not any("intarsia" in str(node.target) for node in exported.graph.nodes)
        assert not counted
        compiled = torch.compile(Layer(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q, k, v, g, beta), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported.module()(q, k, v, g, beta), expected)
    torch.testing.assert_close(
        compiled(q, k, v, g, beta), expected
    )  # compiled again: it sees what was undone


@pytest.mark.parametrize("family", ONE_OF_EACH)
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms_get_the_original_and_second_derivatives_ours(
    family: str, T: int, counted: list[int]
) -> None:
    hf, name = module(family), integration.FAMILIES[family][1 if T == 1 else 0]
    x = [normal(i, 1, T, 2, 8).double() for i in range(3)]
    g = -normal(3, 1, T, 2, *[8] * (family == "kimi_linear")).abs().double()
    x = [*x, g, normal(4, 1, T, 2).sigmoid().double(), normal(5, 1, 2, 8, 8).double()]

    def rule(*x: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(hf, name)(
            *x[:3], g=x[3], beta=x[4], initial_state=x[5], output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    def loss(*x: Tensor) -> Tensor:
        o, state = rule(*x)
        return (o.double() ** 3).sum() + (state.double() ** 2).sum()

    def second(x: list[Tensor]) -> list[Tensor]:
        x = [t.clone().requires_grad_() for t in x]
        first = torch.autograd.grad(loss(*x), x, create_graph=True)
        return list(torch.autograd.grad(sum(d.square().sum() for d in first), x))

    def transformed() -> list[Tensor]:
        everything = tuple(range(6))
        tangents = tuple(torch.ones_like(t) for t in x)
        rows = [torch.stack([t, t]) for t in x]
        return [
            *torch.func.grad(loss, everything)(*x),
            torch.func.jvp(loss, tuple(x), tangents)[1],
            *(torch.vmap(rule)(*rows) if T > 1 else ()),  # the originals of one token write in place
            *torch.jit.trace(rule, tuple(x), check_trace=False)(*x),
        ]

    # The originals compute in float32.
    expected, expected_second = transformed(), second(x)
    with intarsia.integrations.accelerate_transformers():
        got = transformed()
        assert not counted
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(second(x), expected_second, rtol=1e-3, atol=1e-3)
        assert counted == [T]


def test_an_option_of_a_later_version_is_the_originals(counted: list[int]) -> None:
    def original(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, gate: Any = None) -> str:
        return "original"

    rule = integration._rule(original, "qwen3_next")
    x = torch.ones(1, 3, 1, 2)
    g = torch.zeros(1, 3, 1)
    assert rule(x, x, x, g=g, beta=g, gate=1) == "original"
    assert rule(x, x, x, g=g, beta=g, gate=None) != "original"
    assert counted == [3]


def test_it_is_undone_to_the_very_objects() -> None:
    names = {(family, name) for family in FAMILIES for name in integration.FAMILIES[family]}
    before = {(family, name): getattr(module(family), name) for family, name in names}
    with intarsia.integrations.accelerate_transformers() as outer:
        assert set(outer.patched) == {f"{family}.{name}" for family, name in names}
        assert f"{len(names)} functions" in repr(outer)
        assert "qwen3_next" in repr(outer)
        during = {(family, name): getattr(module(family), name) for family, name in names}
        assert all(during[key] is not before[key] for key in names)
        inner = intarsia.integrations.accelerate_transformers()
        assert inner.patched == outer.patched
        inner.undo()
        inner.undo()  # does nothing: it is not the outer's turn
        assert all(getattr(module(family), name) is during[family, name] for family, name in names)
    assert all(getattr(module(family), name) is before[family, name] for family, name in names)
    assert repr(outer) == "Acceleration(undone)"


def test_an_error_in_the_block_undoes_it_too() -> None:
    before = module("qwen3_next").torch_chunk_gated_delta_rule
    with pytest.raises(KeyError), intarsia.integrations.accelerate_transformers():
        raise KeyError
    assert module("qwen3_next").torch_chunk_gated_delta_rule is before


def test_what_others_put_in_the_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = module("qwen3_next")
    monkeypatch.setattr(hf, "torch_chunk_gated_delta_rule", hf.torch_chunk_gated_delta_rule)
    theirs = object()
    with intarsia.integrations.accelerate_transformers():
        hf.torch_chunk_gated_delta_rule = theirs
    assert hf.torch_chunk_gated_delta_rule is theirs


def test_other_devices_get_the_original(counted: list[int]) -> None:
    with torch.device("meta"):
        model = build("qwen3_5")
    with intarsia.integrations.accelerate_transformers():
        logits = model(tokens().to("meta")).logits
    assert logits.shape == (2, T, VOCABULARY)
    assert not counted


def test_a_seq_idx_of_several_rows_is_refused() -> None:
    with intarsia.integrations.accelerate_transformers(), pytest.raises(UnsupportedError, match="seq_idx"):
        build("qwen3_next")(tokens(), seq_idx=torch.zeros(2, T, dtype=torch.int32))


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.14.2")
    with pytest.raises(UnsupportedError, match=r"transformers>=5\.15"):
        intarsia.integrations.accelerate_transformers()


def test_no_transformers_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"intarsia\[hf\]"):
        intarsia.integrations.accelerate_transformers()


def test_the_import_is_light() -> None:
    code = "import sys, intarsia.integrations; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
