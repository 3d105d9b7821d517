"""Mixers that choose what they read, against transformers' layers at lengths beyond their budgets, and against MLA."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.mixers import AttentionConfig
from intarsia.mixers.base import HandedOn
from intarsia.mixers.dsa import DSAConfig, SparseLatentAttention
from intarsia.mixers.mla import MLAConfig
from intarsia.model import LanguageModel, ModelConfig
from intarsia.model.config import FeedForwardConfig
from intarsia.ops import Sequences

D, T, BUDGET = 48, 150, 20
SIZES = {
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "q_lora_rank": 24,
}
OURS: dict[str, Any] = {
    "num_heads": 3,
    "kv_rank": 20,
    "nope_dim": 12,
    "rope_dim": 8,
    "v_dim": 10,
    "q_rank": 24,
}
INDEX: dict[str, Any] = {"index_heads": 4, "index_dim": 16, "top_k": BUDGET}
NAMES = {
    "q_a_proj": "q_down_proj",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_proj",
    "kv_a_proj_with_mqa": "kv_down_proj",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up_proj",
    "o_proj": "o_proj",
    "indexer.wq_b": "indexer.q_proj",
    "indexer.wk": "indexer.k_proj",
    "indexer.k_norm": "indexer.k_norm",
    "indexer.weights_proj": "indexer.head_weights",
}
PAIRS = [*range(0, 8, 2), *range(1, 8, 2)]
"""Neighbouring channels as halves: half-split rotation then turns the same pairs."""


def inputs(B: int = 2, tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(B, tokens, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
        if "norm" in name and "weight" in name:
            parameter.data += 1


def layer(**options: Any) -> SparseLatentAttention:
    made = DSAConfig(**{**OURS, **INDEX, "rotate": True, **options}).build(D).double()
    fill(made)
    return made


def turned(weight: Tensor, heads: int, kept: int) -> Tensor:
    """The rotated rows behind the `kept` first ones of each head in the order of halves."""
    rows = weight.unflatten(0, (heads, -1)).clone()
    rows[:, kept : kept + 8] = rows[:, kept : kept + 8][:, PAIRS]
    return rows.flatten(0, 1)


@pytest.mark.parametrize("model", ["deepseek_v32", "glm_moe_dsa"])
def test_dsa_equals_transformers_beyond_its_budget(model: str) -> None:
    pytest.importorskip("transformers")
    from transformers import DeepseekV32Config, GlmMoeDsaConfig
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

    # With few heads many pairs score nothing at all, and of those that are equal theirs takes any.
    more = {
        "hidden_size": D, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 4,
        "index_n_heads": 24, "index_head_dim": 16, "index_topk": BUDGET, **SIZES,
    }  # fmt: skip
    x = inputs()
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, T, T, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    if model == "deepseek_v32":
        config = DeepseekV32Config(**more)
        config._attn_implementation = "eager"
        theirs, rotary = deepseek.DeepseekV32Attention(config, 0), deepseek.DeepseekV32RotaryEmbedding(config)
    else:
        config = GlmMoeDsaConfig(**more, indexer_types=["full"] * 4)
        config._attn_implementation = "eager"
        theirs, rotary = glm.GlmMoeDsaAttention(config, 0), glm.GlmMoeDsaRotaryEmbedding(config)
    fill(theirs)
    theirs = theirs.double()
    weights = {}
    for name, weight in theirs.state_dict().items():
        module, _, kind = name.rpartition(".")
        weights[f"{NAMES[module]}.{kind}"] = weight.clone()
    weights["q_proj.weight"] = turned(weights["q_proj.weight"], 3, 12)
    weights["kv_down_proj.weight"] = turned(weights["kv_down_proj.weight"], 1, 20)
    if model == "glm_moe_dsa":
        weights["indexer.q_proj.weight"] = turned(weights["indexer.q_proj.weight"], 24, 0)
        for name in ("k_proj.weight", "k_norm.weight", "k_norm.bias"):
            weights[f"indexer.{name}"] = turned(weights[f"indexer.{name}"], 1, 0)
    theta = config.rope_parameters["rope_theta"]
    ours = layer(rope_theta=theta, index_heads=24)
    ours.load_state_dict(weights, strict=True)
    angles = rotary(x.float(), torch.arange(T)[None])
    with torch.no_grad():
        found = theirs(x, position_embeddings=tuple(a.double() for a in angles), attention_mask=mask)
        y = ours(x)[0]
    # They score in float32, and their angles are float32.
    assert (y - found[0]).abs().max() < 2e-5 * found[0].abs().max()
    dense = MLAConfig(**OURS, rotate=True, rope_theta=theta).build(D).double()
    dense.load_state_dict({n: w for n, w in weights.items() if "indexer" not in n}, strict=True)
    error = (dense(x)[0] - found[0]).abs().amax(dim=(0, 2)) / found[0].abs().max()
    assert error[:BUDGET].max() < 2e-5 < 1e-2 < error[BUDGET:].max()


def test_pooled_dsa_equals_transformers_beyond_its_budget() -> None:
    pytest.importorskip("transformers")
    from transformers.models.glm5_next import modeling_glm5_next as glm
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

    config = Glm5NextTextConfig(
        hidden_size=D, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=4, index_n_heads=24,
        index_head_dim=16, index_topk=BUDGET, index_kpool=4, rms_norm_eps=1e-6,
        **{**SIZES, "qk_rope_head_dim": 0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = glm.Glm5NextTextAttention(config, 3).double()
    fill(theirs)
    weights = {}
    for name, weight in theirs.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module in NAMES:
            weights[f"{NAMES[module]}.{kind}"] = weight.clone()
    weights["indexer.pool_gate.weight"] = theirs.indexer.index_kpool_compress_gate.detach().clone()
    weights["indexer.pool_places"] = theirs.indexer.index_kpool_compress_ape.detach().clone()
    ours = layer(rope_dim=0, rotate=False, index_heads=24, index_pool=4)
    ours.load_state_dict(weights, strict=True)
    x = inputs()
    with torch.no_grad():
        found = theirs(x, torch.ones(2, T, dtype=torch.bool))[0]
        y = ours(x)[0]
    # They score in float32.
    assert (y - found).abs().max() < 2e-5 * found.abs().max()


def test_pools_are_one_entry_of_each_and_their_loss_reaches_the_indexer_alone() -> None:
    ours, x = layer(rotate=False, index_pool=4, index_loss=1.0), inputs(1)
    _, state = ours(x, ours.init_state(1))
    assert state.tensors()["index_keys"].shape[1] == T // 4
    assert state.nbytes() == ours.cost().state_bytes(T)
    # The others are counted whole: a token reads its pools and the tail.
    assert ours.cost().keys_read(100_000) == BUDGET + 3 + 25_000
    for seqs in (None, Sequences((100, 47, 3))):
        y, _, told = ours(x, None, seqs, side=("loss",))
        names = [n for n, _ in ours.named_parameters()]
        grads = torch.autograd.grad(told.loss, list(ours.parameters()), allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            assert (grad is not None) == name.startswith("indexer"), name
            assert grad is None or grad.abs().max() > 1e-9, name
        assert y.isfinite().all()


@pytest.mark.parametrize("pieces", [[BUDGET], [7, 12, 1]], ids=str)
def test_it_is_mla_as_long_as_all_tokens_are_picked(pieces: list[int]) -> None:
    ours, dense = layer(), MLAConfig(**OURS, rotate=True).build(D).double()
    dense.load_state_dict({n: w for n, w in ours.state_dict().items() if not n.startswith("indexer")})
    x = inputs(tokens=BUDGET)
    state, outputs = ours.init_state(2), []
    for piece in x.split(pieces, dim=1):
        y, state = ours(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), dense(x)[0], rtol=1e-9, atol=1e-9)


def test_a_token_in_decoding_reads_the_latents_that_it_picked_and_no_others() -> None:
    ours, x = layer(), inputs(1)
    _, state = ours(x[:, :-1], ours.init_state(1))
    y, _, handed = ours(x[:, -1:], state, handed=HandedOn())
    picked = handed.picked[0, 0, 0].long()
    assert len(picked) == len(picked.unique()) == BUDGET
    spoilt = {name: tensor.clone() for name, tensor in state.tensors().items()}
    unread = torch.ones(T - 1, dtype=torch.bool)
    unread[picked[picked < T - 1]] = False
    assert unread.sum() >= T - 1 - BUDGET
    spoilt["latents"][:, unread] = torch.nan
    assert torch.equal(ours(x[:, -1:], state.with_tensors(spoilt))[0], y)
    assert y.isfinite().all()


def test_what_it_reads_is_stated() -> None:
    cost, size = layer().cost(), torch.float64.itemsize
    assert cost.keys_read(100_000) == BUDGET + 100_000
    assert cost.bytes_read(100_000) == size * (BUDGET * 28 + 100_000 * 16)
    assert cost.state_bytes(100_000) == size * 100_000 * (28 + 16)
    shared = layer(shares=True).cost()
    assert shared.bytes_read(100_000) == shared.bytes_read(1000) == size * BUDGET * 28
    assert shared.mixing_flops(100_000) < 2 * 3 * 48 * BUDGET < cost.mixing_flops(100_000)


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_that_shares_reads_what_the_last_indexer_picked(packed: bool) -> None:
    first, second, own = layer(), layer(shares=True), layer()
    second.kv_up_proj.weight.data *= 2
    own.load_state_dict({**first.state_dict(), **second.state_dict()})
    x, seqs = inputs(1 if packed else 2), Sequences((100, 50)) if packed else None
    y, _, handed = first(x, None, seqs, handed=HandedOn())
    assert handed.indexed
    # An indexer of the same weights and inputs picks the same.
    got, _, after = second(x, None, seqs, handed=handed)
    assert torch.equal(after.picked, handed.picked)
    assert torch.equal(got, own(x, None, seqs)[0])
    assert not torch.equal(got, y)
    for nothing in (None, HandedOn()):
        with pytest.raises(ConfigError, match="there is none with an indexer"):
            second(x, None, seqs, handed=nothing)


def model_of(layout: str) -> LanguageModel:
    mixers = {
        "dsa": DSAConfig(**OURS, **INDEX, rotate=True),
        "shared": DSAConfig(**OURS, **INDEX, rotate=True, shares=True),
        "attention": AttentionConfig(num_heads=2, head_dim=8),
    }
    config = ModelConfig(
        vocab_size=64,
        d_model=D,
        depth=len(layout.split()),
        layout=layout,
        mixers={name: options for name, options in mixers.items() if name in layout.split()},
        feed_forward=FeedForwardConfig(d_hidden=32),
    )
    model = LanguageModel(config)
    model.init_weights(0)
    return model.double()


def test_a_model_hands_choices_on_whole_and_in_pieces_and_computed_again() -> None:
    model = model_of("dsa shared attention shared")
    tokens = torch.randint(0, 64, (2, 60), generator=torch.Generator().manual_seed(0))
    whole = model(tokens).logits
    states, found = model.init_states(2), []
    for piece in tokens.split([40, 1, 19], dim=1):
        out = model(piece, states=states)
        found.append(out.logits)
        states = out.states
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-9, atol=1e-9)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.activation_checkpointing = recompute
        model(tokens[:, :-1], targets=tokens[:, 1:]).nll.mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == ("indexer" in name), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


def test_a_step_cannot_be_recorded_where_tokens_are_chosen() -> None:
    from intarsia.layers.recorded import Places, RecordedEntries

    ours = layer()
    pages = {
        name: torch.zeros(2, 16, *entry.shape, dtype=torch.float64)
        for name, entry in ours.memory.growing.items()
    }
    one = torch.zeros(1, dtype=torch.int64)
    state = RecordedEntries(
        ours.memory, pages, Places(one, one, one, one, one + 1, torch.zeros(1, 2, dtype=torch.int64))
    )
    with pytest.raises(UnsupportedError, match="cannot be recorded"):
        ours(inputs(1, 1), state)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"top_k": 0}, "positive"),
        ({"index_dim": 6}, "rotates the 8 channels"),
        ({"index_pool": 3}, "are of pools"),
        ({"index_pool": 4}, "needs rotate=False"),
        ({"index_loss": -1.0}, "at least 0"),
    ],
)
def test_options_that_cannot_be_right(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(DSAConfig(**OURS, **INDEX, rotate=True), **changes)


@pytest.mark.parametrize("top_k", [BUDGET, T])
@pytest.mark.parametrize("packed", [False, True])
def test_the_indexers_loss_and_the_models_reach_nothing_of_each_other(packed: bool, top_k: int) -> None:
    ours, seqs = layer(top_k=top_k, index_loss=0.5), Sequences((100, 50)) if packed else None
    x = inputs(1 if packed else 2).requires_grad_()
    y, _, told = ours(x, None, seqs, side=("loss",))
    torch.testing.assert_close(y, ours(x, None, seqs)[0], rtol=0, atol=0)
    parameters = dict(ours.named_parameters())
    by_loss = torch.autograd.grad(told.loss, [x, *parameters.values()], allow_unused=True)
    by_model = torch.autograd.grad(y.square().sum(), [x, *parameters.values()], allow_unused=True)
    for name, one, other in zip(["x", *parameters], by_loss, by_model, strict=True):
        of_indexer = name.startswith("indexer")
        assert (one is not None) == of_indexer, name
        assert (other is not None) == (not of_indexer), name
        assert one is None or one.abs().max() > 1e-9, name
    whole = layer(top_k=top_k, index_loss=1.0)(x, None, seqs, side=("loss", "largest_logits"))[2]
    torch.testing.assert_close(2 * told.loss, whole.loss)
    assert whole.largest_logits.shape == (3,)


def test_the_indexers_loss_is_over_what_attention_gives() -> None:
    """Of heads whose keys are made of the latents, as the paper writes it: the sum of their weights."""
    ours, x = layer(top_k=T, index_loss=1.0), inputs(1)
    told = ours(x, None, side=("loss",))[2]
    c, positions = ours.config, torch.arange(T)
    q_input, q, latents = ours._projected(x, positions)
    k, _ = ours._expanded(latents)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = torch.einsum("thk,shk->hts", q[0], k[0]) * c.scale
    p = weights.masked_fill(hidden, -torch.inf).softmax(-1).sum(0) / c.num_heads
    index_q, index_k, w = ours.indexer(x, q_input, positions)
    scores = torch.einsum(
        "th,ths->ts", w[0], (torch.einsum("thd,sd->ths", index_q[0], index_k[0]) / 4).relu()
    )
    log_scores = scores.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0)
    expected = (torch.special.xlogy(p, p) - p * log_scores).sum()
    torch.testing.assert_close(told.loss, expected, rtol=1e-9, atol=1e-9)


def test_training_brings_the_indexer_to_attention() -> None:
    """By its own loss alone, everything else frozen, it picks nearly what gets most of attention."""
    length, one_head = 80, {"num_heads": 1, "index_dim": 32, "index_loss": 1.0}
    ours, everything, x = layer(**one_head), layer(**one_head, top_k=length), inputs(2, length)
    assert ours.indexer is not None
    everything.indexer = ours.indexer
    with torch.no_grad():
        _, q, latents = ours._projected(x, torch.arange(length))
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        logits = torch.einsum("bthk,bshk->bhts", q, ours._expanded(latents)[0]) * ours.config.scale
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)[:, BUDGET:]

    def share() -> float:
        """Of the attention that is given, what those get that are picked."""
        with torch.no_grad():
            picked = ours(x, None, handed=HandedOn())[2].picked[:, BUDGET:, 0].long()
        return float(p.gather(2, picked).sum(-1).mean())

    before, best = share(), float(p.topk(BUDGET).values.sum(-1).mean())
    optimizer = torch.optim.Adam(ours.indexer.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        everything(x, None, side=("loss",))[2].loss.div(2 * length).backward()
        optimizer.step()
    assert before < share() < best
    assert best - share() < 0.2 * (best - before)


def test_the_loss_needs_whole_sequences() -> None:
    ours = layer()
    assert ours.side_results == ("largest_logits", "loss", "divergence", "picked")
    assert layer(index_loss=0.0).side_results == layer(shares=True).side_results == ("largest_logits",)
    with pytest.raises(UnsupportedError, match="whole sequences"):
        ours(inputs(2), ours.init_state(2), side=("loss",))
