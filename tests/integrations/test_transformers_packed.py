"""Models of transformers with packed weights and Intarsia's attention: the same results, and back again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from intarsia.errors import ConfigError, UnsupportedError
from intarsia.integrations import accelerate_transformers, prepare_for_inference
from intarsia.layers.packed import Packing
from intarsia.ops import native

pytest.importorskip("transformers", minversion="5.15")
from intarsia.integrations import transformers as integration
from intarsia.integrations.transformers_packed import PreparedModel, _Packed
from support.transformers_models import HYBRIDS, MODELS, Tensors, around, assert_close, build, tokens

FAMILIES = [f for f in MODELS if f not in HYBRIDS or integration._module(f) is not None]
FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@contextmanager
def prepared(model: nn.Module, weights: Any, **options: Any) -> Iterator[PreparedModel]:
    """With all weights packed, however small."""
    with PreparedModel(model, Packing(weights, least=1), **options) as made:
        yield made


def unpacked(model: nn.Module, weights: Any) -> nn.Module:
    """A model whose weights are what the packed ones stand for."""
    made = copy.deepcopy(model)
    packed = copy.deepcopy(model)
    with prepared(packed, weights), torch.no_grad():
        for path, module in packed.named_modules():
            if isinstance(module, _Packed):
                of = made.get_submodule(path)
                names = ["weight"] if isinstance(of, nn.Linear) else ["gate_up_proj", "down_proj"]
                for name, each in zip(names, module.all_packed(), strict=True):
                    numbers = each.unpacked()
                    weight = getattr(of, name)
                    # One of its own: a head may be tied to the embedding, which stays.
                    exact = nn.Parameter(
                        (numbers.mT if of.__dict__.get("is_transposed") else numbers).to(weight.dtype)
                    )
                    setattr(of, name, exact)
    return made


def generation(model: nn.Module, **options: Any) -> Any:
    """A cached generation of two prompts, of which one is padded on the left."""
    prompt = tokens(length=20)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


def forced(model: nn.Module) -> Tensors:
    """The logits of a generation that is continued by given tokens, so that roundings choose none."""
    given = tokens(length=9).tolist()
    choose = {"prefix_allowed_tokens_fn": lambda row, sofar: [given[row][len(sofar) - 20]]}
    return {"logits": torch.stack(generation(model, **choose).logits)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_agrees(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    expected = around(model, forced)
    plain = generation(model).sequences
    with accelerate_transformers(), prepared(model, FORMATS[dtype]) as made:
        assert made.attention
        assert not made.left, made.left
        assert len(made.packed) >= 6
        got = forced(model)
        greedy = generation(model).sequences
    assert_close(got, *expected, dtype=dtype)
    if dtype == torch.float32:
        assert greedy.tolist() == plain.tolist()
    assert torch.equal(generation(model).sequences, plain)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_narrow_weights_are_multiplied_as_what_they_stand_for(family: str, weights: str) -> None:
    """Within the budget of float32, whatever the weights lost when they were packed."""
    model = build(family)
    expected = around(unpacked(model, weights), forced)
    with accelerate_transformers(), prepared(model, weights):
        assert_close(forced(model), *expected, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_5"])
def test_beams_are_found_alike(family: str) -> None:
    model = build(family)
    expected = generation(model, num_beams=3).sequences
    with prepared(model, "float32"):
        assert generation(model, num_beams=3).sequences.tolist() == expected.tolist()


def test_the_model_looks_as_before() -> None:
    model: Any = build("llama").to(torch.bfloat16).train()
    model.model.layers[0].mlp.requires_grad_(False)
    before = {name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()}
    weights = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    seen: list[str] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append("kept"))
    kind, implementation = type(model), model.config._attn_implementation
    embedding = model.get_input_embeddings().weight
    if native.missing_reason() is None:
        # Small weights stay; of this model PyTorch multiplies bfloat16 slowly whatever its size.
        prepare_for_inference(model, "bfloat16").undo()
    with prepared(model, "int8") as made:
        names = {name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()}
        assert names == {**before, "lm_head.weight": before["model.embed_tokens.weight"]}
        assert model.dtype == torch.bfloat16
        assert isinstance(model, kind)
        assert isinstance(model.get_output_embeddings(), nn.Linear)
        assert model.get_input_embeddings().weight is embedding
        assert not any(module.training for module in model.modules())
        assert model.config._attn_implementation == "intarsia"
        assert bool(model.model.layers[0].mlp.up_proj.weight.isnan().all())
        model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append("new"))
        with torch.no_grad():
            logits = model(tokens()).logits
            assert torch.equal(copy.deepcopy(model)(tokens()).logits, logits)
        assert seen == ["kept", "new"] * 2
        assert "PreparedModel(15 modules of LlamaForCausalLM packed" in repr(made)
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()}.keys() == weights.keys()
    for name, parameter in model.named_parameters():
        assert parameter is weights[name][0]
        assert parameter.requires_grad == weights[name][1]
    assert type(model) is kind
    assert model.lm_head.weight is embedding
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == implementation
    assert repr(made) == "PreparedModel(undone)"
    made.undo()


def test_integers_take_less_memory() -> None:
    model = build("gpt_oss")
    sizes = {}
    for weights in ("float32", "bfloat16", "int8"):
        with prepared(model, weights) as made:
            sizes[weights] = made.weight_bytes
    # Of the weights that are packed, 4, 2 and little more than 1 byte a number; the embedding is not.
    rest = model.model.embed_tokens.weight.nbytes
    whole = [size - rest for size in sizes.values()]
    assert whole[1] < 0.55 * whole[0]
    assert whole[2] < 0.33 * whole[0]


def test_what_a_prepared_model_cannot_do_says_how_to_go_back(tmp_path: Any) -> None:
    model: Any = build("gpt_oss")
    with prepared(model, "int8"):
        for call in (
            model.train,
            lambda: model.save_pretrained(tmp_path / "saved"),
            lambda: model.push_to_hub("nobody/nothing"),
            lambda: model.resize_token_embeddings(100),
            model.state_dict,
            lambda: model(tokens(), labels=tokens()),
        ):
            with pytest.raises(UnsupportedError, match=r"\.undo\(\)"):
                call()
        assert not (tmp_path / "saved").exists()
        model.eval()
        with pytest.raises(ConfigError, match="prepared already"):
            prepare_for_inference(model)
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")


def test_what_is_left_alone_is_told() -> None:
    model: Any = build("llama")
    layer = model.model.layers[0]
    layer.mlp.up_proj.to(torch.float16)
    layer.mlp.down_proj.forward = layer.mlp.down_proj.forward  # as hooks of accelerate do

    class Adapted(nn.Linear):
        pass

    layer.mlp.gate_proj.__class__ = Adapted
    with prepared(model, "int8") as made:
        assert made.left == {
            "model.layers.0.mlp.up_proj": "its weight is float16, not float32 or bfloat16",
            "model.layers.0.mlp.down_proj": (
                "another library wraps its forward, as device maps with offloading do"
            ),
        }
        assert type(layer.mlp.gate_proj) is Adapted
    # Weights that the code of the model reads.
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=8)
    ).eval()
    with torch.no_grad():
        expected = mamba(tokens() % 50).logits
        with prepared(mamba, "float32") as made:
            assert "reads its weight itself" in made.left["backbone.layers.0.mixer.dt_proj"]
            torch.testing.assert_close(mamba(tokens() % 50).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_routes_tokens_stays_as_it_is() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(32, 4), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    model: Any = build("llama")
    model.model.layers[0].block = Block()
    with prepared(model, "int8") as made:
        assert made.left == {"model.layers.0.block.gate": "it routes tokens to experts, and stays as it is"}
        assert "model.layers.0.block.experts.3" in made.packed
    with prepared(model, "bfloat16") as made:
        assert not made.left


def test_a_module_in_several_places_stays_one() -> None:
    model: Any = build("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj = first.up_proj
    with prepared(model, "int8"):
        assert first.up_proj is second.up_proj
        assert isinstance(first.up_proj, _Packed)
    assert first.up_proj is second.up_proj
    assert type(first.up_proj) is nn.Linear


def test_the_head_of_int4_is_int8() -> None:
    model: Any = build("llama")
    with prepared(model, "int4"):
        assert model.lm_head.packed_weights.format == "int8"
        assert model.model.layers[0].mlp.up_proj.packed_weights.format == "int4"


def test_attention_is_an_option() -> None:
    model: Any = build("llama")
    with prepared(model, "int8", attention=False) as made:
        assert not made.attention
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(
    native.missing_reason() is not None, reason="without kernels nothing reads weights faster"
)
def test_weights_as_they_are_take_no_memory() -> None:
    model: Any = build("llama").to(torch.bfloat16)
    weight: Tensor = model.model.layers[0].mlp.up_proj.weight
    with prepare_for_inference(model):
        assert model.model.layers[0].mlp.up_proj.packed_weights.data.data_ptr() == weight.data_ptr()


def test_bad_input_changes_nothing() -> None:
    model: Any = build("llama")
    with pytest.raises(ConfigError, match="int3"):
        prepare_for_inference(model, "int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="of transformers"):
        prepare_for_inference(nn.Linear(4, 4), "int8")
    with pytest.raises(UnsupportedError, match="float16"):
        prepare_for_inference(copy.deepcopy(model).half(), "int8")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="finite"):
        PreparedModel(model, Packing("int8", least=1))
    assert not any(isinstance(module, _Packed) for module in model.modules())
    model.train()
