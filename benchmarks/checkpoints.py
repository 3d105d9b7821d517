"""Loading and decoding a published checkpoint: here and in transformers, from the same files, in one run.

    python benchmarks/checkpoints.py [--size small] [--context 256] [--out FILE.json]

A checkpoint of Qwen3.5's layout with random weights is made on the spot, in a temporary folder. Each way opens it in a
process of its own that reports

    load        seconds until the model can be called, with the files in the page cache, and seconds per GB of them
    answer      seconds from the same beginning until the logits of a prompt of `--context` tokens are there
    beside      the peak of memory over the weights that stay, and that per GB of files
    decode      tokens per second behind a context, of one sequence, through its own cache; the processes take turns

transformers maps the files and reads a tensor when it is first used, so its loading is not reading: nothing
stays beside the weights, and the first call pays. Less than nothing is written as zero. Before decoding is
timed the logits of a prompt are compared with those of transformers in float32: ours in bfloat16 may be at
most `WRONG` times as far from them as its own. The errors of int8 and int4 are written down and not judged:
random weights blow up what is rounded.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import in_turn, machine, median, options_parser, peak_memory, table, write_results
from intarsia.checkpoints.opening import load, save
from intarsia.mixers import AttentionConfig, GatedDeltaNetConfig
from intarsia.model import FeedForwardConfig, InferenceModel, LanguageModel, ModelConfig
from intarsia.ops.packed_weights import WeightFormat

Row = dict[str, Any]
WRONG = 4
OPENED = 3
"""Times that a model is opened."""
STEPS = 8
"""Tokens that one turn decodes."""
ROOM = 65536
"""Tokens behind the context for which there are pages."""
WAYS = ("transformers", "bfloat16", "int8", "int4")
SIZES = {"tiny": (256, 4, 1000), "small": (1024, 12, 64_000), "medium": (1024, 24, 150_000)}
"""Width, layers and words."""


def configuration(size: str) -> ModelConfig:
    """A model of Qwen3.5's layers."""
    width, depth, words = SIZES[size]
    heads = width // 64
    return ModelConfig(
        vocab_size=words,
        d_model=width,
        depth=depth,
        layout="gdn*3 attention",
        mixers={
            "gdn": GatedDeltaNetConfig(heads // 2, 128, num_v_heads=heads // 2),
            "attention": AttentionConfig(
                heads // 2, 128, 2, rope=0.25, qk_norm="head", zero_centered_qk_norm=True, output_gate=True
            ),
        },
        feed_forward=FeedForwardConfig(3 * width),
        norm_eps=1e-6,
        zero_centered_norms=True,
    )


def write(folder: Path, size: str) -> None:
    """The checkpoint, in bfloat16."""
    model = LanguageModel(configuration(size))
    model.init_weights(0)
    save(model.bfloat16(), folder, "qwen3_5")


@dataclass
class Opened:
    """A model that has been opened: how, its logits of a prompt, and what decodes some tokens."""

    facts: Row
    logits: torch.Tensor
    decode: Callable[[], None]


def opened_in(call: Callable[[], Any], weights: Callable[[Any], int]) -> tuple[Any, Row]:
    """What `call` opens, and the seconds and the bytes that it took."""
    made: list[Any] = []
    begun = time.perf_counter()
    peak = peak_memory(lambda: made.append(call()))
    seconds, kept = time.perf_counter() - begun, weights(made[0])
    return made[0], {"load_s": seconds, "weights": kept, "beside": max(0.0, peak * 2**20 - kept)}


def open_there(folder: Path, prompt: torch.Tensor) -> Opened:
    """With transformers, in bfloat16."""
    from transformers import AutoModelForCausalLM

    model, facts = opened_in(
        lambda: AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16).eval(),
        lambda model: sum(p.nbytes for p in model.parameters()),
    )
    begun = time.perf_counter()
    with torch.inference_mode():
        out = model(prompt, use_cache=True)
    facts["answer_s"] = facts["load_s"] + time.perf_counter() - begun
    cache = out.past_key_values

    @torch.inference_mode()
    def decode() -> None:
        for token in range(STEPS):
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    return Opened(facts, out.logits[0, -1].float(), decode)


