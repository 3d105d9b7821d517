"""The parameters of the functions of flash-linear-attention 0.6.0 that `intarsia.ops.linear_fla` calls, as its wheel
declares them."""

from __future__ import annotations

VERSION = "0.6.0"

_COMMON = "q k v"
_STATE = "scale initial_state output_final_state"
_IN_KERNEL = "use_qk_l2norm_in_kernel use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval"
_EDGES = "cu_seqlens cu_seqlens_cpu"

SIGNATURES: dict[str, list[str]] = {
    name: parameters.split()
    for name, parameters in {
        "chunk_kda": (
            f"{_COMMON} g beta {_STATE} {_IN_KERNEL} safe_gate lower_bound disable_recompute"
            f" return_intermediate_states state_v_first {_EDGES} cp_context use_graph max_num_seqs **kwargs"
        ),
        "fused_recurrent_kda": (
            f"{_COMMON} g beta A_log dt_bias {_STATE} {_IN_KERNEL} lower_bound state_v_first cu_seqlens **kwargs"
        ),
        "chunk_gated_delta_rule": (
            f"{_COMMON} g beta {_STATE} use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval"
            f" state_v_first {_EDGES} chunk_indices cp_context **kwargs"
        ),
        "fused_recurrent_gated_delta_rule": (
            f"{_COMMON} g gk gv beta {_STATE} use_qk_l2norm_in_kernel use_gate_in_kernel A_log dt_bias"
            " use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens **kwargs"
        ),
        "chunk_gla": f"{_COMMON} g {_STATE} state_v_first {_EDGES}",
        "fused_recurrent_gla": f"{_COMMON} gk gv {_STATE} reverse state_v_first cu_seqlens **kwargs",
        "chunk_simple_gla": f"{_COMMON} g g_gamma {_STATE} state_v_first {_EDGES} **kwargs",
        "fused_recurrent_simple_gla": (
            f"{_COMMON} g g_gamma {_STATE} reverse state_v_first cu_seqlens **kwargs"
        ),
        "chunk_dplr_delta_rule": (
            f"{_COMMON} a b gk {_STATE} {_EDGES} safe_gate chunk_size disable_recompute cp_context lower_bound"
            " **kwargs"
        ),
        "fused_recurrent_dplr_delta_rule": f"{_COMMON} a b gk {_STATE} reverse cu_seqlens",
    }.items()
}

READ_FROM_KWARGS: dict[str, set[str]] = {
    "chunk_kda": {"A_log", "dt_bias"},
    "chunk_gated_delta_rule": {"use_gate_in_kernel", "A_log", "dt_bias"},
}
"""What a function takes out of its `**kwargs`."""
