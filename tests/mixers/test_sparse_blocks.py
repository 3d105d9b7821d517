"""Mixers that read blocks of tokens, against transformers' layers at lengths beyond their budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError
from intarsia.mixers import AttentionConfig, Mixer, MixerConfig
from intarsia.mixers.msa import MSAConfig

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
