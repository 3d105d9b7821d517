"""How the arms did on the plan's exams."""

from __future__ import annotations

from itertools import product

from intarsia.ladder.plan import Plan
from intarsia.ladder.report.markup import Markup, tag
from intarsia.ladder.report.parts import exam_cell, percent
from intarsia.ladder.results import ExamArm, ExamResult, Results


def exams_section(plan: Plan, results: Results) -> Markup:
    """A row for each exam, a column for each arm."""
    if not results.exams:
        return Markup("")
    names = [arm.name for arm in results.exams[0].arms]
    rows = []
    for exam in results.exams:
        head = tag("td", exam.name, tag("span", f"{exam.title}: {_options(exam)}", class_="note"))
        rows.append(tag("tr", head, [_cell(exam.arm(name)) for name in names]))
    seeds = len(plan.seeds)
    starred = any(arm.at_edge for exam in results.exams for arm in exam.arms)
    return tag(
        "section",
        tag("h2", "The exams"),
        tag(
            "p",
            "Every model learned each task from scratch, from the same examples in the same order, until it made no "
            "mistake in the validation or had spent its steps. Its learning rate was chosen by the validation with "
            f"seed {plan.tuning.seed}. Shown are the right answers to test examples in %: the mean of {seeds} "
            f"seed{'s' * (seeds > 1)}, with the least and the most; below, the sequences without a mistake. Seeds "
            "whose model came apart know nothing.",
        ),
        tag(
            "div",
            tag(
                "table",
                tag("thead", tag("tr", tag("th", "Exam"), [tag("th", name) for name in names])),
                tag("tbody", rows),
            ),
            class_="scroll",
        ),
        tag("p", "* The rate is at an end of its grid: one beyond it might serve better.", class_="quiet")
        if starred
        else None,
        [_heat_map(exam, plan) for exam in results.exams if exam.dials],
    )


def _heat_map(exam: ExamResult, plan: Plan) -> Markup:
    """The exam under other options: a column for each value of the last dial, rows for the arms and the other dials."""
    *others, last = exam.dials
    rows = []
    for arm in exam.arms:
        for values in product(*(exam.dials[name] for name in others)):
            turn = dict(zip(others, values, strict=True))
            label = ", ".join(f"{name} {_shown(value)}" for name, value in turn.items())
            cells = [
                _heat_cell(arm.turned({**turn, last: value}), len(plan.seeds)) for value in exam.dials[last]
            ]
            rows.append(
                tag("tr", tag("td", arm.name, tag("span", label, class_="note") if label else None), cells)
            )
    columns = [tag("th", _shown(value)) for value in exam.dials[last]]
    head = tag("thead", tag("tr", tag("th", last), columns))
    return tag(
        "figure",
        tag("h3", f"{exam.name} under other options"),
        tag("div", tag("table", head, tag("tbody", rows), class_="heat"), class_="scroll"),
        tag(
            "figcaption",
            f"Right answers in %, of models that were trained with {_task_options(exam)}; below, the least and the "
            "most over seeds.",
        ),
    )


def _heat_cell(shares: tuple[float, float, float] | None, seeds: int) -> Markup:
    if shares is None:
        return tag("td", "–")
    mean, least, most = (100 * share for share in shares)
    below = tag("small", f"{least:.0f}–{most:.0f}", class_="below") if seeds > 1 else None
    return tag("td", f"{mean:.1f}", below, style=f"--share: {mean:.0f}%")


def _shown(value: object) -> str:
    return "mixed" if value is None else str(value)


def _task_options(exam: ExamResult) -> str:
    one = [f"{name} {_shown(value)}" for name, value in exam.options.items() if name not in exam.mixed]
    return ", ".join(
        [*one, *(f"{name} {', '.join(map(_shown, values))} in turn" for name, values in exam.mixed.items())]
    )


def _cell(arm: ExamArm) -> Markup:
    sequences = arm.sequences
    below = None if sequences is None else tag("small", f"{percent(sequences)} whole", class_="below")
    return tag("td", exam_cell(arm), below)


def _options(exam: ExamResult) -> str:
    return ", ".join([_task_options(exam), f"{exam.steps} steps of {exam.rows} examples at most"])
