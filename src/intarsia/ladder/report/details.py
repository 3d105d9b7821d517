"""What stands below the figures: learning rates, texts, failures, limits, fairness, how to do it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intarsia.ladder.plan import Plan
from intarsia.ladder.report.markup import Markup, join, tag
from intarsia.ladder.report.parts import arm_name, percent
from intarsia.ladder.results import Results
from intarsia.ladder.verdict import Verdict
from intarsia.ladder.words import count
from intarsia.settings import toml


def rates_section(plan: Plan, results: Results) -> Markup:
    """How each arm's learning rate was chosen."""
    tried = [arm for arm in results.arms if arm.tuning_scores]
    rows = []
    for index, arm in enumerate(results.arms):
        scores = arm.tuning_scores
        if not scores:
            rows.append(
                tag(
                    "tr",
                    tag("td", arm_name(arm, index)),
                    tag("td", f"{arm.grid[0]:g} was given", class_="text"),
                )
            )
            continue
        cells = []
        for rate, score in sorted(scores.items()):
            text = f"{rate:g}: {score:.3f}" if score is not None else f"{rate:g}: failed"
            text += " (beyond the grid)" if rate in arm.beyond else ""
            cells += [tag("strong", f"{text} ✓") if rate == arm.learning_rate else text, "  ·  "]
        rows.append(tag("tr", tag("td", arm_name(arm, index)), tag("td", cells[:-1], class_="text")))
    share = plan.tuning.budget_share
    length = f", {percent(share)} of the budget long," if share < 1 else ""
    rule = (
        f"One run for each rate{length} with seed {plan.tuning.seed}, scored on "
        f"{results.tuning_documents} held-out documents. "
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


def samples_section(results: Results) -> Markup:
    """What the trained models write."""
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


def failures_section(results: Results) -> Markup:
    """The runs that did not finish."""
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


def limits_section(verdict: Verdict) -> Markup:
    """What the comparison cannot show."""
    return tag(
        "section",
        tag("h2", "What this cannot show"),
        tag("ul", [tag("li", caveat) for caveat in verdict.caveats], class_="limits"),
    )


def fairness_section(plan: Plan, results: Results) -> Markup:
    """What all arms share, and what was changed to make them equal."""
    rows = []
    for index, arm in enumerate(results.arms):
        rows.append(
            tag(
                "tr",
                tag("td", arm_name(arm, index)),
                tag("td", f"{arm.parameters:,}"),
                tag("td", f"{arm.non_embedding_parameters:,}"),
                tag("td", count(arm.training_flops_per_token) if arm.training_flops_per_token else "–"),
                tag("td", arm.change or "–", class_="text"),
            )
        )
    # Where arms read different amounts, that of whoever read most.
    most = {arm.name for arm in results.arms if arm.tokens == max(each.tokens for each in results.arms)}
    digests = {
        run.seed: run.batches
        for run in results.runs
        if run.role == "judged" and run.failure is None and run.batches and run.arm in most
    }
    shorter = "" if len(most) == len(results.arms) else ", as far as each read,"
    return tag(
        "section",
        tag("h2", "What was held equal"),
        tag(
            "p",
            f"Data, batches and their order, {_spent(plan)}, schedule, optimizer, precision and the rule of "
            "initialisation; weights and data each have a generator of their own. "
            f"Parameters without embeddings may differ by {percent(plan.matching.tolerance)} at most"
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
            f"Every batch was hashed and the hashes{shorter} were found equal in all arms: ",
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


def _spent(plan: Plan) -> str:
    unit = "" if plan.budget is None else plan.budget.unit
    return {"flops": "FLOPs of training", "seconds": "seconds of training on this machine"}.get(unit, "steps")


def reproduce_section(plan: Plan, results: Results) -> Markup:
    """The plan, the machine, the command."""
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
            f"It took {minutes:.1f} minutes here. The same machine with the same versions gives the same "
            "numbers, times aside; "
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
