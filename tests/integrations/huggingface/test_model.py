"""The language model in transformers' seat: configuration, files, the head, the loss, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", minversion="5.15")
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache, set_seed

from intarsia.checkpoints.native import load_extra, load_model, save_model
from intarsia.data.byte_tokenizer import ByteTokenizer
from intarsia.errors import CheckpointError, ConfigError, ShapeError, UnsupportedError
from intarsia.integrations.huggingface import IntarsiaConfig, IntarsiaForCausalLM, register
from intarsia.model import LanguageModel, presets
from support.seats import HYBRID, seat
from support.small_models import tokens_of

VOCAB = 64
IDS = torch.tensor([tokens_of(12, 0), tokens_of(12, 1)]) % VOCAB


@pytest.fixture(autouse=True)
def registered():
    register()
    register()


def make(name="kimi-linear-nano", seed=0, **changes):
    model = LanguageModel(presets.get(name, vocab_size=VOCAB, **changes))
    model.init_weights(seed)
    for block in model.blocks:
        if hasattr(block.feed_forward, "router"):
            block.feed_forward.router.bias.uniform_()
    return model


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["kimi-linear-nano", "kimi-linear-tiny-moe"])
def test_what_either_saves_both_read(tmp_path, name, tie, dtype):
    model = make(name, tie_embeddings=tie).to(dtype)
    seated = IntarsiaForCausalLM.of(model, extra={"step": 7}, eos_token_id=3)
    assert seated.model is model
    seated.save_pretrained(tmp_path / "ours")
    same(load_model(tmp_path / "ours"), model)
    assert load_extra(tmp_path / "ours") == {"step": 7}
    save_model(tmp_path / "native", model)
    for place in ("ours", "native"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        assert type(loaded) is IntarsiaForCausalLM
        same(loaded.model, model)
        assert (loaded.model.head.weight is loaded.model.embed.weight) == tie
        assert not any(x.is_meta for x in (*loaded.parameters(), *loaded.buffers()))
        # Not to the bit: what is mapped from a file is not aligned as what is copied.
        torch.testing.assert_close(loaded(IDS).logits, seated.eval()(IDS).logits)
    assert AutoConfig.from_pretrained(tmp_path / "ours").eos_token_id == 3
    # Again, from what was loaded: the file describes itself and not its source.
    loaded.save_pretrained(tmp_path / "again")
    same(load_model(tmp_path / "again"), model)


def test_auto_tokenizer_finds_the_tokenizer_where_it_is(tmp_path):
    """In its own folder, as this package writes it, and beside the model, as transformers does."""
    save_model(tmp_path / "native", make(), ByteTokenizer())
    found = AutoTokenizer.from_pretrained(tmp_path / "native", padding_side="left")
    assert found("más").input_ids == list("más".encode())
    assert (found.eos_token_id, found.padding_side) == (256, "left")
    IntarsiaForCausalLM.of(make()).save_pretrained(tmp_path / "ours")
    found.save_pretrained(tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("más").input_ids == list("más".encode())
    (tmp_path / "ours" / "tokenizer_config.json").unlink()
    assert AutoTokenizer.from_pretrained(str(tmp_path / "ours"))("a").input_ids == [97]


def test_what_stays_float32_stays_when_loaded_narrower(tmp_path):
    model = make("kimi-linear-tiny-moe")
    save_model(tmp_path, model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    same(loaded.model, load_model(tmp_path, torch.bfloat16))


def test_buffers_that_are_in_no_file_are_made_anew(tmp_path):
    seated = seat("performer")
    seated.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, seated(IDS).logits)


def test_auto_model_gives_what_the_head_is_given(tmp_path):
    model = make()
    save_model(tmp_path, model)
    body = AutoModel.from_pretrained(tmp_path)
    hidden = body(IDS).last_hidden_state
    torch.testing.assert_close(model.eval()(IDS).logits, model.head(hidden))
    seated = IntarsiaForCausalLM.of(model)
    assert torch.equal(seated.base_model(IDS).last_hidden_state, model.hidden(IDS)[0])
    assert len(list(seated.parameters())) == len(list(model.parameters()))
    copied = copy.deepcopy(seated)
    assert copied.base_model.model is copied.model is not model


def test_a_new_model_is_of_the_seed():
    config = IntarsiaConfig.of(make().config)
    models = []
    for seed in (1, 1, 2):
        set_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config))
    same(models[0], models[1])
    assert not torch.equal(models[0].model.embed.weight, models[2].model.embed.weight)
    assert models[0].model.blocks[0].mixer_norm.weight.eq(1).all()


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_missing_tensor_is_named(tmp_path, damage):
    save_model(tmp_path, make())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors["blocks.1.mixer.o_proj.weight"]
    else:
        tensors["blocks.1.mixer.o_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})
    options = {"ignore_mismatched_sizes": True} if damage == "shape" else {}
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mixer\.o_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_configurations_that_contradict_themselves_are_refused(tmp_path):
    save_model(tmp_path, make())
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"vocab_size": 7}))
    with pytest.raises(ConfigError, match="vocab_size is 7 and the model's is 64"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="describes a model"):
        IntarsiaConfig()


def test_loss_is_the_chunked_cross_entropy_and_its_gradient():
    """Whether logits are asked for or not, and with activation checkpointing."""
    found = []
    for logits, checkpointing in ((True, False), (False, False), (False, True)):
        seated = IntarsiaForCausalLM.of(make(), logits_with_labels=logits).train()
        if checkpointing:
            seated.activation_checkpointing_enable()
            assert seated.model.activation_checkpointing
        labels = IDS.clone()
        labels[:, 3:5] = -100
        out = seated(IDS, labels=labels)
        assert (out.logits is not None) == logits
        assert out.past_key_values is None
        out.loss.backward()
        found.append((out.loss.detach(), {n: p.grad for n, p in seated.named_parameters()}))
        if logits:
            expected = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
            torch.testing.assert_close(out.loss, expected)
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name])
    seated.activation_checkpointing_disable()
    assert not seated.model.activation_checkpointing


def test_a_head_that_is_more_than_a_matrix_has_its_loss_and_gradient():
    seated = IntarsiaForCausalLM.of(make(tie_embeddings=False), logits_with_labels=False)
    expected = seated(IDS, labels=IDS).loss
    seated.model.head = torch.nn.Sequential(seated.model.head, torch.nn.Identity())
    torch.testing.assert_close(seated(IDS, labels=IDS).loss, expected)
    seated.model.head[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    loss = seated(IDS, labels=IDS).loss
    assert loss > expected * 1.001 or loss < expected * 0.999
    loss.backward()
    assert seated.model.head[0].weight.grad is not None


@pytest.mark.parametrize("tie", [True, False])
def test_the_vocabulary_can_be_resized(tmp_path, tie):
    seated = IntarsiaForCausalLM.of(make(tie_embeddings=tie)).eval()
    before = seated(IDS).logits
    seated.resize_token_embeddings(VOCAB + 6)
    assert seated.config.vocab_size == seated.model.config.vocab_size == VOCAB + 6
    assert (seated.model.head.weight is seated.model.embed.weight) == tie
    assert torch.equal(seated(IDS).logits[..., :VOCAB], before)
    seated.save_pretrained(tmp_path)
    same(load_model(tmp_path), seated.model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(IDS + 6).logits.shape[-1] == VOCAB + 6


def test_logits_of_some_columns():
    seated = seat(HYBRID)
    whole = seated(IDS).logits
    torch.testing.assert_close(seated(IDS, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(seated(IDS, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]])
    torch.testing.assert_close(seated(IDS, return_dict=False)[0], whole)


def test_a_cache_is_returned_where_one_is_wanted():
    seated = seat("kda")
    assert seated(IDS).past_key_values is None  # gradients are recorded
    with torch.no_grad():
        assert seated(IDS).past_key_values.get_seq_length() == 12
        assert seated(IDS, use_cache=False).past_key_values is None
    cache = seated(IDS, use_cache=True).past_key_values
    seated(IDS, past_key_values=cache).logits.sum().backward()  # through the state as well
    assert seated.model.blocks[0].mixer.q_proj.weight.grad.abs().max() > 0


def test_what_the_model_has_not_is_refused():
    seated = seat("kda")
    dynamic = DynamicCache()
    for error, message, arguments in [
        (UnsupportedError, "output_hidden_states", {"input_ids": IDS, "output_hidden_states": True}),
        (UnsupportedError, "no embeddings", {"inputs_embeds": torch.zeros(1, 3, 32)}),
        (ConfigError, "must be an IntarsiaCache", {"input_ids": IDS, "past_key_values": dynamic}),
        (ShapeError, "labels must be", {"input_ids": IDS, "labels": IDS[:, 1:]}),
        (ShapeError, "input_ids must be", {"input_ids": IDS[0]}),
    ]:
        with pytest.raises(error, match=message):
            seated(**arguments)
    with pytest.raises(UnsupportedError, match="one kind of cache"):
        seated.generate(IDS, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="every block"):
        seated.activation_checkpointing_enable(every_n_layers=2)


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, intarsia.integrations.huggingface; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
