"""Does a model with experts decode at the speed of its active bytes?

    python benchmarks/experts.py [--weights bfloat16,int8,int4] [--threads 2] [--tokens 64] [--out FILE.json]

Models with experts and dense ones of the same width and depth, whose feed-forwards are as wide as what is active of
the experts, take turns: a token of each after the other, behind a context of 256 tokens. Of the experts only those are
read that a token chooses, so that both should take the same time for each byte that they read; weights are drawn at
random, and so are tokens, so that the choices differ. "active MB" is what a token reads of weights.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from common import machine, median, options_parser, table, write_results
from intarsia.mixers import KDAConfig, MLAConfig
from intarsia.model import InferenceModel, LanguageModel, ModelConfig, presets
from intarsia.model.config import ExpertsConfig, FeedForwardConfig
from intarsia.model.experts import PackedExperts

CONTEXT = 256


def larger() -> ModelConfig:
    """Width 1024, 64 experts of which four and a shared one are active."""
    return ModelConfig(
        vocab_size=32768,
        d_model=1024,
        depth=8,
        layout="kda kda kda mla",
        mixers={
            "kda": KDAConfig(num_heads=8, head_dim=128),
            "mla": MLAConfig(num_heads=8, nope_dim=128, rope_dim=64, v_dim=128, kv_rank=512),
        },
        feed_forward=FeedForwardConfig(2560),
        experts=ExpertsConfig(num_experts=64, d_hidden=512, num_active=4, num_shared=1),
        tie_embeddings=False,
    )


def dense(config: ModelConfig) -> ModelConfig:
    """The same with feed-forwards as wide as the active experts."""
    experts = config.experts
    assert experts is not None
    width = experts.num_active * experts.d_hidden + experts.shared_width
    return config.replace(experts=None, feed_forward=FeedForwardConfig(width))


class Decoder:
    """A model that decodes tokens that are drawn at random."""

    def __init__(self, config: ModelConfig, weights: str) -> None:
        model = LanguageModel(config)
        model.init_weights(0)
        self.model = InferenceModel(model.to(torch.bfloat16), weights)  # type: ignore[arg-type]
        self._generator = torch.Generator().manual_seed(0)
        self._states = self.model.init_states(1)
        self._read(CONTEXT)

    @property
    def active_bytes(self) -> int:
        """Of weights, what a token reads: all but the embedding and the experts that it does not choose."""
        idle, embed = 0, self.model.model.embed.weight.nbytes
        for module in self.model.model.modules():
            if isinstance(module, PackedExperts):
                share = 1 - module.config.num_active / module.config.num_experts
                idle += int(share * sum(each.nbytes for each in module.all_packed()))
        return self.model.weight_bytes - idle - (0 if self.model.config.tie_embeddings else embed)

    def seconds(self) -> float:
        """How long the next token takes."""
        start = time.perf_counter()
        self._read(1)
        return time.perf_counter() - start

    def _read(self, count: int) -> None:
        tokens = torch.randint(self.model.config.vocab_size, (1, count), generator=self._generator)
        states = self.model(tokens, self._states).states
        assert states is not None
        self._states = states


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--weights", default="bfloat16,int8,int4")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    configs = {
        "kimi-linear-tiny-moe": presets.get("kimi-linear-tiny-moe"),
        "64 experts, width 1024": larger(),
    }
    for name, config in configs.items():
        for weights in options.weights.split(","):
            pair = {"experts": Decoder(config, weights), "dense": Decoder(dense(config), weights)}
            times: dict[str, list[float]] = {which: [] for which in pair}
            for _ in range(options.tokens):
                for which, decoder in pair.items():
                    times[which].append(decoder.seconds())
            seconds = {which: median(each[options.tokens // 4 :]) for which, each in times.items()}
            size = {which: decoder.active_bytes / 1e6 for which, decoder in pair.items()}
            rows.append(
                {
                    "model": name,
                    "weights": weights,
                    "all MB": pair["experts"].model.weight_bytes / 1e6,
                    "active MB": size["experts"],
                    "dense MB": size["dense"],
                    "tokens/s": 1 / seconds["experts"],
                    "dense tokens/s": 1 / seconds["dense"],
                    "time for a byte, experts / dense": (seconds["experts"] / size["experts"])
                    / (seconds["dense"] / size["dense"]),
                }
            )
            table(rows[-1:], header=len(rows) == 1)
    if options.out:
        write_results(options.out, {"machine": machine(), "results": rows})


if __name__ == "__main__":
    main()
