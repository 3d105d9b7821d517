"""Mixers that read blocks of tokens, against transformers' layers at lengths beyond their budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.mixers import AttentionConfig, Mixer, MixerConfig
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.mixers.moba import MoBAConfig
from intarsia.mixers.msa import MSAConfig
from intarsia.mixers.qsa import QSAConfig

D, T = 40, 150


def inputs(B: int = 2, tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(B, tokens, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)


def layer(config: MixerConfig) -> Mixer:
    made = config.build(D, 1e-6).double()
    fill(made)
    return made


MSA = MSAConfig(
    6, 16, 2, rope=0.5, rope_theta=5e6, qk_norm="head", zero_centered_qk_norm=True,
    index_dim=12, index_block_size=8, index_topk_blocks=3,
)  # fmt: skip


@pytest.mark.parametrize("local", [0, 1, 2])
def test_msa_equals_transformers_beyond_its_budget(local: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig

    config = MiniMaxM3VLTextConfig(
        hidden_size=D, num_attention_heads=6, num_key_value_heads=2, head_dim=16, rotary_dim=8,
        num_hidden_layers=1, layer_types=["minimax_m3_sparse"], index_n_heads=2, index_head_dim=12,
        index_block_size=8, index_topk_blocks=3, index_local_blocks=local,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = m3.MiniMaxM3VLAttention(config, 0).double()
    fill(theirs)
    ours = layer(dataclasses.replace(MSA, index_local_blocks=local))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = inputs()
    angles = m3.MiniMaxM3VLRotaryEmbedding(config)(x.float(), torch.arange(T)[None])
    mask = torch.zeros(1, 1, T, T, dtype=torch.float64)
    mask = mask.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    with torch.no_grad():
        found = theirs(x, tuple(a.double() for a in angles), mask)[0]
        y = ours(x)[0]
        dense = AttentionConfig(**shared_options(MSA)).build(D, 1e-6).double()
        dense.load_state_dict({n: w for n, w in ours.state_dict().items() if "indexer" not in n})
        everything = dense(x)[0]
    # They score in float32, and their angles are float32.
    assert (y - found).abs().max() < 2e-5 * found.abs().max()
    error = (everything - found).abs().amax(dim=(0, 2)) / found.abs().max()
    assert error[:24].max() < 2e-5 < 1e-2 < error[24:].max()


QSA = QSAConfig(
    6, 16, 2, rope=0.5, rope_theta=1e7, qk_norm="head", zero_centered_qk_norm=True, output_gate=True,
    index_heads=24, index_dim=12, index_budget=24, index_ratio=4,
)  # fmt: skip


def test_qsa_equals_transformers_beyond_its_budget() -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen4
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(
        hidden_size=D, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_hidden_layers=4,
        rms_norm_eps=1e-6, indexer_n_heads=24, indexer_kv_heads=1, indexer_head_dim=12, indexer_budget=24,
        indexer_compress_ratio=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = qwen4.Qwen4ExpTextAttention(config, 3).double()
    fill(theirs)
    weights = dict(theirs.state_dict())
    both = weights.pop("q_proj.weight").unflatten(0, (6, 2, 16))
    weights["q_proj.weight"], weights["output_gate_proj.weight"] = (x.flatten(0, 1) for x in both.unbind(1))
    fused = weights.pop("indexer.index_qk_proj.weight")
    weights["indexer.q_proj.weight"], weights["indexer.k_proj.weight"] = fused.split([24 * 12, 12])
    for name in ("q", "k"):
        weights[f"indexer.{name}_norm.weight"] = weights.pop(f"indexer.{name}_layernorm.weight")
    ours = layer(QSA)
    ours.load_state_dict(weights, strict=True)
    x = inputs()
    place = torch.arange(T, dtype=torch.float64)[:, None] * 1e7 ** (-torch.arange(0, 8, 2) / 8)
    angles = torch.cat([place, place], dim=-1)[None].expand(2, -1, -1)
    seen = torch.ones(T, T, dtype=torch.bool).tril()[None, None].expand(2, 1, T, T)
    mask = torch.zeros(2, 1, T, T, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    with torch.no_grad():
        found = theirs(x, (angles.cos(), angles.sin()), mask)[0]
        y = ours(x)[0]
    # They score in float32, and so does their softmax.
    assert (y - found).abs().max() < 2e-5 * found.abs().max()


def everything(config: AttentionConfig, ours: Mixer, x: Tensor) -> Tensor:
    """What softmax attention of the same weights gives."""
    dense = AttentionConfig(**shared_options(config)).build(D, 1e-6).double()
    dense.load_state_dict({n: w for n, w in ours.state_dict().items() if n in dense.state_dict()})
    return dense(x)[0]


MOBA = MoBAConfig(4, 8, 2, block_size=16, top_k=3)
INFLLM2 = InfLLM2Config(
    4, 8, 2, rope=0.0, kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=5
)


def moba_written_out(ours: Mixer, x: Tensor) -> Tensor:
    """One token and head at a time, as the paper has it."""
    q, k, v = (t[0] for t in ours._projected(x, torch.arange(x.shape[1])))
    o = torch.zeros_like(q)
    for t in range(len(q)):
        own = t // 16
        for h in range(4):
            keys, values = k[: t + 1, h // 2], v[: t + 1, h // 2]
            gate = {b: float(q[t, h] @ keys[16 * b : 16 * (b + 1)].mean(0)) for b in range(own)}
            picked = {own, *sorted(gate, key=lambda b: -gate[b])[:2]}
            there = torch.tensor([s for s in range(t + 1) if s // 16 in picked])
            o[t, h] = (keys[there] @ q[t, h] / 8**0.5).softmax(0) @ values[there]
    return ours._finished(o[None], x)


def infllm2_written_out(ours: Mixer, x: Tensor) -> Tensor:
    q, k, v = (t[0] for t in ours._projected(x, torch.arange(x.shape[1])))
    o = torch.zeros_like(q)
    for t in range(len(q)):
        own = t // 8
        for g in range(2):
            heads, keys, values = slice(2 * g, 2 * g + 2), k[: t + 1, g], v[: t + 1, g]
            spans = [(4 * e, 4 * e + 8) for e in range(t) if 4 * e + 7 <= t]
            share = torch.zeros(0)
            if spans:
                means = torch.stack([keys[a:b].mean(0) for a, b in spans])
                share = (q[t, heads] @ means.T / 8**0.5).softmax(1).sum(0)
            score = {}
            for b in range(own + 1):
                inside = [
                    float(s) for (a, e), s in zip(spans, share, strict=True) if a < 8 * b + 8 and e > 8 * b
                ]
                if inside or b == 0 or b > own - 2:
                    score[b] = float("inf") if b == 0 or b > own - 2 else max(inside)
            picked = sorted(score, key=lambda b: (-score[b], b))[:5]
            there = torch.tensor([s for s in range(t + 1) if s // 8 in picked])
            o[t, heads] = (q[t, heads] @ keys[there].T / 8**0.5).softmax(1) @ values[there]
    return ours._finished(o[None], x)


@pytest.mark.parametrize(
    ("config", "written_out"),
    [(MOBA, moba_written_out), (INFLLM2, infllm2_written_out)],
    ids=["moba", "infllm2"],
)
@torch.no_grad()
def test_equals_the_paper_written_out(config: AttentionConfig, written_out: Any) -> None:
    ours, x = layer(config), inputs(1)
    expected = written_out(ours, x)
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-9, atol=1e-9)
    error = (everything(config, ours, x) - expected).abs().amax(dim=(0, 2)) / expected.abs().max()
    most = ours.most_read
    assert error[:most].max() < 1e-9 < 1e-3 < error[most:].max()


@pytest.mark.parametrize("config", [MOBA, INFLLM2, QSA], ids=lambda config: config.type)
def test_what_is_remembered_to_choose_by_is_one_entry_of_each_stride(config: AttentionConfig) -> None:
    ours = layer(config)
    stride = {"moba": 16, "infllm2": 4, "qsa": 4}[config.type]
    x = inputs(1)
    _, state = ours(x, ours.init_state(1))
    name = "index_keys" if config.type == "qsa" else "means"
    assert state.tensors()[name].shape[1] == T // stride
    cost = ours.cost()
    assert cost.state_bytes(T) == state.nbytes()
    growth = cost.bytes_read(200_000) - cost.bytes_read(100_000)
    assert growth == 100_000 // stride * state.tensors()[name][0, 0].nbytes
    pool = ours.new_pool(2, 1000)
    assert pool.pages[name].shape[1] == max(16 // stride, 1)


def test_pages_hold_whole_strides() -> None:
    with pytest.raises(ConfigError, match="whole strides of 16"):
        layer(MOBA).new_pool(2, 1000, page_size=24)


def shared_options(config: AttentionConfig) -> dict[str, Any]:
    """The options that softmax attention has too."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(AttentionConfig)}


