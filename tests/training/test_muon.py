"""Newton–Schulz and Muon: against singular values, PyTorch's Muon, and one matrix at a time."""

from __future__ import annotations

import pytest
import torch

from intarsia.errors import TrainingError
from intarsia.training.muon import Muon, orthogonalize


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 16), (2, 16, 40), (1, 1, 7)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_singular_values_become_about_one(shape, scale):
    matrices = normal(*shape) * scale
    result = orthogonalize(matrices)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    # Square random matrices have singular values near zero, which five rounds do not bring up to one.
    assert values.max() < 1.25
    assert values.median() > 0.65
    # Same singular vectors: the product with the original is symmetric and positive.
    product = result.mT @ (matrices / scale)
    assert torch.allclose(product, product.mT, atol=1e-3 * product.abs().max().item())


def test_zero_gives_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_same_as_pytorch_s_muon(shape):
    ours, theirs = (torch.nn.Parameter(normal(*shape)) for _ in range(2))
    muon = Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    start = ours.detach().clone()
    for step in range(5):
        for parameter, optimizer in ((ours, muon), (theirs, reference)):
            parameter.grad = normal(*shape, seed=step + 1)
            optimizer.step()
    moved = (theirs - start).norm()
    # Both iterate in bfloat16, from momenta that differ by a factor which the normalisation takes out.
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_stack_is_updated_like_its_matrices_one_by_one():
    stack = torch.nn.Parameter(normal(4, 6, 10))
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    optimizers = Muon([stack], lr=0.1, weight_decay=0.5), Muon(singles, lr=0.1, weight_decay=0.5)
    for step in range(3):
        stack.grad = normal(4, 6, 10, seed=step)
        for single, gradient in zip(singles, stack.grad, strict=True):
            single.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([single.detach() for single in singles]))


def test_fused_matrices_are_updated_apart():
    fused = torch.nn.Parameter(normal(3, 8, 10))
    gate, up = (torch.nn.Parameter(half.clone()) for half in fused.detach().chunk(2, dim=1))
    together, apart = Muon([{"params": [fused], "fused": 2}], lr=0.1), Muon([gate, up], lr=0.1)
    fused.grad = normal(3, 8, 10, seed=1)
    gate.grad, up.grad = fused.grad.chunk(2, dim=1)
    together.step()
    apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat([gate.detach(), up.detach()], dim=1))


def test_the_update_has_the_size_of_adamw_s():
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    weight.grad = normal(64, 256)
    Muon([weight], lr=1.0).step()
    rms = weight.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.2, rel=0.2)


def test_parameters_without_a_gradient_stay():
    a, b = torch.nn.Parameter(normal(3, 3)), torch.nn.Parameter(normal(3, 3))
    before = b.detach().clone()
    a.grad = normal(3, 3)
    Muon([a, b], lr=0.1).step()
    assert torch.equal(b.detach(), before)


def test_vectors_are_refused():
    with pytest.raises(TrainingError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(TrainingError, match="fused"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(2, 3, 3))], "fused": 2}], lr=0.1)
