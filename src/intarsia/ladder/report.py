"""The report: one HTML file that opens anywhere, without a network.

The verdict stands first, then the table and the figures behind it, then what the comparison cannot show and
how to do it again. Figures are SVG made here: they follow the reader's light or dark setting and print sharply.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from intarsia.files import write_text
from intarsia.ladder import toml
from intarsia.ladder.page.charts import Bar, Line, forest_figure, layout_strip, line_figure
from intarsia.ladder.page.markup import Markup, join, tag
from intarsia.ladder.plan import Plan
from intarsia.ladder.results import ArmResult, CurvePoint, Results
from intarsia.ladder.statistics import Estimate
from intarsia.ladder.verdict import PairVerdict, Verdict, bracket, count


def write_report(path: Path, plan: Plan, results: Results, verdict: Verdict) -> None:
    """Write the report, atomically."""
    write_text(path, render(plan, results, verdict))


def render(plan: Plan, results: Results, verdict: Verdict) -> str:
    """The report as HTML text."""
    title = plan.title or plan.name
    page = tag(
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
        tag(
            "body", tag("main", _sections(plan, results, verdict)), tag("script", Markup(_asset("report.js")))
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _asset(name: str) -> str:
    return files("intarsia.ladder.page").joinpath(name).read_text(encoding="utf-8")


def _sections(plan: Plan, results: Results, verdict: Verdict) -> list[Markup]:
    return [
        _header(plan, results),
        _verdict(verdict),
        _table(plan, results, verdict),
        _differences(plan, results, verdict),
        _curves(plan, results),
        _costs(plan, results),
        _rates(plan, results),
        _samples(results),
        _failures(results),
        _limits(verdict),
        _fairness(plan, results),
        _reproduce(plan, results),
        tag(
            "footer",
            f"Written by Intarsia {results.environment.get('intarsia', '')} on "
            f"{results.environment.get('date') or datetime.date.today().isoformat()}. ",
            "This file is complete: it loads nothing.",
        ),
    ]


def _header(plan: Plan, results: Results) -> Markup:
    facts = [
        f"{len(results.arms)} architectures",
        f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}",
        f"{count(results.tokens_per_run)} tokens a run",
        f"corpus {results.corpus}, tokenizer {results.tokenizer}",
        f"{len(results.text_bytes)} judged documents",
    ]
    return tag(
        "header",
        tag("div", class_="inlay", aria_hidden="true"),
        tag("p", "Intarsia · comparison", class_="brand"),
        tag("h1", plan.title or plan.name),
        tag("p", " · ".join(facts), class_="meta"),
    )


def _verdict(verdict: Verdict) -> Markup:
    css = {"better": "decided", "worse": "decided"}
    pairs = [tag("li", pair.sentence, class_=css.get(pair.outcome, pair.outcome)) for pair in verdict.pairs]
    return tag(
        "section",
        tag("p", verdict.sentence, class_="sentence"),
        tag("ul", pairs) if len(pairs) > 1 else None,
        class_="verdict",
        aria_label="Verdict",
    )


def _table(plan: Plan, results: Results, verdict: Verdict) -> Markup:
    contexts = [
        context
        for context in plan.figures.contexts
        if any(context == cost.context for arm in results.arms for cost in arm.measurements.decoding)
    ]
    kinds = _kinds(results)
    many = len(contexts) > 3
    shown = [contexts[0], contexts[len(contexts) // 2], contexts[-1]] if many else contexts
    heads = ["Parameters", "Held-out bits per byte", "Training tokens/s"]
    heads += [f"Cache at {context_name(c)}" for c in shown] + [
        f"ms/token at {context_name(c)}" for c in shown
    ]
    body = []
    for index, arm in enumerate(results.arms):
        row = verdict.row(arm.name)
        costs = {cost.context: cost for cost in arm.measurements.decoding}
        speed = arm.measurements.training_tokens_per_second
        cells: list[object] = [
            [
                count(arm.non_embedding_parameters),
                " ",
                tag("small", f"+ {count(arm.parameters - arm.non_embedding_parameters)}"),
            ],
            _level(row.estimate) if row.estimate else "no run finished",
            f"{speed:,.0f}" if speed else None,
            *[size_name(costs[c].cache_bytes) if c in costs else None for c in shown],
            *[f"{costs[c].milliseconds:.2f}" if c in costs else None for c in shown],
        ]
        name = tag(
            "td",
            tag("span", tag("span", class_=f"swatch arm-{index % 6}"), arm.name, class_="arm"),
            tag("span", arm.note, class_="note") if arm.note else None,
            layout_strip(arm.layout.split(), kinds),
        )
        body.append(
            tag("tr", name, _cells(heads, cells), class_="best" if arm.name == verdict.best else None)
        )
    for row, baseline in zip(
        [row for row in verdict.rows if row.is_baseline], results.baselines, strict=True
    ):
        cells = [
            count(baseline.parameters) if baseline.parameters else None,
            _level(row.estimate) if row.estimate else None,
            *[None] * (len(heads) - 2),
        ]
        name = tag("td", row.name, tag("span", row.note, class_="note") if row.note else None)
        body.append(tag("tr", name, _cells(heads, cells), class_="baseline"))
    percent = f"{verdict.confidence:.0%}"
    return tag(
        "section",
        tag("h2", "The table"),
        tag(
            "div",
            tag(
                "table",
                tag("thead", tag("tr", tag("th", "Model"), [tag("th", head) for head in heads])),
                tag("tbody", body),
                class_="cards",
            ),
            class_="scroll",
        ),
        _tiles_legend(kinds),
        tag(
            "p",
            f"Parameters without embeddings, + those of the embeddings. Bits per byte with a {percent} interval over "
            "documents and seeds: most of it is the documents, which all models share, so compare models by the differences below. "
            "Cache: all layers' states at batch 1. Times were taken on this machine one model at a time, in turn, with nothing "
            "else of the comparison running.",
            class_="quiet",
        ),
    )


def _cells(heads: Sequence[str], cells: Sequence[object]) -> list[Markup]:
    return [
        tag(
            "td", cell if cell is not None else "–", data_label=head, class_="empty" if cell is None else None
        )
        for head, cell in zip(heads, cells, strict=True)
    ]


def _level(level: Estimate) -> list[object]:
    interval = level.interval
    return [f"{level.value:.3f} ", tag("small", bracket(interval.low, interval.high))]


def _differences(plan: Plan, results: Results, verdict: Verdict) -> Markup:
    pairs = [pair for pair in verdict.pairs if pair.difference is not None]
    bars = [_bar(pair, pair.difference) for pair in pairs if pair.difference is not None]
    percent = f"{verdict.confidence:.0%}"
    several = len(pairs) > 1
    return tag(
        "section",
        tag("h2", "The differences"),
        tag(
            "p",
            "Paired: the same documents, and for each seed the same batches in the same order. Left of zero, the arm "
            "that is named first needs fewer bits.",
        ),
        tag(
            "figure",
            forest_figure(
                bars,
                title="Differences in bits per byte between each pair of architectures, with intervals",
                x_label="difference in bits per byte",
                left_label="first is better",
                right_label="second is better",
                number=lambda value: f"{value:.3f}".replace("-", "−") if value else "0",
            ),
            tag(
                "figcaption",
                f"Thick: {percent} interval of that pair alone. Thin, and in brackets: "
                + (
                    f"widened so that all {len(pairs)} intervals hold together with {percent} (Bonferroni); the verdict goes by these. "
                    if several
                    else "the same. "
                )
                + "Small strokes below: the single seeds.",
            ),
        ),
    )


def _bar(pair: PairVerdict, difference: Estimate) -> Bar:
    wide = difference.simultaneous
    sign = "−" if difference.value < 0 else "+"
    return Bar(
        label=f"{pair.first} vs {pair.second}",
        value=difference.value,
        inner=(difference.interval.low, difference.interval.high),
        outer=(wide.low, wide.high),
        single=difference.per_seed,
        text=f"{sign}{abs(difference.value):.3f} {bracket(wide.low, wide.high)}",
        css="decided" if pair.better else "undecided",
    )


def _curves(plan: Plan, results: Results) -> Markup:
    def figure(kind: str, heading: str) -> Markup | None:
        lines: list[Line] = []
        for index, arm in enumerate(results.arms):
            runs = [run for run in arm.runs if run.role == "judged"]
            curves = [(run, run.training_curve if kind == "training" else run.heldout_curve) for run in runs]
            curves = [(run, curve) for run, curve in curves if curve]
            lines += [
                Line(run.name, f"arm-{index % 6}", _points(curve), faint=True, failed=run.failure is not None)
                for run, curve in curves
            ]
            finished = [curve for run, curve in curves if run.failure is None]
            if finished:
                lines.append(
                    Line(arm.name, f"arm-{index % 6}", _mean_curve(finished), dots=kind != "training")
                )
        if not lines:
            return None
        return tag(
            "figure",
            tag("h3", heading),
            line_figure(
                lines,
                title=heading,
                x_label="tokens read",
                y_label="bits per byte",
                x_format=count,
                y_format=lambda value: f"{value:.2f}",
                y_range=_curve_range(lines),
            ),
        )

    drawn = [
        figure("training", "Training text, as it was read"),
        figure("heldout", "Held-out text (the tuning documents)"),
    ]
    if not any(drawn):
        return Markup("")
    return tag(
        "section",
        tag("h2", "How they learned"),
        _legend(results),
        drawn,
        tag(
            "p",
            "Thick: the mean over seeds. Thin: each seed. A cross marks a run that failed. The first part of the fall is cut off.",
            class_="quiet",
        ),
    )


def _points(curve: Sequence[CurvePoint]) -> list[tuple[float, float]]:
    return [(point.tokens, point.bits_per_byte) for point in curve]


def _mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[tuple[float, float]]:
    """The mean of several curves at the places that all have."""
    values = [{point.tokens: point.bits_per_byte for point in curve} for curve in curves]
    places = sorted(set.intersection(*[set(value) for value in values]))
    return [(place, sum(value[place] for value in values) / len(values)) for place in places]


def _curve_range(lines: Sequence[Line]) -> tuple[float, float]:
    """From a little below the lowest point to where the curves are after a tenth of the run."""
    points = [point for line in lines for point in line.points]
    last = max(x for x, _ in points)
    low = min(y for _, y in points)
    early = [y for x, y in points if x >= 0.1 * last] or [y for _, y in points]
    high = max(early)
    room = (high - low or 1.0) * 0.05
    return low - room, high + room


def _costs(plan: Plan, results: Results) -> Markup:
    def lines(value: str) -> list[Line]:
        return [
            Line(
                arm.name,
                f"arm-{index % 6}",
                [(cost.context, float(getattr(cost, value))) for cost in arm.measurements.decoding],
                dots=True,
            )
            for index, arm in enumerate(results.arms)
            if arm.measurements.decoding
        ]

    if not lines("milliseconds"):
        return Markup("")
    contexts = sorted({x for line in lines("milliseconds") for x, _ in line.points})
    return tag(
        "section",
        tag("h2", "What a long context costs"),
        tag(
            "p",
            "A linear layer keeps a state of fixed size; an attention layer keeps something for every token it has read.",
        ),
        _legend(results),
        tag(
            "div",
            tag(
                "figure",
                tag("h3", "Time to decode a token"),
                line_figure(
                    lines("milliseconds"),
                    title="Milliseconds per decoded token against context",
                    x_label="tokens already read",
                    y_label="milliseconds per token",
                    x_format=context_name,
                    y_format=lambda value: f"{value:.3g}",
                    x_ticks=contexts,
                    x_log=True,
                    y_range=(0, max(y for line in lines("milliseconds") for _, y in line.points) * 1.08),
                    small=True,
                ),
            ),
            tag(
                "figure",
                tag("h3", "Size of the cache"),
                line_figure(
                    lines("cache_bytes"),
                    title="Bytes of state against context",
                    x_label="tokens already read",
                    y_label="bytes",
                    x_format=context_name,
                    y_format=size_name,
                    x_ticks=contexts,
                    x_log=True,
                    y_log=True,
                    small=True,
                ),
            ),
            class_="pair",
        ),
    )


def _rates(plan: Plan, results: Results) -> Markup:
    tried = [arm for arm in results.arms if arm.tuning_scores]
    rows = []
    for index, arm in enumerate(results.arms):
        scores = arm.tuning_scores
        if not scores:
            rows.append(
                tag("tr", tag("td", _arm(arm, index)), tag("td", f"{arm.grid[0]:g} was given", class_="text"))
            )
            continue
        cells = []
        for rate, score in sorted(scores.items()):
            text = f"{rate:g}: {score:.3f}" if score is not None else f"{rate:g}: failed"
            cells += [tag("strong", f"{text} ✓") if rate == arm.learning_rate else text, "  ·  "]
        rows.append(tag("tr", tag("td", _arm(arm, index)), tag("td", cells[:-1], class_="text")))
    rule = (
        f"One run for each rate with seed {plan.tuning.seed}, scored on {results.tuning_documents} held-out documents. "
        "Neither that seed nor those documents are judged, so that the choice cannot flatter the verdict."
        if tried
        else "The plan gives one rate for each arm; nothing was chosen here."
    )
    return tag(
        "section",
        tag("h2", "The learning rates"),
        tag("p", rule),
        tag(
            "table",
            tag("thead", tag("tr", tag("th", "Model"), tag("th", "Rate: bits per byte", class_="text"))),
            tag("tbody", rows),
        ),
    )


def _samples(results: Results) -> Markup:
    if not results.samples:
        return Markup("")
    prompts = list(dict.fromkeys(sample.prompt for sample in results.samples))
    blocks: list[Markup] = []
    for position, prompt in enumerate(prompts):
        for sample in [sample for sample in results.samples if sample.prompt == prompt]:
            shown = tag(
                "pre", tag("span", prompt, class_="prompt") if prompt else None, sample.text, class_="sample"
            )
            start = tag("code", repr(prompt)) if prompt else "from nothing"
            head = tag("summary", sample.arm, " ", tag("small", "continues " if prompt else "writes ", start))
            blocks.append(tag("details", head, shown, open="open" if position == 0 else None))
    return tag(
        "section",
        tag("h2", "What they write"),
        tag(
            "p",
            "The first judged seed of each, with the same sampling and the same random numbers.",
            class_="quiet",
        ),
        blocks,
    )


def _failures(results: Results) -> Markup:
    failed = results.failed
    total = len(results.runs)
    if not failed:
        text = tag("p", f"None: all {total} runs finished.")
    else:
        rows = [
            tag(
                "tr",
                tag("td", run.name),
                tag("td", run.role, class_="text"),
                tag("td", run.failure.kind, class_="text"),
                tag("td", run.failure.message, class_="text"),
            )
            for run in failed
            if run.failure
        ]
        heads = [tag("th", head, class_="text") for head in ("Run", "For", "How", "What it said")]
        text = join(
            tag(
                "p",
                f"{len(failed)} of {total} runs failed. They are counted and left out of the differences.",
            ),
            tag("div", tag("table", tag("thead", tag("tr", heads)), tag("tbody", rows)), class_="scroll"),
        )
    return tag("section", tag("h2", "Failed runs"), text)


def _limits(verdict: Verdict) -> Markup:
    return tag(
        "section",
        tag("h2", "What this cannot show"),
        tag("ul", [tag("li", caveat) for caveat in verdict.caveats], class_="limits"),
    )


def _fairness(plan: Plan, results: Results) -> Markup:
    rows = []
    for index, arm in enumerate(results.arms):
        rows.append(
            tag(
                "tr",
                tag("td", _arm(arm, index)),
                tag("td", f"{arm.parameters:,}"),
                tag("td", f"{arm.non_embedding_parameters:,}"),
                tag("td", count(arm.training_flops_per_token) if arm.training_flops_per_token else "–"),
                tag("td", arm.change or "–", class_="text"),
            )
        )
    digests = {
        run.seed: run.batches
        for run in results.runs
        if run.role == "judged" and run.failure is None and run.batches
    }
    return tag(
        "section",
        tag("h2", "What was held equal"),
        tag(
            "p",
            "Data, batches and their order, steps, schedule, optimizer, precision and the rule of initialisation; "
            "weights and data each have a generator of their own. "
            f"Parameters without embeddings may differ by {plan.matching.tolerance:.1%} at most"
            + (
                "; the width of the feed-forward layers was changed to bring them together."
                if plan.matching.adjust
                else "."
            ),
        ),
        tag(
            "div",
            tag(
                "table",
                tag(
                    "thead",
                    tag(
                        "tr",
                        [
                            tag("th", head)
                            for head in ("Model", "Parameters", "Without embeddings", "FLOPs/token, training")
                        ],
                        tag("th", "Changed to match", class_="text"),
                    ),
                ),
                tag("tbody", rows),
            ),
            class_="scroll",
        ),
        tag(
            "p",
            "Every batch was hashed and the hashes were found equal in all arms: ",
            [[f"seed {seed} ", tag("code", digest[:16]), ", "] for seed, digest in sorted(digests.items())][
                :-1
            ],
            [[f"seed {seed} ", tag("code", digest[:16]), "."] for seed, digest in sorted(digests.items())][
                -1:
            ],
            class_="quiet",
        )
        if digests
        else None,
    )


def _reproduce(plan: Plan, results: Results) -> Markup:
    values = plan.to_dict()
    environment = _flat(results.environment)
    minutes = results.seconds / 60
    return tag(
        "section",
        tag("h2", "Do it again"),
        tag(
            "p",
            "Save the plan below as ",
            tag("code", "plan.toml"),
            " (it also lies beside this report) and run:",
        ),
        tag("pre", "intarsia compare plan.toml"),
        tag(
            "p",
            f"It took {minutes:.1f} minutes here. The same machine with the same versions gives the same numbers, times aside; "
            "another processor or number of threads rounds differently, which acts like another seed.",
        ),
        tag("details", tag("summary", "The plan"), tag("pre", toml.dumps(values))),
        tag(
            "details",
            tag("summary", "The machine and the versions"),
            tag("dl", [[tag("dt", key), tag("dd", value)] for key, value in environment]),
        ),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key} ")
        elif value is not None:
            flat.append((f"{prefix}{key}", str(value)))
    return flat


def _arm(arm: ArmResult, index: int) -> Markup:
    return tag("span", tag("span", class_=f"swatch arm-{index % 6}"), arm.name, class_="arm")


def _legend(results: Results) -> Markup:
    items = [
        tag("li", tag("span", class_=f"swatch arm-{index % 6}"), arm.name)
        for index, arm in enumerate(results.arms)
    ]
    return tag("ul", items, class_="legend")


def _kinds(results: Results) -> list[str]:
    return list(dict.fromkeys(name for arm in results.arms for name in arm.layout.split()))


def _tiles_legend(kinds: Sequence[str]) -> Markup:
    items = [
        tag("li", tag("span", class_=f"swatch kind-{index % 6}"), name) for index, name in enumerate(kinds)
    ]
    return tag("ul", items, class_="legend tiles")


def context_name(tokens: float) -> str:
    """`256`, `4k`: powers of two read best in binary thousands."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 256 == 0 else f"{tokens:,.0f}"


def size_name(number: float) -> str:
    """`1.5 MB`: decimal units, as axes have decimal marks."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"
