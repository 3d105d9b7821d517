"""Do indexers learn what attention looks at, and does a model that reads an eighth of its context still know all?

    python benchmarks/sparsify.py [--kinds dsa,pooled,qsa,msa] [--seeds 3] [--length 64] [--out FILE.json]

A teacher of one short convolution, which remembers nothing, and one layer of full or latent attention learns multi-
query recall (`mqar`). Then its indexers alone learn from its attention (the warm-up), and then all of it with
attention to `length / 8` tokens (the sparse stage), as `intarsia sparsify` does it. Reported for each seed: the
teacher's accuracy on held-out examples; that of the sparse model before the warm-up (an indexer that has learned
nothing), after it and after the sparse stage; and the share of full attention's weights that stands in what the
indexer picks, at the tokens that ask and at all that have more to see than is picked; and at the tokens that ask the
share that the best choice of as many tokens, pools or blocks would have. Shares and the differences from the teacher
have intervals of 95 % over seeds (Student's t).
"""

from __future__ import annotations

import sys
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from common import machine, options_parser, table, write_results
from intarsia.ladder.student import student_t_quantile
from intarsia.mixers import AttentionConfig, GatedConvolutionConfig, MLAConfig
from intarsia.model import FeedForwardConfig, LanguageModel, ModelConfig
from intarsia.model.loss import IGNORED
from intarsia.model.sparsified import reading_everything, sparsified
from intarsia.ops import Sequences, picked_share
from intarsia.tasks import examine, make_task
from intarsia.training import TrainConfig
from intarsia.training.beginning import fill_from
from intarsia.training.task_loop import train_on_task

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dsa": ("dsa", {"index_heads": 4}),
    "pooled": ("dsa", {"index_heads": 4, "index_pool": 4}),
    "qsa": ("qsa", {}),
    "msa": ("msa", {"index_block_size": 2}),
}


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--kinds", default="dsa,pooled,qsa,msa")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--warm-up-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--examples", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = make_task("mqar", {"length": options.length, "pairs": options.pairs})
    rows: list[dict[str, Any]] = []
    teachers: dict[tuple[str, int], tuple[LanguageModel, float, int]] = {}
    for name in options.kinds.split(","):
        kind, own = KINDS[name]
        dense = "mla" if kind == "dsa" else "attention"
        for seed in range(options.seeds):
            if (dense, seed) not in teachers:
                teachers[dense, seed] = _teacher(dense, task, seed, options)
            row = _one(kind, own, *teachers[dense, seed], task, seed, options)
            rows.append({"seed": seed, "kind": name, **row})
            shown = {key: round(x, 4) if isinstance(x, float) else x for key, x in rows[-1].items()}
            print(shown, flush=True)
            if options.out:
                command = f"python benchmarks/sparsify.py {' '.join(sys.argv[1:])}"
                results = {"command": command, "machine": machine(), "options": vars(options)}
                write_results(options.out, {**results, "runs": rows, "summary": _summaries(rows)})
    table(_summaries(rows))


def _summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return [_summary(name, [row for row in rows if row["kind"] == name]) for name in kinds]


def _config(dense: str, vocabulary: int) -> ModelConfig:
    mixers = {
        "conv": GatedConvolutionConfig(),
        "mla": MLAConfig(num_heads=2, kv_rank=48, nope_dim=32, rope_dim=0, v_dim=32),
        "attention": AttentionConfig(num_heads=4, head_dim=32, num_kv_heads=2, rope=0.0, qk_norm="head"),
    }
    return ModelConfig(
        vocab_size=vocabulary, d_model=64, depth=2, layout=f"conv {dense}",
        mixers={"conv": mixers["conv"], dense: mixers[dense]}, feed_forward=FeedForwardConfig(128),
    )  # fmt: skip


