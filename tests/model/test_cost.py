"""Stated costs against counted parameters, counted FLOPs and measured states."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from intarsia.errors import ConfigError
from intarsia.layers.cost import Cost, Entries
from intarsia.mixers import config_from_dict
from intarsia.model import ExpertsConfig, LanguageModel, cost_of, presets
from intarsia.model.experts import Experts
from intarsia.model.machine import MACHINES, Machine, machine_of
from support.mixer_cases import CASES

SMALL = [name for name in presets.names() if "nano" in name or "tiny" in name]


def products(function):
    """The FLOPs of products of matrices that `function` computes (fused attention is none to the counter)."""
    with FlopCounterMode(display=False) as counter:
        function()
    flops = counter.get_flop_counts()["Global"]
    return sum(count for op, count in flops.items() if "attention" not in str(op))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_parameters(name, tie):
    config = presets.get(name, tie_embeddings=tie)
    with torch.device("meta"):
        model = LanguageModel(config)
    cost = model.cost()
    assert cost.parameters == cost_of(config).parameters
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    embeddings = {id(module.weight): module.weight.numel() for module in (model.embed, model.head)}
    assert cost.embedding_parameters == sum(embeddings.values())
    assert cost.non_embedding_parameters == cost.parameters - cost.embedding_parameters
    for block, layer in zip(model.blocks, cost.layers, strict=True):
        assert layer.parameters == sum(parameter.numel() for parameter in block.parameters())
        assert layer.name == block.name


def test_active_parameters():
    dense, moe = presets.get("kimi-linear-tiny"), presets.get("kimi-linear-tiny-moe")
    cost = cost_of(dense)
    assert cost.active_parameters == cost.parameters
    assert cost_of(dense.replace(tie_embeddings=False)).active_parameters == cost.active_parameters
    cost, experts = cost_of(moe), moe.experts
    idle = experts.num_experts - experts.num_active
    assert (
        cost.parameters - cost.active_parameters
        == (moe.depth - 1) * idle * 3 * moe.d_model * experts.d_hidden
    )


@pytest.mark.parametrize("experts", [True, False])
def test_flops_of_products(make_model, tokens, experts):
    changes = {} if experts else {"experts": None}
    model = make_model(layout="mla attention mla-rope", **changes)
    cost, (B, T) = model.cost(), tokens.shape
    mixing = sum(layer.mixer.mixing_flops(T) for layer in cost.layers)
    assert products(lambda: model(tokens)) == B * T * (cost.forward_flops_per_token(T) - mixing)
    # Training is three forward passes; the loss keeps so few logits for the backward pass.
    training = products(lambda: model(tokens, targets=tokens).nll.sum().backward())
    assert training == B * T * (cost.training_flops_per_token(T) - 3 * mixing)


def test_flops_grow_with_the_length_where_attention_is():
    hybrid, full = (cost_of(presets.get(f"{name}-tiny")) for name in ("kimi-linear", "full"))
    growth = [
        cost.training_flops_per_token(64_000) - cost.training_flops_per_token(1_000)
        for cost in (hybrid, full)
    ]
    assert growth[1] == pytest.approx(4 * growth[0])
    assert hybrid.training_flops_per_token(100) == 3 * hybrid.forward_flops_per_token(100)


@pytest.mark.parametrize("name", ["kimi-linear-nano", "gdn-hybrid-nano", "full-nano"])
def test_state_bytes(name):
    model = LanguageModel(presets.get(name)).eval()
    model.init_weights(0)
    tokens = torch.zeros(3, 10, dtype=torch.int64)
    with torch.no_grad():
        states = model(tokens, states=model.init_states(3)).states
    assert states.nbytes() == model.cost().state_bytes(10, batch=3)
    assert model.init_states(3).nbytes() == model.cost().state_bytes(0, batch=3)


@given(st.integers(0, 60), st.integers(1, 7), st.none() | st.integers(1, 30), st.none() | st.integers(1, 9))
def test_entries(length: int, stride: int, window: int | None, reads: int | None) -> None:
    """Against tokens that come one by one, `stride` of which leave an entry that is of the last one's time."""
    kind = Entries(10, stride, None if window is None else window * stride, reads)
    kept = [token for token in range(length) if (token + 1) % stride == 0][-window if window else None :]
    assert kind.kept(length) == len(kept)
    assert kind.read(length) == len(kept[-reads:] if reads else kept)


def test_sparse_layers_can_be_told() -> None:
    """Compressed keys of every 16 tokens, an indexer's small ones, and of all others the 2048 best."""
    entries = (Entries(512, stride=16), Entries(128), Entries(1024, reads=2048))
    cost = Cost(0, 0, lambda length: 0.0, fixed_state_bytes=100, entries=entries)
    assert cost.state_bytes(32_000, batch=2) == 2 * (100 + 2000 * 512 + 32_000 * (128 + 1024))
    assert cost.keys_read(32_000) == 2000 + 32_000 + 2048
    assert cost.bytes_read(32_000) == 100 + 2000 * 512 + 32_000 * 128 + 2048 * 1024
    assert cost.bytes_written() == 100 + 32 + 128 + 1024
    # Pages of 64 tokens, with four entries of the first kind.
    assert cost.pool_bytes([32_000], 64) == 100 + 500 * (4 * 512 + 64 * 128 + 64 * 1024)
    assert cost.pool_bytes([32_001], 64) == 100 + 501 * (4 * 512 + 64 * 128 + 64 * 1024)


@pytest.mark.parametrize("case", CASES)
def test_the_last_tokens_flops_add_up(case: str) -> None:
    with torch.device("meta"):
        cost = CASES[case].build(32).cost()
    total = sum(cost.last_token_flops(length) for length in range(1, 41))
    assert total == pytest.approx(40 * cost.forward_flops_per_token(40))


