"""How fast are forward and backward of a 180 M hybrid, beside transformers' model of the same dimensions?

    python benchmarks/training_peers.py [--rounds 3] [--peer-rounds 1] [--length 1024] [--out FILE.json]

The model of `inference.py`: width 1024, six layers of KDA and two of MLA, a vocabulary of 32768, 180 M float32 weights,
drawn at random, since the time does not depend on them. One sequence of tokens, bfloat16 autocast, the sum of the
losses, gradients in float32; no optimizer, which would be the same for all.

    transformers                  as it is
    transformers, memory kept     and glibc told not to give memory back, which its chunks ask for all the time
    transformers, our kernels     in `accelerate_transformers()`
    ours, autocast                `LanguageModel` under autocast
    ours                          what a step of `intarsia train` does: weights cast once a step (`Narrowed`), and
                                  freed memory kept

Each is a process of its own, so that peaks of memory are its own; ours and the kernels take turns, `--rounds` times.
A turn is two steps, of which the second counts: training goes from step to step, and memory that lay idle is slow.
The first two take so long that they have one round unless `--peer-rounds` says otherwise. Of each the median is given,
and of transformers' the fastest: `ratio` is our tokens a second by those of transformers as it is.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from common import Worker, machine, median, options_parser, stopwatch, table, write_results
from inference import example
from intarsia.integrations import accelerate_transformers
from intarsia.jobs.freed_memory import keep_freed_memory
from intarsia.layers.narrow import Narrowed

TRANSFORMERS, OURS = "transformers", "ours"
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
FORMS: dict[str, dict[str, str]] = {
    TRANSFORMERS: {},
    f"{TRANSFORMERS}, memory kept": KEEP_MEMORY,
    f"{TRANSFORMERS}, our kernels": {},
    f"{OURS}, autocast": {},
    OURS: {},
}
SLOW = tuple(FORMS)[:2]
PARAMETERS = 179_585_840
Task = dict[str, Any]


def transformers_step(tokens: Tensor, accelerated: bool) -> Callable[[], float]:
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(
        vocab_size=32768, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, linear_head_dim=128, linear_num_heads=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        layer_types=["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(8)],
        mlp_layer_types=["dense"] * 8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config)
    check_size(model)

    def step() -> float:
        model.zero_grad()
        with accelerate_transformers() if accelerated else nullcontext():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        return float(loss.detach())

    return step


def our_step(tokens: Tensor, cast_once: bool) -> Callable[[], float]:
    model = example().float()
    check_size(model)
    narrowed = Narrowed(torch.bfloat16)
    trained = narrowed.of(model) if cast_once else model

    def step() -> float:
        model.zero_grad()
        if cast_once:
            narrowed.refresh()
        with torch.autocast("cpu", torch.bfloat16):
            nll = trained(tokens[:, :-1], targets=tokens[:, 1:]).nll
        assert nll is not None
        (nll.sum() / nll.numel()).backward()
        return float(nll.detach().mean())

    return step


def check_size(model: torch.nn.Module) -> None:
    size = sum(p.numel() for p in model.parameters())
    if abs(size / PARAMETERS - 1) > 1e-3:
        raise RuntimeError(f"{type(model).__name__} has {size} parameters, not {PARAMETERS}")


def serve(task: Task) -> None:
    """Be one of them: print `ready`, and answer each line with the seconds of a step."""
    torch.set_num_threads(task["threads"])
    generator = torch.Generator().manual_seed(0)
    form, length = task["form"], task["length"]
    if form == OURS:
        keep_freed_memory()
    tokens = torch.randint(3, 32768, (1, length + 1), generator=generator)
    if form.startswith(TRANSFORMERS):
        step = transformers_step(tokens[:, :-1], accelerated="our kernels" in form)
    else:
        step = our_step(tokens, cast_once=form == OURS)
    print("ready", flush=True)
    losses: list[float] = []
    timer = stopwatch(lambda: losses.append(step()))
    for _ in sys.stdin:
        print(timer(), flush=True)
        if abs(losses[-1] - math.log(32768)) > 1:
            raise RuntimeError(f"{form} has a loss of {losses[-1]}: the times mean nothing")


def measure(task: Task, rounds: int, peer_rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}

    def started(form: str, stack: ExitStack) -> Worker:
        command = [sys.executable, __file__, "--serve", json.dumps({**task, "form": form})]
        return stack.enter_context(Worker(command, FORMS[form]))

    for form in SLOW if peer_rounds else ():
        with ExitStack() as stack:
            worker = started(form, stack)
            times[form] = [worker.seconds() for _ in range(peer_rounds)]
            memory[form] = worker.peak_memory()
    with ExitStack() as stack:
        workers = {form: started(form, stack) for form in FORMS if form not in SLOW}
        for _ in range(rounds):
            for form, worker in workers.items():
                worker.seconds()
                times.setdefault(form, []).append(worker.seconds())
        memory |= {form: worker.peak_memory() for form, worker in workers.items()}
    taken = {form: min(each) if form in SLOW else median(each) for form, each in times.items()}
    peer = taken.get(TRANSFORMERS, math.nan)
    return [
        {
            "step": form,
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": task["length"] / seconds,
            "ratio": peer / seconds,
            "peak_gib": memory[form] / 1024,
            "steps": len(times[form]),
        }
        for form, seconds in taken.items()
    ]


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--serve", help="used by the benchmark itself")
    options = parser.parse_args()
    if options.serve:
        serve(json.loads(options.serve))
        return
    torch.set_num_threads(options.threads)
    rows = measure(
        {"threads": options.threads, "length": options.length}, options.rounds, options.peer_rounds
    )
    table(rows)
    if options.out:
        import transformers

        results = {"machine": machine(), "transformers": transformers.__version__, "length": options.length}
        write_results(options.out, {**results, "training": rows})


if __name__ == "__main__":
    main()
