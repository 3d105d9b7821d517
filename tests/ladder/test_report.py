"""The report is complete in itself, well formed, and says what the verdict says."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from intarsia.ladder.plan import Plan
from intarsia.ladder.report import render
from intarsia.ladder.report.charts import log_ticks, ticks
from intarsia.ladder.report.colours import COLOURS, arm_class, kind_class
from intarsia.ladder.report.markup import Markup, join, tag
from intarsia.ladder.results import NO_TEXT, Failure, Results
from intarsia.ladder.verdict import judge
from support.comparison import make_exam, make_plan, make_results


class Outline(HTMLParser):
    """Checks that tags are closed in order; collects what would be fetched."""

    void = frozenset({"meta", "br", "hr", "link", "col", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        if name not in self.void:
            self.open.append(name)
        self.sources += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def page_of(plan: Plan, results: Results) -> str:
    return render(plan, results, judge(plan, results))


def test_it_is_one_file_that_loads_nothing(plan: Plan, results: Results) -> None:
    page = page_of(plan, results)
    found = outline(page)
    assert found.sources == []
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert len(page) < 300_000


def test_it_says_what_the_verdict_says(plan: Plan, results: Results) -> None:
    verdict = judge(plan, results)
    text = "".join(outline(render(plan, results, verdict)).text)
    assert verdict.sentence in text
    for pair in verdict.pairs:
        assert pair.sentence in text
    for sentence in (*verdict.caveats, *verdict.notes):
        assert sentence in text
    assert "20,500–21,200" in text, "how far the timed steps lay apart"
    for row in verdict.rows:
        assert row.name in text
        assert f"{row.estimate.value:.3f}" in text
    assert "None: all 18 runs finished." in text
    assert "intarsia compare plan.toml" in text


def test_models_cannot_write_markup_into_it(plan: Plan, results: Results) -> None:
    page = page_of(plan, results)
    assert "<b>&amp;" not in page
    assert "# full &lt;b&gt;&amp;amp;&lt;/b&gt;" in page


def test_figures_are_well_formed(plan: Plan, results: Results) -> None:
    figures = re.findall(r"<svg.*?</svg>", page_of(plan, results), re.DOTALL)
    assert len(figures) == 2 * 5 + 3, "five figures in two widths, and a strip of layers for each arm"
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        assert tree.get("role") == "img"
        assert tree.get("aria-label")
        assert "nan" not in figure


def test_ten_arms_and_ten_mixers_have_colours_of_their_own_in_every_light() -> None:
    arm = make_plan().arms[0]
    plan = make_plan(arms=tuple(dataclasses.replace(arm, name=f"a{n}") for n in range(10)))
    results = make_results(plan, {f"a{n}": 1.8 + 0.01 * n for n in range(10)})
    page = render(plan, results, judge(plan, results))
    style = page[page.index("<style>") : page.index("</style>")]
    for name in (arm_class, kind_class):
        classes = [name(index) for index in range(COLOURS)]
        assert len(set(classes)) == COLOURS == 10
        found = {each: re.findall(rf"--{each}: (#[0-9a-f]{{6}})[; ]", style) for each in classes}
        assert {len(colours) for colours in found.values()} == {3}, "light, dark and print"
        for lights in zip(*found.values(), strict=True):
            assert len(set(lights)) == COLOURS
        assert all(f".{each} {{ --c: var(--{each}); }}" in style for each in classes)
    assert {f"swatch {arm_class(index)}" for index in range(10)} <= set(re.findall(r"swatch arm-\d+", page))


def test_failed_runs_are_shown() -> None:
    plan = make_plan()
    failure = Failure("killed", "The process was ended by signal 9 (SIGKILL).")
    text = "".join(outline(page_of(plan, make_results(plan, failed={("full", 2): failure}))).text)
    assert "1 of 18 runs failed" in text
    assert "full lr 0.004 seed 2" in text
    assert failure.message in text


def test_exams_are_shown_beside_the_verdict_and_alone(plan: Plan, results: Results) -> None:
    with_exams = dataclasses.replace(results, exams=(make_exam(), make_exam("mqar-64", rights=(4, 4, 3))))
    text = "".join(outline(page_of(plan, with_exams)).text)
    assert judge(plan, results).sentence in text
    for part in ("The exams", "mqar-64", "length 32, pairs 4", "90.0 (90.0–90.0)", "30.0 (30.0–30.0)"):
        assert part in text
    assert "no test of a difference" in text, "what exams cannot show"
    alone = dataclasses.replace(NO_TEXT, exams=with_exams.exams)
    text = "".join(outline(page_of(plan, alone)).text)
    assert "Nothing was judged by text" in text
    assert "90.0 (90.0–90.0)" in text
    assert "None: all 12 runs finished." in text
    assert "bits per byte" not in text.split("The plan")[0]


def test_the_same_results_give_the_same_page(plan: Plan, results: Results) -> None:
    assert page_of(plan, results) == page_of(plan, results)


def test_nothing_measured_and_nothing_finished() -> None:
    plan = make_plan(seeds=(1,))
    failure = Failure("diverged", "nan")
    names = [arm.name for arm in plan.arms]
    results = make_results(plan, failed={(name, 1): failure for name in names})
    outline(page_of(plan, results))


def test_markup() -> None:
    assert (
        tag("p", "a < b & c", class_="x", data_label='"')
        == '<p class="x" data-label="&quot;">a &lt; b &amp; c</p>'
    )
    assert join("<", Markup("<br>"), None, ["a", 1.25]) == "&lt;<br>a1.2"
    assert tag("br") == "<br>"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.03, 0.04), (1.71, 1.93), (0, 12345), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    marks = ticks(low, high, 5)
    assert 1 <= len(marks) <= 8
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


@pytest.mark.parametrize(("low", "high"), [(1, 10), (3e5, 2e7), (1, 1e9), (40, 60)])
def test_log_ticks(low: float, high: float) -> None:
    marks = log_ticks(low, high)
    assert all(low * 0.99 <= mark <= high * 1.01 for mark in marks)
    assert len(marks) <= 10
