"""Intarsia's operators inside the layers of flash-linear-attention, on CPUs.

Its layers call functions of `fla.ops` and `fla.modules` by names at the top of their own modules. So these names are
replaced wherever they stand: layers made before and after are served alike, and putting the functions back undoes it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from intarsia.errors import MissingExtraError, UnsupportedError
from intarsia.integrations import fla as functions
from intarsia.integrations.fla import modules
from intarsia.integrations.fla.missing import MISSING
from intarsia.integrations.replacements import Acceleration, Replacement, Replacements

Function = Callable[..., Any]

OLDEST = (0, 6)
"""The first version of flash-linear-attention with these names and signatures."""

OPERATORS: dict[str, tuple[str, ...]] = {
    "attn.parallel": ("parallel_attn",),
    "comba.chunk": ("chunk_comba",),
    "comba.fused_recurrent": ("fused_recurrent_comba",),
    "delta_rule.chunk": ("chunk_delta_rule",),
    "delta_rule.fused_chunk": ("fused_chunk_delta_rule",),
    "delta_rule.fused_recurrent": ("fused_recurrent_delta_rule",),
    "deltaformer.parallel": ("deltaformer_attn",),
    "forgetting_attn.parallel": ("parallel_forgetting_attn",),
    "gated_delta_product.chunk": ("chunk_gated_delta_product",),
    "gated_delta_rule.chunk": ("chunk_gated_delta_rule",),
    "gated_delta_rule.fused_recurrent": ("fused_recurrent_gated_delta_rule",),
    "gated_delta_rule.gate": ("fused_gdn_gate",),
    "gdn2.chunk": ("chunk_gdn2",),
    "gdn2.fused_recurrent": ("fused_recurrent_gdn2",),
    "generalized_delta_rule.dplr.chunk": ("chunk_dplr_delta_rule",),
    "generalized_delta_rule.dplr.fused_recurrent": ("fused_recurrent_dplr_delta_rule",),
    "generalized_delta_rule.iplr.chunk": ("chunk_iplr_delta_rule",),
    "generalized_delta_rule.iplr.fused_recurrent": ("fused_recurrent_iplr_delta_rule",),
    "gla.chunk": ("chunk_gla",),
    "gla.fused_chunk": ("fused_chunk_gla",),
    "gla.fused_recurrent": ("fused_recurrent_gla",),
    "hgrn.chunk": ("chunk_hgrn",),
    "hgrn.fused_recurrent": ("fused_recurrent_hgrn",),
    "kda.chunk": ("chunk_kda",),
    "kda.fused_recurrent": ("fused_recurrent_kda",),
    "kda.gate": ("fused_kda_gate",),
    "lightning_attn.chunk": ("chunk_lightning_attn",),
    "lightning_attn.fused_recurrent": ("fused_recurrent_lightning_attn",),
    "linear_attn.chunk": ("chunk_linear_attn",),
    "linear_attn.fused_chunk": ("fused_chunk_linear_attn",),
    "linear_attn.fused_recurrent": ("fused_recurrent_linear_attn",),
    "path_attn.parallel": ("parallel_path_attn",),
    "retention.chunk": ("chunk_retention",),
    "retention.fused_chunk": ("fused_chunk_retention",),
    "retention.fused_recurrent": ("fused_recurrent_retention",),
    "retention.parallel": ("parallel_retention",),
    "rwkv7.chunk": ("chunk_rwkv7",),
    "rwkv7.fused_recurrent": ("fused_recurrent_rwkv7", "fused_mul_recurrent_rwkv7"),
    "simple_gla.chunk": ("chunk_simple_gla",),
    "simple_gla.fused_chunk": ("fused_chunk_simple_gla",),
    "simple_gla.fused_recurrent": ("fused_recurrent_simple_gla",),
    "simple_gla.parallel": ("parallel_simple_gla",),
}
"""Where in `fla.ops` each function of `intarsia.integrations.fla` stands."""

MODULES: dict[str, tuple[str, ...]] = {
    "fla.modules.activations.ops": ("sigmoid", "logsigmoid", "swish", "swiglu", "swiglu_linear"),
    "fla.modules.norm.fused_norm_gate": (
        "layer_norm_gated", "layer_norm_swish_gate_linear", "rms_norm_swish_gate_linear",
    ),
    "fla.modules.norm.l2norm": ("l2norm",),
    "fla.modules.norm.layernorm": (
        "layer_norm", "rms_norm", "group_norm", "layer_norm_linear", "rms_norm_linear",
    ),
    "fla.modules.norm.layernorm_gated": ("layernorm_fn", "rmsnorm_fn"),
    "fla.modules.rotary.ops": ("rotary_embedding",),
    "fla.modules.token_shift": ("token_shift",),
    "fla.ops.attn.decoding": ("attn_decoding_one_step",),
    "fla.ops.rwkv7.fused_addcmul": ("fused_addcmul_rwkv7",),
    "fla.ops.rwkv7.fused_k_update": ("fused_k_rwkv7",),
    "fla.ops.rwkv7.gate_output_correction": ("gate_output_correction",),
}  # fmt: skip
"""Where each function of `intarsia.integrations.fla.modules` stands."""

BESIDE: dict[str, tuple[str, ...]] = {
    "fla.modules.causal_conv1d.ops": ("causal_conv1d", "causal_conv1d_update"),
    "fla.modules.norm.fused_norm_gate": ("rms_norm_gated",),
}
"""The functions of `intarsia.integrations.fla` that stand in `fla.modules`."""


def accelerate_fla() -> Acceleration:
    """Let the layers of flash-linear-attention run on CPUs: their rules on Intarsia's operators, their norms,
    convolutions and activations in its kernels or in PyTorch.

    Holds for all layers and models, made before or after, in this process until it is undone. Tensors on other devices
    get the original functions. A layer whose rule is none of Intarsia's operators raises an UnsupportedError on a CPU
    that says which. Calling it again is harmless; it stays until each call has been undone.

    flash-linear-attention imports Triton, which must be installed, and warns on a machine without a GPU.

    Returns:
        An `Acceleration`: `.undo()`, or leaving the `with` block, takes the call back.

    Raises:
        MissingExtraError: flash-linear-attention, or what it imports, is not installed.
        UnsupportedError: it is older than `OLDEST`.
    """
    return Acceleration(_REPLACEMENTS)


def _replacements() -> dict[str, Replacement]:
    """What there is to replace in the installed version, by `"module.function"`; nothing is changed yet."""
    try:
        fla = importlib.import_module("fla")
        for name in ("fla.ops", "fla.modules", "fla.layers"):
            importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"flash-linear-attention cannot be imported ({error}): run"
            " `pip install 'flash-linear-attention>=0.6' triton`"
        ) from error
    if tuple(int(part) for part in fla.__version__.split(".")[:2]) < OLDEST:
        raise UnsupportedError(
            f"flash-linear-attention {fla.__version__} is too old: install flash-linear-attention>="
            + ".".join(map(str, OLDEST))
        )
    ours: dict[int, tuple[Function, Function]] = {}
    for path, name, function in _served():
        original = getattr(_module(path), name, None)
        if original is not None:
            ours[id(original)] = original, _on_cpu(original, function)
    for path, names in _namespaces():
        for name in MISSING.keys() & names.keys() if path.startswith("fla.ops.") else ():
            original = names[name]
            ours.setdefault(id(original), (original, _on_cpu(original, _refusal(name))))
    made = {}
    for path, names in _namespaces():
        for name, value in list(names.items()):
            if id(value) in ours:
                made[f"{path.removeprefix('fla.')}.{name}"] = Replacement(names, name, *ours[id(value)])
    return made


_REPLACEMENTS = Replacements(_replacements)  # one, for there is one flash-linear-attention in a process


def _module(path: str) -> ModuleType | None:
    """A module of its, or None where another version has it elsewhere."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return None


