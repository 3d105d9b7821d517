"""The weights that a run begins with, where they are not drawn: those of another model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intarsia.checkpoints.opening import load, opened
from intarsia.errors import CheckpointError
from intarsia.files import sha256
from intarsia.model import LanguageModel, ModelConfig
from intarsia.training.indexers import indexer_parameters

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Beginning:
    """A model in a folder, ours or published, that has all the weights of the one to train but those of indexers."""

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """What is recorded of it: a digest of all files that hold weights.

        Raises:
            CheckpointError: there are none.
        """
        files = sorted(path for pattern in WEIGHTS for path in self.folder.glob(pattern))
        if not files:
            raise CheckpointError(f"{self.folder} holds no weights")
        digest = hashlib.sha256("".join(sha256(path) for path in files).encode())
        return {"weights": digest.hexdigest()}

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError unless a model of this configuration can begin with it. No weights are read."""
        with torch.device("meta"):
            model = LanguageModel(config)
        check_names(model, opened(self.folder)[0].state_dict(), str(self.folder))

    def fill(self, model: LanguageModel) -> None:
        """Put the weights into a model that is not divided among processes. Indexers keep theirs where the folder has
        none.

        Raises:
            CheckpointError: the model in the folder is another.
        """
        fill_from(model, load(self.folder, torch.float32).state_dict(), str(self.folder))


def fill_from(model: LanguageModel, weights: dict[str, Tensor], what: str) -> None:
    """Copy weights into a model that has the same, and perhaps indexers beside them.

    Raises:
        CheckpointError: it has not.
    """
    check_names(model, weights, what)
    model.load_state_dict(weights, strict=False)


def check_names(model: LanguageModel, weights: dict[str, Tensor], what: str) -> None:
    """Raise CheckpointError unless the weights are all those of the model, or all but those of its indexers."""
    own, indexers = model.state_dict(), indexer_parameters(model)
    missing = [name for name in own if name not in weights]
    wrong = [name for name in missing if name not in indexers] or [n for n in weights if n not in own]
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong or (missing and set(missing) != set(indexers)):
        raise CheckpointError(
            f"the weights of {what} are not those of the model that is to be trained: "
            f"{', '.join((wrong or missing)[:3])}"
        )
