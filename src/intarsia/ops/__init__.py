"""The operators: one signature each, several implementations behind it."""

from intarsia.ops.linear import explain, gated_delta_rule, linear_attention
from intarsia.ops.sequences import Sequences

__all__ = ["Sequences", "explain", "gated_delta_rule", "linear_attention"]