def test_a_token_of_msa_reads_the_blocks_that_it_picked_and_no_others() -> None:
    ours, x = layer(MSA), inputs(1)
    _, state = ours(x[:, :-1], ours.init_state(1))
    y, after = ours(x[:, -1:], state)
    read = set()
    for token in range(0, T - 1, 8):
        spoilt = {name: tensor.clone() for name, tensor in state.tensors().items()}
        spoilt["values"][:, token : token + 8] = torch.nan
        got = ours(x[:, -1:], state.with_tensors(spoilt))[0]
        if not torch.equal(got, y):
            read.add(token // 8)
    # Each of two groups picks three blocks, the own one among them.
    assert T // 8 in read
    assert 3 <= len(read) <= 5
    assert after.tokens == (T,)


def test_what_msa_reads_is_stated() -> None:
    cost, size = layer(MSA).cost(), torch.float64.itemsize
    assert cost.bytes_read(100_000) == size * (24 * 2 * 2 * 16 + 100_000 * 12)
    assert cost.state_bytes(100_000) == size * 100_000 * (2 * 2 * 16 + 12)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"index_local_blocks": 4}, "are among"),
        ({"index_heads": 4}, "must divide"),
        ({"index_dim": 6}, "rotates the 8 channels"),
        ({"sinks": True}, "sinks"),
        ({"index_topk_blocks": 0}, "positive"),
    ],
)
def test_options_that_cannot_be_right(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(MSA, **changes)
