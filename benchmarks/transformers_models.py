"""Linear-attention models of transformers with and without `accelerate_transformers()`, in one run.

    python benchmarks/transformers_models.py [--families kimi_linear,qwen3_5] [--length 1024] [--out FILE.json]

    prefill     the logits of one sequence
    training    forward, loss and backward of one sequence
    decode      one token after another behind that sequence, each

The models have random weights: 4 layers of width 512, three of them linear with 4 heads of 128, one of softmax
attention, dense feed-forward layers. Original and accelerated take turns and medians are compared. Before anything is
timed the logits are: `difference` is that between the two, relative and root mean square, and `rounding` what the
dtype itself does to the original's.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from common import in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.integrations import accelerate_transformers

Row = dict[str, Any]
LAYERS, WIDTH, HEADS, DIM, VOCABULARY = 4, 512, 4, 128, 4096
STEPS = 8
"""Tokens that one turn decodes."""
WRONG = 4
"""How many times the dtype's own rounding the difference may be; beyond, the times mean nothing."""

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "layer_types": ["linear_attention"] * (LAYERS - 1) + ["full_attention"],
}  # fmt: skip
GATED_DELTANET = {
    "head_dim": DIM, "linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS,
    "linear_key_head_dim": DIM, "linear_value_head_dim": DIM,
}  # fmt: skip
KDA = {
    "linear_num_heads": HEADS, "linear_head_dim": DIM, "kv_lora_rank": 256, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "mlp_layer_types": ["dense"] * LAYERS,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, Row]] = {
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", KDA),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", GATED_DELTANET),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", GATED_DELTANET),
}


def build(family: str, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, as transformers draws them."""
    config, model, options = MODELS[family]
    package = f"transformers.models.{family}"
    configurations = importlib.import_module(f"{package}.configuration_{family}")
    models = importlib.import_module(f"{package}.modeling_{family}")
    torch.manual_seed(0)
    made: nn.Module = getattr(models, model)(getattr(configurations, config)(**SHAPE, **options))
    return made.to(dtype)


def train(model: nn.Module, tokens: Tensor) -> None:
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()


@torch.inference_mode()
def prefill(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@torch.inference_mode()
def decode(model: nn.Module, tokens: Tensor, cache: Any) -> None:
    for t in range(STEPS):
        model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def accelerated(call: Callable[..., Any], *arguments: Any, really: bool = True) -> Callable[[], Any]:
    """`call(*arguments)`, between accelerating and undoing it."""

    def run() -> Any:
        with accelerate_transformers() if really else nullcontext():
            return call(*arguments)

    return run


def measure(family: str, dtype: torch.dtype, length: int, seconds: float) -> list[Row]:
    model = build(family, dtype)
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    original = prefill(model, tokens)
    exact = prefill(
        copy.deepcopy(model).to(torch.float64 if dtype == torch.float32 else torch.float32), tokens
    )
    difference = relative(accelerated(prefill, model, tokens)(), original)
    rounding = relative(original, exact)
    if not difference <= WRONG * rounding:
        raise RuntimeError(
            f"{family}, {dtype}: logits differ by {difference:.2g}, rounding makes {rounding:.2g}"
        )
    with torch.inference_mode():
        caches = [model(tokens, use_cache=True).past_key_values for _ in range(2)]
    calls: dict[str, list[Callable[[], Any]]] = {
        # Stopwatches, so that replacing the functions is not counted.
        "prefill": [stopwatch(prefill, model, tokens)] * 2,
        "training": [stopwatch(train, model, tokens)] * 2,
        "decode": [stopwatch(decode, model, tokens, cache) for cache in caches],
    }
    rows = []
    for what, (one, other) in calls.items():
        timers = {"original": accelerated(one, really=False), "accelerated": accelerated(other)}
        for timer in timers.values():  # whatever a first call does
            timer()
        times = in_turn(timers, seconds)
        count = STEPS if what == "decode" else 1
        before, after = (median(times[name]) / count * 1e3 for name in timers)
        rows.append({
            "family": family, "dtype": str(dtype).removeprefix("torch."), "what": what, "original_ms": before,
            "accelerated_ms": after, "ratio": before / after, "runs": len(times["original"]),
            "difference": difference, "rounding": rounding,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--families", default="kimi_linear,qwen3_5", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line, at least three rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for family in options.families.split(","):
        for dtype in options.dtypes.split(","):
            new = measure(family, getattr(torch, dtype), options.length, options.seconds)
            table(new, header=not rows)
            rows += new
    if options.out:
        import transformers

        write_results(
            options.out,
            {
                "machine": machine(),
                "transformers": transformers.__version__,
                "length": options.length,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
