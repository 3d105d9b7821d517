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

A run ends when no validation example has a mistake, or after `--steps`. Each finished run is a file in `--runs`: stop
at any time, and the same command goes on with the runs that are missing. Files know the settings and the package's
version; after a change of the code, name another directory.

The report has heads of 128, 64 stacks, lengths from 256 to 2048, rates of 5e-5, 1e-4, 5e-4 and 1e-3 and at most 20,000
steps; its batch size and schedule are not published. That is `--head-dim 128 --stacks 64 --lengths 256,512,1024,2048
--rates 5e-5,1e-4,5e-4,1e-3 --steps 20000`, and wants a GPU: `--device cuda`, where this has not been run yet. The
defaults suit two CPU cores, which take about 80 minutes: smaller heads, fewer stacks, shorter sequences, and the larger
rates that 2000 steps need to learn something. `--lengths 32,64,128,256` adds a length to finished runs and takes a
little more than twice as long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from common import machine, options_parser, table, write_results
from intarsia import __version__
from intarsia.data import Batch
from intarsia.errors import ConfigError, IntarsiaError, TrainingError
from intarsia.files import write_json
from intarsia.mixers import mixer
from intarsia.model import LanguageModel, ModelConfig
from intarsia.model.config import FeedForwardConfig
from intarsia.model.language_model import cost_of
from intarsia.model.matching import match_parameters
from intarsia.ops import Sequences
from intarsia.tasks import IGNORED, NOTHING, ExampleSplit, Score, Task, task
from intarsia.tasks import names as task_names
from intarsia.training.config import TrainConfig
from intarsia.training.distributed import Processes
from intarsia.training.optimizers import build_optimizers
from intarsia.training.step import train_step

Settings = dict[str, Any]
Results = dict[str, dict[str, Any]]

TUNING_SEED = 100


def model_config(settings: Settings, name: str, vocab_size: int) -> ModelConfig:
    """Two layers of a mixer with a feed-forward twice as wide as the model, which is as wide as its heads."""
    heads, size = settings["heads"], settings["head_dim"]
    options = {"num_heads": heads, "head_dim": size}
    if name == "mamba2":
        # Queries and keys of each head's own, and a state of size x size, as the others have.
        options |= {"state_dim": size, "num_groups": heads}
    width = heads * size
    return ModelConfig(
        vocab_size=vocab_size, d_model=width, depth=settings["depth"], layout=name,
        mixers={name: mixer(name)(**options)}, feed_forward=FeedForwardConfig(2 * width),
        # So that a narrow model's layers keep the size of what they read: 0.02 learns far more slowly.
        init_std=width**-0.5,
    )  # fmt: skip


def matched_config(settings: Settings, vocab_size: int) -> ModelConfig:
    """The model of a run, with as many parameters as that of the mixer which sets the size."""
    config = model_config(settings, settings["mixer"], vocab_size)
    if settings["mixer"] == settings["size_of"]:
        return config
    target = cost_of(model_config(settings, settings["size_of"], vocab_size)).non_embedding_parameters
    return match_parameters(config, target)


def train_config(settings: Settings) -> TrainConfig:
    return TrainConfig(
        steps=settings["steps"], rows=settings["rows"], length=settings["length"], optimizer="adamw",
        lr=settings["rate"], schedule="cosine", final_lr_fraction=0.1, warmup_steps=settings["steps"] // 20,
        weight_decay=0.1, grad_clip=1.0, seed=settings["seed"], data_seed=settings["seed"],
    )  # fmt: skip


@torch.no_grad()
def examine(model: LanguageModel, it: Task, settings: Settings, split: ExampleSplit) -> Score:
    """The score on the first examples of a split."""
    total, rows, device = NOTHING, settings["rows"], settings["device"]
    for start in range(0, settings["examined"], rows):
        indices = range(start, min(start + rows, settings["examined"]))
        inputs, targets = it.examples(settings["seed"], indices, split)
        logits = model(inputs.to(device)).logits
        assert logits is not None
        total += it.score(logits, targets.to(device))
    return total


