"""The short causal convolution, as functions and as a module."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.integrations.fla.common import Result, refuse, sequences
from intarsia.ops import Sequences, short_convolution
from intarsia.ops.precision import widen

_BACKENDS = ("triton", "cuda", "mix")


def causal_conv1d(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool | None = False, activation: str | None = None,
    backend: str | None = "triton", cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None, cp_context: object | None = None,
) -> Result:  # fmt: skip
    """The short causal convolution (`fla.modules.convolution`) of `x` `[B, T, D]` with `weight` `[D, W]`.

    Channels may stand in several dimensions, `[B, T, heads, dim]` with `heads * dim == D`. `bias` is `[D]`;
    `activation` None, `"silu"` or its other name `"swish"`; `residual` in the shape of x is added last. States hold the
    last W inputs, `[N, D, W]` (`intarsia.ops.short_convolution` keeps the W - 1 that matter). `backend` and
    `chunk_indices` change nothing.
    """
    refuse(cp_context=cp_context)
    if weight is None:
        raise UnsupportedError("weight=None is not supported: give weights of 1, torch.ones(D, W)")
    if backend is not None and backend not in _BACKENDS:
        raise ConfigError(f"backend must be one of {_BACKENDS}, and changes nothing here; got {backend!r}")
    shape = x.shape
    x, residual = x.flatten(2), None if residual is None else residual.flatten(2)
    if initial_state is not None or output_final_state:
        weight = F.pad(weight, (1, 0))  # a tap of 0 before the others: the state gets the W-th input
    y, state = short_convolution(
        widen(x), widen(weight), initial_state=None if initial_state is None else initial_state.mT,
        output_final_state=bool(output_final_state), cu_seqlens=sequences(cu_seqlens, cu_seqlens_cpu),
    )  # fmt: skip
    y = _finish(y, bias, activation)
    if residual is not None:
        y = y + residual
    return y.to(x.dtype).view(shape), None if state is None else state.mT.to(x.dtype)


def causal_conv1d_update(
    x: Tensor, cache: Tensor, residual: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`causal_conv1d` of one token of each of N sequences, `x` `[N, D]`, `[N, 1, D]` or `[1, N, D]`.

    `cache` `[N, D, W]`, the last W inputs, is changed in place, as in flash-linear-attention, and returned besides the
    output in the shape of x. Not differentiable.
    """
    if weight is None:
        raise UnsupportedError("weight=None is not supported: give weights of 1, torch.ones(D, W)")
    N, D, W = cache.shape
    if weight.shape != (D, W) or x.numel() != N * D:
        raise ShapeError(
            f"x must hold one token for each of the {N} sequences of cache {list(cache.shape)}, and weight be [D, W];"
            f" got {list(x.shape)} and {list(weight.shape)}"
        )
    with torch.no_grad():
        cache.copy_(torch.cat([cache[..., 1:], x.reshape(N, D, 1).to(cache.dtype)], dim=-1))
        y = _finish((widen(cache) * widen(weight)).sum(-1), bias, activation)
        if residual is not None:
            y = y + residual.reshape(N, D)
        return y.to(x.dtype).view(x.shape), cache


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The function of this name of the package `causal_conv1d`, which the Mamba layers take if they can: channels
    first.

    Args:
        x: `[B, D, T]`.
        weight: `[D, W]`; bias `[D]`.
        seq_idx: the number of each token's sequence, `[B, T]`; tokens of different numbers do not see each other.
        initial_states: the `W - 1` inputs before the first, `[B, D, W - 1]`; not with `seq_idx`.
        return_final_states: whether to return the last `W - 1` inputs, `[B, D, W - 1]`, besides the output.
        final_states_out: where to write them.
        activation: None, `"silu"` or `"swish"`.

    Returns:
        `[B, D, T]` in the dtype of x.
    """
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise ConfigError("seq_idx goes with neither initial_states nor return_final_states")
    row, seqs = x.mT, None
    if seq_idx is not None:
        if seq_idx.shape != row.shape[:2]:
            raise ShapeError(f"seq_idx must be [B, T] = {list(row.shape[:2])}; got {list(seq_idx.shape)}")
        counts = [torch.unique_consecutive(numbers, return_counts=True)[1] for numbers in seq_idx]
        seqs, row = Sequences(tuple(torch.cat(counts).tolist())), row.reshape(1, -1, x.shape[1])
    y, state = short_convolution(
        widen(row), widen(weight), initial_state=None if initial_states is None else initial_states.mT,
        output_final_state=return_final_states, cu_seqlens=seqs,
    )  # fmt: skip
    y = _finish(y, bias, activation).to(x.dtype).view(x.shape[0], x.shape[2], x.shape[1]).mT
    if state is None:
        return y
    state = state.mT.to(x.dtype)
    return y, state if final_states_out is None else final_states_out.copy_(state)


class ShortConvolution(nn.Conv1d):
    """`fla.modules.ShortConvolution`: `causal_conv1d` with a weight `[D, 1, W]`, under the names of its parameters.

    Args:
        hidden_size: D.
        kernel_size: W.
        bias: whether there is one.
        activation: None, `"silu"` or `"swish"`.
        backend: changes nothing.
        device, dtype: of the parameters.
    """

    def __init__(
        self, hidden_size: int, kernel_size: int, bias: bool = False, activation: str | None = "silu",
        backend: str | None = "triton", device: torch.device | None = None, dtype: torch.dtype | None = None,
        **older: Any,
    ) -> None:  # fmt: skip
        if older.pop("use_fast_conv1d", None) is not None:
            warnings.warn(
                "use_fast_conv1d is deprecated and changes nothing", DeprecationWarning, stacklevel=2
            )
        if older:
            raise TypeError(f"ShortConvolution got unexpected keyword arguments: {', '.join(older)}")
        if backend is not None and backend not in _BACKENDS:
            raise ConfigError(
                f"backend must be one of {_BACKENDS}, and changes nothing here; got {backend!r}"
            )
        _check_activation(activation)
        super().__init__(
            hidden_size, hidden_size, kernel_size, padding=kernel_size - 1, groups=hidden_size, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.hidden_size = hidden_size
        self.activation = activation

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None, cache: Tensor | None = None,
        output_final_state: bool = False, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
        **options: Any,
    ) -> Result:  # fmt: skip
        """`[B, T, D]` to the same, and with `output_final_state` the last W inputs `[N, D, W]`, else None.

        `mask` `[B, T]` clears what is zero in it. `cache` holds the inputs before. Where nothing is recorded for
        gradients and there is one token a sequence, `cache` is changed in place and returned, as in
        flash-linear-attention; else it is left as it is.
        """
        if mask is not None:
            if cu_seqlens is not None:
                raise ConfigError("give mask or cu_seqlens: packed sequences have no padding")
            x = x * mask.unsqueeze(-1)
        weight = self.weight.squeeze(1)
        seqs = sequences(cu_seqlens, options.pop("cu_seqlens_cpu", None))
        count = x.shape[0] if seqs is None else seqs.count
        one_each = x.shape[0] * x.shape[1] == count and (seqs is None or seqs.max_length == 1)
        if not torch.is_grad_enabled() and one_each:
            return self.step(x, residual, cache, output_final_state, cu_seqlens)
        return causal_conv1d(
            x, weight, self.bias, residual, cache, output_final_state, self.activation, cu_seqlens=cu_seqlens,
            **options,
        )  # fmt: skip

    def step(
        self, x: Tensor, residual: Tensor | None, cache: Tensor | None, output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Result:  # fmt: skip
        """`causal_conv1d_update` of one token a sequence, `[N, 1, D]` or packed `[1, N, D]`."""
        if cache is None:
            cache = x.new_zeros(x.shape[0] * x.shape[1], self.hidden_size, self.kernel_size[0])
        weight = self.weight.squeeze(1)
        y, cache = causal_conv1d_update(x, cache, residual, weight, self.bias, self.activation)
        return y, cache if output_final_state else None

    @property
    def state_size(self) -> int:
        """How many numbers the state of a sequence holds."""
        return self.hidden_size * self.kernel_size[0]


def _check_activation(activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise ConfigError(f"activation must be None, 'silu' or 'swish'; got {activation!r}")


def _finish(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    _check_activation(activation)
    y = y if bias is None else y + bias
    return y if activation is None else F.silu(y)
