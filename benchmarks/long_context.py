"""A long text through a small hybrid: time and memory of reading it in pieces, and of a token behind it.

    python benchmarks/long_context.py [--tokens 1048576] [--piece 2048] [--out FILE.json]

Linear layers remember in a fixed size, so a token costs them the same wherever it stands; softmax layers look at all
that came before. Both are timed apart, as the layers of the model behind a text of so many tokens, and the whole token.
Progress goes to stderr. The memory is that of the process, beside the peak that its weights and states explain.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any, cast

import torch

from common import machine, median, options_parser, table, write_results
from intarsia.mixers import AttentionConfig, KDAConfig
from intarsia.model import FeedForwardConfig, InferenceModel, LanguageModel, ModelConfig, ModelStates
from intarsia.model.block import Block

VOCABULARY = 256
DECODED, WARM = 20, 3
"""Tokens that are decoded at a place, after some to warm up."""


def small_hybrid(width: int, heads: int, key_heads: int, head_dim: int) -> ModelConfig:
    """Three layers of KDA to one of attention."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        layout="kda kda kda attention",
        mixers={
            "kda": KDAConfig(num_heads=2, head_dim=64),
            "attention": AttentionConfig(heads, head_dim, key_heads, rope=0.0),
        },
        depth=4,
        feed_forward=FeedForwardConfig(d_hidden=2 * width),
    )


def resident_peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def per_token(
    model: InferenceModel, layers: list[Any], states: ModelStates, count: int
) -> tuple[dict[str, float], ModelStates]:
    """Milliseconds of a token behind `states`, whole and of all layers of a kind; and the states after the tokens."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    x = torch.randn(1, 1, model.config.d_model).to(model.model.embed.weight.dtype)
    times: dict[str, list[float]] = {}

    def note(name: str, begin: float) -> None:
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))

    with torch.inference_mode():
        for _ in range(count):
            begin = time.perf_counter()
            after = model(token, states).states
            note("token", begin)
            assert after is not None
            states = after
        for _ in range(count):
            following = []
            spent = dict.fromkeys(model.config.layers, 0.0)
            for name, layer, state in zip(model.config.layers, layers, states.layers, strict=True):
                begin = time.perf_counter()
                following.append(layer(x, state, None)[1])
                spent[name] += 1e3 * (time.perf_counter() - begin)
            for name, each in spent.items():
                times.setdefault(name, []).append(each)
            states = ModelStates(tuple(following))
    return {f"{name}_ms": median(each[WARM:]) for name, each in times.items()}, states


def run(options: Any) -> None:
    """Read the text, and measure at each place; results are written as they come."""
    config = small_hybrid(options.width, options.heads, options.key_heads, options.head_dim)
    language_model = LanguageModel(config)
    language_model.init_weights(0)
    model = InferenceModel(language_model.to(torch.bfloat16))
    layers: list[Any] = [cast(Block, block).mixer.for_inference() for block in model.model.blocks]
    generator = torch.Generator().manual_seed(0)
    about = {
        "machine": machine(),
        "layout": config.layout,
        "width": config.d_model,
        "heads": options.heads,
        "key_heads": options.key_heads,
        "head_dim": options.head_dim,
        "dtype": "bfloat16",
        "piece": options.piece,
        "weights_MiB": model.weight_bytes / 2**20,
    }
    places = [n for n in (4096, 16384, 65536, 262144, 1048576) if n < options.tokens] + [options.tokens]
    room = options.tokens + 2 * (DECODED + WARM) * len(places)
    # Once each way before memory is looked at: what is loaded and made at first stays.
    warm = model(torch.zeros(1, options.piece, dtype=torch.int64), model.init_states(1)).states
    assert warm is not None
    per_token(model, layers, warm, WARM + 1)
    before = resident_peak()
    pool = model.new_pool(1, room)
    states, read, seconds = pool.view([pool.take()]), 0, 0.0
    rows: list[dict[str, Any]] = []
    for place in places:
        while read < place:
            size = min(options.piece, place - read)
            tokens = torch.randint(0, VOCABULARY, (1, size), generator=generator)
            begin = time.perf_counter()
            after = model(tokens, states).states
            seconds += time.perf_counter() - begin
            assert after is not None
            states, read = after, read + size
            speed = size / (time.perf_counter() - begin)
            print(f"\r{read:,} of {options.tokens:,} tokens, {speed:,.0f} tokens/s", end="", file=sys.stderr)
        found, states = per_token(model, layers, states, DECODED + WARM)
        held = states.nbytes()
        row = {
            "tokens": place,
            "read_s": seconds,
            "last_tokens/s": speed,
            **found,
            "states_MiB": held / 2**20,
            "peak_over_states_MiB": (resident_peak() - before - held) / 2**20,
        }
        print("\r\x1b[K", end="", file=sys.stderr)
        table([row], header=not rows)
        rows.append(row)
        if options.out:
            write_results(options.out, {**about, "results": rows})


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--piece", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--key-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=32)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
