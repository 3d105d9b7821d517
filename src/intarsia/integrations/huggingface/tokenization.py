"""The tokenizer of a model in this package's own format, where transformers' `AutoTokenizer` looks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from intarsia.checkpoints.native import TOKENIZER


class IntarsiaTokenizer(PreTrainedTokenizerFast):
    """What finds it: our own format has it in a folder of its own, `tokenizer/`. None is ever made of this class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """That in `tokenizer/`, or else the one beside the model, where `save_pretrained` puts it.

        Raises:
            OSError, ValueError: there is none that transformers reads.
        """
        folder = Path(pretrained_model_name_or_path) / TOKENIZER
        if folder.is_dir():
            options.pop("_commit_hash", None)  # of the model's repository
            return AutoTokenizer.from_pretrained(str(folder), *arguments, **options)
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, *arguments, **options)
