"""Softmax attention, whole and in a window, against independent implementations: transformers, and dense masks."""

from __future__ import annotations

import importlib
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from intarsia.errors import ConfigError
from intarsia.layers.growing import GrowingTensor
from intarsia.layers.rope import Yarn, rotate
from intarsia.mixers import Attention, AttentionConfig, SlidingWindowConfig, config_from_dict, config_to_dict
from intarsia.ops import softmax_attention
from intarsia.ops.attention import largest_logit
from intarsia.training.qk_clip import scale_rows_

D, T = 48, 150


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name == "sinks" else 0.2, generator=generator)
        if "norm" in name:
            parameter.data += 1
        parameter.requires_grad_(False)


def inputs(B: int = 2) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def theirs(model: str, cls: str, config: Any, layer: int, window: int | None = None) -> tuple[Any, Tensor]:
    """Their attention layer with random weights, and what it makes of the inputs."""
    hf = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config._attn_implementation = "eager"
    module = getattr(hf, f"{cls}Attention")(config, layer)
    randomise(module)
    x = inputs()
    angles = None
    if config.rope_parameters is not None:
        angles = getattr(hf, f"{cls}RotaryEmbedding")(config)(x, torch.arange(T)[None])
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance >= (T if window is None else window))
    mask = torch.zeros(T, T).masked_fill(hidden, -torch.inf)[None, None]
    return module, module(x, position_embeddings=angles, attention_mask=mask)[0]


def check(config: AttentionConfig, weights: dict[str, Tensor], expected: Tensor, eps: float = 1e-6) -> None:
    """Our layer with these weights gives what theirs gives: all at once, and in pieces with a state."""
    ours = config.build(D, norm_eps=eps)
    ours.load_state_dict(weights, strict=True)
    x = inputs()
    state = ours.init_state(2)
    pieces = []
    for piece in x.split([20, 1, 1, 100, 28], dim=1):
        y, state = ours(piece, state)
        pieces.append(y)
    for got in (ours(x)[0], torch.cat(pieces, dim=1)):
        # Both work in float32 and round differently: a few roundings of the largest value.
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 * expected.abs().max().item() * 8)


def test_gated_and_normed_attention_equals_transformers_qwen3_next() -> None:
    transformers = pytest.importorskip("transformers")
    H, HKV, K = 4, 2, 16
    config = transformers.Qwen3NextConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=HKV, head_dim=K, num_hidden_layers=4
    )
    module, expected = theirs("qwen3_next", "Qwen3Next", config, 3)
    w = module.state_dict()
    # Each head's query is followed by its gate.
    q, gate = w.pop("q_proj.weight").view(H, 2, K, D).unbind(1)
    w |= {"q_proj.weight": q.reshape(-1, D), "output_gate_proj.weight": gate.reshape(-1, D)}
    ours = AttentionConfig(H, K, HKV, rope=0.25, qk_norm="head", zero_centered_qk_norm=True, output_gate=True)
    check(ours, w, expected)


@pytest.mark.parametrize("window", [None, 7, 128])
@pytest.mark.parametrize("truncate", [False, True])
def test_sinks_biases_and_yarn_equal_transformers_gpt_oss(window: int | None, truncate: bool) -> None:
    transformers = pytest.importorskip("transformers")
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    config = transformers.GptOssConfig(
        hidden_size=D, num_attention_heads=8, num_key_value_heads=2, head_dim=12, num_hidden_layers=2,
        num_local_experts=2, sliding_window=window, max_position_embeddings=2048,
        rope_parameters={**yarn, "truncate": truncate, "original_max_position_embeddings": 64},
    )  # fmt: skip
    module, expected = theirs("gpt_oss", "GptOss", config, 1 if window is None else 0, window)
    options = {
        "rope_theta": 150000.0,
        "yarn": Yarn(factor=32.0, original_length=64, truncate=truncate),
        "sinks": True,
        "bias": True,
    }
    ours = (
        AttentionConfig(8, 12, 2, **options)
        if window is None
        else SlidingWindowConfig(8, 12, 2, **options, window=window)
    )
    check(ours, module.state_dict(), expected)


