"""How the arms did on the plan's exams."""

from __future__ import annotations

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
    )


def _cell(arm: ExamArm) -> Markup:
    sequences = arm.sequences
    below = None if sequences is None else tag("small", f"{percent(sequences)} whole", class_="below")
    return tag("td", exam_cell(arm), below)


def _options(exam: ExamResult) -> str:
    shown = [f"{name} {value}" for name, value in exam.options.items()]
    return ", ".join([*shown, f"{exam.steps} steps of {exam.rows} examples at most"])
