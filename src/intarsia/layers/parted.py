"""A mixer in three parts, of which the first and the last belong to a program of what is done to each token alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from intarsia.ops import PackedWeights, Sequences
from intarsia.ops.row_program import Place, RowProgram

Rows = Sequence[Tensor]
"""Results of a program, `[tokens, numbers]` each, the tokens of a sequence behind each other."""


class Parted:
    """What a mixer becomes for inference where it can be taken apart: it is called as the mixer is, or in three parts,
    so that what comes before and after them joins the first and the last."""

    @property
    def parts(self) -> bool:
        """Whether it can be called in parts: all that it needs is where the kernels can read it."""
        raise NotImplementedError

    @property
    def beside(self) -> tuple[PackedWeights, ...]:
        """Copies of weights that it has made, beside the mixer's own."""
        return ()

    def begin(self, program: RowProgram, x: Place) -> None:
        """List what is made of each token's `x` alone; the program's results are what the tokens exchange."""
        raise NotImplementedError

    def exchange(
        self, rows: Rows, shape: tuple[int, int], state: Any, seqs: Sequences | None
    ) -> tuple[Tensor, Any]:
        """What each of the tokens `[B, T]` of `shape` finds, `[tokens, numbers]`, and the state after them. `rows` are
        the results of `begin`; `seqs` as in the mixer."""
        raise NotImplementedError

    def finish(self, program: RowProgram) -> Place:
        """List what is made of that: the program's next input. Returns where the mixer's output is."""
        raise NotImplementedError
