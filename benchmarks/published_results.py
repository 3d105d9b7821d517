"""Do our layers give what was published about what layers can and cannot learn?

    python benchmarks/published_results.py [--only parity,s3] [--out FILE.json]

Small models learn a task at one length and are examined, with new examples, at that length or beyond it. A
model that can express the solution may still not find it, so the best run of a model counts: it must solve the
task, or must not. Runs are far shorter than those of the papers, and sequences too. All runs are in the JSON,
with seeds, counts and intervals.

`--out` is written after every run, and the same command goes on with the runs that are missing there. One
thread of a busy machine takes about an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import machine, options_parser, table, write_results
from intarsia.errors import IntarsiaError
from intarsia.mixers.registry import use_plugins
from intarsia.model import ModelConfig
from intarsia.tasks import examine, make_task
from intarsia.training import TrainConfig
from intarsia.training.task_loop import train_on_task


@dataclass(frozen=True)
class Subject:
    """A model that is to succeed or fail."""

    name: str
    layout: str
    mixers: Mapping[str, Mapping[str, Any]]
    must: str
    """"solve" or "fail", or "any": shown, and nothing claimed."""
    depth: int = 1
    d_model: int = 64


@dataclass(frozen=True)
class Claim:
    """What was published, and how it is looked at here."""

    name: str
    says: str
    source: str
    learned: Mapping[str, Any]
    """The task that is learned, with its options."""
    examined: Mapping[str, Any]
    """Options of it that differ in the examination."""
    subjects: tuple[Subject, ...]
    steps: int
    rows: int = 32
    rates: tuple[float, ...] = (3e-3, 1e-2)
    seeds: tuple[int, ...] = (1, 2)
    solved: float = 0.9
    """Right answers, from which on the task counts as solved."""


def delta(kind: str, heads: int = 4, dim: int = 16, **more: Any) -> dict[str, dict[str, Any]]:
    """A delta-rule layer."""
    return {kind: {"type": kind, "num_heads": heads, "head_dim": dim, **more}}


DENSE = {"dense-recurrence": {"type": "dense-recurrence", "width": 32}}
# With a sink, so that it can tell how many equal tokens there were: no token marks where a sequence begins.
ATTENTION = {"attention": {"type": "attention", "num_heads": 4, "head_dim": 16, "sinks": True}}
NEGATIVE = {"negative_eigenvalues": True}
ZERO_TO_ONE = {"negative_eigenvalues": False}


def product(steps: int, **more: Any) -> dict[str, dict[str, Any]]:
    """DeltaProduct without a decay and without a convolution: what is tracked is tracked by the state."""
    return delta("deltaproduct", heads=8, steps=steps, decay=False, conv_size=None, **more)


def tracks_a5(length: int, must: Mapping[int, str]) -> Claim:
    """Products of so many generators of A5, by one layer of a recurrence and by attention of so many layers each."""
    return Claim(
        f"a5-{length}",
        "one layer of a recurrence whose matrix the input decides tracks A5; attention needs more layers the longer",
        "arXiv:2404.08819",
        {"task": "word-problem", "group": "a5", "length": length, "generators": True},
        {"asked_from": length // 2},
        (
            Subject("dense recurrence, 1 layer", "dense-recurrence", DENSE, "solve"),
            *(
                Subject(
                    f"attention, {depth} layer{'s' * (depth > 1)}", "attention", ATTENTION, how, depth=depth
                )
                for depth, how in must.items()
            ),
        ),
        steps=600,
        rows=64,
        rates=(3e-3,),
        seeds=(1,),
    )


CLAIMS = (
    tracks_a5(4, {1: "solve", 2: "any", 3: "any"}),
    tracks_a5(8, {1: "fail", 2: "solve", 3: "any"}),
    tracks_a5(16, {1: "fail", 2: "fail"}),
    Claim(
        "s3",
        "DeltaProduct of two steps with eigenvalues in [-1, 1] tracks S3 in one layer; of one step, or in [0, 1], not",
        "arXiv:2502.10297",
        {"task": "word-problem", "group": "s3", "length": 12},
        {"length": 48, "asked_from": 12},
        (
            Subject("2 steps, [-1, 1]", "deltaproduct", product(2, **NEGATIVE), "solve", d_model=128),
            Subject("1 step, [-1, 1]", "deltaproduct", product(1, **NEGATIVE), "fail", d_model=128),
            Subject("2 steps, [0, 1]", "deltaproduct", product(2, **ZERO_TO_ONE), "fail", d_model=128),
        ),
        steps=1500,
        rows=64,
        rates=(5e-3,),
        seeds=(1,),
    ),
    Claim(
        "parity",
        "DeltaNet tracks parity beyond the trained length with beta in [0, 2]; DeltaNet, KDA and GDN in [0, 1] do not",
        "arXiv:2411.12537",
        {"task": "parity", "length": 40},
        {"length": 256, "asked_from": 40},
        (
            Subject("DeltaNet [0, 2]", "deltanet", delta("deltanet", **NEGATIVE), "solve", depth=2),
            Subject("DeltaNet [0, 1]", "deltanet", delta("deltanet", **ZERO_TO_ONE), "fail", depth=2),
            Subject("KDA [0, 1]", "kda", delta("kda", **ZERO_TO_ONE), "fail", depth=2),
            Subject("GDN [0, 1]", "gdn", delta("gdn"), "fail", depth=2),
        ),
        steps=600,
        rates=(1e-2,),
        seeds=(1, 2),
    ),
)


def model_of(subject: Subject, vocab_size: int) -> ModelConfig:
    """The model of a subject, with a feed-forward twice as wide."""
    width = subject.d_model
    return ModelConfig.from_dict(
        {
            "vocab_size": vocab_size,
            "d_model": width,
            "depth": subject.depth,
            "layout": subject.layout,
            "mixers": dict(subject.mixers),
            "feed_forward": {"d_hidden": 2 * width},
            "init_std": width**-0.5,
        }
    )


def run(claim: Claim, subject: Subject, rate: float, seed: int) -> dict[str, Any]:
    """Train and examine one model."""
    options = {name: value for name, value in claim.learned.items() if name != "task"}
    task = make_task(claim.learned["task"], options)
    beyond = make_task(claim.learned["task"], {**options, **claim.examined})
    config = TrainConfig(
        steps=claim.steps, rows=claim.rows, length=task.length, optimizer="adamw", lr=rate, schedule="cosine",
        final_lr_fraction=0.1, weight_decay=0.01, warmup_steps=claim.steps // 20, seed=seed, data_seed=seed,
    )  # fmt: skip
    model, often = model_of(subject, task.vocab_size), claim.steps // 20
    result = train_on_task(model, config, task, examples=128, examine_every=often)
    if not result.finished:
        raise KeyboardInterrupt
    found: dict[str, Any] = {}
    for where, it in (("trained length", task), ("examined", beyond)):
        found[where] = examine(result.model, it, seed=seed, examples=128).to_dict()
        del found[where]["by_sequence"]
    return {"rate": rate, "seed": seed, "steps": result.steps, "seconds": round(result.seconds, 1), **found}


def judged(claim: Claim, subject: Subject, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table."""
    best = max(runs, key=lambda made: made["examined"]["answers"]["accuracy"])
    accuracy = best["examined"]["answers"]["accuracy"]
    solved = accuracy >= claim.solved
    return {
        "claim": claim.name,
        "model": subject.name,
        "learned %": 100 * max(made["trained length"]["answers"]["accuracy"] for made in runs),
        "examined %": 100 * accuracy,
        "chance %": 100
        * make_task(claim.learned["task"], {k: v for k, v in claim.learned.items() if k != "task"}).chance,
        "runs": len(runs),
        "must": subject.must,
        "as published": {"solve": solved, "fail": not solved, "any": None}[subject.must],
    }


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--only", help="claims, by name, with commas")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    use_plugins([Path(__file__).with_name("dense_recurrence.py")])
    torch.set_num_threads(options.threads)
    claims = [claim for claim in CLAIMS if not options.only or claim.name in options.only.split(",")]
    done: dict[str, dict[str, Any]] = {}
    if options.out and Path(options.out).exists():
        done = json.loads(Path(options.out).read_text())["runs"]
    for claim in claims:
        for subject in claim.subjects:
            for rate in claim.rates:
                for seed in claim.seeds:
                    key = f"{claim.name}/{subject.name}/{rate:g}/{seed}"
                    if key not in done:
                        done[key] = {
                            "subject": asdict(subject),
                            "learned": dict(claim.learned),
                            **run(claim, subject, rate, seed),
                        }
                        right = done[key]["examined"]["answers"]["accuracy"]
                        print(f"{key}: {right:.1%} in {done[key]['seconds']} s", flush=True)
                        save(options, done)
    rows = save(options, done)
    table(rows)
    if any(row["as published"] is False for row in rows):
        sys.exit("not all came out as published")


def save(options: argparse.Namespace, done: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write what there is; the lines of the table."""
    rows = []
    for claim in CLAIMS:
        for subject in claim.subjects:
            runs = [made for key, made in done.items() if key.startswith(f"{claim.name}/{subject.name}/")]
            if runs:
                rows.append(judged(claim, subject, runs))
    if options.out:
        described = {claim.name: asdict(claim) for claim in CLAIMS}
        write_results(
            options.out, {"machine": machine(), "results": rows, "claims": described, "runs": dict(done)}
        )
    return rows


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the runs that are missing")
    except IntarsiaError as error:
        sys.exit(f"published_results.py: {error}")