def _served() -> Iterator[tuple[str, str, Function]]:
    """The module and name of each function that is replaced, and by what."""
    for path, names in OPERATORS.items():
        yield from ((f"fla.ops.{path}", name, getattr(functions, name)) for name in names)
    for path, names in BESIDE.items():
        yield from ((path, name, getattr(functions, name)) for name in names)
    for path, names in MODULES.items():
        yield from ((path, name, getattr(modules, name)) for name in names)


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    """The names of all its modules, and the tables of functions that some of them hold."""
    for path, module in list(sys.modules.items()):
        if module is None or not (path == "fla" or path.startswith("fla.")):
            continue
        names = vars(module)
        yield path, names
        table = names.get("ACT2FN")
        if isinstance(table, dict) and path == "fla.modules.activations.ops":
            yield f"{path}.ACT2FN", table


def _on_cpu(original: Function, ours: Function) -> Function:
    """`ours` for tensors on the CPU, `original` for all others."""

    @functools.wraps(ours)
    def call(*args: Any, **options: Any) -> Any:
        given = next((x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)), None)
        return (ours if given is not None and given.device.type == "cpu" else original)(*args, **options)

    return call


def _refusal(name: str) -> Function:
    def refused(*_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"{name} does not run on a CPU: {MISSING[name]}")

    return refused
