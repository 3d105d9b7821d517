"""Making a trained model sparse: its indexers learn from full attention, and then all of it from what they pick
(DeepSeek-V3.2, 2025, arXiv:2512.02556)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intarsia.checkpoints.opening import load
from intarsia.data import TokenDataset, Tokenizer
from intarsia.errors import CheckpointError, ConfigError
from intarsia.files import write_json
from intarsia.jobs.locks import locked
from intarsia.jobs.progress import NoProgress, Progress
from intarsia.model import LanguageModel, ModelConfig
from intarsia.model.sparsified import reading_everything
from intarsia.training.beginning import Beginning, fill_from
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import device_named
from intarsia.training.evaluate import Evaluation, evaluate, first_documents
from intarsia.training.metrics import read_metrics
from intarsia.training.result import TrainResult
from intarsia.training.run_directory import RunDirectory, compare, read_json
from intarsia.training.start_or_resume import train


@dataclass(frozen=True)
class SparsifyDirectory:
    """The paths of a model that becomes sparse.

    sparsify.json       what it is: the model of before, the one to be, and both stages
    before.npz          how likely held-out text is to the model of before
    warmed-up.npz       and to the sparse one when its indexers have learned, before anything else does
    warm-up/            the run in which they learn
    train/              the run in which all of it learns; its `model/` is the result
    """

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "sparsify.json"

    @property
    def before(self) -> Path:
        return self.path / "before.npz"

    @property
    def warmed_up(self) -> Path:
        return self.path / "warmed-up.npz"

    @property
    def warm_up(self) -> RunDirectory:
        return RunDirectory(self.path / "warm-up")

    @property
    def sparse(self) -> RunDirectory:
        return RunDirectory(self.path / "train")


@dataclass(frozen=True)
class Sparsified:
    """How it ended, or where it was stopped: what is None is still to be done."""

    directory: SparsifyDirectory
    before: Evaluation | None = None
    warm_up: TrainResult | None = None
    warmed_up: Evaluation | None = None
    sparse: TrainResult | None = None

    @property
    def finished(self) -> bool:
        return self.sparse is not None and self.sparse.finished

    @property
    def picked_share(self) -> dict[str, float]:
        """The share of full attention that indexers picked in the last line of metrics of each stage that has one."""
        found = {}
        for name, run in (("warm_up", self.directory.warm_up), ("sparse", self.directory.sparse)):
            lines = read_metrics(run.metrics) if run.metrics.exists() else []
            shares = [line["picked_share"] for line in lines if "picked_share" in line]
            if shares:
                found[name] = float(shares[-1])
        return found


def sparsify(
    source: Path,
    model: ModelConfig,
    dataset: TokenDataset,
    tokenizer: Tokenizer | None,
    directory: str | os.PathLike[str],
    *,
    warm_up: TrainConfig,
    sparse: TrainConfig,
    progress: Progress | None = None,
    device: str = "auto",
) -> Sparsified:
    """Train a sparse model from one with full attention, in two stages; or go on where an earlier call stopped.

    In the first all is frozen but the indexers, which learn what attention to everything gives; in the second layers
    read what their indexers pick, these learn from that, and the rest from the text. Each stage is a training run of
    its own: it can be stopped and goes on, with the same numbers to the bit.

    Args:
        source: the folder of a model, ours or published.
        model: what it becomes (`intarsia.model.sparsified`).
        warm_up, sparse: the two stages. They have their own steps, and the evaluation's options are those of `sparse`.
        directory: laid out as `SparsifyDirectory` says.

    Raises:
        ConfigError: they do not fit together, or this is one of several processes.
        CheckpointError: the source cannot be read, or the directory holds another model that becomes sparse.
        TrainingError: as in `train`.
    """
    place, shown = SparsifyDirectory(Path(directory)), progress or NoProgress()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a model is made sparse in one process: run it without torchrun")
    if warm_up.trains != "indexers" or sparse.trains != "all":
        raise ConfigError(
            "first indexers are trained alone and then everything: "
            f"trains is {warm_up.trains!r} in the warm-up and {sparse.trains!r} after it, not 'indexers' and 'all'"
        )
    origin, dense = Beginning(source), reading_everything(model, True)
    now = _identity(origin, model, warm_up, sparse, dataset)
    _check_is_wanted(place, now)
    if dataset.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the data have a vocabulary of {dataset.vocab_size} and the model one of {model.vocab_size}"
        )
    documents = first_documents(dataset.heldout, sparse.eval_documents, sparse.eval_bytes)
    if not len(documents):
        raise ConfigError("no held-out text is read, so that what becomes of the model cannot be told")
    origin.check(model)
    on = device_named(device)

    def scored(file: Path, label: str, made: Callable[[], LanguageModel]) -> Evaluation:
        if file.exists():
            return Evaluation.load(file)
        shown.note(f"{label}: reading held-out text")
        found = evaluate(
            made().to(on),
            dataset.heldout,
            length=sparse.length,
            documents=documents,
            precision=sparse.precision,
        )
        found.save(file)
        return found

    busy = CheckpointError(f"another process is at work in {place.path}: wait for it or stop it")
    with locked(place.path / ".lock", busy):
        if not place.plan.exists():
            write_json(place.plan, now)
        before = scored(place.before, "Before", lambda: load(source, torch.float32))
        warmed = train(
            dense, warm_up, dataset, tokenizer, place.warm_up.path, progress=progress, label="Warm-up",
            device=device, beginning=origin,
        )  # fmt: skip
        if not warmed.finished:
            return Sparsified(place, before, warmed)
        after = scored(place.warmed_up, "After the warm-up", lambda: _model_of(model, place.warm_up.model))
        trained = train(
            model, sparse, dataset, tokenizer, place.sparse.path, progress=progress, label="Sparse",
            device=device, beginning=Beginning(place.warm_up.model),
        )  # fmt: skip
    return Sparsified(place, before, warmed, after, trained)


def _identity(
    origin: Beginning, model: ModelConfig, warm_up: TrainConfig, sparse: TrainConfig, dataset: TokenDataset
) -> dict[str, Any]:
    return {
        "source": str(origin.folder),
        "beginning": origin.record,
        "model": model.to_dict(),
        "data": {
            "corpus": dataset.corpus,
            "tokenizer": dataset.tokenizer,
            "fingerprint": dataset.fingerprint,
        },
        "warm_up": warm_up.to_dict(),
        "sparse": sparse.to_dict(),
    }


def _check_is_wanted(place: SparsifyDirectory, now: dict[str, Any]) -> None:
    """Raise CheckpointError where the directory holds something else. The stages look at their options themselves."""
    if not place.plan.exists():
        if RunDirectory(place.path).config.exists():
            raise CheckpointError(f"{place.path} holds a training run: choose another directory (--out)")
        return
    differences = compare(read_json(place.plan), now)
    if differences:
        listed = "".join(f"\n  {one}" for one in differences)
        raise CheckpointError(
            f"{place.path} holds a model that becomes sparse otherwise:{listed}\n"
            "Go on with what it was started with, remove it, or choose another directory (--out)."
        )


def _model_of(config: ModelConfig, folder: Path) -> LanguageModel:
    """The model with the weights of a folder, and drawn indexers where there are none."""
    model = LanguageModel(config)
    model.init_weights(0)
    fill_from(model, load(folder, torch.float32).state_dict(), str(folder))
    return model.eval()
