"""Plans from files: TOML, or Python that defines `plan = Plan(...)`."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

from intarsia.errors import ConfigError
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import PlanError
from intarsia.settings import toml


def load_plan(path: str | Path, *, quick: bool = False, full: bool = False) -> Plan:
    """Read a plan from a `.toml` or a `.py` file. A plan without a name takes the file's.

    Raises:
        PlanError: the file is missing, cannot be read, or says something wrong; with the line for TOML.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanError(
            f"there is no plan file {path}; examples/demo.toml in the repository is one to start from"
        )
    if path.suffix == ".toml":
        plan = _load_toml(path)
    elif path.suffix == ".py":
        plan = _load_python(path)
    else:
        raise PlanError(f"{path}: a plan is a .toml or a .py file")
    if plan.name == "comparison":
        plan = dataclasses.replace(plan, name=path.stem)
    if quick and full:
        raise PlanError("a plan is run in its quick form or at its full size, not both")
    if full:
        return plan.as_full()
    return plan.as_quick() if quick else plan


def _load_toml(path: Path) -> Plan:
    from intarsia.ladder.arms import check_models

    try:
        values, text = toml.load(path)
    except ConfigError as error:
        raise PlanError(str(error)) from None
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
    try:
        names = runpy.run_path(str(path))
    except ConfigError as error:
        raise PlanError(f"{path}: {error}") from None
    except Exception as error:
        raise PlanError(f"{path} failed with {type(error).__name__}: {error}") from error
    plan = names.get("plan")
    if not isinstance(plan, Plan):
        raise PlanError(f"{path} must define `plan = intarsia.ladder.Plan(...)`")
    return plan