@pytest.mark.parametrize("name", ["kimi-linear-nano", "gdn-hybrid-nano", "gpt-oss-nano", "full-nano"])
def test_states_in_bfloat16_and_what_is_read_of_them(name: str) -> None:
    config = presets.get(name)
    model = LanguageModel(config)
    model.init_weights(0)
    model = model.to(torch.bfloat16).eval()
    cost = cost_of(config, torch.bfloat16)
    assert cost.weight_bytes == model.cost().weight_bytes == 2
    with torch.no_grad():
        states = model(torch.zeros(1, 200, dtype=torch.int64), states=model.init_states(1)).states
    assert states.nbytes() == cost.state_bytes(200) == model.cost().state_bytes(200)
    per_layer = [layer.mixer.keys_read(200) for layer in cost.layers]
    expected = {"kda": 0, "gdn": 0, "mla": 200, "attention": 200, "window": 128}
    assert per_layer == [expected[layer] for layer in config.layers]
    assert cost.keys_read(200) == sum(per_layer)


@pytest.mark.parametrize("name", ["kda", "gdn", "retnet", "mamba2"])
def test_pools_of_states_of_a_fixed_size(name: str) -> None:
    options = {"type": name, "num_heads": 2, "head_dim": 16}
    mixer = config_from_dict({**options, "state_dim": 8} if name == "mamba2" else options).build(32)
    assert mixer.new_pool(5).nbytes == mixer.cost().pool_bytes([0, 1, 7, 100, 3], page_size=16)


@pytest.mark.parametrize("case", ["attention", "mla", "window", "fox"])
def test_pools_of_pages(case: str) -> None:
    """The pages that sequences hold after their tokens, and what has a fixed size beside them."""
    options = next(config for config in CASES.values() if config.type == case)
    mixer = options.build(32)
    lengths = (1, 16, 17, 70)
    pool = mixer.new_pool(len(lengths), sum(lengths) + 100)
    slots = [pool.take() for _ in lengths]
    with torch.no_grad():
        for slot, length in zip(slots, lengths, strict=True):
            mixer(torch.randn(1, length, 32), pool.view([slot]))
    page_size = pool.paging.page_size
    of_page = sum(x[0].nbytes for x in pool.pages.values())
    used = next(iter(pool.pages.values())).shape[0] - pool.free_pages
    fixed = sum(x.nbytes for x in pool.fixed.values())
    assert used * of_page + fixed == mixer.cost().pool_bytes(lengths, page_size)


def test_experts_that_serve_any_of_some_tokens() -> None:
    """Against all choices that two tokens can make of their experts."""
    config = ExpertsConfig(num_experts=5, d_hidden=8, num_active=2)
    cost = Experts(16, config).cost()
    assert cost.parameters_read(1) == cost.active_parameters
    choices = list(itertools.combinations(range(5), 2))
    used = [len({*one, *other}) for one in choices for other in choices]
    expert = 3 * 16 * 8
    expected = cost.active_parameters + (sum(used) / len(used) - 2) * expert
    assert cost.parameters_read(2) == pytest.approx(expected)
    assert cost.parameters_read(10_000) == pytest.approx(cost.parameters)
    dense = cost_of(presets.get("full-nano")).layers[0].feed_forward
    assert dense.parameters_read(1) == dense.parameters_read(9) == dense.parameters


CHANGES: list[dict[str, Any]] = [
    {"activation": "relu2"},
    {"d_latent": 6},
    {"d_latent": 6, "latent_norm": True},
    {"biases": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_experts_of_other_kinds_have_as_many_parameters_as_they_say(changes: Any) -> None:
    config = ExpertsConfig(num_experts=5, d_hidden=8, num_active=2, **changes)
    module = Experts(16, config)
    assert module.cost().parameters == sum(p.numel() for p in module.parameters())


def test_rooflines() -> None:
    machine = Machine("slow", flops=100.0, bandwidth=10.0)
    assert machine.seconds(1000, 20) == 10
    assert machine.seconds(100, 20) == 2
    config = presets.get("kimi-linear-nano")
    cost = cost_of(config, torch.bfloat16)
    computes, reads = Machine("", 1.0, math.inf), Machine("", math.inf, 1.0)
    state = sum(layer.mixer.bytes_read(64) + layer.mixer.bytes_written() for layer in cost.layers)
    # Every weight is read for a token but the embedding's rows of the others; tied, they are the head.
    assert cost.decode_seconds(reads, 64) == 2 * cost.parameters + state
    assert cost.decode_seconds(reads, 64, batch=3) == 2 * cost.parameters + 3 * state
    decoded = sum(cost.decode_seconds(computes, length) for length in range(1, 65))
    assert decoded == pytest.approx(64 * cost.forward_flops_per_token(64))
    logits = 2 * config.vocab_size * config.d_model
    assert cost.prefill_seconds(computes, 64) == pytest.approx(decoded - 63 * logits)
    assert cost.prefill_seconds(reads, 64) == 2 * cost.parameters + cost.state_bytes(64)
    assert 1 / cost.training_tokens_per_second(computes, 64) == pytest.approx(3 * decoded / 64)


def test_machines() -> None:
    assert machine_of("h100") is MACHINES["h100"]
    made = machine_of("2.5:80")
    assert (made.flops, made.bandwidth) == (2.5e12, 80e9)
    for text in ("", "2", "2:", ":3", "a:b", "0:1", "-1:1", "nan:1", "1:inf"):
        with pytest.raises(ConfigError, match=r"such as 2\.5:80"):
            machine_of(text)
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        machine_of("h10")
