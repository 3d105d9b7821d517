"""The functions of flash-linear-attention, by name and signature, over Intarsia's operators.

    from intarsia.integrations.fla import chunk_kda      # was: from fla.ops.kda import chunk_kda

The signatures are those of flash-linear-attention 0.6; keywords that older versions had are taken where they
still have a meaning. `q`, `k` are `[B, T, H, K]`, `v` `[B, T, HV, V]`, decays natural logarithms, states
`[N, HV, K, V]` float32 (`[N, HV, V, K]` with `state_v_first`), with N the batch or the number of sequences that
`cu_seqlens` packs into one row. The `chunk_`, `fused_chunk_` and `fused_recurrent_` forms of a rule compute the
same: which implementation runs is for the operators to choose. All are differentiable, `causal_conv1d_update`
excepted. What is asked for "in kernel" (the l2norm of q and k, the gate, the sigmoid of beta) is left to the operators
where their CPU kernels do it on the way.

Options that only say how a GPU should work (`chunk_size`, `chunk_indices`, `disable_recompute`, `safe_gate`,
`max_num_seqs`) change nothing here. A public function of `fla.ops` that is not served is an UnsupportedError when it is
imported, which says what is missing (`intarsia.integrations.fla.missing` lists them all).

`intarsia.integrations.accelerate_fla` puts these functions, and those of `modules`, inside flash-linear-attention's own
layers.

Raises, all functions:
    TypeError: an unknown keyword.
    UnsupportedError: an option with a value that cannot be served; the message says what to do instead.
    ConfigError, ShapeError: options that contradict each other, tensors that do not fit together. Both are ValueErrors,
        which is what flash-linear-attention raises.
"""

from __future__ import annotations

from intarsia.errors import UnsupportedError, did_you_mean
from intarsia.integrations.fla.additive import (
    chunk_gla,
    chunk_lightning_attn,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_chunk_gla,
    fused_chunk_linear_attn,
    fused_chunk_retention,
    fused_chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_lightning_attn,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
    parallel_retention,
    parallel_simple_gla,
)
from intarsia.integrations.fla.attention import (
    deltaformer_attn,
    parallel_attn,
    parallel_forgetting_attn,
    parallel_path_attn,
)
from intarsia.integrations.fla.convolution import (
    ShortConvolution,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
)
from intarsia.integrations.fla.delta import (
    chunk_delta_rule,
    chunk_gated_delta_product,
    chunk_gated_delta_rule,
    chunk_gdn,
    chunk_kda,
    fused_chunk_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    fused_recurrent_kda,
)
from intarsia.integrations.fla.gates import (
    fused_gdn_gate,
    fused_kda_gate,
)
from intarsia.integrations.fla.general import (
    chunk_comba,
    chunk_dplr_delta_rule,
    chunk_gdn2,
    chunk_iplr_delta_rule,
    chunk_rwkv7,
    fused_mul_recurrent_rwkv7,
    fused_recurrent_comba,
    fused_recurrent_dplr_delta_rule,
    fused_recurrent_gdn2,
    fused_recurrent_iplr_delta_rule,
    fused_recurrent_rwkv7,
)
from intarsia.integrations.fla.hgrn import (
    chunk_hgrn,
    fused_recurrent_hgrn,
)
from intarsia.integrations.fla.missing import MISSING
from intarsia.integrations.fla.norm import (
    FusedRMSNormGated,
    rms_norm_gated,
)

__all__ = [
    "FusedRMSNormGated",
    "ShortConvolution",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_comba",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_hgrn",
    "chunk_iplr_delta_rule",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "deltaformer_attn",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_gdn_gate",
    "fused_kda_gate",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_comba",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_hgrn",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
    "parallel_attn",
    "parallel_forgetting_attn",
    "parallel_path_attn",
    "parallel_retention",
    "parallel_simple_gla",
    "rms_norm_gated",
]


def __getattr__(name: str) -> object:
    """Say what is missing where a function of flash-linear-attention is imported that is not served here."""
    if name in MISSING:
        raise UnsupportedError(
            f"intarsia.integrations.fla does not serve {name}: {MISSING[name]}. Run it with"
            " flash-linear-attention itself"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}")
