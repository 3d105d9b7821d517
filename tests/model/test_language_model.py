"""The whole model: loss against logits, cached, packed and split against whole, memory and dtypes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from intarsia.errors import ShapeError
from intarsia.layers.side import SideResults
from intarsia.model import LanguageModel, ModelStates
from intarsia.ops import Sequences
from support.device import device

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("tie", [True, False])
def test_nll_is_that_of_the_logits(make_model, tokens, tie):
    model = make_model(tie_embeddings=tie).double()
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    out, logits = model(tokens, targets=targets), model(tokens).logits
    assert out.logits is None
    assert out.states is None
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(out.nll, expected, **CLOSE)
    assert (out.nll[:, -1] == 0).all()
    assert (model.head.weight is model.embed.weight) == tie
    torch.testing.assert_close(model(tokens, last_only=True).logits, logits[:, -1:], **CLOSE)


@pytest.mark.parametrize("cuts", [(1, 1, 68), (64, 6), (35, 35), (69, 1)])
def test_cached_is_uncached(make_model, tokens, cuts):
    model = make_model().double().eval()
    states, logits = model.init_states(2), []
    for part in tokens.split(cuts, dim=1):
        before = states
        out = model(part, states=states)
        states = out.states
        logits.append(out.logits)
        assert states.tokens == tuple(n + part.shape[1] for n in before.tokens)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, **CLOSE)


def test_packed_is_separate(make_model, tokens):
    model = make_model().double()
    lengths = (1, 40, 29)
    packed = model(tokens[:1], seqs=Sequences(lengths)).logits
    separate = [model(part).logits for part in tokens[:1].split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, 1), **CLOSE)


def test_later_tokens_change_nothing_earlier(make_model, tokens):
    # Experts are chosen token by token, but their rows are grouped across tokens: still to the bit in dense
    # models, and to rounding with experts.
    changed = tokens.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 97
    dense, mixed = make_model(experts=None), make_model()
    assert torch.equal(dense(tokens).logits[:, :50], dense(changed).logits[:, :50])
    torch.testing.assert_close(mixed(tokens).logits[:, :50], mixed(changed).logits[:, :50])


def test_states(make_model, tokens):
    model = make_model()
    states = model(tokens, states=model.init_states(2)).states
    assert states.tokens == (70, 70)
    assert states.nbytes() == model.cost().state_bytes(70, batch=2)
    copied = states.snapshot()
    for state, copy in zip(states.layers, copied.layers, strict=True):
        for name, tensor in state.tensors().items():
            assert torch.equal(tensor, copy.tensors()[name])
            assert tensor.data_ptr() != copy.tensors()[name].data_ptr()
    assert states.to("meta").nbytes() == states.nbytes()
    with pytest.raises(ShapeError, match="the same tokens"):
        ModelStates((*states.layers[:-1], model.init_states(2).layers[-1]))


def test_arguments_that_do_not_fit(make_model, tokens):
    model = make_model()
    states = model.init_states(2)
    cases = [
        ({"tokens": tokens[0]}, "tokens must be"),
        ({"tokens": tokens.int()}, "int64"),
        ({"tokens": tokens, "targets": tokens[:, 1:]}, "targets must be"),
        ({"tokens": tokens, "targets": tokens, "last_only": True}, "last_only"),
        ({"tokens": tokens[:1], "states": states, "seqs": Sequences((70,))}, "input of 1"),
        ({"tokens": tokens[:1], "seqs": Sequences((70, 0)), "last_only": True}, "sequence 1 of the row"),
        ({"tokens": tokens[:1], "states": states}, "2 sequences"),
        ({"tokens": tokens[:1], "seqs": Sequences((7,))}, "1, 7"),
        ({"tokens": tokens, "states": ModelStates(states.layers[:2])}, "2 layers"),
    ]
    for arguments, message in cases:
        with pytest.raises(ShapeError, match=message):
            model(**arguments)


def gradients(model, tokens, **kwargs):
    model.zero_grad()
    model(tokens, targets=tokens, **kwargs).nll.mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_activation_checkpointing_changes_nothing_but_memory(make_model, tokens):
    model = make_model()
    expected = gradients(model, tokens)
    side = model(tokens, side=("load", "largest_logits")).side
    model.activation_checkpointing = True
    got = gradients(model, tokens)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    told = model(tokens, side=("load", "largest_logits")).side
    for values, others in zip(side, told, strict=True):
        for value, other in zip(values, others, strict=True):
            assert (value is None and other is None) or torch.equal(value, other)
    # Without gradients there is nothing to recompute, with states neither.
    with torch.no_grad():
        assert model(tokens).logits is not None
    assert model(tokens, states=model.init_states(2)).states is not None


@pytest.mark.parametrize("recompute", [False, True])
def test_tokens_without_a_target_are_no_load_of_experts(make_model, tokens, recompute):
    model = make_model()
    model.activation_checkpointing = recompute
    targets = tokens.clone()
    targets[0, 1:] = -100

    def loads(targets):
        out = model(tokens, targets=targets, side=("load",))
        (out.logits if targets is None else out.nll).sum().backward()
        assert out.side[0].load is None
        return torch.stack([told.load for told in out.side[1:]])

    active = model.config.experts.num_active
    assert (loads(targets).sum(1) == (targets != -100).sum() * active).all()
    assert not loads(torch.full_like(tokens, -100)).any()
    assert (loads(None).sum(1) == tokens.numel() * active).all(), "without targets all count"
    assert model(tokens).side is None


def test_activation_checkpointing_keeps_less(make_model, tokens):
    def kept(model):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, targets=tokens)
        return sum(sizes.values())

    model = make_model()
    everything = kept(model)
    model.activation_checkpointing = True
    assert kept(model) < everything / 4


def test_every_parameter_gets_a_gradient(make_model, tokens):
    grads = gradients(make_model(tie_embeddings=False), tokens)
    assert not [
        name for name, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()
    ]


def test_autocast(make_model, tokens):
    model = make_model()
    plain = model(tokens, targets=tokens).nll
    with torch.autocast(device().type, torch.bfloat16):
        out = model(tokens, targets=tokens)
    assert out.nll.dtype == torch.float32
    # A few layers of products rounded to 8 bits; experts may be chosen otherwise.
    assert (out.nll - plain).abs().mean() < 0.1 * plain.abs().mean()
    out.nll.mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("states", [False, True])
def test_pure_bfloat16(make_model, tokens, states):
    model, plain = make_model().to(torch.bfloat16), make_model()(tokens).logits
    out = model(tokens, states=model.init_states(2) if states else None)
    assert out.logits.dtype == torch.float32
    assert (out.logits - plain).norm() < 0.3 * plain.norm()
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert {name.rsplit(".", 1)[1] for name in kept} == {"A_log", "dt_bias", "weight", "bias"}
    assert all(".router." in name or ".decay." in name for name in kept)


def test_meta_device(make_model, tokens):
    config = make_model().config
    with torch.device("meta"):
        model = LanguageModel(config)
        assert all(parameter.is_meta for parameter in model.parameters())
        out = model(torch.empty(2, 9, dtype=torch.int64), states=model.init_states(2))
    assert out.logits.shape == (2, 9, 97)
    assert out.states.tokens == (9, 9)


def test_router_bias_moves_towards_balance(make_model, tokens):
    model = make_model()
    side = model(tokens, side=("load",)).side
    routers = [block.feed_forward.router for block in model.blocks[1:]]
    loads = torch.stack([told.load for told in side[1:]])
    returned = model.update_router_bias(side)
    assert torch.equal(returned, loads)
    assert (loads.sum(1) == tokens.numel() * 2).all()
    for router, load in zip(routers, loads, strict=True):
        assert torch.equal(router.bias, 1e-3 * (load.mean() - load).sign())
    for wrong in (side[:-1], [SideResults()] * len(side), [side[1]] * len(side)):
        with pytest.raises(ShapeError, match="every layer that has experts"):
            model.update_router_bias(wrong)
    plain = make_model(experts=None)
    assert plain.update_router_bias(plain(tokens, side=("load",)).side) is None


def test_balancing_balances(make_model, tokens):
    model = make_model(layout="attention attention")

    def imbalance():
        with torch.no_grad():
            side = model(tokens, side=("load",)).side
        return (model.update_router_bias(side).amax(1) / (tokens.numel() * 2 / 8)).max().item()

    first = imbalance()
    for _ in range(300):
        last = imbalance()
    assert last < 1.3 < first


@pytest.mark.cpu
def test_router_bias_counts_all_processes(make_model, tokens, tmp_path):
    model = make_model()
    model.update_router_bias(model(tokens, side=("load",)).side)
    expected = torch.stack([block.feed_forward.router.bias for block in model.blocks[1:]])
    torch.save((model.config.to_dict(), tokens), tmp_path / "work.pt")
    command = [sys.executable, str(Path(__file__).with_name("router_bias_worker.py"))]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)


def test_compiled_is_eager(make_model, tokens):
    # More tokens than a chunk: below that, the tracer that this backend shows bare gets the strides of
    # softplus's gradient wrong, which the default backend does not use.
    model = make_model(layout="kda mla")
    expected = gradients(model, tokens)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(tokens, targets=tokens).nll.mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
