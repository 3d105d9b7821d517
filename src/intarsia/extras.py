"""Optional libraries, imported when first used."""

from __future__ import annotations

import importlib
from types import ModuleType

from intarsia.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of this package installs it.

    Raises:
        MissingExtraError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs the library {module.split('.')[0]!r}, which is not installed: "
            f"run `pip install 'intarsia[{extra}]'`"
        ) from error
