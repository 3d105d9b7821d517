"""The report: one HTML file that opens anywhere, without a network.

The verdict stands first, then the table and the figures behind it, then what the comparison cannot show and
how to do it again. Figures are SVG made here: they follow the reader's light or dark setting and print sharply.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from intarsia.files import write_text
from intarsia.ladder.plan import Plan
from intarsia.ladder.report.details import (
    failures_section,
    fairness_section,
    limits_section,
    rates_section,
    reproduce_section,
    samples_section,
)
from intarsia.ladder.report.exams import exams_section
from intarsia.ladder.report.figures import (
    costs_section,
    curves_section,
    differences_section,
    positions_section,
)
from intarsia.ladder.report.markup import Markup, tag
from intarsia.ladder.report.parts import tokens_a_run
from intarsia.ladder.report.table import table_section
from intarsia.ladder.results import Results
from intarsia.ladder.verdict import Verdict


def write_report(path: Path, plan: Plan, results: Results, verdict: Verdict) -> None:
    """Write the report, atomically."""
    write_text(path, render(plan, results, verdict))


def render(plan: Plan, results: Results, verdict: Verdict) -> str:
    """The report as HTML text."""
    return page(plan.title or plan.name, _sections(plan, results, verdict))


def page(title: str, sections: list[Markup]) -> str:
    """A page in one file that loads nothing, as HTML text."""
    made = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            # Nothing may be fetched, whatever a sample of text contains.
            tag(
                "meta",
                http_equiv="Content-Security-Policy",
                content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:",
            ),
            tag("title", f"{title} · Intarsia"),
            tag("style", Markup(_asset("report.css"))),
        ),
        tag("body", tag("main", sections), tag("script", Markup(_asset("report.js")))),
        lang="en",
    )
    return f"<!doctype html>\n{made}\n"


def _asset(name: str) -> str:
    return files("intarsia.ladder.report").joinpath(name).read_text(encoding="utf-8")


def _sections(plan: Plan, results: Results, verdict: Verdict) -> list[Markup]:
    version, date = (results.environment.get(key, "") for key in ("intarsia", "date"))
    text = [
        table_section(plan, results, verdict),
        differences_section(results, verdict),
        curves_section(results),
        positions_section(results),
        costs_section(results),
        rates_section(plan, results),
        samples_section(results),
    ]
    return [
        _header(plan, results),
        _verdict(verdict),
        *(text if results.arms else []),
        exams_section(plan, results),
        failures_section(results),
        limits_section(verdict),
        fairness_section(plan, results) if results.arms else Markup(""),
        reproduce_section(plan, results),
        tag("footer", f"Written by Intarsia {version}, {date}. This file is complete: it loads nothing."),
    ]


def _header(plan: Plan, results: Results) -> Markup:
    facts = [f"{len(plan.arms)} architectures", f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}"]
    if results.arms:
        facts += [
            f"{tokens_a_run(results)} tokens a run",
            f"corpus {results.corpus}, tokenizer {results.tokenizer}",
            f"{len(results.text_bytes)} judged documents",
        ]
    if results.exams:
        facts.append(f"{len(results.exams)} exam{'s' * (len(results.exams) > 1)}")
    return tag(
        "header",
        tag("div", class_="inlay", aria_hidden="true"),
        tag("p", "Intarsia · comparison", class_="brand"),
        tag("h1", plan.title or plan.name),
        tag("ul", [tag("li", fact) for fact in facts], class_="meta"),
    )


def _verdict(verdict: Verdict) -> Markup:
    css = {"better": "decided", "worse": "decided"}
    pairs = [tag("li", pair.sentence, class_=css.get(pair.outcome, pair.outcome)) for pair in verdict.pairs]
    return tag(
        "section",
        tag("p", verdict.sentence, class_="sentence"),
        [tag("p", note, class_="note") for note in verdict.notes],
        tag("ul", pairs) if len(pairs) > 1 else None,
        class_="verdict",
        aria_label="Verdict",
    )
