"""The operators: one signature each, several implementations behind it."""

from intarsia.ops.sequences import Sequences

__all__ = ["Sequences"]
