"""A ladder as it is asked for: the tables of a comparison, several sizes with their budgets, and gates between.

A rung is a size with a budget, and is a comparison of its own (`Plan`): the same arms, seeds, data and documents. The
rungs are climbed in the order of the sizes, each size from its smallest budget to its largest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from intarsia.errors import OptionError, did_you_mean
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import BUDGET_UNITS, Budget, PlanError, check_name, check_rates
from intarsia.ladder.words import count
from intarsia.settings import check_bounds, merge, read, settle_types, with_none, without_none

LADDER_TABLES = ("sizes", "gates", "branch")
"""What a ladder's plan has beside the tables of a comparison."""


@dataclass(frozen=True)
class Size:
    """A size of all arms, and what its runs may spend: one of four units, and at least one amount."""

    name: str
    tokens: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    flops: tuple[float, ...] | None = None
    seconds: tuple[float, ...] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model of every arm, laid over those of the plan and under the arm's own."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of training that are others at this size."""
    learning_rates: tuple[float, ...] | None = None
    """The grid at this size, for arms that have none of their own."""

    def __post_init__(self) -> None:
        settle_types(self)
        object.__setattr__(self, "model", with_none(self.model))
        object.__setattr__(self, "training", with_none(self.training))
        check_name(self.name)
        given = [unit for unit in BUDGET_UNITS if getattr(self, unit)]
        if len(given) != 1:
            raise PlanError(
                f"the size {self.name!r} needs the amounts of one of {', '.join(BUDGET_UNITS)}; it has "
                f"{' and '.join(given) or 'none'}"
            )
        amounts = getattr(self, given[0])
        if list(amounts) != sorted(set(amounts)):
            raise PlanError(f"must grow; got {list(amounts)}", (given[0],))
        check_bounds(self, *BUDGET_UNITS, above=0)
        if self.learning_rates is not None:
            check_rates(self.learning_rates, ("learning_rates",))

    @property
    def unit(self) -> str:
        """What the amounts are of."""
        return next(unit for unit in BUDGET_UNITS if getattr(self, unit))

    @property
    def budgets(self) -> list[Budget]:
        """The smallest first."""
        return [Budget(**{self.unit: amount}) for amount in getattr(self, self.unit)]


@dataclass(frozen=True)
class Gates:
    """Which arms climb from one rung to the next."""

    baseline: str | None = None
    """The arm that the others are held against and matched to; the first by default. It climbs always."""
    margin: float = 0.02
    """Bits per byte that an arm may be worse."""
    strict: bool = False
    """False: an arm stops once it is shown to be worse by more than the margin. True: it stops unless it is shown not
    to be. The rung's interval shows it; with a single seed there is none, and the difference itself decides."""

    def __post_init__(self) -> None:
        settle_types(self)
        check_bounds(self, "margin", least=0)


@dataclass(frozen=True)
class Rung:
    """A size with a budget."""

    name: str
    size: str
    budget: Budget
    plan: Plan
    """Of the comparison, with all arms."""
    is_first: bool
    """Whether the size has no smaller budget."""


