"""Models whose weights are packed for inference: the same numbers, or near ones, from fewer bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.inference import Sampling, generate
from intarsia.layers.packed import PackedLinear, Packing, bytes_of_weights, packed
from intarsia.mixers import KDAConfig, Mixer, MLAConfig
from intarsia.model import InferenceModel, LanguageModel, ModelConfig
from intarsia.model.config import ExpertsConfig, FeedForwardConfig
from intarsia.model.experts import Experts, PackedExperts
from intarsia.model.loss import IGNORED
from intarsia.ops.packed_weights import WeightFormat
from support.mixer_cases import CASES, build


def small(experts: bool = False, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Large enough that most of its weights are packed."""
    config = ModelConfig(
        vocab_size=1024,
        d_model=128,
        depth=4,
        layout="kda kda kda mla",
        mixers={
            "kda": KDAConfig(num_heads=4, head_dim=128),
            "mla": MLAConfig(num_heads=4, nope_dim=128, rope_dim=16, v_dim=128, kv_rank=64),
        },
        feed_forward=FeedForwardConfig(512),
        experts=ExpertsConfig(num_experts=6, num_active=2, d_hidden=128, num_shared=1) if experts else None,
    )
    model = LanguageModel(config)
    model.init_weights(0)
    return model.to(dtype)


TOKENS = torch.randint(0, 1024, (1, 40), generator=torch.Generator().manual_seed(0))


