"""The operators of the linear family: a matrix that is decayed, erased and written, one token after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from intarsia.errors import ShapeError
from intarsia.ops.gate import Gate
from intarsia.ops.linear_call import LinearCall, delta_call, linear_call
from intarsia.ops.pools import InSlots, apart
from intarsia.ops.sequences import Sequences
from intarsia.ops.table import run, run_in_slots

Final = Any
"""The final state: a tensor, None where it is not asked for, or the `InSlots` that were given."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | InSlots | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    normalize: bool = False,
    gate: Gate | None = None,
    beta_max: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Final]:
    """The delta rule with decay: erase along the key, then write.

        S_t = (I - beta_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ        o_t = S_tᵀ q_t · scale

    With `g` of each channel this is Kimi Delta Attention (Kimi Linear report, equation 1), of each head Gated
    DeltaNet (Yang et al. 2024), without decay DeltaNet (Schlag et al. 2021, Yang et al. 2024).

    Args:
        q, k: `[B, T, H, K]`. Keys should have length at most one (`l2norm` them), else the erasure overshoots and
            the state can grow without bound.
        v: `[B, T, HV, V]`; `HV` a multiple of `H`. Where the floating dtypes of q, k and v differ, all is computed
            in float32, or in float64 if one of them is that.
        g: log-decay, natural logarithm, at most 0 (`-inf` forgets everything): None, `[HV]`, `[B, T, HV]` or
            `[B, T, HV, K]`.
        beta: write strength `[B, T, HV]`, in [0, 1] (or [0, 2]); None means 1.
        scale: of the queries; `K ** -0.5` by default.
        initial_state: `[N, HV, K, V]`, N = B or the number of packed sequences; zero by default. `InSlots`, they are
            updated in place and returned as the final state.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` cumulative lengths of the sequences packed into one row (`B == 1`), or a
            `Sequences`, which spares reading the lengths back from the device. A sequence may be empty.
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
    state, held = apart(initial_state)
    call = delta_call(
        q, k, v, g, beta, scale=scale, initial_state=state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize, gate=gate, beta_max=beta_max,
    )  # fmt: skip
    return _run("gated_delta_rule", call, held, impl)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | InSlots | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    normalize: bool = False,
    gate: Gate | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Final]:
    """The additive rule with decay: only write.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t · scale

    Without decay this is linear attention (Katharopoulos et al. 2020) before its feature map and normaliser,
    with a fixed `g` `[HV]` RetNet and Lightning Attention, with `[B, T, HV]` Mamba-2, with `[B, T, HV, K]`
    gated linear attention. Arguments, results and errors are those of `gated_delta_rule`.
    """
    state, held = apart(initial_state)
    call = linear_call(
        q, k, v, g, scale=scale, initial_state=state, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, normalize=normalize, gate=gate,
    )  # fmt: skip
    return _run("linear_attention", call, held, impl)


def dplr_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | InSlots | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Final]:
    """The general rule, whose transition is diagonal plus low rank: erase along `a` what `b` reads.

        S_t = (Diag(exp g_t) - a_t b_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t · scale

    The board is read by `b` before it decays. The delta rule is the special case `a = beta k`,
    `b = exp(g) k` that also writes `beta k`; `gated_delta_rule` computes it with two matrices of scores in a
    chunk instead of four (Kimi Linear report, section 6.2). RWKV-7 (arXiv:2503.14456) and Comba
    (arXiv:2506.02475) need the general one.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`; `HV` a multiple of `H`. Dtypes are as in `gated_delta_rule`. A write strength is
            the caller's business: it belongs into k or v.
        a, b: each `[B, T, HV, K]`, or `[B, T, H, K]` to be shared by value heads as q and k are, in any floating
            dtypes. The state stays bounded where no `Diag(exp g_t) - a_t b_tᵀ` makes anything longer, for
            instance with `a_t = beta_t b_t`, `beta_t |b_t|² <= 2` and no decay.
        g, scale, initial_state, output_final_state, cu_seqlens: as in `gated_delta_rule`.
        impl: `"auto"`, `"reference"` (float64, one token at a time), `"chunked"` (plain PyTorch) or `"cpu"` (native
            kernels for a few tokens behind a state, without gradients).

    Returns:
        `o` `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]`, float32 (float64 for
        float64 inputs), or None.

    Raises:
        ShapeError: arguments that do not fit together.
        UnsupportedError: a named implementation that cannot serve the call.
    """
    state, held = apart(initial_state)
    call = linear_call(
        q, k, v, g, None, a, b, scale=scale, initial_state=state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return _run("dplr_rule", call, held, impl)


def _run(operator: str, call: LinearCall, held: InSlots | None, impl: str) -> tuple[Tensor, Final]:
    if held is None:
        o, state = run(operator, call, impl)
        return o, state
    if held.shape != call.state_shape:
        raise ShapeError(
            f"initial_state must be [N, HV, K, V] = {list(call.state_shape)}; got {list(held.shape)}"
        )
    return run_in_slots(operator, replace(call, in_slots=True), held, impl), held