@dataclass(frozen=True)
class LadderPlan:
    """A ladder, ready to be climbed by `intarsia.ladder.climb`."""

    sizes: tuple[Size, ...]
    base: Mapping[str, Any]
    """The tables of a comparison (`Plan`) but its budget, which all rungs share."""
    gates: Gates = field(default_factory=Gates)
    branch: bool = True
    """Runs of a size go on from the stable phase of those with a smaller budget, where the schedule has one
    (`intarsia.ladder.branches`). It saves steps and changes no number; a checkpoint of each run is kept for it."""

    def __post_init__(self) -> None:
        if not self.sizes:
            raise PlanError("a ladder needs at least one size", ("sizes",))
        if "budget" in self.base:
            raise PlanError("a ladder's budgets are those of its sizes: say them in [[sizes]]", ("budget",))
        names = [size.name for size in self.sizes]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise PlanError(f"two sizes are called {name!r}", ("sizes", index, "name"))
        named = [str(arm.get("name")) for arm in self.base.get("arms", []) if isinstance(arm, Mapping)]
        if named and self.baseline not in named:
            near = did_you_mean(self.baseline, named)
            raise PlanError(f"no arm {self.baseline!r}{near}", ("gates", "baseline"))
        rungs = self.rungs  # all of them can be right
        for rung in rungs:
            if [other.name for other in rungs].count(rung.name) > 1:
                raise PlanError(
                    f"two rungs would be called {rung.name!r}: name the sizes otherwise", ("sizes",)
                )

    @property
    def baseline(self) -> str:
        """The arm that the others are held against."""
        arms = self.base.get("arms") or [{}]
        return str(
            self.gates.baseline or self.base.get("matching", {}).get("reference") or arms[0].get("name")
        )

    @property
    def name(self) -> str:
        return str(self.base.get("name", "ladder"))

    @property
    def title(self) -> str:
        return str(self.base.get("title", "") or self.name)

    @property
    def arms(self) -> list[str]:
        """Their names."""
        return [arm.name for arm in self.rungs[0].plan.arms]

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """In the order in which they are climbed."""
        return tuple(
            self._rung(index, number, budget)
            for index, size in enumerate(self.sizes)
            for number, budget in enumerate(size.budgets)
        )

    def _rung(self, index: int, number: int, budget: Budget) -> Rung:
        size = self.sizes[index]
        name = f"{size.name}-{_amount(budget)}"
        reference = self.base.get("matching", {}).get("reference")
        if reference not in (None, self.baseline):
            raise PlanError(
                f"arms are matched to the baseline, {self.baseline}, which climbs always: leave it out",
                ("matching", "reference"),
            )
        changes: dict[str, Any] = {
            "name": name,
            "title": f"{self.title}: {name}",
            "model": size.model,
            "training": {**size.training, "keep_stable": self.branch},
            "budget": {size.unit: getattr(budget, size.unit)},
            "matching": {"reference": self.baseline},
        }
        if size.learning_rates is not None:
            changes["tuning"] = {"learning_rates": list(size.learning_rates)}
        if number:
            # What does not depend on the budget is measured and examined once.
            changes["figures"] = {"contexts": [], "throughput_steps": 0, "sample_tokens": 0}
            changes["examined_on"] = []
        shared = {key: value for key, value in self.base.items() if key not in ("quick", "full")}
        try:
            plan = Plan.from_dict(merge(shared, changes))
        except PlanError as error:
            raise self.placed(error, index) from None
        return Rung(name, size.name, budget, plan, is_first=not number)

    def placed(self, error: PlanError, index: int) -> PlanError:
        """An error of a rung's plan, with the place in the ladder's plan that it is about."""
        path = error.path
        own = _says(dataclasses.asdict(self.sizes[index]), path)
        if own or path[:1] == ("budget",):
            path = path[1:] if path[:1] == ("budget",) else path
            return PlanError(error.message, ("sizes", index, *path))
        return error

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values; `LadderPlan.from_dict` takes them back."""
        sizes = []
        for size in self.sizes:
            values = {
                key: value for key, value in dataclasses.asdict(size).items() if value not in (None, {})
            }
            for table in values.keys() & {"model", "training"}:
                values[table] = without_none(values[table])
            sizes.append(
                {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            )
        return {**self.base, "branch": self.branch, "gates": dataclasses.asdict(self.gates), "sizes": sizes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LadderPlan:
        """The ladder that the values describe.

        Raises:
            PlanError: anything that is wrong, with the place where.
        """
        base = {key: value for key, value in values.items() if key not in LADDER_TABLES}
        tables = values.get("sizes", [])
        if not isinstance(tables, list | tuple):
            raise PlanError("must be a list of tables, [[sizes]]", ("sizes",))
        sizes = [_read(Size, table, ("sizes", index)) for index, table in enumerate(tables)]
        gates = _read(Gates, values.get("gates", {}), ("gates",))
        branch = values.get("branch", True)
        if not isinstance(branch, bool):
            raise PlanError(f"must be true or false; got {branch!r}", ("branch",))
        return cls(tuple(sizes), base, gates, branch)

    def as_quick(self) -> LadderPlan:
        """The ladder with its `quick` changes, which may have sizes, gates and branch of their own; or, where it has
        none, the first two sizes with twenty steps each, two seeds and one rate. It shows that everything works and
        judges nothing."""
        values = self.to_dict()
        changes, _ = values.pop("quick", {}), values.pop("full", {})
        if not changes:
            rates = sorted(self.rungs[0].plan.tuning.learning_rates)
            sizes = [{**size, **dict.fromkeys(BUDGET_UNITS), "steps": [20]} for size in values["sizes"][:2]]
            changes = {
                "seeds": list(values.get("seeds", []))[:2],
                "sizes": [{k: v for k, v in size.items() if v is not None} for size in sizes],
                "training": {"warmup_steps": 2},
                "tuning": {"learning_rates": [rates[len(rates) // 2]], "documents": 5},
                "evaluation": {"documents": 20, "tokens_per_document": 512},
                "figures": {"contexts": [256, 1024], "repeats": 2, "throughput_steps": 1, "sample_tokens": 0},
                "examined_on": [],
            }
        return self._with(values, changes, "quick")

    def as_full(self) -> LadderPlan:
        """The ladder with its `full` changes.

        Raises:
            PlanError: it has none.
        """
        values = self.to_dict()
        changes, _ = values.pop("full", {}), values.pop("quick", {})
        if not changes:
            raise PlanError("is missing: the plan has no other size than its own", ("full",))
        return self._with(values, changes, "full")

    def _with(
        self, values: Mapping[str, Any], changes: Mapping[str, Any], size: Literal["quick", "full"]
    ) -> LadderPlan:
        try:
            changed = LadderPlan.from_dict(merge(values, changes))
        except PlanError as error:
            raise error.under((size,)) from None
        return dataclasses.replace(changed, base={**changed.base, "name": f"{self.name}-{size}"})


def _read(kind: type[Any], table: Any, place: tuple[str | int, ...]) -> Any:
    try:
        return read(kind, table)
    except OptionError as error:
        raise PlanError(error.message, (*place, *error.path)) from None


def _says(values: Any, path: tuple[str | int, ...]) -> bool:
    """Whether nested tables have something at `path`, or at what it lies in."""
    if not path:
        return False
    for depth, key in enumerate(path):
        if not isinstance(values, Mapping) or key not in values or values[key] is None:
            return depth > 1
        values = values[key]
    return True


def _amount(budget: Budget) -> str:
    """A budget in a name: `100k`, `20steps`, `1e12flops`, `60s`."""
    if budget.tokens is not None:
        return count(budget.tokens).replace(" ", "")
    if budget.steps is not None:
        return f"{budget.steps}steps"
    if budget.flops is not None:
        return f"{budget.flops:.3g}flops".replace("+", "")
    return f"{budget.seconds:g}s"