def run(settings: Settings) -> dict[str, Any]:
    """Train one model and examine it."""
    it = task(settings["task"])(length=settings["length"], **settings["options"])
    config, training = matched_config(settings, it.vocab_size), train_config(settings)
    processes = Processes(device=torch.device(settings["device"]))
    model = LanguageModel(config)
    model.init_weights(settings["seed"])
    model.to(processes.device)
    optimizers = build_optimizers(model, training)
    rows, length = training.rows, training.length
    seqs = Sequences((length,) * rows)
    begin, curve, failure, score, loss = time.perf_counter(), [], None, NOTHING, float("nan")
    for step in range(1, training.steps + 1):
        inputs, targets = it.examples(settings["seed"], range((step - 1) * rows, step * rows))
        batch = Batch(inputs.view(1, -1), targets.view(1, -1), seqs, text_bytes=0, digest="", epoch=0)
        # A few short rows of stacks may ask nothing: there is nothing to learn then, for any mixer.
        if (targets != IGNORED).any():
            try:
                loss = train_step(model, optimizers, training, batch, step - 1, processes).loss
            except TrainingError as error:
                failure = str(error)
                break
        if step % settings["examine_every"] == 0 or step == training.steps:
            score = examine(model, it, settings, "validation")
            if not score.tokens:
                raise ConfigError(
                    f"no validation example of {it} asks anything: take longer or more examples"
                )
            curve.append({"step": step, "loss": loss, **accuracies(score)})
            if settings["verbose"]:
                print(f"    {title(settings)}, step {step}: loss {loss:.3f}, {percent(score)}", flush=True)
            if score.right_tokens == score.tokens:
                break
    test = NOTHING if failure else examine(model, it, settings, "test")
    nothing_known = {"tokens": 0.0, "sequences": 0.0}  # by a model that has come apart
    return {
        "settings": identity(settings),
        "parameters": cost_of(config).non_embedding_parameters,
        "feed_forward": config.feed_forward.d_hidden,
        "steps": step,
        "seconds": time.perf_counter() - begin,
        "failure": failure,
        "validation": nothing_known if failure else accuracies(score),
        "test": nothing_known if failure else accuracies(test),
        "curve": curve,
    }


def accuracies(score: Score) -> dict[str, float]:
    return {"tokens": score.token_accuracy, "sequences": score.sequence_accuracy}


def percent(score: Score) -> str:
    return f"{score.token_accuracy:.1%} of the answers, {score.sequence_accuracy:.1%} of the sequences"


def title(settings: Settings) -> str:
    purpose = "tuning" if settings["seed"] == TUNING_SEED else f"seed {settings['seed']}"
    return "{task} {length} {mixer} rate {rate:g}".format(**settings) + f" {purpose}"


def identity(settings: Settings) -> Settings:
    """What decides a run's result."""
    return {name: value for name, value in settings.items() if name not in ("verbose", "runs")}


