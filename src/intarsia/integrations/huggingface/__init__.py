"""Intarsia's language models as models of transformers: `AutoModelForCausalLM` opens them, and what is written for
transformers' models evaluates and trains them.

Nothing is imported or registered before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from intarsia.extras import require

if TYPE_CHECKING:
    from intarsia.integrations.huggingface.cache import IntarsiaCache
    from intarsia.integrations.huggingface.configuration import IntarsiaConfig
    from intarsia.integrations.huggingface.modeling import IntarsiaForCausalLM, IntarsiaModel

__all__ = ["IntarsiaCache", "IntarsiaConfig", "IntarsiaForCausalLM", "IntarsiaModel", "register"]

_WHERE = {
    "IntarsiaCache": "cache",
    "IntarsiaConfig": "configuration",
    "IntarsiaForCausalLM": "modeling",
    "IntarsiaModel": "modeling",
}


def register() -> None:
    """Tell transformers' `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` of the model type
    `intarsia`, in this process. Calling it again is harmless.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", "hf")
    from intarsia.integrations.huggingface.configuration import IntarsiaConfig
    from intarsia.integrations.huggingface.modeling import IntarsiaForCausalLM, IntarsiaModel
    from intarsia.integrations.huggingface.tokenization import IntarsiaTokenizer

    transformers.AutoConfig.register(IntarsiaConfig.model_type, IntarsiaConfig, exist_ok=True)
    transformers.AutoModel.register(IntarsiaConfig, IntarsiaModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(IntarsiaConfig, IntarsiaForCausalLM, exist_ok=True)
    transformers.AutoTokenizer.register(IntarsiaConfig, fast_tokenizer_class=IntarsiaTokenizer, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("transformers", "hf")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
