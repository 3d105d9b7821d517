"""The tokenizer that lies beside a model."""

from __future__ import annotations

import os

from intarsia.checkpoints.native import TOKENIZER
from intarsia.checkpoints.places import find_folder
from intarsia.data import tokenizer
from intarsia.data.tokenizer_base import Tokenizer


def load_tokenizer(path_or_repo: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model that `intarsia.load` opens.

    Args:
        path_or_repo: the model's folder, or a repository that is in Hugging Face's cache on this machine.

    Raises:
        CheckpointError: there is no such folder.
        DataError: it holds no tokenizer that is known.
    """
    folder = find_folder(path_or_repo)
    return tokenizer.load_tokenizer(folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder)
