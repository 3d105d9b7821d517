"""Softmax attention of Intarsia inside transformers: the same results, and no mask where none is needed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import UnsupportedError

pytest.importorskip("transformers", minversion="5.15")
from transformers import masking_utils

from intarsia.integrations.transformers_attention import CausalMask, attention, mask, register_attention
from support.transformers_models import OTHERS, Tensors, around, assert_close, build, tokens

FAMILIES = list(OTHERS)
CHUNKED = "llama4_text"
"""The family with a pattern that is not described."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(side: str, length: int = 20) -> Tensor:
    """The mask of two prompts of which the second is shorter."""
    there = torch.ones(2, length, dtype=torch.int64)
    there[1, slice(0, 6) if side == "left" else slice(length - 6, None)] = 0
    if side == "between":
        there[1] = 1
        there[1, 8:12] = 0
    return there


def use(model: Any, name: str) -> Any:
    register_attention()
    model.set_attn_implementation(name)
    return model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the masks that were made."""
    shapes: list[tuple[int, ...]] = []
    make = CausalMask.made

    def counting(self: CausalMask) -> Tensor:
        shapes.append(tuple(self.shape))
        return make(self)

    monkeypatch.setattr(CausalMask, "made", counting)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "left", "right", "between"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree(
    family: str, padding: str | None, dtype: torch.dtype, made: list[tuple[int, ...]]
) -> None:
    model = build(family).to(dtype)
    there = None if padding is None else padded(padding)
    counted = torch.ones(2, 20, dtype=torch.bool) if there is None else there.bool()

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensors:
        return {"logits": model(tokens(length=20), attention_mask=there).logits[counted]}

    expected = around(model, logits)
    made.clear()
    assert_close(logits(use(model, "intarsia")), *expected, dtype=dtype)
    # Each layer makes its own where padding stands between tokens; what is not described was made before.
    assert len(made) == (0 if padding != "between" else 1 if family == CHUNKED else 2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_agrees(family: str, options: dict[str, Any], made: list[tuple[int, ...]]) -> None:
    model: Any = build(family)
    both = [
        use(model, name).generate(
            tokens(length=20), attention_mask=padded("left"), max_new_tokens=12, do_sample=False, **options
        )
        for name in (model.config._attn_implementation, "intarsia")
    ]
    assert torch.equal(*both)
    assert not made


@pytest.mark.parametrize("pieces", [(20, 1, 1, 18), (3, 30, 7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_in_pieces_agrees(family: str, pieces: tuple[int, ...], made: list[tuple[int, ...]]) -> None:
    model: Any = use(build(family), "intarsia")
    text, cache, found = tokens(length=40), None, []
    with torch.inference_mode():
        whole = model(text).logits
        for piece in text.split(pieces, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert not made


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_gradients_agree(family: str) -> None:
    model: Any = build(family).train()

    def gradients(model: Any) -> Tensors:
        model.zero_grad()
        model(tokens(length=20), attention_mask=padded("left")).logits[
            padded("left").bool()
        ].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = around(model, gradients)
    assert_close(gradients(use(model, "intarsia")), *expected, dtype=torch.float32)


def test_dropout_and_sequences_packed_by_their_positions_go_to_pytorch() -> None:
    model: Any = build("llama")
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    with torch.no_grad():
        apart = torch.cat([model(part).logits for part in tokens(1, 20).split([9, 11], 1)], 1)
        together = use(model, "intarsia")(tokens(1, 20), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    use(build("llama"), "intarsia")
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    q, k, v = normal(0, 1, 4, 6, 8), normal(1, 1, 2, 6, 8), normal(2, 1, 2, 6, 8)
    described = mask(1, 6, 6)
    exact, _ = attention(module, q, k, v, described)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = torch.stack(
            [attention(module, q, k, v, described, dropout=0.5)[0] for _ in range(4000)]  # type: ignore[arg-type]
        )
    assert dropped.std(0)[0, 3:].min() > 0.01
    # The mean of 4000 that spread so much is as near as this, five times in a row of a million.
    assert ((dropped.mean(0) - exact).abs() <= 5 * dropped.std(0) / 4000**0.5 + 1e-6).all()


@pytest.mark.parametrize("function", ["causal", "sliding", "chunked", "bidirectional", "both"])
@pytest.mark.parametrize(("past", "queries"), [(0, 9), (5, 4), (8, 1)])
def test_masks_are_those_of_transformers(function: str, past: int, queries: int) -> None:
    """Described or not, whoever looks into a mask finds that of PyTorch's attention."""
    functions = {
        "causal": (masking_utils.causal_mask_function, None),
        "sliding": (masking_utils.sliding_window_causal_mask_function(3), 3),
        "chunked": (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)), 3),
        "bidirectional": (masking_utils.bidirectional_mask_function, None),
        "both": (
            masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == 2), None
        ),
    }  # fmt: skip
    pattern, local = functions[function]
    for there in (None, padded("left", 9).bool(), padded("right", 9).bool(), padded("between", 9).bool()):
        call: dict[str, Any] = {
            "batch_size": 2, "q_length": queries, "kv_length": past + queries, "q_offset": past,
            "mask_function": pattern, "attention_mask": there, "local_size": local, "allow_is_causal_skip": False,
        }  # fmt: skip
        ours, theirs = mask(**call), masking_utils.sdpa_mask(**call)
        assert isinstance(ours, CausalMask) == (function in ("causal", "sliding"))
        assert torch.equal(ours & True, theirs)
        assert torch.equal(ours[:, :, -1:, 1:], theirs[:, :, -1:, 1:])


def test_a_mask_takes_no_memory_until_somebody_looks(made: list[tuple[int, ...]]) -> None:
    described = mask(1, 10**6, 10**6)
    assert described is not None
    assert described.shape == (1, 1, 10**6, 10**6)
    assert described.dtype == torch.bool
    assert not made


def test_torch_compile_gets_the_mask_itself() -> None:
    model: Any = use(build("llama"), "intarsia")
    with torch.no_grad():
        expected = model(tokens(length=20), attention_mask=padded("left")).logits
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
        got = compiled(tokens(length=20), attention_mask=padded("left")).logits
    there = padded("left").bool()
    torch.testing.assert_close(got[there], expected[there], rtol=1e-4, atol=1e-4)


def test_what_is_not_known_is_refused() -> None:
    q, k, v = normal(0, 1, 2, 6, 8), normal(1, 1, 2, 6, 8), normal(2, 1, 2, 6, 8)
    with pytest.raises(UnsupportedError, match="Linear gives attention softcap"):
        attention(nn.Linear(1, 1), q, k, v, mask(1, 6, 6), softcap=30.0)
    with pytest.raises(UnsupportedError, match="position_bias beside sinks"):
        attention(
            nn.Linear(1, 1), q, k, v, mask(1, 6, 6), s_aux=torch.zeros(2), position_bias=normal(3, 1, 2, 6, 6)
        )
