"""Does a ladder that is killed at random moments give the numbers of one that never was?

    python benchmarks/ladder_kills.py --out benchmarks/results/ladder-kills.json

A tiny ladder (one size, two budgets that share their stable phase, learning rates beyond the grid, a gate, three arms
of which one is stopped) is climbed once undisturbed. Then it is climbed in other directories, and killed with SIGKILL
at a random moment, again and again: every other time with the runs that it has started, else alone. A climb that came
to its end is compared, and the next begins from nothing, until there were as many kills as asked for. All final numbers
must be the same, to the last digit: everything in verdict.json but times, places and speeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import machine, options_parser, write_results
from intarsia.settings import toml

CLOCKS = {"seconds", "environment", "report", "measurements", "source"}
"""What of verdict.json is of a clock, a place or a day."""

PLAN: dict[str, Any] = {
    "name": "kills",
    "seeds": [1],
    "corpus": {"tokenizer": "bytes", "heldout": 0.3},
    "training": {"rows": 2, "length": 64, "decay_fraction": 0.5, "log_every": 5, "checkpoint_every": 5},
    "tuning": {"learning_rates": [5e-3], "documents": 6, "beyond": 1},
    "evaluation": {"documents": 12, "tokens_per_document": 100, "resamples": 1000},
    "figures": {"contexts": [], "throughput_steps": 0, "sample_tokens": 0},
    "model": {
        "d_model": 16,
        "depth": 2,
        "mixers": {
            "mla": {"num_heads": 1, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8},
            "kda": {"num_heads": 1, "head_dim": 8},
        },
        "feed_forward": {"d_hidden": 48},
    },
    "matching": {"tolerance": 0.02},
    "baselines": "none",
    "gates": {"baseline": "full", "margin": 0.5},
    "sizes": [{"name": "tiny", "steps": [60, 120]}],
    "arms": [
        {"name": "full", "preset": "full-nano", "learning_rates": [2.5e-3, 5e-3]},
        {"name": "kimi-linear", "preset": "kimi-linear-nano", "model": {"layout": "kda mla"}},
        {"name": "slow", "preset": "full-nano", "learning_rates": [1e-8]},
    ],
}


def write_texts(directory: Path) -> str:
    """Sixty small files of words that follow each other by a rule."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(20)]
    for index in range(60):
        chosen = np.cumsum(rng.integers(1, 3, rng.integers(40, 120))) % len(words)
        (directory / f"{index:02}.txt").write_text(" ".join(words[word] for word in chosen))
    return str(directory / "*.txt")


def start(plan: Path, out: Path) -> subprocess.Popen[bytes]:
    """Climb in a process of its own."""
    command = [sys.executable, "-m", "intarsia", "ladder", str(plan), "--out", str(out), "--jobs", "2"]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def children(process: int) -> list[int]:
    """The processes that one has started."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(number) for number in text.split()]


def kill(process: subprocess.Popen[bytes], with_children: bool) -> int:
    """Kill it; returns how many runs went with it at once."""
    started = children(process.pid) if with_children else []
    for number in (process.pid, *started):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()
    return len(started)


def numbers(found: Any) -> Any:
    """All of verdict.json but clocks and places."""
    if isinstance(found, dict):
        return {key: numbers(value) for key, value in found.items() if key not in CLOCKS}
    return [numbers(value) for value in found] if isinstance(found, list) else found


def read(out: Path) -> Any:
    return numbers(json.loads((out / "verdict.json").read_text()))


def main() -> int:
    parser = options_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--longest",
        type=float,
        help="seconds until a kill, at most; by default what the undisturbed climb took",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    same: list[bool] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        plan = place / "plan.toml"
        plan.write_text(
            toml.dumps({**PLAN, "corpus": {**PLAN["corpus"], "source": write_texts(place / "texts")}})
        )
        began = time.monotonic()
        if start(plan, place / "undisturbed").wait():
            print((place / "undisturbed.log").read_text(), file=sys.stderr)
            return 1
        undisturbed, seconds = read(place / "undisturbed"), time.monotonic() - began
        # Shorter ones would all come while the first runs are still starting.
        longest = options.longest or seconds
        while len(kills) < options.kills:
            out = place / f"killed-{len(same)}"
            while True:
                process = start(plan, out)
                moment, with_children = chance.uniform(0.5, longest), len(kills) % 2 == 0
                try:
                    status = process.wait(moment if len(kills) < options.kills else None)
                except subprocess.TimeoutExpired:
                    at_once = kill(process, with_children)
                    done = len(list(out.glob("rungs/*/runs/*/outcome.json")))
                    kills.append(
                        {"after_seconds": round(moment, 2), "runs_killed": at_once, "runs_done": done}
                    )
                    print(
                        f"kill {len(kills)} after {moment:.1f} s, {done} runs done",
                        file=sys.stderr,
                        flush=True,
                    )
                    continue
                if status:
                    print((place / f"{out.name}.log").read_text(), file=sys.stderr)
                    return 1
                same.append(read(out) == undisturbed)
                break
    runs = sum(len(arm["runs"]) for rung in undisturbed["rungs"] for arm in rung["arms"])
    record = {
        "machine": machine(),
        "kills": kills,
        "climbs_that_were_killed_and_came_to_their_end": len(same),
        "same_numbers": all(same),
        "undisturbed": {
            "seconds": round(seconds, 1),
            "judged_runs": runs,
            "sentence": undisturbed["sentence"],
        },
    }
    if options.out:
        write_results(options.out, record)
    print(
        f"{len(kills)} kills in {len(same)} climbs: the numbers are {'the same' if all(same) else 'OTHERS'}"
    )
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
