"""Mixers that read blocks of tokens, against transformers' layers at lengths beyond their budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.layers.rope import rotate
from intarsia.mixers import AttentionConfig, Mixer, MixerConfig
from intarsia.mixers.infllm2 import InfLLM2Config
from intarsia.mixers.moba import MoBAConfig
from intarsia.mixers.msa import MSAConfig
from intarsia.mixers.nsa import NSAConfig
from intarsia.mixers.qsa import QSAConfig
from intarsia.mixers.static_sparse import StaticSparseConfig

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


NSA = NSAConfig(
    4, 8, 2, compress_block=12, compress_stride=4, compress_dim=5, select_block=8, select_count=5, window=10
)


def nsa_written_out(ours: Mixer, x: Tensor) -> Tensor:
    """With the paper's indices: the block i is of the tokens from `i d` to `i d + l - 1`, and equation 9 for what a
    block of l' tokens is given of the shares of attention to compressed ones."""
    small, d, large, n, w = 12, 4, 8, 5, 10
    place = torch.arange(x.shape[1])
    q, k, v = (t[0] for t in ours._projected(x, place))
    near_k = rotate(ours.window_k_proj(x).unflatten(-1, (2, 8)), place)[0]
    near_v = ours.window_v_proj(x)[0].unflatten(-1, (2, 8))
    gates = torch.sigmoid(ours.gate_proj(x))[0].unflatten(-1, (3, 4))
    compressed = []
    for rows, net in (
        (ours.compressed_k_proj(x)[0], ours.compress_k), (ours.compressed_v_proj(x)[0], ours.compress_v),
    ):  # fmt: skip
        blocks = []
        for begin in range(0, len(rows) - small + 1, d):
            heads = rows[begin : begin + small].unflatten(-1, (2, 8))
            flat = torch.stack([(heads[:, g] + net.places).flatten() for g in range(2)])
            blocks.append(torch.nn.functional.silu(flat @ net.up.T) @ net.down.T)
        compressed.append(torch.stack(blocks))
    small_k = rotate(compressed[0][None], d * torch.arange(len(compressed[0])))[0]
    small_v = compressed[1]
    o = torch.zeros_like(q)
    for t in range(len(q)):
        seen = max((t + 1 - small) // d + 1, 0) if t + 1 >= small else 0
        for g in range(2):
            heads = slice(2 * g, 2 * g + 2)
            asked = q[t, heads] / 8**0.5
            share = (asked @ small_k[:seen, g].T).softmax(1)
            o_small = share @ small_v[:seen, g]
            given = dict(enumerate(share.sum(0).tolist()))
            score = {}
            for j in range(t // large + 1):
                # The paper counts so that what is summed ends with the block's own last stride.
                end = (j + 1) * (large // d) - 1
                parts = [end - a - b for a in range(large // d) for b in range(small // d)]
                if any(i in given for i in parts):
                    score[j] = sum(given.get(i, 0.0) for i in parts)
            always = {0, t // large, max(t // large - 1, 0)}
            rest = sorted((j for j in score if j not in always), key=lambda j: (-score[j], j))
            picked = always | set(rest[: n - len(always)])
            there = torch.tensor([s for s in range(t + 1) if s // large in picked])
            o_large = (asked @ k[there, g].T).softmax(1) @ v[there, g]
            last = slice(max(t - w + 1, 0), t + 1)
            o_near = (asked @ near_k[last, g].T).softmax(1) @ near_v[last, g]
            for gate, found in zip(gates[t], (o_small, o_large, o_near), strict=True):
                o[t, heads] += gate[heads, None] * found
    return ours._finished(o[None], x)


STATIC = StaticSparseConfig(4, 8, 2, block_size=4, local_blocks=2, stride_blocks=5, sink_blocks=1)


def static_written_out(config: StaticSparseConfig, ours: Mixer, x: Tensor) -> Tensor:
    """One token at a time, by the sets of the papers."""
    q, k, v = (t[0] for t in ours._projected(x, torch.arange(x.shape[1])))
    size, s, o = config.block_size, config.stride_blocks, torch.zeros_like(q)
    for t in range(len(q)):
        own = t // size

        def is_read(b: int, own: int = own) -> bool:
            apart = (own - b) % s == 0 if config.pattern == "strided" else b % s == s - 1
            return own - b < config.local_blocks or b < config.sink_blocks or apart

        there = torch.tensor([j for j in range(t + 1) if is_read(j // size)])
        for h in range(4):
            o[t, h] = (k[there, h // 2] @ q[t, h] / 8**0.5).softmax(0) @ v[there, h // 2]
    return ours._finished(o[None], x)


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("sizes", [(4, 2, 5, 1), (1, 7, 7, 0), (3, 1, 1, 2), (2, 3, 4, 9)], ids=str)
@torch.no_grad()
def test_static_equals_the_papers_written_out(pattern: str, sizes: tuple[int, ...]) -> None:
    names = ("block_size", "local_blocks", "stride_blocks", "sink_blocks")
    config = dataclasses.replace(STATIC, pattern=pattern, **dict(zip(names, sizes, strict=True)))
    ours, x = layer(config), inputs(1, 90)
    torch.testing.assert_close(ours(x)[0], static_written_out(config, ours, x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_static_reads_is_stated() -> None:
    """The last token reads no more than the cost says, and what it does not read may be anything."""
    ours, x = layer(STATIC), inputs(1)
    _, state = ours(x[:, :-1], ours.init_state(1))
    y, read = ours(x[:, -1:], state)[0], 1
    for token in range(T - 1):
        spoilt = {name: tensor.clone() for name, tensor in state.tensors().items()}
        spoilt["keys"][:, token] = spoilt["values"][:, token] = torch.nan
        read += not torch.equal(ours(x[:, -1:], state.with_tensors(spoilt))[0], y)
    cost = ours.cost()
    stated = cost.keys_read(T)
    assert stated - 2 * STATIC.block_size <= read <= stated
    growth = cost.bytes_read(200_000) - cost.bytes_read(100_000)
    assert growth == 100_000 // 5 * 2 * 2 * 8 * torch.float64.itemsize


@torch.no_grad()
def test_what_moba_reads_is_stated() -> None:
    """What the heads of a key head read together is no more than the cost says, and not everything."""
    ours, x = layer(MOBA), inputs(1)
    _, state = ours(x[:, :-1], ours.init_state(1))
    y, read = ours(x[:, -1:], state)[0], 1
    for token in range(T - 1):
        spoilt = {name: tensor.clone() for name, tensor in state.tensors().items()}
        # Whether a key is chosen depends on its block's mean, which is kept apart.
        spoilt["values"][:, token, 0] = torch.nan
        read += not torch.equal(ours(x[:, -1:], state.with_tensors(spoilt))[0], y)
    growing = ours.memory.growing
    most = (2 * (MOBA.top_k - 1) + 1) * MOBA.block_size
    assert growing["keys"].reads == growing["values"].reads == most
    assert ours.most_read - MOBA.block_size < read <= min(most, T - 1)
    entry, mean = 2 * 8 * torch.float64.itemsize, 2 * 8 * 8
    assert ours.cost().bytes_read(100_000) == 2 * most * entry + 100_000 // MOBA.block_size * mean


@torch.no_grad()
def test_nsa_equals_the_paper_written_out() -> None:
    ours, x = layer(NSA), inputs(1)
    expected = nsa_written_out(ours, x)
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-9, atol=1e-9)
    everything = dataclasses.replace(NSA, select_count=100).build(D, 1e-6).double()
    everything.load_state_dict(ours.state_dict())
    error = (everything(x)[0] - expected).abs().amax(dim=(0, 2)) / expected.abs().max()
    assert error[: NSA.selected].max() < 1e-9 < 1e-3 < error[NSA.selected :].max()


@torch.no_grad()
def test_what_nsa_keeps_and_reads_is_stated() -> None:
    ours, size = layer(NSA), torch.float64.itemsize
    _, state = ours(inputs(1), ours.init_state(1))
    tensors, head = state.tensors(), 2 * 8
    assert tensors["compressed_keys"].shape[1] == tensors["compressed_values"].shape[1] == T // 4
    assert (tensors["compressed_keys_tail"].shape[1], tensors["window_keys_tail"].shape[1]) == (11, 9)
    cost = ours.cost()
    assert cost.state_bytes(T) == state.nbytes()
    fixed = 2 * head * (11 + 9) * size
    assert cost.bytes_read(100_000) == fixed + 2 * head * (5 * 8 + 100_000 // 4) * size
    assert cost.state_bytes(100_000) == fixed + 2 * head * (100_000 + 100_000 // 4) * size


def test_a_block_of_nsa_is_seen_from_its_last_token_on() -> None:
    """Of a token the compressed keys and values reach the outputs of the last token of their block, and of no earlier
    one: what a network makes of several tokens is not there before the last of them."""
    ours, x = layer(NSA), inputs(1, 40)
    y = ours(x)[0]
    with torch.no_grad():
        for name in ("k_proj", "v_proj", "window_k_proj", "window_v_proj"):
            getattr(ours, name).weight.zero_()
    alone = ours(x)[0]
    assert not torch.equal(alone, y)
    for token in (11, 12, 20, 27):
        changed = x.clone()
        changed[:, token] += 1
        moved = (ours(changed)[0] - alone)[0].abs().amax(1) > 0
        # The token's own queries and gates, and whoever sees a block that it is in.
        first = max((token // 4 + 1) * 4 - 1, 11)
        expected = {token, *range(first, 40)}
        assert set(moved.nonzero().flatten().tolist()) == expected


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
