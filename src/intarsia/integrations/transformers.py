"""Intarsia's operators inside the linear-attention models of transformers, on CPUs.

A model file of transformers holds its delta rule as functions at the top of the module, one for many tokens and
one for a single token, and its layers call them by name. So the functions are replaced there: models made before
and after are served alike, in inference, training and generation, and putting the functions back undoes it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from intarsia.errors import UnsupportedError
from intarsia.extras import require
from intarsia.integrations.replacements import Acceleration, Replacement, Replacements
from intarsia.integrations.transformers_attention import register_attention
from intarsia.ops import DecodeStep, Sequences, Slots, StatePool, gated_delta_rule
from intarsia.ops.conv_call import conv_call
from intarsia.ops.precision import compute_dtype
from intarsia.ops.table import TABLE
from intarsia.ops.tracing import apart_from_torch, transform

Function = Callable[..., Any]

OLDEST = (5, 15)
"""The first version of transformers whose layers call the functions by name."""

GATED_DELTANET = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn")
KDA = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "causal_conv1d_fn")

FAMILIES: dict[str, tuple[str, ...]] = {
    "bailing_hybrid": KDA,
    "glm5_next": KDA,
    "kimi_linear": KDA,
    "olmo_hybrid": GATED_DELTANET,
    "qwen3_5": GATED_DELTANET,
    "qwen3_5_moe": GATED_DELTANET,
    "qwen3_next": GATED_DELTANET,
    "qwen4_exp": GATED_DELTANET,
}
"""The model families and the functions of `transformers.models.<family>.modeling_<family>` to replace."""

MIXING = frozenset({"glm5_next"})
"""The families whose other layers let sequences that are packed into one row see each other."""

OPTIONS = frozenset(
    {"query", "key", "value", "g", "beta", "chunk_size", "initial_state", "output_final_state"}
    | {"use_qk_l2norm_in_kernel", "cu_seqlens", "seq_idx", "kwargs"}
)
"""The parameters of transformers' delta rules whose meaning is known here."""


def accelerate_transformers() -> Acceleration:
    """Replace the delta rule of the linear-attention models of transformers by Intarsia's, on CPUs.

    Holds for all models of `FAMILIES` that the installed transformers has, made before or after, in this process
    until it is undone. Tensors on other devices, `torch.export`, `torch.jit.trace` and the transforms of `torch.func`
    get the original functions. Calling it again is harmless; it stays until each call has been undone.

    Sequences packed into one row are kept apart, whether the model is told of them by `cu_seq_lens_q` or by
    `seq_idx`; `DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)` makes both. The
    originals refuse them without flash-linear-attention, or mix them. With a cache, and in the families of `MIXING`,
    the softmax attention of transformers would mix them: that is refused here.

    All models of transformers can have Intarsia's softmax attention from then on, by `attn_implementation="intarsia"`;
    the name stays, and changes nothing for models that do not ask for it.

    Returns:
        An `Acceleration`: `.undo()`, or leaving the `with` block, takes the call back.

    Raises:
        MissingExtraError: transformers is not installed.
        UnsupportedError: it is older than `OLDEST`, or has none of the families.
    """
    made = Acceleration(_REPLACEMENTS)
    register_attention()
    return made


def _replacements() -> dict[str, Replacement]:
    """What there is to replace in the installed transformers, by `"family.function"`; nothing is changed yet."""
    transformers = require("transformers", "hf")
    version = transformers.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UnsupportedError(
            f"transformers {version} is too old: its layers keep their own references to the functions."
            f" Install transformers>={OLDEST[0]}.{OLDEST[1]}"
        )
    made = {}
    for family, names in FAMILIES.items():
        module = _module(family)  # 10 to 50 ms each, once transformers itself is there
        for name in names:
            original = getattr(module, name, None)
            if module is not None and original is not None:
                wrap = _convolution if name == "causal_conv1d_fn" else _rule
                ours = wrap(original, family)
                made[f"{family}.{name}"] = Replacement(vars(module), name, original, ours)
    if not made:
        raise UnsupportedError(
            f"transformers {version} has none of {', '.join(FAMILIES)}: install another version"
        )
    return made


_REPLACEMENTS = Replacements(_replacements)  # one, for there is one transformers in a process


def _module(family: str) -> ModuleType | None:
    if importlib.util.find_spec(f"transformers.models.{family}") is None:
        return None
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _served(x: Tensor) -> bool:
    """Whether the operators take a call: not one that becomes a program of its own, which would need them wherever it
    runs, nor one under a transform of `torch.func`, which has a use for PyTorch's own operations alone."""
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return x.device.type == "cpu" and not traced and transform() is None


