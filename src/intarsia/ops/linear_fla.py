"""The linear operators by the Triton kernels of flash-linear-attention, on GPUs, where it is installed.

    gated_delta_rule    decay of each channel: chunk_kda             else: chunk_gated_delta_rule
    linear_attention    decay of each channel: chunk_gla             else: chunk_simple_gla
    dplr_rule                                  chunk_dplr_delta_rule

and `fused_recurrent_` in the place of `chunk_` for few tokens without gradients. Their arguments are ours, but for what
is translated here: decays that they do not take are expanded, heads that they do not share are repeated, their
`Diag(exp g) + b aᵀ` is our `Diag(exp g) - a bᵀ`, and sequences without tokens are kept from them. Their l2norm has the
epsilon of ours, 1e-6 under the root.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.ops.choice import Implementation
from intarsia.ops.compiler import constant_in_graphs
from intarsia.ops.gate import Gate
from intarsia.ops.linear_call import LinearCall, linear_call
from intarsia.ops.norm_torch import unit
from intarsia.ops.sequences import Sequences
from intarsia.ops.tracing import observed, sizes, transform
from intarsia.ops.uncompiled import Uncompiled

OLDEST = (0, 6)
"""The first version whose functions have the arguments that are given here."""

FUNCTIONS = {
    "chunk_kda": "kda",
    "fused_recurrent_kda": "kda",
    "chunk_gated_delta_rule": "gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "gated_delta_rule",
    "chunk_gla": "gla",
    "fused_recurrent_gla": "gla",
    "chunk_simple_gla": "simple_gla",
    "fused_recurrent_simple_gla": "simple_gla",
    "chunk_dplr_delta_rule": "generalized_delta_rule",
    "fused_recurrent_dplr_delta_rule": "generalized_delta_rule",
}
"""The functions that are used, each with its module in `fla.ops`."""

LARGEST_KEY = 256
SAFE_BOUND = -5.0
"""The lowest bound of a bounded gate that `chunk_kda` takes."""
RECURRENT = 64
"""Up to so many tokens of each sequence are worked off one after another, as in flash-linear-attention's layers."""

Functions = Mapping[str, Callable[..., tuple[Tensor, Tensor | None]]]


def refuse(call: LinearCall) -> str | None:
    """Why the kernels cannot serve a call, or None where they can."""
    if call.q.device.type != "cuda":
        return f"its kernels are for GPUs; the tensors are on {call.q.device}"
    if (missing := missing_reason()) is not None:
        return missing
    return refuse_form(call) or refuse_observer()


def refuse_form(call: LinearCall) -> str | None:
    """Why the kernels do not compute calls of this form, on whatever device."""
    K = call.q.shape[3]
    if call.compute_dtype == torch.float64:
        return "it computes in float32, and the call is of float64"
    if K > LARGEST_KEY:
        return f"its keys have {LARGEST_KEY} channels at most, and these have {K}"
    if call.rule == "general" and _dtype(call) == torch.float32 and not _is_recurrent(call):
        return "its chunks of the general rule are for 16-bit inputs"
    return None


def refuse_observer() -> str | None:
    """What in PyTorch would not see the kernels, which are one operator in the graphs of torch.compile."""
    if (working := transform()) is not None:
        return working
    if observed() and not torch.compiler.is_compiling():
        return "something in PyTorch follows the call, and would not see its kernels"
    return None


def refuse_precision(call: LinearCall) -> str | None:
    """Why `impl="auto"` does not take them although they can serve."""
    if _dtype(call) == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "it rounds float32 to TF32, which torch.set_float32_matmul_precision('high') allows, or impl='fla'"
    return None


def fla(call: LinearCall) -> tuple[Tensor, Tensor | None]:
    """Compute a call on a GPU."""
    if not torch.compiler.is_compiling():
        return compute(call, functions())
    gate = call.gate
    tensors = (call.q, call.k, call.v, call.g, call.beta, call.a, call.b, call.initial_state)
    weights = (None, None) if gate is None else (gate.A_log, gate.dt_bias)
    bound = 0.0 if gate is None else gate.lower_bound or 0.0
    packed = call.seqs is not None
    lengths = (sizes(call.q)[1],) if call.seqs is None else call.seqs.lengths
    numbers = (call.scale, packed, call.normalize, bound, call.beta_max or 0.0)
    o, final = _FLA((*tensors, *weights), lengths, numbers, always=True)
    return o, final if call.output_final_state else None