def decoded(model: InferenceModel) -> torch.Tensor:
    """Logits of a piece, and of tokens one by one behind it, `[1, T, vocabulary]`."""
    states, logits = model.init_states(1), []
    for piece in TOKENS.split([25, *[1] * 15], dim=1):
        out = model(piece, states=states, last_only=False)
        assert out.logits is not None
        states = out.states
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", CASES)
def test_a_mixer_with_packed_weights_computes_the_same(name: str) -> None:
    mixer = build(name, torch.float32)
    made: Mixer = packed(mixer, Packing("float32", least=0))
    linear = [m for m in mixer.modules() if type(m) is nn.Linear]
    kept = [m for m in made.modules() if type(m) is nn.Linear]
    assert len(kept) == len(mixer.reads_weights) < len(linear)
    assert made.cost().parameters == mixer.cost().parameters
    x = torch.randn(2, 12, mixer.d_model, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for before, after in ((x[:, :9], x[:, 9:]), (x[:, :1], x[:, 1:])):
            expected, state = mixer(before, mixer.init_state(2))
            got, own = made(before, made.init_state(2))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                made.for_inference()(after, own)[0], mixer(after, state)[0], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_as_they_are_are_not_copied_and_give_the_same(experts: bool, dtype: torch.dtype) -> None:
    model = small(experts, dtype)
    made = InferenceModel(model)
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for module in made.model.modules():
        if isinstance(module, PackedLinear | PackedExperts):
            assert all(each.data.data_ptr() in shared for each in module.all_packed())
    plain = model(TOKENS).logits
    error = (decoded(made) - plain).norm() / plain.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(
    ("weights", "allowed", "bits"), [("bfloat16", 0.01, 16), ("int8", 0.02, 8), ("int4", 0.25, 4)]
)
def test_fewer_bytes_give_near_logits(
    weights: WeightFormat, allowed: float, bits: int, experts: bool
) -> None:
    model = small(experts)
    made = InferenceModel(model, weights)
    plain = model(TOKENS).logits
    error = (decoded(made) - plain).norm() / plain.norm()
    assert 0 < error < allowed
    packs = [m for m in made.model.modules() if isinstance(m, PackedLinear | PackedExperts)]
    assert len(packs) > 15
    assert isinstance(made.model.head, PackedLinear)
    assert made.model.head.packed_weights.format == ("int8" if weights == "int4" else weights)
    for module in packs:
        for each in module.all_packed():
            numbers = torch.Size(each.shape).numel()
            assert (
                each.nbytes <= numbers * (8 if module is made.model.head and bits == 4 else bits) / 8 * 1.07
            )
    assert made.weight_bytes < InferenceModel(model).weight_bytes
    # The model itself stays what it was.
    assert torch.equal(model(TOKENS).logits, plain)


@pytest.mark.parametrize("weights", [None, "bfloat16"])
def test_copies_that_layers_have_made_are_counted(weights: WeightFormat | None) -> None:
    made = InferenceModel(small(), weights)
    # The last layer has its 4 heads' 128 rows of keys and 128 of values, of 64 numbers each, twice.
    assert made.weight_bytes == bytes_of_weights(made.model.modules()) + 4 * (128 + 128) * 64 * 4


def test_what_is_not_packed_is_shared() -> None:
    model = small(experts=True)
    made = InferenceModel(model, "int4")
    assert made.model.embed.weight is model.embed.weight
    for ours, given in zip(made.model.modules(), model.modules(), strict=False):
        if isinstance(ours, Experts):
            assert isinstance(given, Experts)
            assert ours.router.weight is given.router.weight
    kept = [name for name, m in made.model.named_modules() if type(m) is nn.Linear]
    assert any("beta_proj" in name for name in kept)
    assert all("kv_up_proj" in name or model.get_submodule(name).weight.numel() < 1 << 16 for name in kept)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_several_prompts_are_continued_as_if_each_were_alone(weights: WeightFormat | None) -> None:
    made = InferenceModel(small(experts=True), weights)
    prompts = [[1, 2, 3], [7], [5, 6, 7, 8, 9]]
    greedy = Sampling(greedy=True)
    together = list(generate(made, prompts, max_tokens=6, sampling=greedy))
    for n, prompt in enumerate(prompts):
        alone = list(generate(made, prompt, max_tokens=6, sampling=greedy))
        assert [token for number, token in together if number == n] == alone


def test_the_numbers_of_a_packed_weight_are_not_to_be_read() -> None:
    made = InferenceModel(small(experts=True), "int8").model
    assert torch.isnan(made.head.weight).all()
    assert made.head.weight.shape == (1024, 128)


def test_it_evaluates_and_leaves_the_model_in_its_mode() -> None:
    model = small(experts=True).train()
    made = InferenceModel(model)
    assert not any(module.training for module in made.model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("experts", [False, True])
def test_one_that_is_asked_to_train_says_what_can_be_trained(experts: bool) -> None:
    model = small(experts)
    made = InferenceModel(model, "int8")
    for asked in (made.train, made.model.train):
        with pytest.raises(UnsupportedError, match="train the model that they were packed from"):
            asked()
    with pytest.raises(UnsupportedError, match="train the model or the layer that they were packed from"):
        made.model(TOKENS, TOKENS)
    assert made.train(False) is made
    loss = model.train()(TOKENS, TOKENS).nll.mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_groups_are_those_of_all_packed_weights() -> None:
    made = InferenceModel(small(experts=True), "int8", group=32).model
    for module in made.modules():
        if isinstance(module, PackedLinear | PackedExperts):
            assert {each.group for each in module.all_packed()} == {32}


def test_wrong_formats_are_errors() -> None:
    with pytest.raises(ConfigError, match="int3"):
        InferenceModel(small(), "int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a group of int4"):
        InferenceModel(small(), "int4", group=48)


@pytest.mark.parametrize("shape", [(1, 40), (3, 7)])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_likelihood_of_targets_is_that_of_the_logits(
    shape: tuple[int, int], weights: WeightFormat
) -> None:
    ready = InferenceModel(small(), weights)
    tokens = torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, dims=1)
    targets[:, -2] = IGNORED
    with torch.no_grad():
        nll = ready.model(tokens, targets=targets).nll
        logits = ready.model(tokens).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(nll, expected.view(shape), atol=1e-5, rtol=1e-5)
    assert not nll[:, -2].any()