def _rule(original: Function, family: str) -> Function:
    """`gated_delta_rule` in the place of one of the delta rules of transformers, KDA or Gated DeltaNet."""
    # What a later version may add changes what is computed, so a call that uses it is the original's.
    unknown = tuple(name for name in inspect.signature(original).parameters if name not in OPTIONS)

    @functools.wraps(original, updated=())
    def delta_rule(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *args: Any, **options: Any
    ) -> Any:
        # What stands where in `args` differs between the functions; the layers name everything.
        if not _served(query) or args or any(options.get(name) is not None for name in unknown):
            return original(query, key, value, g, beta, *args, **options)
        keep = bool(options.get("output_final_state"))
        packing = _packing(options, family)
        if packing is not None and keep:
            raise UnsupportedError(
                "with a cache, the attention layers of transformers mix the sequences that are packed into one row:"
                " call the model with use_cache=False, or give it the sequences as rows"
            )
        # Their l2norm, in float32 with 1e-6 under the root, is ours.
        normalize = bool(options.get("use_qk_l2norm_in_kernel"))
        state = options.get("initial_state")
        if state is not None and query.shape[1] == 1 and apart_from_torch(query, key, value, g, beta, state):
            if not DecodeStep.is_faster(1, query, key, value, g, beta, state):
                return original(
                    query, key, value, g=g, beta=beta, initial_state=state, output_final_state=keep,
                    use_qk_l2norm_in_kernel=normalize,
                )  # fmt: skip
            o, state = _decode(query, key, value, g, beta, state, normalize)
            return o, state if keep else None
        return gated_delta_rule(
            query, key, value, g, beta, initial_state=state, output_final_state=keep, cu_seqlens=packing,
            normalize=normalize,
        )  # fmt: skip

    return delta_rule


def _decode(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` of one token a sequence, by the kernel for that."""
    B, _, H, K = q.shape
    step = _decode_step(H, K, v.shape[2], v.shape[3], "channel" if g.dim() == 4 else "head", normalize)
    read = StatePool(state.to(compute_dtype(q, k, v)).contiguous())
    written = StatePool(torch.empty_like(read.board))
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    o = step(qkv, read, _slots(B), g=g.flatten(1), beta=beta.flatten(1), into=written)
    return o.view(v.shape).to(v.dtype), written.board


@functools.lru_cache
def _decode_step(
    heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
    decay: Literal["head", "channel"],
    normalize: bool,
) -> DecodeStep:
    return DecodeStep(
        heads=heads, key_dim=key_dim, value_heads=value_heads, value_dim=value_dim, decay=decay, normalize=normalize
    )  # fmt: skip


@functools.lru_cache
def _slots(count: int) -> Slots:
    """Each sequence has the slot of its row."""
    return Slots(range(count))


def _convolution(original: Function, family: str) -> Function:
    """`short_convolution` in the place of `causal_conv1d_fn`."""

    @functools.wraps(original, updated=())
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Any:
        if not _served(hidden_states) or bias is not None or activation not in (None, "silu"):
            return original(hidden_states, weight, bias, activation=activation, **options)
        x, dtype = hidden_states.mT, hidden_states.dtype
        call = conv_call(
            x, weight, activation="silu" if activation else None, cu_seqlens=_packing(options, family)
        )
        chosen = TABLE["short_convolution"].choose(call)
        if dtype.itemsize < 4 and chosen.rounding is not None:  # the original rounds once
            call = call._replace(x=x.float())
            chosen = TABLE["short_convolution"].choose(call)
        y, _ = chosen.run(call)
        return y.mT.to(dtype)

    return causal_conv1d_fn


def _packing(options: Mapping[str, Any], family: str) -> Sequences | None:
    """The sequences that are packed into one row, as the layers are told of them, or None for one sequence a row:
    cumulative lengths, under two names, or the number of each token's sequence `[1, T]`."""
    edges, numbers = options.get("cu_seqlens"), options.get("seq_idx")
    edges = options.get("cu_seq_lens_q") if edges is None else edges
    if edges is not None:
        packing = Sequences.from_cu_seqlens(edges)
    elif numbers is None:
        return None
    elif numbers.dim() == 2 and numbers.shape[0] == 1:
        packing = Sequences(tuple(torch.unique_consecutive(numbers, return_counts=True)[1].tolist()))
    else:
        raise UnsupportedError(f"seq_idx must be [1, T], one packed row; got {list(numbers.shape)}")
    if packing.count == 1:
        return None
    if family in MIXING:
        raise UnsupportedError(
            f"the attention layers of {family} mix the sequences that are packed into one row: give it the"
            " sequences as rows"
        )
    return packing
