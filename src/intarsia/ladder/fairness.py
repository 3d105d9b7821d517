"""Whether the arms of a comparison had the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from intarsia.errors import TrainingError
from intarsia.ladder.results import RunResult
from intarsia.ladder.run_folder import RunFolder
from intarsia.training import read_metrics


def check_batches(runs: Iterable[RunResult], directory: Path) -> None:
    """Assert that runs with the same seed saw the same batches, at every step that was logged.

    The training loop chains the digests of all batches, so that equal digests at a step mean equal batches up
    to it. Failed runs are checked as far as they came.

    Raises:
        TrainingError: two did not.
    """
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for run in runs:
        for line in read_metrics(RunFolder(directory / run.directory).train / "metrics.jsonl"):
            if line["kind"] != "train":
                continue
            name, digest = seen.setdefault((run.seed, line["step"]), (run.name, line["batches"]))
            if digest != line["batches"]:
                raise TrainingError(
                    f"{run.name} and {name} saw different batches up to step {line['step']}: the comparison is not "
                    "fair. This is a bug, or a file in the directory was changed."
                )