def compute(call: LinearCall, functions: Functions) -> tuple[Tensor, Tensor | None]:
    """Compute a call by these functions of flash-linear-attention: `o` in v's dtype and the state in float32."""
    occupied = None
    given = call
    if call.seqs is not None and 0 in call.seqs.lengths:
        occupied = [n for n, length in enumerate(call.seqs.lengths) if length]
        some = None if call.initial_state is None else call.initial_state[occupied]
        call = replace(call, seqs=Sequences(call.seqs.occupied), initial_state=some)
    name, arguments = translate(call)
    o, final = functions[name](**arguments)
    o = _once(o.to(given.v.dtype))
    if not given.output_final_state or final is None:
        return o, None
    final = _once(final.to(given.compute_dtype))
    if occupied is None:
        return o, final
    # A sequence without tokens ends as it began.
    began = final.new_zeros(given.state_shape) if given.initial_state is None else given.initial_state
    return o, began.to(final.dtype).index_copy(0, torch.tensor(occupied, device=final.device), final)


def translate(call: LinearCall) -> tuple[str, dict[str, Any]]:
    """The function that computes a call, and its arguments. Every sequence has a token."""
    form = "fused_recurrent" if _is_recurrent(call) else "chunk"
    dtype = _dtype(call)
    state = call.initial_state
    arguments: dict[str, Any] = {
        "q": call.q.to(dtype),
        "k": call.k.to(dtype),
        "v": call.v.to(dtype),
        "scale": call.scale,
        "initial_state": None if state is None else state.float().contiguous(),
        "output_final_state": call.output_final_state,
    }
    if call.seqs is not None:
        arguments["cu_seqlens"] = _edges(call.seqs, call.q.device)
        if form == "chunk":  # their plan of the chunks is made on the host
            arguments["cu_seqlens_cpu"] = _edges(call.seqs, torch.device("cpu"))
    rule = {"delta": _delta, "additive": _additive, "general": _general}[call.rule]
    return rule(call, form, arguments)


