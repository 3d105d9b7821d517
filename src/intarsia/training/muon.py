"""Muon for matrices and stacks of matrices, on whole tensors and on tensors that are divided among processes.

`torch.optim.Muon` is not used, for three reasons (PyTorch 2.13): it refuses anything but two dimensions, and
the experts of a layer are one stack `[E, out, in]`; it orthogonalises one matrix at a time in a Python loop,
where one batched product for all matrices of a shape is several times faster on small models; and given
DTensors it runs the whole iteration in every process, through a collective for each product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from intarsia.errors import TrainingError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x³ + c x⁵, chosen by Keller Jordan for the steepest slope at zero; five rounds bring
every singular value from about 0.003 upwards into [0.7, 1.2], which is as good as 1 for an optimizer."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, as the update of a matrix.

        M ← mu M + G        W ← W - lr (0.2 sqrt(max(rows, columns)) NewtonSchulz(G + mu M) + weight_decay W)

    The factor gives the update the root mean square that AdamW's usually has (0.2), so that learning rate and
    weight decay mean the same for both optimizers.

    Parameters are `[rows, columns]`, or `[N, rows, columns]` for N separate matrices. Where each of the N is
    several matrices one below the other (gate and up, in one product), their group says how many, as `fused`.
    A parameter may be a DTensor that is divided along its first dimension. Its matrices are then brought
    together for the iteration, each by one process (an all-to-all there and one back), so that no matrix is
    orthogonalised twice.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: mu, in the Nesterov form.
        weight_decay: decoupled.
        dtype: of the Newton–Schulz products. Momentum and weights keep the parameter's own.

    Source: Liu et al. 2025, "Muon is Scalable for LLM Training" (Moonlight), arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "fused": 1})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise TrainingError(
                        f"Muon updates matrices and stacks of matrices; got {list(parameter.shape)}"
                    )
                if group["fused"] > 1 and (parameter.dim() != 3 or parameter.shape[1] % group["fused"]):
                    raise TrainingError(
                        f"{list(parameter.shape)} is no stack of {group['fused']} fused matrices"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _alike(group["params"]):
                options = {key: group[key] for key in ("lr", "momentum", "weight_decay", "fused")}
                self._update(parameters, **options)
        return loss

    def _update(
        self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float, fused: int
    ) -> None:
        """One step of parameters of one shape and one placement."""
        weights = [_local(parameter) for parameter in parameters]
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        velocities = [_local(self._velocity(parameter)) for parameter in parameters]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        looking_ahead = list(torch._foreach_add(gradients, velocities, alpha=momentum))
        if isinstance(parameters[0], DTensor) and parameters[0].placements != (Shard(0),):
            raise TrainingError(
                f"Muon knows tensors divided along their first dimension; got {parameters[0].placements}"
            )
        updates = self._orthogonalized(parameters[0], looking_ahead, fused)
        rows, columns = parameters[0].shape[-2:]
        rate = lr * 0.2 * max(rows // fused, columns) ** 0.5
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-rate)

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        velocity: Tensor = state["momentum_buffer"]
        return velocity

    def _orthogonalized(self, like: Tensor, matrices: list[Tensor], fused: int) -> list[Tensor]:
        if like.dim() == 3:  # Divided along the stack, if at all: whole matrices in either case.
            stacked = torch.cat(matrices)
            apart = stacked.view(-1, like.shape[1] // fused, like.shape[2])
            if len(apart):
                stacked = orthogonalize(apart, self.dtype).to(like.dtype).reshape(stacked.shape)
            return list(stacked.split([len(stack) for stack in matrices]))
        if isinstance(like, DTensor):
            updates = _orthogonalized_in_turns(like, matrices, self.dtype)
        else:
            updates = orthogonalize(torch.stack(matrices), self.dtype)
        return list(updates.to(like.dtype).unbind())


def _alike(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters that have a gradient, grouped by what must agree for one batched product."""
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            placement = (
                (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            )
            key = (parameter.shape[-2:], parameter.dim(), parameter.dtype, parameter.device, placement)
            groups.setdefault(key, []).append(parameter)
    return list(groups.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _orthogonalized_in_turns(like: DTensor, shards: list[Tensor], dtype: torch.dtype) -> Tensor:
    """This process's shards `[N, its rows, columns]` of the orthogonalised matrices, given those of the
    matrices.

    The matrices are dealt out to the processes like cards. Each process is sent the shards of its matrices,
    orthogonalises these, and sends every process its rows of the result.
    """
    group = like.device_mesh.get_group()
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows, columns = like.shape
    # As torch.chunk divides them: the last processes may hold fewer rows, or none.
    chunk = -(-rows // world_size)
    rows_of = [max(0, min(chunk, rows - r * chunk)) for r in range(world_size)]
    dealt = [list(range(r, len(shards), world_size)) for r in range(world_size)]
    shard_sizes = [len(indices) * rows_of[rank] * columns for indices in dealt]
    own_sizes = [len(dealt[rank]) * count * columns for count in rows_of]

    order = [index for indices in dealt for index in indices]
    sent = torch.stack([shards[index] for index in order]).to(dtype).view(-1)
    received = sent.new_empty(sum(own_sizes))
    dist.all_to_all_single(received, sent, own_sizes, shard_sizes, group=group)
    pieces = zip(received.split(own_sizes), rows_of, strict=True)
    own = torch.cat([piece.view(len(dealt[rank]), count, columns) for piece, count in pieces], dim=1)
    if len(own):
        own = orthogonalize(own, dtype)

    sent = torch.cat([piece.reshape(-1) for piece in own.split(rows_of, dim=1)])
    received = sent.new_empty(sum(shard_sizes))
    dist.all_to_all_single(received, sent, shard_sizes, own_sizes, group=group)
    places = torch.tensor(order, device=received.device).argsort()
    return received.view(len(shards), rows_of[rank], columns)[places]


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """`U Vᵀ` of each matrix `U S Vᵀ`, approximately, by the quintic Newton–Schulz iteration.

    Args:
        matrices: `[N, rows, columns]`; the N are independent and multiplied in one batch.
        dtype: of the products. The iteration heals its own rounding, so bfloat16 serves.
        steps: rounds of the iteration.

    Returns:
        `[N, rows, columns]` in `dtype`. A zero matrix gives zero.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # The Frobenius norm bounds the spectral norm, which the iteration needs to be at most 1. First by the
    # largest entry, since the squares of very small or large ones are not representable.
    x = x.float()
    x = x / _norm(x, float("inf"))
    x = (x / _norm(x, 2)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _norm(x: Tensor, order: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, order, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return norm.clamp_min(torch.finfo(torch.float32).tiny)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