def _training(length: int, seed: int, **changes: Any) -> TrainConfig:
    base = TrainConfig(steps=1, rows=16, length=length, seed=seed, data_seed=seed, weight_decay=0.1)
    return base.replace(**{"warmup_steps": changes["steps"] // 20, **changes})


def _teacher(dense: str, task: Any, seed: int, options: Any) -> tuple[LanguageModel, float, int]:
    config = _training(options.length, seed, steps=options.teacher_steps, lr=4e-3)
    found = train_on_task(
        _config(dense, task.vocab_size), config, task, examine_every=100, until_perfect=False, device="cpu"
    )
    return found.model, _accuracy(found.model, task, seed, options), found.steps


def _one(
    kind: str, own: dict[str, Any], teacher: LanguageModel, accuracy: float, steps: int, task: Any, seed: int,
    options: Any,
) -> dict[str, Any]:  # fmt: skip
    began = time.perf_counter()
    sparse = sparsified(teacher.config, kind, options.length // 8, own)
    drawn = LanguageModel(sparse)
    drawn.init_weights(seed)
    fill_from(drawn, teacher.state_dict(), "the teacher")
    warming = train_on_task(
        reading_everything(sparse, True),
        _training(options.length, seed, steps=options.warm_up_steps, lr=5e-3, trains="indexers"),
        task, beginning=teacher, until_perfect=False, examine_every=10**9, device="cpu",
    )  # fmt: skip
    warmed = LanguageModel(sparse)
    warmed.load_state_dict(warming.model.state_dict())
    trained = train_on_task(
        sparse, _training(options.length, seed + 1000, steps=options.steps, lr=4e-4), task, beginning=warmed,
        until_perfect=False, examine_every=10**9, device="cpu",
    )  # fmt: skip
    asking, everywhere, best = _shares(warmed, task, seed, options)
    return {
        "teacher": accuracy,
        "teacher_steps": steps,
        "drawn": _accuracy(drawn, task, seed, options),
        "warmed_up": _accuracy(warmed, task, seed, options),
        "sparse": _accuracy(trained.model, task, seed, options),
        "share_before": _shares(drawn, task, seed, options)[0],
        "share_asking": asking,
        "share_best": best,
        "share_everywhere": everywhere,
        "share_asking_in_the_end": _shares(trained.model, task, seed, options)[0],
        "seconds": time.perf_counter() - began,
    }


def _accuracy(model: LanguageModel, task: Any, seed: int, options: Any) -> float:
    answers = examine(model, task, seed=seed, examples=options.examples, split="test", rows=16)
    return float(answers.score.token_accuracy)


@torch.no_grad()
def _shares(model: LanguageModel, task: Any, seed: int, options: Any) -> tuple[float, float, float]:
    """The share of full attention that was picked, at the tokens that ask and at all that have a choice; and the
    largest that could have been, at those that ask."""
    inputs, targets = task.examples(seed, 64, "test")
    seqs = Sequences((options.length,) * len(inputs))
    asked: list[tuple[Any, Any]] = []

    def watched(*given: Any, **how: Any) -> Any:
        asked.append((given, how))
        return picked_share(*given, **how)

    with (
        patch("intarsia.mixers.dsa.picked_share", watched),
        patch("intarsia.mixers.indexed.picked_share", watched),
    ):
        side = model.eval()(inputs.view(1, -1), seqs=seqs, side=("picked",)).side
    (picked,) = [told.picked for told in side if told.picked is not None]
    asks = (targets.view(1, -1) != IGNORED) & picked.isfinite()
    best = _best(
        *asked[0], options.length, forced=any(mixer.type == "msa" for mixer in model.config.mixers.values())
    )
    return float(picked[asks].mean()), float(picked.nanmean()), float(best[asks].mean())


def _best(given: Any, how: dict[str, Any], length: int, forced: bool) -> torch.Tensor:
    """`[1, T]`: the share of the best choice of as many blocks as were picked, the own one among them where it is
    `forced` or has no last token yet."""
    q, k, picked = given
    block, groups = how["block"], picked.shape[2]
    place = torch.arange(picked.shape[1]) % length
    own = (place // block)[:, None]
    must = (torch.ones_like(place, dtype=torch.bool) if forced else (place + 1) % block != 0)[:, None]
    found = torch.zeros(picked.shape[1])
    for group in range(groups):
        one, shares = torch.full_like(picked[..., :1], -1), []
        for number in range(-(-length // block)):
            one[:, :, group] = number
            shares.append(picked_share(q, k, one, **how)[0][0])
        of_blocks = torch.stack(shares, dim=-1)
        free = of_blocks.scatter(1, own, of_blocks.gather(1, own).masked_fill(must, 0.0))
        count = (picked[0, :, group] >= 0).sum(-1, keepdim=True) - must.int()
        ranked = free.sort(dim=-1, descending=True).values
        found += (ranked * (torch.arange(ranked.shape[1]) < count)).sum(-1)
        found += (of_blocks.gather(1, own) * must)[:, 0]
    return found[None]


def _summary(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind}
    for name in ("teacher", "drawn", "warmed_up", "sparse", "share_before"):
        found[name] = f"{100 * np.mean([row[name] for row in rows]):.2f}"
    for name in ("share_asking", "share_best", "share_everywhere"):
        found[name] = _interval([row[name] for row in rows], "")
    for name in ("warmed_up", "sparse"):
        found[f"{name} - teacher"] = _interval([row[name] - row["teacher"] for row in rows], "+")
    return found


def _interval(values: list[float], sign: str) -> str:
    """The mean of seeds in percent, and the half of its interval where there are some."""
    mean = f"{100 * np.mean(values):{sign}.2f}"
    if len(values) < 2:
        return mean
    quantile = student_t_quantile(np.array([0.975]), len(values) - 1)[0]
    return f"{mean} ± {100 * quantile * np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
