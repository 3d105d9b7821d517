"""Plans from files: TOML, or Python that defines `plan = Plan(...)`."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from intarsia.errors import ConfigError
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import PlanError
from intarsia.ladder.rungs import LadderPlan
from intarsia.settings import toml

P = TypeVar("P", Plan, LadderPlan)


def load_plan(path: str | Path, *, quick: bool = False, full: bool = False) -> Plan:
    """Read a plan from a `.toml` or a `.py` file. A plan without a name takes the file's.

    Raises:
        PlanError: the file is missing, cannot be read, or says something wrong; with the line for TOML.
    """
    path = Path(path)
    plan = _load(path, "demo.toml", _load_toml, _load_python)
    if plan.name == "comparison":
        plan = dataclasses.replace(plan, name=path.stem)
    if quick and full:
        raise PlanError("a plan is run in its quick form or at its full size, not both")
    if full:
        return plan.as_full()
    return plan.as_quick() if quick else plan


def load_ladder(path: str | Path, *, quick: bool = False, full: bool = False) -> LadderPlan:
    """Read the plan of a ladder from a `.toml` or a `.py` file. One without a name takes the file's.

    Raises:
        PlanError: the file is missing, cannot be read, or says something wrong; with the line for TOML.
    """
    path = Path(path)
    ladder = _load(path, "ladder.toml", _load_toml_ladder, _load_python_ladder)
    if "name" not in ladder.base:
        ladder = dataclasses.replace(ladder, base={**ladder.base, "name": path.stem})
    if quick and full:
        raise PlanError("a plan is run in its quick form or at its full size, not both")
    if full:
        return ladder.as_full()
    return ladder.as_quick() if quick else ladder


def _load(path: Path, example: str, from_toml: Callable[[Path], P], from_python: Callable[[Path], P]) -> P:
    if not path.is_file():
        raise PlanError(
            f"there is no plan file {path}; examples/{example} in the repository is one to start from"
        )
    if path.suffix == ".toml":
        return from_toml(path)
    if path.suffix == ".py":
        return from_python(path)
    raise PlanError(f"{path}: a plan is a .toml or a .py file")


def _load_toml_ladder(path: Path) -> LadderPlan:
    from intarsia.ladder.arms import check_models

    try:
        values, text = toml.load(path)
    except ConfigError as error:
        raise PlanError(str(error)) from None
    if "sizes" not in values:
        raise PlanError(f"{path} has no [[sizes]] to climb: a plan without is for `intarsia compare`")
    try:
        ladder = LadderPlan.from_dict(values)
        for index, size in enumerate(ladder.sizes):
            rung = next(rung for rung in ladder.rungs if rung.size == size.name)
            try:
                check_models(rung.plan)
            except PlanError as error:
                raise ladder.placed(error, index) from None
        ladder.as_quick()
        if ladder.base.get("full"):
            for rung in ladder.as_full().rungs:
                if rung.is_first:
                    check_models(rung.plan)
    except PlanError as error:
        line = toml.line_of(text, error.path)
        raise error.at(f"{path}:{line}" if line else str(path)) from None
    return ladder


def _load_toml(path: Path) -> Plan:
    from intarsia.ladder.arms import check_models

    try:
        values, text = toml.load(path)
    except ConfigError as error:
        raise PlanError(str(error)) from None
    if "sizes" in values:
        raise PlanError(f"{path} has [[sizes]]: it is the plan of a ladder, for `intarsia ladder`")
    try:
        plan = Plan.from_dict(values)
        check_models(plan)
        check_models(plan.as_quick())
        if plan.full:
            check_models(plan.as_full())
    except PlanError as error:
        line = toml.line_of(text, error.path)
        raise error.at(f"{path}:{line}" if line else str(path)) from None
    return plan


def _load_python(path: Path) -> Plan:
    plan = _run_python(path)
    if isinstance(plan, LadderPlan):
        raise PlanError(f"{path} defines the plan of a ladder, for `intarsia ladder`")
    if not isinstance(plan, Plan):
        raise PlanError(f"{path} must define `plan = intarsia.ladder.Plan(...)`")
    return plan


def _load_python_ladder(path: Path) -> LadderPlan:
    ladder = _run_python(path)
    if not isinstance(ladder, LadderPlan):
        raise PlanError(f"{path} must define `plan = intarsia.ladder.LadderPlan(...)`")
    return ladder


def _run_python(path: Path) -> object:
    """What the file calls `plan`; None if nothing."""
    try:
        names = runpy.run_path(str(path))
    except ConfigError as error:
        raise PlanError(f"{path}: {error}") from None
    except Exception as error:
        raise PlanError(f"{path} failed with {type(error).__name__}: {error}") from error
    return names.get("plan")
