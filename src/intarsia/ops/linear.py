"""The operators of the linear family: a matrix that is decayed, erased and written, one token after another."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops.arguments import Arguments, check
from intarsia.ops.dispatch import Choice, choose, run
from intarsia.ops.gate import Gate
from intarsia.ops.sequences import Sequences


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    normalize: bool = False,
    gate: Gate | None = None,
    beta_max: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with decay: erase along the key, then write.

        S_t = (I - beta_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ        o_t = S_tᵀ q_t · scale

    With `g` of each channel this is Kimi Delta Attention (Kimi Linear report, equation 1), of each head Gated
    DeltaNet (Yang et al. 2024), without decay DeltaNet (Schlag et al. 2021, Yang et al. 2024).

    Args:
        q, k: `[B, T, H, K]`, one floating dtype. Keys should have length at most one (`l2norm` them), else
            the erasure overshoots and the state can grow without bound.
        v: `[B, T, HV, V]`, the same dtype; `HV` a multiple of `H`.
        g: log-decay, natural logarithm, at most 0 (`-inf` forgets everything): None, `[HV]`, `[B, T, HV]` or
            `[B, T, HV, K]`.
        beta: write strength `[B, T, HV]`, in [0, 1] (or [0, 2]); None means 1.
        scale: of the queries; `K ** -0.5` by default.
        initial_state: `[N, HV, K, V]`, N = B or the number of packed sequences; zero by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` cumulative lengths of the sequences packed into one row (`B == 1`), or a
            `Sequences`, which spares reading the lengths back from the device.
        normalize: divide q and k by their length first, as `l2norm` does.
        gate: `g` holds raw numbers, of which this gate makes the log-decay.
        beta_max: `beta` holds raw numbers; the write strength is `beta_max * sigmoid(beta)`.
        impl: `"auto"`, `"reference"` (float64, one token at a time), `"chunked"` (plain PyTorch) or `"cpu"`
            (native kernels).

    Returns:
        `o` `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]`, float32 (float64 for
        float64 inputs), or None.

    Raises:
        ShapeError: arguments that do not fit together.
        UnsupportedError: a named implementation that cannot serve the call.
    """
    if beta is None:
        beta, beta_max = v.new_ones(v.shape[:3]), None
    call = check(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize, gate=gate, beta_max=beta_max,
    )  # fmt: skip
    return run(call, impl)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    normalize: bool = False,
    gate: Gate | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The additive rule with decay: only write.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t · scale

    Without decay this is linear attention (Katharopoulos et al. 2020) before its feature map and normaliser,
    with a fixed `g` `[HV]` RetNet and Lightning Attention, with `[B, T, HV]` Mamba-2, with `[B, T, HV, K]`
    gated linear attention. Arguments, results and errors are those of `gated_delta_rule`.
    """
    call = check(
        q, k, v, g, None, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize, gate=gate,
    )  # fmt: skip
    return run(call, impl)


class Operator(Protocol):
    """An operator with the signature that all share."""

    __name__: str

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]: ...


def explain(operator: Operator, *args: Any, **kwargs: Any) -> Choice:
    """Which implementation `operator(*args, **kwargs)` would run, and why, without running it.

    >>> import torch
    >>> q = k = v = torch.randn(1, 8, 2, 16)
    >>> explain(gated_delta_rule, q, k, v, impl="chunked").reason
    'it was asked for by name'
    """
    return choose(*_bind(operator, *args, **kwargs))[1]


def _bind(
    operator: Operator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    impl: str = "auto",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    normalize: bool = False,
    gate: Gate | None = None,
    beta_max: float | None = None,
) -> tuple[Arguments, str]:
    if operator is gated_delta_rule:
        beta = v.new_ones(v.shape[:3]) if beta is None else beta
    elif operator is not linear_attention:
        raise ShapeError(f"explain() knows gated_delta_rule and linear_attention; got {operator!r}")
    elif beta is not None:
        raise ShapeError("linear_attention takes no beta")
    call = check(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize, gate=gate, beta_max=beta_max,
    )  # fmt: skip
    return call, impl
