"""A few tokens at once by programs between exchanges: the same numbers as the readable layers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import PoolError, ShapeError
from intarsia.layers.packed import Packing
from intarsia.layers.parted import Parted
from intarsia.mixers import KDAConfig, MixerConfig, MLAConfig
from intarsia.mixers.deltanet import DeltaNetConfig
from intarsia.mixers.gated_deltanet import GatedDeltaNetConfig
from intarsia.model import InferenceModel, LanguageModel, ModelConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig
from intarsia.model.experts import Router
from intarsia.model.few_tokens import FEW
from intarsia.model.states import ModelStates
from intarsia.ops import Sequences, native
from intarsia.ops.packed_weights import WeightFormat
from support.mixer_cases import CASES

pytestmark = pytest.mark.skipif(
    native.missing_reason() is not None, reason="without kernels the layers compute few tokens too"
)

LATENT = MLAConfig(num_heads=2, nope_dim=8, rope_dim=6, v_dim=10, kv_rank=12)
WHOLE = "mla, each channel gated"
"""What gates the values, which are made of latents behind the exchange, is no part of a program."""
PARTED = [name for name in CASES if name.startswith(("kda", "gdn", "mla")) and name != WHOLE]
PARTED += ["deltanet", "deltanet gated"]


def model_of(mixer: MixerConfig, dtype: torch.dtype = torch.float32, **options: Any) -> LanguageModel:
    config = ModelConfig(
        vocab_size=50,
        d_model=24,
        depth=2,
        layout="a",
        mixers={"a": mixer},
        feed_forward=options.pop("feed_forward", FeedForwardConfig(40)),
        **options,
    )
    model = LanguageModel(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def both(model: LanguageModel, weights: WeightFormat | None = None) -> tuple[InferenceModel, InferenceModel]:
    """One that computes few tokens by programs, and one that has the layers."""
    fast, readable = InferenceModel(model, weights), InferenceModel(model, weights)
    assert fast.few_tokens is not None
    readable.few_tokens = None
    return fast, readable


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(2))


def close(got: Tensor | None, expected: Tensor | None, tolerance: float = 2e-5) -> None:
    assert got is not None
    assert expected is not None
    assert got.dtype == expected.dtype == torch.float32
    assert got.shape == expected.shape
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_every_mixer_computes_the_same(name: str) -> None:
    fast, readable = both(model_of(CASES[name]))
    states, others = fast.init_states(2), readable.init_states(2)
    for piece in tokens(2, 14).split([9, 1, 3, 1], dim=1):
        one, other = fast(piece, states, last_only=False), readable(piece, others, last_only=False)
        close(one.logits, other.logits)
        assert one.states is not None
        assert other.states is not None
        states, others = one.states, other.states
        assert states.tokens == others.tokens
    for a, b in zip(states.layers, others.layers, strict=True):
        for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTED)
def test_these_mixers_are_taken_apart(name: str) -> None:
    made = InferenceModel(model_of(CASES[name]))
    assert all(isinstance(layer, Parted) and layer.parts for layer in made.layers)


def test_latent_attention_with_a_gate_of_each_channel_is_called_whole() -> None:
    made = InferenceModel(model_of(CASES[WHOLE]))
    assert not any(isinstance(layer, Parted) for layer in made.layers)


@pytest.mark.parametrize("placement", ["before", "after", "stream"])
@pytest.mark.parametrize("mixer", [CASES["kda"], LATENT, CASES["gated deltanet 2"]])
@pytest.mark.parametrize("experts", [False, True])
def test_norms_stand_where_the_model_has_them(placement: Any, mixer: MixerConfig, experts: bool) -> None:
    options: dict[str, Any] = {"experts": ExpertsConfig(4, 16, 2, num_shared=1)} if experts else {}
    model = model_of(
        mixer,
        norm_placement=placement,
        residual_scale=1.7,
        zero_centered_norms=experts,
        tie_embeddings=experts,
        **options,
    )
    fast, readable = both(model)
    begun = readable(tokens(1, 8), readable.init_states(1)).states
    close(fast(tokens(1, 2), begun).logits, readable(tokens(1, 2), begun).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_embedding_branches_and_head(dtype: torch.dtype) -> None:
    """The programs divide the residual stream where the layers multiply what is added to it; with an epsilon that is
    not small beside the stream."""
    model = model_of(CASES["kda"], dtype, embed_scale=1.3, branch_scale=0.22, head_scale=3.1, norm_eps=1e-2)
    fast, readable = both(model)
    begun = readable(tokens(1, 8), readable.init_states(1)).states
    expected = readable(tokens(1, 2), begun).logits
    close(fast(tokens(1, 2), begun).logits, expected, 2e-5 if dtype.itemsize == 4 else 0.03)


EXPERTS = {
    "sigmoid": ExpertsConfig(8, 16, 3, num_shared=1, routed_scaling_factor=2.4),
    "softmax without shared experts": ExpertsConfig(
        8, 16, 2, num_shared=0, scores="softmax", normalize=False
    ),
    "groups": ExpertsConfig(8, 16, 2, num_shared=2, num_groups=4, num_active_groups=2),
    "biased weights": ExpertsConfig(6, 16, 6, num_shared=1, routing_weights="biased"),
    "gated": ExpertsConfig(8, 16, 3, num_shared=1, shared_gate=True),
    "clamped, with biases": ExpertsConfig(8, 16, 3, num_shared=0, biases=True, activation="clamped"),
    "latent": ExpertsConfig(8, 16, 3, num_shared=1, d_latent=12),
    "without gates": ExpertsConfig(8, 16, 3, num_shared=1, activation="relu2"),
    "situ": ExpertsConfig(8, 16, 3, num_shared=1, activation="situ", d_latent=12, latent_norm=True),
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_chosen_and_added_up_as_the_layers_do(name: str, dtype: torch.dtype) -> None:
    model = model_of(CASES["kda"], experts=EXPERTS[name], dense_layers=0)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.data.normal_(generator=generator)
            module.bias.normal_(0, 0.2, generator=generator)
    model = model.to(dtype)
    packing = Packing("float32", least=0)
    fast, readable = InferenceModel(model, packing), InferenceModel(model, packing)
    readable.few_tokens = None
    assert fast.few_tokens is not None
    plain = name not in ("gated", "clamped, with biases", "latent", "without gates", "situ")
    assert fast.few_tokens.stages == (2 if plain else 4)
    begun = readable(tokens(2, 8), readable.init_states(2)).states
    expected = readable(tokens(2, 5), begun, last_only=False)
    close(
        fast(tokens(2, 5), begun, last_only=False).logits,
        expected.logits,
        2e-5 if dtype.itemsize == 4 else 0.03,
    )


@pytest.mark.parametrize("mixer", [CASES["kda"], CASES["gdn"], LATENT])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("last_only", [False, True])
def test_ragged_sequences_and_pools(mixer: MixerConfig, pooled: bool, last_only: bool) -> None:
    model = model_of(mixer)
    fast, readable = both(model)
    lengths = [(3, 4), (1, 1), (2, 3)] if last_only else [(3, 4), (0, 2), (1, 1), (2, 0)]
    states, others = (each.init_states(2) for each in (fast, readable))
    if pooled:
        pool = fast.new_pool(3, 64)
        states = pool.view(pool.restore(states))
    for each in lengths:
        row, seqs = tokens(1, sum(each)), Sequences(each)
        one, other = fast(row, states, seqs, last_only), readable(row, others, seqs, last_only)
        close(one.logits, other.logits)
        assert one.states is not None
        assert other.states is not None
        states, others = one.states, other.states
        assert states.tokens == others.tokens


def test_a_row_does_not_depend_on_the_others() -> None:
    for mixer in (CASES["kda"], LATENT):
        fast, _ = both(model_of(mixer, torch.bfloat16))
        begun = fast(tokens(3, 6), fast.init_states(3)).states
        assert begun is not None
        together = fast(tokens(3, 1), begun).logits
        assert together is not None
        for n in range(3):
            alone = fast(tokens(3, 1)[n : n + 1], begun.select([n])).logits
            assert alone is not None
            assert torch.equal(alone[0], together[n])


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_packed_weights_in_bfloat16(weights: WeightFormat | None) -> None:
    config = ModelConfig(
        vocab_size=512,
        d_model=256,
        depth=4,
        layout="kda gdn deltanet mla",
        mixers={
            "kda": KDAConfig(num_heads=2, head_dim=128),
            "gdn": GatedDeltaNetConfig(num_heads=2, head_dim=128),
            "deltanet": DeltaNetConfig(num_heads=2, head_dim=128),
            "mla": MLAConfig(num_heads=4, nope_dim=64, rope_dim=16, v_dim=64, kv_rank=128),
        },
        feed_forward=FeedForwardConfig(384),
    )
    model = LanguageModel(config)
    model.init_weights(0)
    fast, readable = both(model.to(torch.bfloat16), weights)
    begun = readable(tokens(1, 30), readable.init_states(1)).states
    # Each rounds to bfloat16 in places of its own.
    close(fast(tokens(1, 4), begun).logits, readable(tokens(1, 4), begun).logits, 0.02)


def test_many_tokens_and_no_state_go_through_the_layers() -> None:
    fast, readable = both(model_of(CASES["kda"]))
    many = tokens(1, FEW + 1)
    one, other = fast(many, fast.init_states(1)), readable(many, readable.init_states(1))
    assert one.logits is not None
    assert other.logits is not None
    assert torch.equal(one.logits, other.logits)
    close(fast(many[:, :4]).logits, fast(many[:, :4], fast.init_states(1)).logits)


def test_what_cannot_be_is_said_before_anything_is_written() -> None:
    fast, _ = both(model_of(LATENT))
    pool = fast.new_pool(2, 700)
    view = pool.view([pool.take(), pool.take()])
    with pytest.raises(ShapeError, match="last_only wants the last one of each"):
        fast(tokens(1, 2), view, Sequences((2, 0)))
    with pytest.raises(ShapeError, match="states are of 2 sequences"):
        fast(tokens(3, 1), view)

    def go_on_until_it_is_full() -> None:
        states: ModelStates | None = view
        for _ in range(60):
            assert states is not None
            seen.append(states.tokens)
            states = fast(tokens(2, 16), states).states

    seen: list[tuple[int, ...]] = []
    with pytest.raises(PoolError):
        go_on_until_it_is_full()
    assert pool.tokens((0, 1)) == seen[-1] > (300, 300)


def test_weights_are_read_where_they_are() -> None:
    model = model_of(CASES["kda"], tie_embeddings=False)
    made = InferenceModel(model)
    begun = made.init_states(1)
    before = made(tokens(1, 1), begun).logits
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert before is not None
    close(made(tokens(1, 1), begun).logits, 2 * before)
