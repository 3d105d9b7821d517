"""What was judged before in the directory of a comparison, and what lies there and is not counted.

A plan may be changed and started again. If seeds are added or exchanged until the verdict pleases, its 5 % of false
alarms are no longer 5 %; so no verdict is overwritten, each later one tells of the one before it, and finished runs
that it leaves out are named.

    history/001/plan.toml, verdict.json    the first verdict and the plan that it is of
    history/002/...                        the next one, of other runs or by other rules

A plan that is `sequential` may be looked at after each further seed. Its look number `k` spends the share
`1 / (k (k + 1))` of the allowed errors; the shares of all looks, however many, sum to one, so that by the union bound
the chance of a false claim at any look is at most what a single look has. Such an error-spending rule (Lan and DeMets
1983) needs neither a number of looks in advance nor independence between them; it asks for wider intervals in return.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.files import write_json, write_text
from intarsia.ladder.plan import Plan
from intarsia.ladder.results import Results, RunResult
from intarsia.ladder.run_folder import RunFolder
from intarsia.ladder.run_spec import RunSpec
from intarsia.ladder.words import listed
from intarsia.settings import toml

_NAMED = 6
"""Of the runs that are not counted, so many are named in a sentence; verdict.json has them all."""


@dataclass(frozen=True)
class Look:
    """A verdict that was made."""

    number: int
    date: str
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    """The directories of the judged runs that it is of."""
    sentence: str
    confidence: float
    identity: str
    """Hex digits of the runs and the rules of judging."""


@dataclass(frozen=True)
class NotCounted:
    """A judged run that is finished, and that the verdict leaves out."""

    run: str
    arm: str
    seed: int
    reason: str


@dataclass(frozen=True)
class History:
    """The verdicts of one directory, the first one first, without the one that is being made."""

    path: Path
    looks: tuple[Look, ...]
    number: int
    """Of the look that is being made: a new one, or one that is made again from the same."""
    identity: str
    runs: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, plan: Plan, results: Results) -> History:
        """The history of a comparison's directory, as these results go on with it."""
        path = directory / "history"
        if not path.exists():
            _adopt(directory / "verdict.json", path)
        runs = tuple(sorted(run.directory for arm in results.arms for run in arm.judged.values()))
        identity = _identity(runs, plan.to_dict()["evaluation"])
        looks = tuple(_read(each) for each in sorted(path.glob("[0-9]*")) if (each / "verdict.json").exists())
        again = next((look.number for look in looks if look.identity == identity), None)
        earlier = tuple(look for look in looks if look.number != again)
        return cls(path, earlier, again or len(looks) + 1, identity, runs)

    def confidence(self, plan: Plan) -> float:
        """Of this look's intervals."""
        allowed = plan.evaluation.confidence
        return 1 - (1 - allowed) * spending(self.number) if plan.evaluation.sequential else allowed

    def notes(self, plan: Plan, left_out: Sequence[NotCounted]) -> list[str]:
        """What a reader must know beside the verdict, in sentences."""
        notes = []
        if left_out:
            named = [f"{run.arm} seed {run.seed} ({run.reason})" for run in left_out[:_NAMED]]
            more = [f"{len(left_out) - _NAMED} more"] if len(left_out) > _NAMED else []
            notes.append(
                f"Finished runs that are in the directory and not counted: {listed([*named, *more])}."
            )
        allowed = f"{1 - plan.evaluation.confidence:.3g}"
        before = [look for look in self.looks if look.number < self.number]
        if before:
            last = before[-1]
            seeds = f"seed{'s' * (len(last.seeds) > 1)} {listed([str(seed) for seed in last.seeds])}"
            notes.append(
                f"This is verdict {self.number} in this directory. The one before it, of {seeds}, said: "
                f"“{last.sentence}”"
            )
        if plan.evaluation.sequential:
            notes.append(
                f"Sequential: look {self.number} may err with a chance of {1 - self.confidence(plan):.2g}, "
                f"and all looks together with {allowed}."
            )
        elif before:
            notes.append(
                "The intervals are those of a single look: where verdicts were looked at before the plan was changed, "
                f"the chance of a false claim is more than {allowed} ([evaluation] sequential allows for looking)."
            )
        return notes

    def record(self, left_out: Sequence[NotCounted]) -> dict[str, Any]:
        """What verdict.json holds of it."""
        return {
            "look": {"number": self.number, "runs": list(self.runs), "identity": self.identity},
            "history": [asdict(look) for look in self.looks],
            "not_counted": [asdict(run) for run in left_out],
        }

    def keep(self, plan: Plan, verdict: Mapping[str, Any]) -> None:
        """Keep a verdict with its plan. One that is made again from the same stays as it was."""
        place = self.path / f"{self.number:03}"
        if not (place / "verdict.json").exists():
            write_text(place / "plan.toml", toml.dumps(plan.to_dict()))
            write_json(place / "verdict.json", verdict)


def spending(look: int) -> float:
    """The share of the allowed errors that a look may spend; over all looks they sum to one."""
    return 1 / (look * (look + 1))


def not_counted(runs: Path, plan: Plan, results: Results) -> list[NotCounted]:
    """The finished judged runs in `runs`, the directory of all, that the results leave out."""
    counted = {run.directory for run in results.runs}
    found = []
    for path in sorted(runs.glob("*/spec.json")):
        folder = RunFolder(path.parent)
        if folder.path.name in counted or folder.state != "done":
            continue
        try:
            spec = RunSpec.load(folder.path)
        except (ValueError, TypeError, KeyError):  # a spec of another version of this package
            continue
        if spec.role == "judged":
            found.append(NotCounted(folder.path.name, spec.arm, spec.seed, _reason(spec, plan, results.runs)))
    return found


def _reason(spec: RunSpec, plan: Plan, counted: Sequence[RunResult]) -> str:
    """Why a run is not one of the plan's."""
    if spec.arm not in {arm.name for arm in plan.arms}:
        return "the plan has no such arm"
    if spec.seed not in plan.seeds:
        return "the plan has not this seed"
    rates = {run.learning_rate for run in counted if run.arm == spec.arm and run.role == "judged"}
    if spec.learning_rate not in rates:
        return f"another rate, {spec.learning_rate:g}"
    return "other data, options, code or libraries"


def _identity(runs: Sequence[str], rules: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([list(runs), rules], sort_keys=True).encode()).hexdigest()[:16]


def _read(place: Path) -> Look:
    found = json.loads((place / "verdict.json").read_text(encoding="utf-8"))
    return Look(
        number=int(place.name),
        date=str(found.get("environment", {}).get("date", "")),
        seeds=tuple(found["plan"]["seeds"]),
        runs=tuple(found["look"]["runs"]),
        sentence=found["sentence"],
        confidence=found["confidence"],
        identity=found["look"]["identity"],
    )


def _adopt(verdict: Path, history: Path) -> None:
    """Take up the verdict of a directory that has no history yet."""
    if not verdict.exists():
        return
    found = json.loads(verdict.read_text(encoding="utf-8"))
    runs = sorted(
        run["directory"]
        for arm in found["arms"]
        for run in arm["runs"]
        if run["role"] == "judged" and run["failure"] is None
    )
    if not runs:
        return
    identity = _identity(runs, found["plan"]["evaluation"])
    write_json(
        history / "001" / "verdict.json", {**found, "look": {"number": 1, "runs": runs, "identity": identity}}
    )
