"""How well do linear mixers reproduce, look up and keep track, as sequences grow?

    python benchmarks/exams.py [--lengths 32,64,128] [--jobs 2] [--out FILE.json]

The synthetic tests of the Kimi Linear report (arXiv:2510.26692, section 5.1): models of two layers and two heads learn
`intarsia.tasks`, with KDA, Gated DeltaNet or Mamba-2 in them and otherwise alike. What makes it fair:

* the models of a task have as many parameters as the first mixer's (the feed-forward's width makes up for it), and
  heads with states of the same size;
* a seed gives all mixers the same examples in the same order, and the optimizer's settings are shared but for the
  learning rate: each mixer has its own, on each task and length, from one grid;
* rates are chosen on validation examples with a seed that is not used again. What is reported are test examples,
  which nothing was chosen on, with fresh seeds for the initial weights and the data.

It is a plan of `intarsia.ladder` that has exams alone, made here from the options: `--runs` holds its report and a
directory for each run. A run ends when no validation example has a mistake, or after `--steps`. Stop at any time, and
the same command goes on with the runs that are missing.

The report has heads of 128, 64 stacks, lengths from 256 to 2048, rates of 5e-5, 1e-4, 5e-4 and 1e-3 and at most 20,000
steps; its batch size and schedule are not published. That is `--head-dim 128 --stacks 64 --lengths 256,512,1024,2048
--rates 5e-5,1e-4,5e-4,1e-3 --steps 20000`, and wants a GPU, where this has not been run yet. The
defaults suit two CPU cores, which take about 80 minutes: smaller heads, fewer stacks, shorter sequences, and the larger
rates that 2000 steps need to learn something. `--lengths 32,64,128,256` adds a length to finished runs and takes a
little more than twice as long.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from common import machine, options_parser, table, write_results
from intarsia.errors import IntarsiaError
from intarsia.ladder import Arm, ExamOptions, Matching, Plan, Tuning, compare
from intarsia.tasks import names as task_names

TUNING_SEED = 100


def model_of(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Layers of a mixer with a feed-forward twice as wide as the model, which is as wide as its heads."""
    heads, size = options.heads, options.head_dim
    mixer: dict[str, Any] = {"type": name, "num_heads": heads, "head_dim": size}
    if name == "mamba2":
        # Queries and keys of each head's own, and a state of size x size, as the others have.
        mixer |= {"state_dim": size, "num_groups": heads}
    width = heads * size
    return {
        "d_model": width,
        "depth": options.depth,
        "layout": name,
        "mixers": {name: mixer},
        "feed_forward": {"d_hidden": 2 * width},
        # So that a narrow model's layers keep the size of what they read: 0.02 learns far more slowly.
        "init_std": width**-0.5,
    }


def plan_of(options: argparse.Namespace) -> Plan:
    """The exams that are asked for, the short lengths first."""
    lists = {name: getattr(options, name).split(",") for name in ("tasks", "mixers", "lengths", "rates")}
    more: dict[str, dict[str, Any]] = {"stack": {"stacks": options.stacks}}
    return Plan(
        name="exams",
        title="How well do linear mixers reproduce, look up and keep track?",
        arms=tuple(Arm(name, model=model_of(options, name)) for name in lists["mixers"]),
        tuning=Tuning(learning_rates=tuple(sorted(set(map(float, lists["rates"])))), seed=TUNING_SEED),
        seeds=tuple(range(TUNING_SEED + 1, TUNING_SEED + 1 + options.seeds)),
        matching=Matching(reference=lists["mixers"][0]),
        examined_on=tuple(
            ExamOptions(
                task=task,
                options={"length": length, **more.get(task, {})},
                steps=options.steps,
                rows=options.rows,
                examples=options.examined,
                examine_every=options.examine_every,
            )
            for length in sorted(map(int, lists["lengths"]))
            for task in lists["tasks"]
        ),
    )


def rows_of(exams: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: a line for each exam and mixer."""
    rows = []
    for exam in exams:
        for arm in exam["arms"]:
            judged = [run for run in arm["runs"] if run["role"] == "judged"]
            steps = sorted(run["steps"] for run in judged if run["steps"])
            share = {name: None if value is None else 100 * value for name, value in arm["answers"].items()}
            rate = arm["learning_rate"]
            rows.append(
                {
                    "task": exam["task"],
                    "length": exam["options"]["length"],
                    "mixer": arm["name"],
                    "rate": "none" if rate is None else f"{rate:g}" + "*" * arm["at_edge_of_grid"],
                    "answers %": share["mean"],
                    "min": share["least"],
                    "max": share["most"],
                    "sequences %": None if arm["sequences"] is None else 100 * arm["sequences"],
                    "steps": steps[len(steps) // 2] if steps else None,
                    "failed": sum(run["failure"] is not None for run in judged),
                    "parameters": arm["non_embedding_parameters"],
                }
            )
    return rows


def parse() -> argparse.Namespace:
    parser = options_parser(__doc__)
    parser.add_argument("--tasks", default=",".join(task_names()))
    parser.add_argument("--mixers", default="kda,gdn,mamba2", help="the first sets the number of parameters")
    parser.add_argument("--lengths", default="32,64,128")
    parser.add_argument("--rates", default="1e-3,2e-3,5e-3,1e-2", help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--stacks", type=int, default=16, help="of the task `stack`")
    parser.add_argument("--steps", type=int, default=2000, help="at most")
    parser.add_argument("--rows", type=int, default=16, help="examples of a step")
    parser.add_argument("--examined", type=int, default=256, help="examples of validation and of the test")
    parser.add_argument("--examine-every", type=int, default=50, help="steps between two validations")
    parser.add_argument("--jobs", "-j", type=int, help="runs at a time; what the machine allows by default")
    parser.add_argument("--runs", default="runs/exams", help="where the runs and the report are kept")
    parser.add_argument("--quick", action="store_true", help="short sequences, few steps, one rate and seed")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.rates, options.seeds, options.steps = "32", "5e-3", 1, 300
    return options


def main() -> None:
    options = parse()
    verdict = compare(plan_of(options), options.runs, jobs=options.jobs)
    exams = verdict.record["exams"]
    rows = rows_of(exams)
    table(rows)
    if any(row["rate"].endswith("*") for row in rows):
        print("* at the edge of the grid: a rate beyond it might be better")
    if options.out:
        # The runs have threads of their own, which this process does not know of.
        used = verdict.record["environment"]
        described = {**machine(), "threads": used["threads"], "jobs": used["jobs"]}
        runs = [
            {"task": exam["task"], "length": exam["options"]["length"], "mixer": arm["name"], **run}
            for exam in exams
            for arm in exam["arms"]
            for run in arm["runs"]
        ]
        write_results(options.out, {"machine": described, "exams": rows, "runs": runs})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the runs that are missing")
    except IntarsiaError as error:
        sys.exit(f"exams.py: {error}")
