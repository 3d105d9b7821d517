"""Runs that go on from a checkpoint of another run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import CheckpointError, ConfigError
from intarsia.files import directory_atomically, link_or_copy, write_text
from intarsia.model.fingerprint import changes
from intarsia.training import checksums
from intarsia.training.checkpoint import Checkpoints, found_steps
from intarsia.training.config import FREE_FIELDS, TrainConfig
from intarsia.training.distributed import Processes
from intarsia.training.metrics import lines_up_to
from intarsia.training.run_directory import RunDirectory, compare
from intarsia.training.schedule import multiplier, stable_until


@dataclass(frozen=True)
class Parent:
    """A run to branch off from, and the step of the checkpoint; None: the newest before its rate began to fall."""

    run: Path
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> Parent:
        """`runs/mine` or `runs/mine@800`.

        Raises:
            ConfigError: it is neither.
        """
        match = re.fullmatch(r"(?P<run>.+?)(@(?P<step>\d+))?", text)
        if match is None or text.endswith("@"):
            raise ConfigError(f"a run to go on from is RUN or RUN@STEP, as in runs/mine@800; got {text!r}")
        return cls(Path(match["run"]), int(match["step"]) if match["step"] else None)

    def __str__(self) -> str:
        return str(self.run) if self.step is None else f"{self.run}@{self.step}"

    def is_that_of(self, lineage: dict[str, Any] | None) -> bool:
        """Whether a run of this lineage branched off here."""
        return (
            lineage is not None
            and Path(lineage["run"]).resolve() == self.run.resolve()
            and self.step in (None, lineage["step"])
        )


def branch_off(parent: Parent, run: RunDirectory, now: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What is to be recorded of where a run `now` branches off, and what the user should hear of it. Nothing is
    written.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is of another model or of other data.
        ConfigError: the run would not go on from there.
    """
    home = RunDirectory(parent.run)
    started = home.read()
    if started is None or "train" not in started:
        raise CheckpointError(f"{parent.run} holds no training run to go on from")
    checkpoints = Checkpoints(home.checkpoints, Processes())
    step = _choose(parent, found_steps(home.checkpoints), started)
    saved = checkpoints.trainer(step)
    differences = [d for d in compare(saved["run"], now) if d.field not in FREE_FIELDS]
    if lasting := [d for d in differences if d.is_lasting]:
        listed = "".join(f"\n  {one}" for one in lasting)
        raise CheckpointError(
            f"a run that branches off from {parent.run} has its model, its data and their order:{listed}\n"
            "Start a new run without --from."
        )
    old, new = (TrainConfig.from_dict(one["train"]) for one in (saved["run"], now))
    if new.steps <= step:
        raise ConfigError(
            f"the run goes on from step {step} and would end at step {new.steps}: steps count from the start of "
            "the first run; give more"
        )
    changed = [f"{d.name} {d.was} → {d.now}" for d in differences]
    changed += changes(saved["run"]["fingerprint"], now["fingerprint"])
    notes = [f"Going on from step {step} of {parent.run} with {'; '.join(changed) or 'the same settings'}."]
    if (jump := _jump(old, new, step)) is not None:
        notes.append(jump)
    lineage = {
        "run": str(parent.run),
        "step": step,
        "checkpoint": checksums.Known.of(checkpoints.path(step) / checksums.FILE).sha256,
        "batches": saved["tally"]["batches"],
        "changed": changed,
        "lineage": saved["run"].get("lineage"),
    }
    return lineage, notes


def _choose(parent: Parent, steps: list[int], started: dict[str, Any]) -> int:
    listed = ", ".join(map(str, steps))
    if not steps:
        raise CheckpointError(
            f"{parent.run} holds no checkpoint to go on from: checkpoint_every, keep_every and keep_stable say which "
            "are written and kept"
        )
    if parent.step is not None:
        if parent.step not in steps:
            raise CheckpointError(
                f"{parent.run} holds no checkpoint of step {parent.step}; there are: {listed}"
            )
        return parent.step
    end = stable_until(TrainConfig.from_dict(started["train"]))
    stable = [step for step in steps if end is not None and step <= end]
    if not stable:
        raise CheckpointError(
            f"{parent.run} holds no checkpoint from before its learning rate began to fall; say which of those that "
            f"there are: {', '.join(f'{parent.run}@{step}' for step in steps)}"
        )
    return max(stable)


def _jump(old: TrainConfig, new: TrainConfig, step: int) -> str | None:
    """What to say where the rate of the step before the branch is not the one that the new settings would have given
    it."""
    last = step - 1
    was, would = (config.lr * multiplier(config, last) for config in (old, new))
    if math.isclose(was, would, rel_tol=1e-6):
        return None
    return (
        f"The learning rate was {was:.3g} in the last step before and is {new.lr * multiplier(new, step):.3g} in the "
        f"next: by the new settings it would have been {would:.3g} already. For a decay that begins at step {step}, "
        f"set decay_fraction to {(new.steps - step) / new.steps:.6g}."
    )


def adopt(lineage: dict[str, Any], run: RunDirectory) -> None:
    """Copy the checkpoint and the metrics that a run goes on from into its directory, so that the parent may go on or
    be removed.

    Raises:
        CheckpointError: they are not there any more, or not those that the lineage tells of.
    """
    home, step = RunDirectory(Path(lineage["run"])), int(lineage["step"])
    theirs, ours = (Checkpoints(place.checkpoints, Processes()) for place in (home, run))
    source = theirs.path(step)
    if not source.is_dir():
        raise CheckpointError(f"{run.path} goes on from {source}, which is not there any more")
    theirs.verify(step)
    if checksums.Known.of(source / checksums.FILE).sha256 != lineage["checkpoint"]:
        raise CheckpointError(f"{source} is not the checkpoint any more that {run.path} goes on from")
    write_text(run.metrics, lines_up_to(home.metrics, step))
    with directory_atomically(ours.path(step)) as copied:
        for name in (*checksums.names(source), checksums.FILE):
            link_or_copy(
                source / name, copied / name
            )  # checkpoints are never changed, so they can share the disk
