"""The public functions of `fla.ops` that nothing here computes."""

from __future__ import annotations

MISSING: dict[str, str] = {
    "chunk_abc": "attention with bounded memory needs a softmax over the slots of its memory",
    "chunk_cyfa": "the operators have no rule of CyFA's",
    "chunk_gated_oja_rule": "the operators have no rule that erases along the values",
    "chunk_gsa": "gated slot attention needs a softmax between two boards",
    "chunk_lightnet": "its decay is the softmax of the keys, which no operator makes; call chunk_gla with the decay",
    "chunk_log_linear_attn": "the operators have no states of several levels",
    "chunk_mesa_net": "the operators solve no system for each token",
    "chunk_momentum_delta_rule": "the operators have one board, without a momentum",
    "chunk_precond_gated_delta_rule": "the operators have no preconditioner beside the board",
    "chunk_precond_kda": "the operators have no preconditioner beside the board",
    "chunk_rwkv6": "the operators have no bonus for the token itself",
    "chunk_ttt_linear": "the operators have no rule with a norm inside",
    "fused_attnres": "attention over residual streams is no operator here",
    "fused_chunk_based": "the Taylor feature map is not made here; make it and call chunk_linear_attn",
    "fused_chunk_ttt_linear": "the operators have no rule with a norm inside",
    "fused_recurrent_cyfa": "the operators have no rule of CyFA's",
    "fused_recurrent_gated_oja_rule": "the operators have no rule that erases along the values",
    "fused_recurrent_gsa": "gated slot attention needs a softmax between two boards",
    "fused_recurrent_lightnet": "its decay is the softmax of the keys; call fused_recurrent_gla with the decay",
    "fused_recurrent_momentum_delta_rule": "the operators have one board, without a momentum",
    "fused_recurrent_precond_gated_delta_rule": "the operators have no preconditioner beside the board",
    "fused_recurrent_precond_kda": "the operators have no preconditioner beside the board",
    "fused_recurrent_rwkv4": "the operators have no normaliser that is carried as a logarithm",
    "fused_recurrent_rwkv6": "the operators have no bonus for the token itself",
    "parallel_based": "the Taylor feature map is not made here; make it and call chunk_linear_attn",
    "parallel_moba": "there is no sparse attention here",
    "parallel_nsa": "there is no sparse attention here",
    "parallel_parallax": "the operators have no rule of Parallax's",
    "parallel_rebased": "the quadratic feature map is not made here; make it and call chunk_linear_attn",
    "parallel_stickbreaking_attn": "stick-breaking attention is no operator here",
    "parallel_wall_attn": "wall attention is no operator here",
    "parallel_wall_attn_decode": "wall attention is no operator here",
}
"""Why each is missing, by name."""
