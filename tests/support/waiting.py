"""What in a computation would make the host wait for a GPU, found on any device."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "_is_all_true", "_is_any_true", "allclose",
}  # fmt: skip
"""Operators whose result, or the size of it, the host must know before it goes on."""


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        given = (kwargs or {}).get("output_size")
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if (
            name in WAIT
            or (name == "repeat_interleave" and given is None)
            or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks)
        ):
            ours = [frame for frame in traceback.extract_stack() if "/intarsia/" in frame.filename]
            self.found.append(f"{name} at {ours[-1].filename}:{ours[-1].lineno}" if ours else name)
        return func(*args, **(kwargs or {}))
