"""The options that mixers with heads have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from intarsia.errors import ConfigError
from intarsia.layers.norm import OutputGate
from intarsia.mixers.base import MixerConfig, positive


@dataclass(frozen=True)
class HeadsConfig(MixerConfig):
    """`num_heads` heads, with `head_dim` channels of queries and keys (K) and `head_v_dim` of values (V; K by
    default)."""

    num_heads: int
    head_dim: int
    head_v_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(num_heads=self.num_heads, head_dim=self.head_dim, head_v_dim=self.head_v_dim)

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim


@dataclass(frozen=True)
class GroupedHeadsConfig(MixerConfig):
    """`num_heads` query and key heads of `head_dim` (K), and `num_v_heads` value heads (a multiple; the same number by
    default) of `head_v_dim` (V; K by default)."""

    num_heads: int
    head_dim: int
    num_v_heads: int | None = None
    head_v_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_v_heads=self.num_v_heads,
            head_v_dim=self.head_v_dim,
        )
        check_value_heads(self.value_heads, self.num_heads)

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        """V."""
        return self.head_dim if self.head_v_dim is None else self.head_v_dim


def check_value_heads(value_heads: int, num_heads: int) -> None:
    """Raise ConfigError unless each query-key head has the same number of value heads."""
    if value_heads % num_heads:
        raise ConfigError(f"num_v_heads must be a multiple of num_heads={num_heads}; got {value_heads}")


def check_output_gate(gate: str) -> None:
    """Raise ConfigError unless there is such an output gate."""
    if gate not in get_args(OutputGate):
        raise ConfigError(f"output_gate must be 'sigmoid', 'swish' or 'none'; got {gate!r}")
