"""A call of the short convolution, checked."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from intarsia.errors import ConfigError, ShapeError
from intarsia.ops.sequences import Sequences

Activation = Literal["silu"]


class ConvCall(NamedTuple):
    """A checked call of `short_convolution`: `x` `[B, T, D]`, `weight` `[D, W]`, `initial_state` `[N, W - 1, D]` or
    None, with `N` the number of sequences: `B`, or those that `seqs` packs into one row."""

    x: Tensor
    weight: Tensor
    silu: bool
    initial_state: Tensor | None
    output_final_state: bool
    seqs: Sequences | None

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """`(N, W - 1, D)`."""
        return self.sequences, self.weight.shape[1] - 1, self.x.shape[2]

    def after(self, state: Tensor) -> ConvCall:
        """The same call behind this state, with the one that follows."""
        return self._replace(initial_state=state, output_final_state=True)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each sequence has."""
        return (self.x.shape[1],) * self.x.shape[0] if self.seqs is None else self.seqs.lengths

    @property
    def sequences(self) -> int:
        return self.x.shape[0] if self.seqs is None else self.seqs.count


def conv_call(
    x: Tensor,
    weight: Tensor,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequences | None = None,
) -> ConvCall:
    """Check a call of `short_convolution`.

    Raises:
        ShapeError: arguments that do not fit together.
        ConfigError: an unknown `activation`.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ShapeError(
            f"x must be [B, T, D] and weight [D, W]; got {list(x.shape)} and {list(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise ConfigError(f"activation must be None or 'silu'; got {activation!r}")
    seqs = None if cu_seqlens is None else Sequences.from_cu_seqlens(cu_seqlens)
    if seqs is not None and (x.shape[0] != 1 or seqs.total != x.shape[1]):
        raise ShapeError(
            f"cu_seqlens describes one row of {seqs.total} tokens (B == 1); x is {list(x.shape)}"
        )
    call = ConvCall(x, weight, activation == "silu", initial_state, output_final_state, seqs)
    if initial_state is not None and initial_state.shape != call.state_shape:
        raise ShapeError(f"initial_state must be {list(call.state_shape)}; got {list(initial_state.shape)}")
    return call
