"""Intarsia builds, judges and runs hybrid linear-attention language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from intarsia.checkpoints.opening import load as load
    from intarsia.checkpoints.opening import save as save
    from intarsia.data.published import load_tokenizer as load_tokenizer

_DOORS = {
    "load": "intarsia.checkpoints.opening",
    "save": "intarsia.checkpoints.opening",
    "load_tokenizer": "intarsia.data.published",
}
"""What is called by the package's own name, and where it is. Imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_DOORS[name]), name)
