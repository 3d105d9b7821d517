"""What the functions share: the keywords of older versions, what is refused, and one call of the operators."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError, UnsupportedError
from intarsia.ops import Gate, Sequences, dplr_rule, gated_delta_rule, linear_attention
from intarsia.ops.precision import compute_dtype

P = ParamSpec("P")
R = TypeVar("R")
Result = tuple[Tensor, "Tensor | None"]

_UNSERVED = {
    "gv": "the operators have no decay of the value channels; run this call with flash-linear-attention",
    "cp_context": "there is no context parallelism here; pass each piece's final state to the next piece as its"
    " initial_state",
    "return_intermediate_states": "call it on pieces of the sequence with output_final_state=True",
    "use_graph": "it records CUDA graphs; leave it out",
    "head_first": "transpose the arguments to [B, T, H, ...], sequence first",
}


def refuse(**options: object) -> None:
    """Raise UnsupportedError for the first of these options that is asked for."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise UnsupportedError(f"{name} is not supported: {_UNSERVED[name]}")


def older_keywords(*chunk_sizes: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take what stands in no signature of flash-linear-attention 0.6: `head_first` (False only),
    `chunk_size` (one of `chunk_sizes`, where it restricts them) and the deprecated `transpose_state_layout`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            refuse(head_first=kwargs.pop("head_first", None))
            if "chunk_size" not in known:
                size = kwargs.pop("chunk_size", None)
                if size is not None and chunk_sizes and size not in chunk_sizes:
                    raise ConfigError(f"chunk_size must be one of {list(chunk_sizes)}; got {size}")
            if "transpose_state_layout" in kwargs:
                if kwargs.get("state_v_first"):
                    raise ConfigError(
                        "transpose_state_layout is the old name of state_v_first; give one of them"
                    )
                warnings.warn(
                    "transpose_state_layout is deprecated and has become state_v_first",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs["state_v_first"] = kwargs.pop("transpose_state_layout")
            return function(*args, **kwargs)

        return call

    return decorate


def sequences(cu_seqlens: Tensor | None, on_host: Tensor | None = None) -> Sequences | None:
    """The packed sequences, read from the host's copy where there is one."""
    if cu_seqlens is None:
        if on_host is not None:
            raise ConfigError("cu_seqlens_cpu is a copy of cu_seqlens on the host; give cu_seqlens too")
        return None
    return Sequences.from_cu_seqlens(cu_seqlens if on_host is None else on_host)


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, gate: Gate | None = None, beta: Tensor | None = None,
    beta_max: float | None = None, erase: bool = False, a: Tensor | None = None, b: Tensor | None = None,
    scale: float | None, initial_state: Tensor | None, output_final_state: bool, normalize_qk: bool = False,
    state_v_first: bool = False, reverse: bool = False, cu_seqlens: Tensor | Sequences | None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:  # fmt: skip
    """The delta rule (`erase`), the general rule (`a` and `b`) or the additive rule, in flash-linear-attention's
    conventions."""
    seqs = cu_seqlens if isinstance(cu_seqlens, Sequences) else sequences(cu_seqlens, cu_seqlens_cpu)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    if reverse:
        # Each sequence from its end: the whole row turned round, and with it the order of the sequences.
        q, k, v = q.flip(1), k.flip(1), v.flip(1)
        g = g if g is None or g.dim() == 1 else g.flip(1)
        beta, a, b = (None if x is None else x.flip(1) for x in (beta, a, b))
        if seqs is not None:
            seqs = Sequences(seqs.lengths[::-1])
            initial_state = None if initial_state is None else initial_state.flip(0)
    options: dict[str, Any] = {
        "scale": scale, "initial_state": initial_state, "output_final_state": output_final_state, "cu_seqlens": seqs
    }  # fmt: skip
    if a is not None and b is not None:
        o, state = dplr_rule(q, k, v, a, b, g, **options)
    elif erase:
        o, state = gated_delta_rule(
            q, k, v, g, beta, beta_max=beta_max, normalize=normalize_qk, gate=gate, **options
        )
    else:
        o, state = linear_attention(q, k, v, g, normalize=normalize_qk, gate=gate, **options)
    if reverse:
        o = o.flip(1)
        state = state if state is None or seqs is None else state.flip(0)
    if state_v_first and state is not None:
        state = state.mT.contiguous()
    return o, state


def of_channels(name: str, g: Tensor | None) -> None:
    """Raise ShapeError unless g is a decay of each channel."""
    if g is not None and g.dim() != 4:
        raise ShapeError(f"{name} must be [B, T, HV, K], a decay of each channel; got {list(g.shape)}")


def of_heads(name: str, g: Tensor | None, g_gamma: Tensor | None = None) -> Tensor | None:
    """The one decay of each head that was given, of each token or fixed."""
    if g is not None and g_gamma is not None:
        raise UnsupportedError("give g or g_gamma; both together decay like g + g_gamma, given as g")
    if g is not None and g.dim() != 3:
        raise ShapeError(f"{name} must be [B, T, HV], a decay of each head; got {list(g.shape)}")
    if g_gamma is not None and g_gamma.dim() != 1:
        raise ShapeError(f"g_gamma must be [HV], the same for all tokens; got {list(g_gamma.shape)}")
    return g if g_gamma is None else g_gamma


def gate_of(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None, dims: int
) -> Gate:
    """What makes the decay of its raw input `g`, `[..., HV]` (`dims` 1) or `[..., HV, K]` (`dims` 2)."""
    if A_log is None and lower_bound is None:
        raise ConfigError("the gate needs A_log (or, for KDA, a lower_bound); give it")
    sizes = g.shape[-dims:]
    for name, parameter, size in (("A_log", A_log, sizes[0]), ("dt_bias", dt_bias, sizes.numel())):
        if parameter is not None and parameter.numel() != size:
            raise ShapeError(
                f"{name} must hold {size} elements for g {list(g.shape)}; got {parameter.numel()}"
            )
    dtype = compute_dtype(g)
    rate = g.new_zeros(sizes[0], dtype=dtype) if A_log is None else A_log.to(dtype).reshape(-1)
    return Gate(rate, None if dt_bias is None else dt_bias.to(dtype).reshape(-1), lower_bound)


def decay_of(g: Tensor, gate: Gate, dims: int) -> Tensor:
    """The decay itself, float32, in the shape of its raw input."""
    return gate.log_decay(g.reshape(1, -1, *g.shape[-dims:])).view(g.shape)


def check_safe_gate(safe_gate: bool, use_gate_in_kernel: bool, lower_bound: float | None) -> None:
    """Raise ConfigError where a safe gate is asked for that is none."""
    if safe_gate and use_gate_in_kernel and not (lower_bound is not None and -5 <= lower_bound < 0):
        raise ConfigError(f"safe_gate=True needs a lower_bound in [-5, 0); got {lower_bound}")


def write_strength(beta: Tensor | None, logits: bool = False, negative: bool = False) -> dict[str, Any]:
    """The write strength `[B, T, HV]` as the operators take it: itself, or logits and how far it may reach."""
    if negative and not logits:
        raise ConfigError(
            "allow_neg_eigval=True doubles the sigmoid: it needs use_beta_sigmoid_in_kernel=True"
        )
    if beta is not None and beta.dim() == 4:
        raise UnsupportedError(
            "beta must be [B, T, HV]: the operators have no write strength of each channel"
        )
    return {"beta": beta, "beta_max": (2.0 if negative else 1.0) if logits else None}
