"""Chunked cross-entropy against torch's own, and the memory that it is there to save."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from intarsia.errors import ShapeError
from intarsia.model import loss
from intarsia.model.loss import chunked_cross_entropy


def example(tokens=37, d=16, vocab=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, d, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, d, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def naive(hidden, weight, targets):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


@pytest.mark.parametrize("chunk_size", [1, 8, 36, 37, 100, None])
def test_values_and_gradients(chunk_size):
    hidden, weight, targets = example()
    nll = chunked_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
    expected = naive(hidden, weight, targets)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    assert (nll[::5] == 0).all()
    # Any upstream gradient, not only that of a mean.
    upstream = torch.randn(nll.shape, dtype=nll.dtype, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(nll, (hidden, weight), upstream)
    torch.testing.assert_close(
        got, torch.autograd.grad(expected, (hidden, weight), upstream), rtol=1e-11, atol=1e-11
    )


def test_gradcheck():
    hidden, weight, targets = example(tokens=7, d=3, vocab=5)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, chunk_size=3), (hidden, weight)
    )


def test_extreme_logits_are_finite():
    hidden, weight, targets = example(dtype=torch.float32)
    nll = chunked_cross_entropy(hidden * 1e4, weight, targets)
    grads = torch.autograd.grad(nll.sum(), (hidden, weight))
    assert all(tensor.isfinite().all() for tensor in (nll, *grads))


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_log_softmax_is_float32_under_autocast(inside):
    hidden, weight, targets = example(tokens=64, d=32, vocab=300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nll = chunked_cross_entropy(hidden, weight, targets, chunk_size=16)
        if inside:
            grads = torch.autograd.grad(nll.sum(), (hidden, weight))
    if not inside:
        grads = torch.autograd.grad(nll.sum(), (hidden, weight))
    # Only the operands and results of the products are rounded; softmax and sums are exact.
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=1e-6)
    assert nll.dtype == torch.float32
    expected_grads = torch.autograd.grad(naive(hidden, weight, targets).sum(), (hidden, weight))
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == torch.float32
        # bfloat16 keeps 8 bits.
        assert (got - want).norm() < 2**-7 * want.norm()


def test_pure_bfloat16():
    hidden, weight, targets = example(dtype=torch.bfloat16)
    nll = chunked_cross_entropy(hidden, weight, targets, chunk_size=10)
    torch.testing.assert_close(nll, naive(hidden, weight, targets))
    grads = torch.autograd.grad(nll.sum(), (hidden, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_all_logits():
    tokens, d, vocab, chunk = 512, 8, 1000, 64
    hidden, weight, targets = example(tokens, d, vocab, torch.float32)
    with Largest() as largest:
        chunked_cross_entropy(hidden, weight, targets, chunk_size=chunk).sum().backward()
    assert largest.numel == chunk * vocab
    with Largest() as largest:
        naive(hidden, weight, targets).sum().backward()
    assert largest.numel == tokens * vocab, "the instrument sees what it should"


def kept_bytes(nll, but):
    """What the backward pass of `nll` holds, without the tensors of `but`."""
    saved = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in nll.grad_fn.next_functions[0][0].saved_tensors
    }
    return sum(size for where, size in saved.items() if where not in {x.data_ptr() for x in but})


@pytest.mark.parametrize("limit", ["just enough", "too little"])
def test_few_logits_are_kept_and_many_computed_again(monkeypatch, limit):
    tokens, d, vocab = 50, 8, 300
    hidden, weight, targets = example(tokens, d, vocab, torch.float32)
    expected = torch.autograd.grad(naive(hidden, weight, targets).sum(), (hidden, weight))
    monkeypatch.setattr(loss, "KEPT_BYTES", 4 * tokens * vocab - (limit == "too little"))
    monkeypatch.setattr(loss, "BLOCK", 16 * 64)  # of 16 tokens, and five of the vocabulary
    nll = chunked_cross_entropy(hidden, weight, targets, chunk_size=16)
    held = kept_bytes(nll, [hidden, weight, targets])
    assert held == 4 * tokens * (1 + (vocab if limit == "just enough" else 0))
    for _ in range(2):  # the second time from the same blocks
        got = torch.autograd.grad(nll.sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden, weight, targets, chunk_size=16), nll)


@pytest.mark.parametrize("block", [1, 7, 50, 64])
def test_blocks_of_the_vocabulary(monkeypatch, block):
    monkeypatch.setattr(loss, "BLOCK", 8 * block)
    test_values_and_gradients(8)


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_outside_of_the_vocabulary_is_refused(target):
    hidden, weight, targets = example()
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError), match=r"index out of range|out of bounds"):
        chunked_cross_entropy(hidden, weight, targets)


def test_shapes():
    hidden, weight, targets = example(dtype=torch.float32)
    nll = chunked_cross_entropy(hidden[:36].view(2, 18, -1), weight, targets[:36].view(2, 18))
    assert nll.shape == (2, 18)
    with pytest.raises(ShapeError, match="do not fit"):
        chunked_cross_entropy(hidden, weight, targets[:5])


def test_frozen_weight():
    hidden, weight, targets = example()
    chunked_cross_entropy(hidden, weight.detach(), targets).sum().backward()
    (expected,) = torch.autograd.grad(naive(hidden, weight, targets).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected)
    chunked_cross_entropy(hidden.detach(), weight, targets).sum().backward()
    (expected,) = torch.autograd.grad(naive(hidden, weight, targets).sum(), weight)
    torch.testing.assert_close(weight.grad, expected)
