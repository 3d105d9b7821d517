"""Plans are read strictly, and errors say where and what was meant."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_file import load_plan
from intarsia.ladder.plan_tables import Budget, PlanError
from intarsia.settings import toml
from support.comparison import make_plan

EXAMPLES = Path(__file__).parents[2] / "examples"

TEXT = """
name = "mine"
seeds = [1, 2]

[budget]
tokens = 100_000

[tuning]
learning_rates = [1e-3, 2e-3]

[training]
rows = 8
warmup_steps = 3

[[arms]]
name = "a"
preset = "full-nano"
[arms.model]
depth = 3

[[arms]]
name = "b"
preset = "kimi-linear-nano"
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_plan(text: str, name: str = "plan.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_plan


def test_toml(write) -> None:
    plan = load_plan(write(TEXT))
    assert plan.name == "mine"
    assert [arm.name for arm in plan.arms] == ["a", "b"]
    assert plan.arms[0].model == {"depth": 3}
    assert plan.rates(plan.arms[1]) == (1e-3, 2e-3)
    assert plan.budget.steps_of(8 * 512) == 25


def test_python(write) -> None:
    text = (
        "from intarsia.ladder import Arm, Budget, Plan, Tuning\n"
        "plan = Plan(arms=(Arm('a', preset='full-nano'), Arm('b', preset='kimi-linear-nano')),\n"
        "            budget=Budget(steps=5), tuning=Tuning((1e-3,)), seeds=(1,))\n"
    )
    plan = load_plan(write(text, "mine.py"))
    assert plan.name == "mine", "a plan without a name takes its file's"
    assert plan.budget == Budget(steps=5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("tokens =", "tokns =", r"plan.toml:6: budget.tokns: unknown option; did you mean 'tokens'\?"),
        ("rows =", "row =", r"plan.toml:12: training.row: unknown option; did you mean 'rows'\?"),
        ("rows = 8", "steps = 8", r"plan.toml:12: training.steps is set by the comparison"),
        ("rows = 8", "lr = 8", r"\[tuning\] learning_rates"),
        ("rows = 8", "rows = 'x'", r"plan.toml:12: training.rows must be a whole number; got 'x'"),
        ('"kimi-linear-nano"', "3", r"plan.toml:23: arms\[1\].preset must be text or none; got 3 \(int\)"),
        ('name = "b"', 'name = "a"', r"plan.toml:22: arms\[1\].name: two arms are called 'a'"),
        ('name = "b"', 'name = "b/c"', r"arms\[1\].name: 'b/c' must be letters"),
        ("seeds = [1, 2]", "seeds = [0, 2]", r"tuning.seed: seed 0 chooses the learning rates"),
        ("seeds = [1, 2]", "seeds = []", r"plan.toml:3: seeds: at least one seed"),
        ("[1e-3, 2e-3]", "[-1e-3]", r"tuning.learning_rates must be different and above 0"),
        ("100_000", "100_000\nsteps = 3", r"budget: give one of tokens, steps, flops or seconds"),
        ("[training]", "[quick.budget]\nx = 1\n[training]", r"plan.toml:12: quick.budget.x: unknown option"),
        (
            "depth = 3",
            "dept = 3",
            r"plan.toml:19: arms\[0\].model.dept: unknown option; did you mean 'depth'",
        ),
        (
            "depth = 3",
            "mixers.mla.num_heads = 2.5",
            r"plan.toml:19: arms\[0\].model.mixers.mla.num_heads must be a whole number; got 2.5",
        ),
        ("depth = 3", "mixers.mle.num_heads = 2", r"plan.toml:19: .* no mixer 'mle'; did you mean 'mla'"),
        (
            "[training]",
            "[model.mixers.kdaa]\nnum_heads = 2\n[training]",
            r"plan.toml:11: model.mixers.kdaa: no arm has a mixer 'kdaa'; did you mean 'kda'",
        ),
        ("[training]", "[matching]\nreference = 'c'\n[training]", r"matching.reference: no arm 'c'"),
        ("seeds = [1, 2]", "seeds = [1, 2", r"is not valid TOML"),
    ],
)
def test_errors_say_where_and_what(write, before: str, after: str, message: str) -> None:
    assert before in TEXT
    head, _, tail = TEXT.rpartition(before)
    with pytest.raises(PlanError, match=message):
        load_plan(write(head + after + tail))


