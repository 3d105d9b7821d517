"""Decoding with models of transformers: as they are, with kernels, and made ready for inference, in one run.

    python benchmarks/transformers_decoding.py [--families qwen3,qwen3_next] [--contexts 1024,8192] [--out FILE.json]

    plain       transformers alone
    kernels     `accelerate_transformers()`
    bfloat16    that, and `prepare_for_inference(model)`: products of few rows, attention, caches with room
    int8, int4  the same with weights of integers

One sequence, bfloat16, random weights of width 1024: what is measured is tokens per second behind a context, by calling
the model with its own cache. All take turns, and medians are compared. The caches of the softmax layers are filled with
random keys and values, since a prompt of some thousand tokens takes transformers longer than all that is measured.
Before anything is timed the logits of plain and of bfloat16 are compared with those in float32.
"""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from common import in_turn, machine, median, options_parser, stopwatch, table, write_results
from intarsia.integrations import accelerate_transformers, prepare_for_inference
from intarsia.integrations.transformers_cache import with_room
from intarsia.ops.packed_weights import WeightFormat

Row = dict[str, Any]
WIDTH, LAYERS, VOCABULARY = 1024, 8, 32000
STEPS = 4
"""Tokens that one turn decodes."""
PROMPT = 64
WRONG = 4
"""How many times as far from the exact logits as transformers' own ours may be; beyond, the times mean nothing."""

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 3 * WIDTH, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 1 << 17,
}  # fmt: skip
HYBRID = {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (LAYERS // 4)}
MODELS: dict[str, tuple[str, str, Row]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "qwen3_next": (
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {**HYBRID, "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 64,
         "linear_value_head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
         "shared_expert_intermediate_size": 512},
    ),
    "kimi_linear": (
        "KimiLinearConfig", "KimiLinearForCausalLM",
        {**HYBRID, "num_key_value_heads": 16, "linear_num_heads": 8, "linear_head_dim": 128, "kv_lora_rank": 512,
         "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "mlp_layer_types": ["dense"] * LAYERS},
    ),
}  # fmt: skip
FORMATS: dict[str, WeightFormat | None] = {"bfloat16": None, "int8": "int8", "int4": "int4"}
WAYS = ("plain", "kernels", *FORMATS)


def build(family: str) -> Any:
    """A model with random weights, as transformers draws them."""
    config, model, options = MODELS[family]
    package = f"transformers.models.{family}"
    configurations = importlib.import_module(f"{package}.configuration_{family}")
    models = importlib.import_module(f"{package}.modeling_{family}")
    torch.manual_seed(0)
    made = getattr(models, model)(getattr(configurations, config)(**{**SHAPE, **options}))
    for name, parameter in made.named_parameters():
        if "gate.weight" in name and parameter.shape[0] == options.get("num_experts"):
            nn.init.normal_(parameter, std=1.0)  # experts that are nearly alike would be chosen by roundings
    return made.to(torch.bfloat16).eval()


def scope(way: str) -> Any:
    return nullcontext() if way == "plain" else accelerate_transformers()


@torch.inference_mode()
def filled(model: nn.Module, context: int) -> Any:
    """A cache behind `context` tokens."""
    cache = model(torch.arange(PROMPT)[None], use_cache=True).past_key_values
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and layer.keys.dim() == 4:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                more = torch.randn(*held.shape[:2], context - PROMPT, held.shape[3], generator=generator)
                setattr(layer, name, torch.cat([held, more.to(held.dtype)], dim=2))
    return cache


@torch.inference_mode()
def decode(model: nn.Module, cache: Any) -> Tensor:
    for t in range(STEPS):
        logits: Tensor = model(torch.tensor([[t]]), past_key_values=cache, use_cache=True).logits
    return logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def measure(family: str, contexts: list[int], seconds: float) -> list[Row]:
    """The tokens per second of each way, behind each context."""
    models = {way: build(family) for way in WAYS}
    exact = decode(wide := copy.deepcopy(models["plain"]).float(), filled(wide, PROMPT))
    del wide
    prepared = {}
    for way in FORMATS:
        prepared[way] = prepare_for_inference(models[way], FORMATS[way])
        prepared[way]._replaced.clear()  # the weights as they were go
    gc.collect()
    errors = {}
    for way in WAYS:
        with scope(way):
            errors[way] = relative(decode(models[way], filled(models[way], PROMPT)), exact)
    if not errors["bfloat16"] <= WRONG * errors["plain"]:
        raise RuntimeError(
            f"{family}: logits are {errors['bfloat16']:.2g} off, those of transformers {errors['plain']:.2g}"
        )
    rows = []
    for context in contexts:
        caches = {way: filled(models["int8"], context) for way in WAYS}
        for way in FORMATS:
            with_room(caches[way])  # as `generate` of a prepared model makes them
        timers: dict[str, Callable[[], float]] = {
            way: scoped(way, stopwatch(decode, models[way], caches[way])) for way in WAYS
        }
        for timer in timers.values():  # whatever a first call does
            timer()
        times = in_turn(timers, seconds)
        plain = median(times["plain"])
        for way in WAYS:
            weights = (
                prepared[way].weight_bytes
                if way in prepared
                else sum(p.nbytes for p in models[way].parameters())
            )
            rows.append({
                "family": family, "context": context, "way": way, "tokens_per_s": STEPS / median(times[way]),
                "ratio": plain / median(times[way]), "weights_mb": weights / 1e6, "error": errors[way],
                "runs": len(times[way]),
            })  # fmt: skip
    return rows


def scoped(way: str, timer: Callable[[], float]) -> Callable[[], float]:
    """The timer, between accelerating and undoing it, which are not timed."""

    def run() -> float:
        with scope(way):
            return timer()

    return run


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--families", default="qwen3,qwen3_next", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--contexts", default="1024,8192")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="for each family and context, three rounds at least"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for family in options.families.split(","):
        new = measure(family, [int(n) for n in options.contexts.split(",")], options.seconds)
        table(new, header=not rows)
        rows += new
    if options.out:
        import transformers

        write_results(
            options.out, {"machine": machine(), "transformers": transformers.__version__, "rows": rows}
        )


if __name__ == "__main__":
    main()
