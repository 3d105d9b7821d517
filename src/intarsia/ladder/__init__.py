"""Judging: put architectures in a fair fight and say honestly what came out.

`compare(load_plan("examples/demo.toml"), "runs/demo")` trains every arm of a plan on the same data, judges
them with intervals over documents and seeds, and writes `verdict.json` and `report.html`. `climb` does so at several
sizes and budgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from intarsia.data import CorpusOptions
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_file import load_ladder, load_plan
from intarsia.ladder.plan_tables import (
    Arm,
    Budget,
    EvaluationOptions,
    ExamOptions,
    Figures,
    Matching,
    PlanError,
    Tuning,
)
from intarsia.ladder.rungs import Gates, LadderPlan, Size

if TYPE_CHECKING:
    from intarsia.ladder.climbing import climb
    from intarsia.ladder.comparison import compare
    from intarsia.ladder.verdict import PairVerdict, Verdict

__all__ = [
    "Arm",
    "Budget",
    "CorpusOptions",
    "EvaluationOptions",
    "ExamOptions",
    "Figures",
    "Gates",
    "LadderPlan",
    "Matching",
    "PairVerdict",
    "Plan",
    "PlanError",
    "Size",
    "Tuning",
    "Verdict",
    "climb",
    "compare",
    "load_ladder",
    "load_plan",
]


def __getattr__(name: str) -> Any:
    # A plan can be read and checked without loading what runs it (PyTorch among it).
    if name == "compare":
        from intarsia.ladder.comparison import compare

        return compare
    if name == "climb":
        from intarsia.ladder.climbing import climb

        return climb
    if name in ("Verdict", "PairVerdict"):
        from intarsia.ladder import verdict

        return getattr(verdict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