EXAM = """
[[examined_on]]
task = "mqar"
options = { length = 32, pairs = 4 }
steps = 30
training.weight_decay = 0.0

"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '"mqar"',
            '"mqr"',
            r"plan.toml:7: examined_on\[0\].task: there is no task 'mqr'; did you mean 'mqar'",
        ),
        (
            "pairs",
            "pair",
            r"plan.toml:8: examined_on\[0\].options.pair: unknown option; did you mean 'pairs'",
        ),
        ("length = 32, ", "", r"examined_on\[0\].options.length is missing"),
        ("length = 32", "length = 8.5", r"examined_on\[0\].options.length must be a whole number"),
        ("pairs = 4", "pairs = 40", r"plan.toml:8: examined_on\[0\].options: 40 pairs and the separator"),
        ("steps = 30", "steps = 0", r"plan.toml:9: examined_on\[0\].steps must be at least 1"),
        (
            "weight_decay",
            "steps",
            r"examined_on\[0\].training.steps is set by the comparison; say it in steps",
        ),
        ("weight_decay", "length", r"say it in options.length"),
        (
            "weight_decay",
            "weight_decey",
            r"training.weight_decey: unknown option; did you mean 'weight_decay'",
        ),
        (
            "[[arms]]",
            EXAM + "[[arms]]",
            r"plan.toml:\d+: examined_on\[1\].name: two exams are called 'mqar-32'",
        ),
    ],
)
def test_errors_in_exams_say_where_and_what(write, before: str, after: str, message: str) -> None:
    text = TEXT.replace("[budget]\ntokens = 100_000", EXAM)
    assert before in text
    with pytest.raises(PlanError, match=message):
        load_plan(write(text.replace(before, after, 1)))


def test_exams_alone_and_beside_text(write) -> None:
    alone = load_plan(write(TEXT.replace("[budget]\ntokens = 100_000", EXAM)))
    assert alone.budget is None
    (exam,) = alone.examined_on
    assert (exam.name, exam.made.num_pairs, exam.steps) == ("mqar-32", 4, 30)
    assert alone.rates(alone.arms[0], exam) == (1e-3, 2e-3), "those of the plan, where it names none"
    assert alone.as_quick().examined_on[0].steps == 20
    assert alone.as_quick().budget is None
    both = load_plan(write(TEXT + EXAM))
    assert both.budget is not None
    for plan in (alone, both, both.as_quick()):
        assert Plan.from_dict(tomllib.loads(toml.dumps(plan.to_dict()))) == plan
    one = TEXT.replace("[budget]\ntokens = 100_000", EXAM).rpartition("[[arms]]")[0]
    assert len(load_plan(write(one)).arms) == 1, "an exam needs no other arm"


def test_missing_parts_are_named(write) -> None:
    with pytest.raises(PlanError, match=r"plan\.toml: budget is missing"):
        load_plan(write(TEXT.replace("[budget]\ntokens = 100_000", "")))
    with pytest.raises(PlanError, match="there is no plan file"):
        load_plan("no-such-plan.toml")
    with pytest.raises(PlanError, match=r"must define `plan"):
        load_plan(write("x = 1", "other.py"))
    with pytest.raises(PlanError, match="failed with ZeroDivisionError"):
        load_plan(write("1 / 0", "broken.py"))


def test_a_plan_survives_its_own_toml() -> None:
    for plan in (
        make_plan(),
        load_plan(EXAMPLES / "demo.toml"),
        load_plan(EXAMPLES / "demo.toml", quick=True),
    ):
        assert Plan.from_dict(tomllib.loads(toml.dumps(plan.to_dict()))) == plan


def test_null_stands_for_none(write) -> None:
    text = TEXT.replace("depth = 3", 'depth = 3\nmixers.mla.q_rank = "null"').replace(
        "rows = 8", 'rows = 8\ngrad_clip = "null"'
    )
    plan = load_plan(write(text))
    assert plan.arms[0].model["mixers"] == {"mla": {"q_rank": None}}
    assert plan.training["grad_clip"] is None
    assert Plan.from_dict(tomllib.loads(toml.dumps(plan.to_dict()))) == plan


def test_the_plan_of_the_documentation(write) -> None:
    page = (EXAMPLES.parent / "docs" / "comparison.md").read_text(encoding="utf-8")
    plan = load_plan(write(page.split("```toml\n")[1].split("```")[0]))
    assert plan.arms[1].model == {"mixers": {"kda": {"conv_size": None}}}


def test_quick_without_a_quick_table_is_small() -> None:
    quick = make_plan().as_quick()
    assert quick.name == "simulated-quick"
    assert quick.budget == Budget(steps=20)
    assert quick.seeds == (1, 2)
    assert quick.tuning.learning_rates == (4e-3,), "the middle of the grid"


def test_a_quick_budget_in_the_other_unit_replaces_the_budget() -> None:
    plan = dataclasses.replace(make_plan(), quick={"budget": {"steps": 7}})
    assert plan.as_quick().budget == Budget(steps=7)