@pytest.mark.parametrize("rope", [0.0, 1.0])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_with_all_heads_normed_equals_transformers_olmo_hybrid(rope: float, kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OlmoHybridConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=4
    )
    if not rope:
        config.rope_parameters = None
    module, expected = theirs("olmo_hybrid", "OlmoHybrid", config, 3)
    ours = AttentionConfig(4, 12, kv_heads, rope=rope, qk_norm="channels")
    check(ours, module.state_dict(), expected)


@pytest.mark.parametrize("window", [1, 5, 64, 149, 150, 1000])
def test_a_window_equals_transformers_mistral(window: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=window
    )
    module, expected = theirs("mistral", "Mistral", config, 0, window)
    check(SlidingWindowConfig(4, 12, 2, window=window), module.state_dict(), expected)


def test_a_window_with_each_head_normed_equals_transformers_qwen3() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=40
    )
    module, expected = theirs("qwen3", "Qwen3", config, 0, 40)
    check(SlidingWindowConfig(4, 12, 2, qk_norm="head", window=40), module.state_dict(), expected)


def test_the_mask_of_transformers_has_the_window_that_is_tested_here() -> None:
    pytest.importorskip("transformers")
    from transformers.masking_utils import sliding_window_causal_mask_function

    sees = sliding_window_causal_mask_function(3)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    assert torch.equal(sees(0, 0, i, j), (j <= i) & (j > i - 3))


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by a mask over all pairs; and the largest logit of each head."""
    n, m, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    logits = scale * torch.einsum("bihk,bjhk->bhij", q, k)
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
    logits = logits.masked_fill((j > i) | (j <= i - (window or m)), -torch.inf)
    weights = logits.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return torch.einsum("bhij,bjhv->bihv", weights / total, v), logits.amax(dim=(0, 2, 3))


@pytest.mark.parametrize("value_dim", [8, 12, 5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_blocks_of_queries_equal_a_dense_mask(with_sinks: bool, value_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, past, window in product((1, 2, 64, 65, 700), (0, 1, 70, 300), (None, 1, 2, 64, 65, 100, 600)):
        q, k, v = (
            torch.randn(2, length, heads, dim, generator=generator, dtype=torch.float64)
            for length, heads, dim in ((n, 4, 8), (n + past, 2, 8), (n + past, 2, value_dim))
        )
        sinks = torch.randn(4, generator=generator, dtype=torch.float64) if with_sinks else None
        expected, largest = dense(q, k, v, 0.3, window, sinks)
        got = softmax_attention(q, k, v, scale=0.3, window=window, sinks=sinks)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        if not past:
            recorded = largest_logit(q, k, scale=0.3, window=window, rows=100)
            torch.testing.assert_close(recorded, largest.float())


def test_a_window_holds_no_more_than_its_blocks() -> None:
    """No mask or copy of the keys grows with the square of the length."""
    T, window = 8192, 100
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = f(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    q = k = v = torch.zeros(1, T, 1, 8)
    with Sizes():
        softmax_attention(q, k, v, scale=1.0, window=window)
    assert max(sizes) <= T * window


@pytest.mark.parametrize(
    "case", ["plain", "bias", "grouped", "head", "zero-centred head", "channels", "window"]
)
def test_the_clip_brings_every_head_to_the_threshold(case: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "plain": {},
        "bias": {"bias": True, "sinks": True},
        "grouped": {"num_kv_heads": 2, "bias": True},
        "head": {"qk_norm": "head"},
        "zero-centred head": {"qk_norm": "head", "zero_centered_qk_norm": True, "num_kv_heads": 2},
        "channels": {"qk_norm": "channels", "output_gate": True},
        "window": {"window": 7},
    }[case]
    kind = SlidingWindowConfig if case == "window" else AttentionConfig
    mixer: Attention = kind(4, 12, **options).build(D)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return mixer(inputs(), side=("largest_logits",))[2].largest_logits

    before = logits()
    threshold = float(before.sort().values[1])
    for scale in mixer.logit_scales((threshold / before).clamp(max=1)):
        scale_rows_(scale)
    after = logits()
    assert bool((after <= threshold * (1 + 1e-5)).all())
    if "head" in case:
        # One weight for all heads: all are scaled alike.
        torch.testing.assert_close(after, before * (threshold / before.max()), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-4, atol=1e-5)


def test_a_limited_sequence_keeps_its_last_entries_and_overwrites_none() -> None:
    entries = torch.arange(400.0).view(1, -1, 1)
    held = [(0, GrowingTensor(entries[:, :0], limit=10))]
    storages = set()
    for count in [1] * 90 + [3, 10, 11, 25, 9] + [1] * 200:
        seen, sequence = held[-1]
        held.append((seen + count, sequence.append(entries[:, seen : seen + count])))
        storages.add(held[-1][1].content.untyped_storage().data_ptr())
        assert held[-1][1].content.untyped_storage().nbytes() <= 4 * 64
    for seen, sequence in held:
        assert torch.equal(sequence.content, entries[:, max(seen - 10, 0) : seen])
    # Two continuations of one sequence.
    seen, sequence = held[7]
    one, other = (sequence.append(torch.full((1, 4, 1), value)) for value in (-1.0, -2.0))
    assert one.content.flatten().tolist() == [1, 2, 3, 4, 5, 6, -1, -1, -1, -1]
    assert other.content.flatten().tolist() == [1, 2, 3, 4, 5, 6, -2, -2, -2, -2]
    assert len(storages) > 1


def test_the_window_state_stays_small() -> None:
    mixer = SlidingWindowConfig(4, 12, window=20).build(D)
    state = mixer.init_state(1)
    with torch.no_grad():
        for piece in inputs(1).split([70, 1, 1, 78], dim=1):
            _, state = mixer(piece, state)
    assert state.kind == "window"
    assert state.tokens == (T,)
    assert state.nbytes() == mixer.cost().state_bytes(T) == mixer.cost().state_bytes(20)
    again = state.with_tensors(state.tensors())
    assert (again.tokens, again.form.window) == ((T,), 20)


def test_options_survive_a_file_and_wrong_ones_are_named() -> None:
    config = SlidingWindowConfig(4, 12, yarn=Yarn(2.0, 64), window=9)
    values = config_to_dict(config)
    assert values["yarn"]["factor"] == 2.0
    assert config_from_dict(values) == config
    for options, message in (
        ({"qk_norm": "layer"}, "qk_norm"),
        ({"zero_centered_qk_norm": True}, "needs a qk_norm"),
        ({"yarn": {"factor": 2.0}}, "original_length"),
        ({"yarn": {"factor": 2.0, "original_length": 64, "beta": 1}}, "fast, slow"),
        ({"yarn": {"factor": -2.0, "original_length": 64}}, "yarn.factor"),
        ({"yarn": Yarn(2.0, 64), "rope": 0.0}, "rope=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            AttentionConfig(4, 12, **options)
    with pytest.raises(ConfigError, match="window"):
        SlidingWindowConfig(4, 12, window=0)


def test_rotation_is_exact_far_into_a_text() -> None:
    """An angle in float32 would be off by 1e-2 at a million tokens."""
    x = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([1_000_003, 2_000_005])
    got = rotate(x, positions)
    torch.testing.assert_close(got, rotate(x.double(), positions).float(), rtol=1e-6, atol=1e-6)
    angle = 1_000_003 * 10000.0 ** (-2 / 8)  # of the second pair
    expected = x[0, 0, 0, 1].item() * math.cos(angle) - x[0, 0, 0, 5].item() * math.sin(angle)
    assert got[0, 0, 0, 1].item() == pytest.approx(expected, abs=1e-6)
