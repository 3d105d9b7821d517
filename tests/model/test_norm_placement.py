"""Where the norms of a block stand: before mixer and feed-forward, after them, or in the residual stream."""

from __future__ import annotations

import json

import pytest
import torch

from intarsia.errors import ConfigError
from intarsia.model import LanguageModel, ModelConfig
from intarsia.model.initialization import init_weights
from intarsia.model.language_model import cost_of

PLACEMENTS = {"kda": "before", "mla": "after", "attention": "stream"}


def test_each_block_adds_up_as_its_placement_says(make_model):
    model = make_model(
        layout="kda mla attention", norm_placement=PLACEMENTS, residual_scale=3.5, experts=None
    ).double()
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for block, placement in zip(model.blocks, ("before", "after", "stream"), strict=True):
        expected = x
        for norm, f in (
            (block.mixer_norm, lambda h, block=block: block.mixer(h)[0]),
            (block.feed_forward_norm, block.feed_forward),
        ):
            if placement == "before":
                expected = expected + f(norm(expected))
            elif placement == "after":
                expected = expected + norm(f(expected))
            else:
                expected = 3.5 * norm(expected) + f(norm(expected))
        torch.testing.assert_close(block(x)[0], expected)


def test_one_placement_for_all_is_the_same_as_naming_all(make_model):
    layers = {"layout": "kda mla", "experts": None}
    tokens = torch.randint(0, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    logits = [
        make_model(norm_placement=placement, **layers)(tokens).logits
        for placement in ("after", {"kda": "after", "mla": "after"}, "before")
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_the_placement_is_kept_on_disk_and_cannot_be_changed(make_model):
    config = make_model(norm_placement=PLACEMENTS, residual_scale=2.0).config
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert hash(ModelConfig.from_dict(config.to_dict())) == hash(config)
    assert config.to_dict()["norm_placement"] == PLACEMENTS
    with pytest.raises(TypeError):
        config.norm_placement["kda"] = "after"


@pytest.mark.parametrize(
    ("placement", "problem"),
    [("behind", "must be 'before' or 'after' or 'stream'"), ({"kad": "after"}, "did you mean 'kda'")],
)
def test_a_wrong_placement_is_named(make_model, placement, problem):
    with pytest.raises(ConfigError, match=problem):
        make_model(norm_placement=placement)


def test_factors_of_embedding_branches_and_head(make_model, tokens):
    """Layer by layer, in float64."""
    model = make_model(layout="kda mla", depth=2, embed_scale=1.5, branch_scale=0.3, head_scale=0.7).double()
    x = 1.5 * model.embed(tokens)
    for block in model.blocks:
        x = x + 0.3 * block.mixer(block.mixer_norm(x))[0]
        x = x + 0.3 * block.feed_forward(block.feed_forward_norm(x))
    expected = 0.7 * model.norm(x) @ model.head.weight.T
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    targets = tokens.roll(-1, 1)
    nll = torch.nn.functional.cross_entropy(expected.mT, targets, reduction="none")
    torch.testing.assert_close(model(tokens, targets).nll.double(), nll, rtol=1e-5, atol=1e-5)


def test_branches_with_a_factor_have_their_norms_before(make_model):
    with pytest.raises(ConfigError, match="norms before"):
        make_model(norm_placement="after", branch_scale=0.5)


def test_equals_a_block_of_transformers_minimax():
    """The residual stream of MiniMax-01 carries the normed input times a factor."""
    pytest.importorskip("transformers")
    from transformers import MiniMaxConfig
    from transformers.models.minimax import modeling_minimax as hf

    from intarsia.mixers import AttentionConfig
    from intarsia.model import ExpertsConfig, FeedForwardConfig

    scale, T = 3.5, 20
    theirs = hf.MiniMaxDecoderLayer(
        MiniMaxConfig(
            hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, layer_types=["full_attention"],
            num_hidden_layers=1, full_attn_alpha_factor=scale, mlp_alpha_factor=scale, attn_implementation="eager",
        ),
        0,
    )  # fmt: skip
    init_weights_of(theirs)
    w = theirs.state_dict()
    config = ModelConfig(
        vocab_size=8,
        d_model=32,
        depth=1,
        layout="attention",
        mixers={"attention": AttentionConfig(2, 16, rope=0.0)},
        feed_forward=FeedForwardConfig(16),
        experts=ExpertsConfig(4, 16, 2, num_shared=0, scores="softmax"),
        dense_layers=0,
        norm_placement="stream",
        residual_scale=scale,
    )
    model = LanguageModel(config)
    init_weights(model, 0, std=0.02, depth=1)
    block = model.blocks[0]
    block.load_state_dict(
        {
            "mixer_norm.weight": w["input_layernorm.weight"],
            "feed_forward_norm.weight": w["post_attention_layernorm.weight"],
            **{f"mixer.{n}_proj.weight": w[f"self_attn.{n}_proj.weight"] for n in "qkvo"},
            "feed_forward.router.weight": w["mlp.gate.weight"],
            "feed_forward.router.bias": torch.zeros(4),
            "feed_forward.gate_up": w["mlp.experts.gate_up_proj"],
            "feed_forward.down": w["mlp.experts.down_proj"],
        }
    )
    x = torch.randn(1, T, 32, generator=torch.Generator().manual_seed(1))
    nowhere = torch.ones(1, T, 16), torch.zeros(1, T, 16)  # cosine and sine of no rotation
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected = theirs(x, position_embeddings=nowhere, attention_mask=mask)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-4, atol=1e-5)


def init_weights_of(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        parameter.requires_grad_(False)


def test_layer_norms_and_blocks_without_a_feed_forward_add_up(make_model):
    """Against PyTorch's own layer norm, in float64."""
    from torch.nn.functional import layer_norm

    changes = {"norm": "layer", "embed_norm": True, "mixer_only": ("kda",), "norm_eps": 1e-3}
    model = make_model(layout="kda mla kda", **changes).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def normed(norm, x):
        return layer_norm(x, (32,), norm.weight, norm.bias, 1e-3)

    x = torch.randint(0, 97, (2, 20), generator=generator)
    expected = normed(model.embed_norm, model.embed.weight[x])
    for block in model.blocks:
        expected = expected + block.mixer(normed(block.mixer_norm, expected))[0]
        if block.name == "mla":
            expected = expected + block.feed_forward(normed(block.feed_forward_norm, expected))
        else:
            assert block.feed_forward is None
            assert block.feed_forward_norm is None
    expected = normed(model.norm, expected) @ model.head.weight.T
    torch.testing.assert_close(model(x).logits, expected)

    config, cost = model.config, model.cost()
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    unbuilt = cost_of(config, torch.float64)
    assert cost.parameters_by_part() == unbuilt.parameters_by_part()
    assert cost.forward_flops_per_token(64) == unbuilt.forward_flops_per_token(64)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.parameters_by_part()["feed-forwards"] == cost.layers[1].feed_forward.parameters
    load = model(x, targets=x, side=("load",)).side
    assert [told.load is not None for told in load] == [False, True, False]


def test_a_model_without_feed_forwards_decodes_and_cannot_be_widened(make_model):
    from intarsia.model import InferenceModel
    from intarsia.model.matching import match_parameters

    model = make_model(layout="kda mla", mixer_only=("kda", "mla"), experts=None)
    assert not [name for name, _ in model.named_parameters() if "feed_forward" in name]
    ready = InferenceModel(model)
    tokens = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(0)).to(
        model.embed.weight.device
    )
    states, logits = ready.init_states(1), []
    for token in tokens.split(1, dim=1):
        output = ready(token, states)
        states = output.states
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no block"):
        match_parameters(model.config, 10_000)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"norm": "batch"}, "must be 'rms' or 'layer'"),
        ({"mixer_only": ["kad"]}, "did you mean 'kda'"),
        ({"norm": "layer", "zero_centered_norms": True}, "not zero-centred"),
    ],
)
def test_norms_and_blocks_that_cannot_be_are_named(make_model, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        make_model(**changes)
