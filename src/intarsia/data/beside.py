"""The JSON files that lie beside a model or a tokenizer, any of which may be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from intarsia.errors import DataError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value
