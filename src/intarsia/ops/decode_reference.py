"""The decode step in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from intarsia.ops.choice import Implementation
from intarsia.ops.decode_call import StepCall, StepRows
from intarsia.ops.decode_torch import decode_in_torch
from intarsia.ops.pools import StatePool


class ReferenceStep:
    """The step written out in PyTorch, a token at a time, with everything in float64; the states are rounded when they
    are written."""

    def __init__(self, call: StepCall) -> None:
        assert call.form is not None
        self._form = call.form

    def attempt(self, *_: object) -> None:
        """Nothing is done before the arguments are checked."""

    def run(self, rows: StepRows) -> Tensor:
        board, conv = rows.pool.board.double(), None if rows.pool.conv is None else rows.pool.conv.double()
        # Slots that are not written stay as they are.
        into = StatePool(
            rows.into.board.double(), None if rows.into.conv is None else rows.into.conv.double()
        )
        g, beta, z = (None if x is None else x.double() for x in (rows.g, rows.beta, rows.z))
        wide = StepRows(rows.qkv.double(), g, beta, z, None, StatePool(board, conv), into, rows.slots)
        with torch.no_grad():
            o = decode_in_torch(self._form, wide)
            write = list(rows.slots.write)
            rows.into.board[write] = into.board[write].to(rows.into.board.dtype)
            if rows.into.conv is not None and into.conv is not None:
                rows.into.conv[write] = into.conv[write].to(rows.into.conv.dtype)
            o = o.to(rows.qkv.dtype)
            return o if rows.out is None else rows.out.copy_(o)


IMPLEMENTATION = Implementation("reference", ReferenceStep, automatic=False)