def _delta(call: LinearCall, form: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    by_channel, gate, beta = call.decay == "channel", call.gate, call.beta
    assert beta is not None
    arguments["use_qk_l2norm_in_kernel"] = call.normalize
    if call.beta_max in (1, 2):
        arguments |= {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": call.beta_max == 2}
    elif call.beta_max is not None:
        beta = call.beta_max * torch.sigmoid(beta.float())
    bound = None if gate is None else gate.lower_bound
    if gate is None:
        g = _of_heads(call) if not by_channel else call.g
        arguments["g"] = None if g is None else g.float()
    elif bound is None or (by_channel and (form != "chunk" or bound >= SAFE_BOUND)):
        bias = None if gate.dt_bias is None else gate.dt_bias.float()
        arguments |= {"g": call.g, "use_gate_in_kernel": True, "A_log": gate.A_log.float(), "dt_bias": bias}
        if bound is not None:
            arguments["lower_bound"] = bound
            if form == "chunk":
                arguments["safe_gate"] = True
    else:
        assert call.g is not None
        arguments["g"] = gate.log_decay(call.g, torch.float32)
    arguments["beta"] = beta
    return f"{form}_{'kda' if by_channel else 'gated_delta_rule'}", arguments


def _additive(call: LinearCall, form: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if call.normalize:
        arguments |= {"q": unit(arguments["q"]), "k": unit(arguments["k"])}
    _share(arguments, ("q", "k"), call.v.shape[2])
    g = call.g
    if g is not None and call.gate is not None:
        g = call.gate.log_decay(g, torch.float32)
    if call.decay == "channel":
        assert g is not None
        arguments["g" if form == "chunk" else "gk"] = g.float()
        return f"{form}_gla", arguments
    if (
        g is not None and call.decay == "fixed" and not _records(g)
    ):  # of their fixed decay they give no gradient
        arguments["g_gamma"] = g.float()
    elif g is not None:
        arguments["g"] = g.float().expand(call.v.shape[:3])
    return f"{form}_simple_gla", arguments


def _general(call: LinearCall, form: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    assert call.a is not None
    assert call.b is not None
    dtype, shape = arguments["q"].dtype, (*call.v.shape[:3], call.q.shape[3])
    arguments |= {"a": call.b.to(dtype), "b": -call.a.to(dtype)}
    _share(arguments, ("q", "k", "a", "b"), call.v.shape[2])
    g = call.g if call.decay == "channel" else _of_heads(call)[..., None].expand(shape)
    assert g is not None
    return f"{form}_dplr_delta_rule", {**arguments, "gk": g.float()}


def _of_heads(call: LinearCall) -> Tensor:
    """The log-decay of each head in each token, `[B, T, HV]`, where it is not of channels."""
    if call.g is None:
        return torch.zeros(call.v.shape[:3], dtype=torch.float32, device=call.v.device)
    return call.g.expand(call.v.shape[:3])


def _share(arguments: dict[str, Any], names: tuple[str, ...], heads: int) -> None:
    """Repeat the vectors that value heads share."""
    for name in names:
        x = arguments[name]
        arguments[name] = x.repeat_interleave(heads // x.shape[2], dim=2) if x.shape[2] != heads else x


def _dtype(call: LinearCall) -> torch.dtype:
    """What the vectors are given in: their own dtype, or float32 where they differ."""
    dtypes = {x.dtype for x in (call.q, call.k, call.v, call.a, call.b) if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _is_recurrent(call: LinearCall) -> bool:
    longest = call.q.shape[1] if call.seqs is None else call.seqs.max_length
    gate = call.gate
    tensors = (call.q, call.k, call.v, call.g, call.beta, call.a, call.b, call.initial_state)
    weights = (None, None) if gate is None else (gate.A_log, gate.dt_bias)
    return longest <= RECURRENT and not any(map(_records, (*tensors, *weights)))


def _records(x: Tensor | None) -> bool:
    return x is not None and torch.is_grad_enabled() and x.requires_grad


@functools.lru_cache(maxsize=64)
def _edges(seqs: Sequences, device: torch.device) -> Tensor:
    """Cumulative lengths; the same tensor for the same sequences, by which flash-linear-attention knows its plans."""
    return seqs.cu_seqlens(device).long()


class _DifferentiableOnce(torch.autograd.Function):
    """The same tensor; a second derivative is refused, which the kernels would not give and not miss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedError("impl='fla' gives first derivatives; impl='chunked' gives second ones too")
        return d


def _once(x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    y: Tensor = _DifferentiableOnce.apply(x)
    return y


@functools.cache
def _load() -> Functions | str:
    """The functions, or why there are none."""
    try:
        package = importlib.import_module("fla")
        version = str(getattr(package, "__version__", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"flash-linear-attention {version} is too old: pip install 'fla-core>=0.6'"
        return {
            name: getattr(importlib.import_module(f"fla.ops.{module}"), name)
            for name, module in FUNCTIONS.items()
        }
    except ModuleNotFoundError as error:
        if error.name == "fla":
            return "flash-linear-attention is not installed: pip install fla-core"
        return f"flash-linear-attention does not load ({error})"
    except Exception as error:  # Triton asks for a driver, in errors of its own
        return f"flash-linear-attention does not load ({type(error).__name__}: {error})"


@constant_in_graphs
def missing_reason() -> str | None:
    """Why there are no kernels, or None where there are."""
    found = _load()
    return found if isinstance(found, str) else None


def functions() -> Functions:
    """The functions of flash-linear-attention.

    Raises:
        UnsupportedError: it is not installed, too old, or does not load.
    """
    found = _load()
    if isinstance(found, str):
        raise UnsupportedError(found)
    return found


def _run(
    tensors: Iterable[Tensor | None], lengths: Iterable[int], numbers: Iterable[float]
) -> tuple[Tensor, Tensor]:
    o, final = compute(_call(tensors, lengths, numbers), functions())
    assert final is not None
    return o, final


def _outputs(
    tensors: Iterable[Tensor | None], lengths: Iterable[int], numbers: Iterable[float]
) -> list[Tensor]:
    call = _call(tensors, lengths, numbers)
    return [call.v.new_empty(call.v.shape), call.v.new_empty(call.state_shape, dtype=call.compute_dtype)]


def _call(tensors: Iterable[Tensor | None], lengths: Iterable[int], numbers: Iterable[float]) -> LinearCall:
    q, k, v, g, beta, a, b, initial_state, A_log, dt_bias = tensors
    scale, packed, normalize, bound, beta_max = numbers
    assert q is not None
    assert k is not None
    assert v is not None
    return linear_call(
        q, k, v, g, beta, a, b, scale=scale, initial_state=initial_state, output_final_state=True,
        cu_seqlens=Sequences(tuple(lengths)) if packed else None, normalize=bool(normalize),
        gate=None if A_log is None else Gate(A_log, dt_bias, bound or None), beta_max=beta_max or None,
    )  # fmt: skip


_FLA = Uncompiled("fla", 10, 2, _run, _outputs)

IMPLEMENTATION = Implementation(
    "fla",
    fla,
    refuse,
    yields=refuse_precision,
    rounding="the factors of products in float32 to TF32, and what goes from kernel to kernel to the inputs' dtype",
)
