"""A plan and simulated results of it."""

from __future__ import annotations

import pytest

from intarsia.ladder.plan import Plan
from intarsia.ladder.results import Results
from support.comparison import make_plan, make_results


@pytest.fixture
def plan() -> Plan:
    return make_plan()


@pytest.fixture
def results(plan: Plan) -> Results:
    return make_results(plan)
