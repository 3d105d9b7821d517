"""Runs that share their first steps: one stable phase serves several budgets.

Until a rate begins to fall (`intarsia.training.schedule.stable_until`), a run with the schedule WSD does not know how
long it will be: it takes the same steps, on the same batches, as any longer one with its seeds and its rate. So a run
that is wanted with a larger budget goes on from the last checkpoint before the fall of a finished smaller one (Hu et
al. 2024, MiniCPM; Hägele et al. 2024), and its numbers are those, to the bit, that it would have had from the start.
Where there is no such checkpoint it is made from the start.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from intarsia.ladder.run_folder import RunFolder
from intarsia.ladder.run_spec import RunSpec
from intarsia.training import TrainConfig
from intarsia.training.checkpoint import found_steps
from intarsia.training.config import FREE_FIELDS, SCHEDULE_FIELDS
from intarsia.training.run_directory import RunDirectory
from intarsia.training.schedule import first_difference, stable_until


def stable_phase(spec: RunSpec, directories: Iterable[Path]) -> str | None:
    """The latest checkpoint `RUN@STEP`, in directories of runs, that the run of `spec` would have come by as well."""
    found: tuple[int, Path] | None = None
    for path in (each for directory in directories for each in sorted(directory.glob("*/spec.json"))):
        folder = RunFolder(path.parent)
        if folder.state != "done":
            continue
        try:
            other = RunSpec.load(folder.path)
        except (ValueError, TypeError, KeyError):  # a spec of another version of this package
            continue
        step = _shared_steps(other, spec)
        if step in found_steps(RunDirectory(folder.train).checkpoints) and (found is None or step > found[0]):
            found = step, folder.train
    return None if found is None else f"{found[1].resolve()}@{found[0]}"


def _shared_steps(shorter: RunSpec, longer: RunSpec) -> int:
    """The steps after which the shorter run keeps its last checkpoint that is one of the longer run, too; 0: none."""
    if _apart_from_budget(shorter) != _apart_from_budget(longer):
        return 0
    old, new = (TrainConfig.from_dict(dict(spec.train)) for spec in (shorter, longer))
    step = stable_until(old) or 0
    return step if step < new.steps and first_difference(old, new, range(step)) is None else 0


def _apart_from_budget(spec: RunSpec) -> dict[str, object]:
    """What two runs must have in common to take the same steps, as far as their rates are the same."""
    identity = spec.identity
    train = {name: value for name, value in spec.train.items() if name not in FREE_FIELDS | SCHEDULE_FIELDS}
    lesson = {**identity["lesson"], "documents": None}
    return {**identity, "train": train, "lesson": lesson}


def keep_stable_alone(folder: RunFolder, config: TrainConfig) -> None:
    """Remove what a finished run needed to go on, but for the checkpoint from which longer ones do."""
    checkpoints = RunDirectory(folder.train).checkpoints
    step = stable_until(config)
    if not config.keep_stable or step not in found_steps(checkpoints):
        shutil.rmtree(checkpoints, ignore_errors=True)
        return
    for path in checkpoints.iterdir():
        if path.name != f"step-{step:06d}":
            shutil.rmtree(path, ignore_errors=True)