def open_here(folder: Path, prompt: torch.Tensor, way: WeightFormat) -> Opened:
    """With this package, packed or, for bfloat16, as it is."""

    def call() -> InferenceModel:
        return InferenceModel(load(folder)) if way == "bfloat16" else load(folder, weights=way)

    model, facts = opened_in(call, lambda model: model.weight_bytes)
    begun = time.perf_counter()
    pool = model.new_pool(1, prompt.numel() + ROOM)
    pool.take()
    out = model(prompt, pool.view([0]))
    facts["answer_s"] = facts["load_s"] + time.perf_counter() - begun
    states = [out.states]

    def decode() -> None:
        for token in range(STEPS):
            states[0] = model(torch.tensor([[token]]), states[0]).states

    return Opened(facts, out.logits[0, -1].float(), decode)


def work(folder: Path, way: Any, context: int, threads: int) -> None:
    """What a process does: open, say what it took, then decode whenever it is told to."""
    torch.set_num_threads(threads)
    prompt = torch.randint(0, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    open_in = open_there if way == "transformers" else partial(open_here, way=way)
    open_in(folder.parent / "first", prompt)  # what is imported when it is first used is not loading
    facts = open_in(folder, prompt).facts  # memory is that of the first time; seconds are the median
    seconds = [facts]
    for _ in range(OPENED - 1):
        opened = None
        gc.collect()
        opened = open_in(folder, prompt)
        seconds.append(opened.facts)
    assert opened is not None
    opened.facts = facts | {name: median([each[name] for each in seconds]) for name in ("load_s", "answer_s")}
    torch.save(opened.logits, folder.parent / f"{way}.pt")
    print(json.dumps(opened.facts), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        opened.decode()
        print(time.perf_counter() - begin, flush=True)


def exact(folder: Path, context: int) -> torch.Tensor:
    """The prompt's logits, of transformers in float32."""
    from transformers import AutoModelForCausalLM

    prompt = torch.randint(0, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(prompt).logits[0, -1]
    return logits


def measure(folder: Path, size: int, context: int, seconds: float, threads: int) -> list[Row]:
    """A row for each way."""
    truth = exact(folder, context)
    command = [
        sys.executable,
        __file__,
        "--work",
        str(folder),
        "--context",
        str(context),
        "--threads",
        str(threads),
    ]
    processes: dict[str, subprocess.Popen[str]] = {}
    told: dict[str, Row] = {}
    try:
        for way in WAYS:  # one after the other: loading is measured alone
            processes[way] = subprocess.Popen(
                [*command, "--way", way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            told[way] = json.loads(_line(processes[way]))
        logits = {way: torch.load(folder.parent / f"{way}.pt") for way in WAYS}
        errors = {way: float((x - truth).norm() / truth.norm()) for way, x in logits.items()}
        if not errors["bfloat16"] <= WRONG * errors["transformers"]:
            raise RuntimeError(f"logits are off: {errors}")
        timers = {way: partial(_turn, process) for way, process in processes.items()}
        for timer in timers.values():  # whatever a first call does
            timer()
        times = in_turn(timers, seconds)
    finally:
        for process in processes.values():
            process.communicate()
    rows = []
    for way, facts in told.items():
        rows.append({
            "way": way, "load_s": facts["load_s"], "load_s_per_gb": facts["load_s"] / size * 1e9,
            "answer_s": facts["answer_s"],
            "weights_gb": facts["weights"] / 1e9, "beside_gb": facts["beside"] / 1e9,
            "beside_per_gb": facts["beside"] / size, "tokens_per_s": STEPS / median(times[way]),
            "ratio": median(times["transformers"]) / median(times[way]), "error": errors[way], "runs": len(times[way]),
        })  # fmt: skip
    return rows


def _turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("run\n")
    process.stdin.flush()
    return float(_line(process))


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0, help="of decoding, three rounds at least")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is made and left")
    parser.add_argument("--work", type=Path, help="used by the script itself")
    parser.add_argument("--way", choices=WAYS, help="used by the script itself")
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.way, options.context, options.threads)
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / "model"
        for place, size in ((folder, options.size), (folder.parent / "first", "tiny")):
            if not place.exists():
                write(place, size)
        held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{held / 1e9:.2f} GB of files")
        rows = measure(folder, held, options.context, options.seconds, options.threads)
    table(rows)
    if options.out:
        import transformers

        results = {"machine": machine(), "transformers": transformers.__version__, "file_gb": held / 1e9}
        write_results(options.out, {**results, "context": options.context, "rows": rows})


if __name__ == "__main__":
    main()