def file_of(settings: Settings) -> Path:
    """Where the result of a run is kept: under a name that no other settings have."""
    text = json.dumps([__version__, identity(settings)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = "{task}-{length}-{mixer}-{rate:g}-{seed}".format(**settings)
    return Path(settings["runs"]) / f"{name}-{digest}.json"


class Arm:
    """A mixer on a task of a length: tuned, then trained with each seed."""

    def __init__(self, shared: Settings, rates: list[float], seeds: int) -> None:
        self.tuning = [{**shared, "rate": rate, "seed": TUNING_SEED} for rate in rates]
        self.shared, self.rates, self.seeds = shared, rates, range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds)

    @property
    def runs(self) -> int:
        return len(self.tuning) * (len(self.tuning) > 1) + len(self.seeds)

    def rate(self, results: Results) -> float | None:
        """The rate with the best validation accuracy, of equal ones the one that was there first; None if it is
        not known yet."""
        if len(self.rates) == 1:
            return self.rates[0]
        if any(key(settings) not in results for settings in self.tuning):
            return None

        def quality(settings: Settings) -> tuple[float, float, int]:
            result = results[key(settings)]
            return result["validation"]["tokens"], result["validation"]["sequences"], -result["steps"]

        return float(max(self.tuning, key=quality)["rate"])

    def due(self, results: Results) -> Iterator[Settings]:
        """The runs that can be made now."""
        rate = self.rate(results)
        final = [{**self.shared, "rate": rate, "seed": seed} for seed in self.seeds]
        wanted = self.tuning if rate is None else final
        yield from (settings for settings in wanted if key(settings) not in results)

    def row(self, results: Results) -> dict[str, Any]:
        """A line of the table."""
        rate = self.rate(results)
        runs = [results[key({**self.shared, "rate": rate, "seed": seed})] for seed in self.seeds]
        answers = [run["test"]["tokens"] for run in runs]
        sequences = [run["test"]["sequences"] for run in runs]
        at_edge = len(self.rates) > 1 and rate in (min(self.rates), max(self.rates))
        return {
            **{name: self.shared[name] for name in ("task", "length", "mixer")},
            "rate": f"{rate:g}" + "*" * at_edge,
            "answers %": 100 * sum(answers) / len(runs),
            "min": 100 * min(answers),
            "max": 100 * max(answers),
            "sequences %": 100 * sum(sequences) / len(runs),
            "steps": sorted(run["steps"] for run in runs)[len(runs) // 2],
            "failed": sum(run["failure"] is not None for run in runs),
            "parameters": runs[0]["parameters"],
        }


def key(settings: Settings) -> str:
    return file_of(settings).name


def tokens_of(settings: Settings) -> int:
    """The tokens that a run reads if it does not end early: what it costs."""
    return int(settings["steps"] * settings["rows"] * settings["length"])


class Jobs:
    """Runs in processes of one thread each."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[Settings, subprocess.Popen[bytes]]] = {}

    def start(self, settings: Settings) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # In a session of its own, Ctrl-C reaches this process alone, which ends the others.
        process = subprocess.Popen(
            [sys.executable, __file__, "--run", json.dumps(settings)],
            env={**os.environ, **threads}, start_new_session=True,
        )  # fmt: skip
        self.running[key(settings)] = settings, process

    def finished(self) -> Iterator[Settings]:
        """Those that have ended since.

        Raises:
            TrainingError: one ended without a result.
        """
        for name, (settings, process) in list(self.running.items()):
            if (status := process.poll()) is None:
                continue
            del self.running[name]
            if status != 0:
                raise TrainingError(f"{title(settings)} ended with status {status}")
            yield settings

    def stop(self) -> None:
        for _, process in self.running.values():
            process.kill()
            process.wait()


def examination(arms: list[Arm], jobs: int) -> Results:
    """Make all runs that there are no results of, and return all results."""
    results: Results = {}
    pool, total = Jobs(), sum(arm.runs for arm in arms)
    tokens = sum(arm.runs * tokens_of(arm.shared) for arm in arms)
    begin, made, left_out = time.perf_counter(), 0, 0

    def take(settings: Settings) -> bool:
        """Read a result, if there is one."""
        file = file_of(settings)
        if file.exists():
            results[file.name] = json.loads(file.read_text())
        return file.exists()

    try:
        while True:
            due = [settings for arm in arms for settings in arm.due(results)]
            waiting = [settings for settings in due if key(settings) not in pool.running]
            for settings in waiting:
                if take(settings):
                    left_out += tokens_of(settings)
                elif len(pool.running) < jobs:
                    pool.start(settings)
            if not due:
                return results
            for settings in pool.finished():
                take(settings)
                result = results[key(settings)]
                made += tokens_of(settings)
                spent = time.perf_counter() - begin
                rest = spent * (tokens - left_out - made) / made
                print(
                    f"[{len(results)}/{total}] {title(settings)}: {result['validation']['tokens']:.1%} after "
                    f"{result['steps']} steps, {result['seconds']:.0f} s"
                    + (f" ({result['failure']})" if result["failure"] else "")
                    + f"; {spent / 60:.0f} min gone, at most about {rest / 60:.0f} to go",
                    flush=True,
                )
            time.sleep(0.1)
    finally:
        pool.stop()


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """The arms, the short lengths first."""
    lists = {name: getattr(options, name).split(",") for name in ("tasks", "mixers", "lengths", "rates")}
    rates = sorted(set(map(float, lists["rates"])))
    task_options: Mapping[str, Settings] = {"stack": {"stacks": options.stacks}}
    arms = []
    for length in sorted(map(int, lists["lengths"])):
        for name in lists["tasks"]:
            for mixer_name in lists["mixers"]:
                shared = {
                    "task": name, "length": length, "mixer": mixer_name, "size_of": lists["mixers"][0],
                    "options": task_options.get(name, {}), "device": options.device, "runs": options.runs,
                    "verbose": options.verbose,
                    **{o: getattr(options, o) for o in ("heads", "head_dim", "depth", "steps", "rows")},
                    "examined": options.examined, "examine_every": options.examine_every,
                }  # fmt: skip
                # What cannot be is said now and not hours later.
                it = task(name)(length=length, **shared["options"])
                matched_config(shared, it.vocab_size)
                train_config({**shared, "rate": rates[0], "seed": TUNING_SEED})
                arms.append(Arm(shared, rates, options.seeds))
    return arms


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
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, of one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", default="runs/exams", help="where finished runs are kept")
    parser.add_argument("--verbose", action="store_true", help="print each validation")
    parser.add_argument("--quick", action="store_true", help="short sequences, few steps, one rate and seed")
    parser.add_argument("--run", help="used by the benchmark itself")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.rates, options.seeds, options.steps = "32", "5e-3", 1, 300
    return options


def main() -> None:
    options = parse()
    # Runs have one thread each, and so has the machine's description.
    torch.set_num_threads(1)
    if options.run:
        settings = json.loads(options.run)
        write_json(file_of(settings), run(settings))
        return
    if options.seeds < 1 or options.jobs < 1:
        raise ConfigError(f"there must be a seed and a job; got {options.seeds} and {options.jobs}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arms = arms_of(options)
    results = examination(arms, options.jobs)
    rows = [arm.row(results) for arm in arms]
    table(rows)
    if any(row["rate"].endswith("*") for row in rows):
        print("* at the edge of the grid: a rate beyond it might be better")
    if options.out:
        described = {**machine(), "jobs": options.jobs}
        # The curves stay in the files of the runs.
        runs = [{name: v for name, v in run.items() if name != "curve"} for run in results.values()]
        write_results(options.out, {"machine": described, "exams": rows, "runs": runs})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the runs that are missing")
    except IntarsiaError as error:
        sys.exit(f"exams.py: {error}")
