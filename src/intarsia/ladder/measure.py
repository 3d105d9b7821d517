"""The process that measures what each model costs on this machine, and has it write: `python -m intarsia.ladder.measure
DIRECTORY`.

For each figure the arms take turns, several rounds, and the median counts, so that a slow moment of the machine meets
all arms alike.
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.files import write_json
from intarsia.jobs.child import CRASHED, DONE, Channel, child_process
from intarsia.ladder.measuring import RESULT, MeasuredArm, MeasureSpec
from intarsia.ladder.results import Decoding, Sample

if TYPE_CHECKING:
    from intarsia.data import TokenDataset
    from intarsia.model import InferenceModel, LanguageModel, ModelStates

Speed = tuple[float, float, float]
"""Median, and between what the middle half of the timings lay."""
PREFILL = 512
"""Tokens that are read at a time on the way to a context, to bound the memory."""


def main(arguments: list[str]) -> int:
    """Measure what `measure.json` in the given directory asks for."""
    directory = Path(arguments[0])
    with child_process(directory / ".measure.lock") as channel:
        try:
            spec = MeasureSpec.load(directory)
            result = _measure(spec, directory, channel)
            write_json(directory / RESULT, {"key": spec.key, **result})
            return DONE if result["complete"] else CRASHED
        except Exception:
            traceback.print_exc()
            return CRASHED


def _measure(spec: MeasureSpec, directory: Path, channel: Channel) -> dict[str, Any]:
    import torch

    from intarsia.checkpoints.native import load_model
    from intarsia.data import TokenDataset
    from intarsia.model import LanguageModel, ModelConfig

    torch.set_num_threads(spec.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = TokenDataset(spec.dataset)
    models: dict[str, LanguageModel] = {}
    for arm in spec.arms:
        if arm.run is not None:
            models[arm.name] = load_model(directory / "runs" / arm.run / "train" / "model", device=device)
        else:
            # The cost of decoding does not depend on the weights.
            models[arm.name] = LanguageModel(ModelConfig.from_dict(arm.model)).to(device)
            models[arm.name].init_weights(0)
        models[arm.name].eval()
    progress = _Counter(channel, spec.rounds)
    decoding: dict[str, list[Decoding]] = {}
    samples: list[Sample] = []
    speeds: dict[str, Speed] = {}
    failed = False
    for part in ("decoding", "samples", "training"):
        try:
            if part == "decoding":
                text = _tokens(dataset, max(spec.contexts, default=0))
                decoding = decode_times(
                    models,
                    text,
                    spec.contexts,
                    tokens=spec.decode_tokens,
                    repeats=spec.repeats,
                    tick=progress.tick,
                )
            elif part == "samples":
                samples = _samples(spec, models, dataset, progress) if spec.sample_tokens else []
                models.clear()
            else:
                speeds = training_speeds(spec, dataset, device, progress.tick)
        except Exception:
            # One figure that cannot be had is no reason to lose the others.
            traceback.print_exc()
            failed = True
    return {
        "complete": not failed,
        "arms": {
            arm.name: {
                "decoding": [asdict(cost) for cost in decoding.get(arm.name, [])],
                "training": speeds.get(arm.name),
            }
            for arm in spec.arms
        },
        "samples": [asdict(sample) for sample in samples],
    }


class _Counter:
    def __init__(self, channel: Channel, total: int) -> None:
        self._channel, self._done = channel, 0
        channel.begin("measure", total)

    def tick(self) -> None:
        self._done += 1
        self._channel.advance(self._done, {})


def _tokens(dataset: TokenDataset, count: int) -> list[int]:
    """`count` tokens of held-out text, repeated where there are too few."""
    tokens: list[int] = []
    while len(tokens) < count:
        for index in range(dataset.heldout.documents):
            tokens += dataset.heldout.document(index).tolist()
            if len(tokens) >= count:
                break
    return tokens[:count]


def decode_times(
    models: Mapping[str, LanguageModel],
    text: Sequence[int],
    contexts: Sequence[int],
    *,
    tokens: int,
    repeats: int,
    tick: Any = lambda: None,
) -> dict[str, list[Decoding]]:
    """Milliseconds for a token and bytes of state after each context, for each model.

    Args:
        text: at least as many tokens as the largest context.
        contexts: ascending.
        tokens: decoded one by one for each timing; each timing starts again from the same state.
        repeats: timings; the median over all their tokens counts.
    """
    import torch

    from intarsia.model import InferenceModel

    costs: dict[str, list[Decoding]] = {name: [] for name in models}
    with torch.inference_mode():
        ready = {name: InferenceModel(model) for name, model in models.items()}
        states = {name: model.init_states(1) for name, model in ready.items()}
        read = 0
        for context in contexts:
            for name, model in ready.items():
                for start in range(read, context, PREFILL):
                    piece = text[start : min(start + PREFILL, context)]
                    states[name] = _advance(model, piece, states[name])
            read = context
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(repeats):
                for name, model in ready.items():
                    times[name] += _decode(model, states[name], text[context - 1], tokens)
                    tick()
            for name in models:
                middle, *spread = (seconds * 1e3 for seconds in middle_half(times[name]))
                costs[name].append(
                    Decoding(context, middle, states[name].nbytes(), range=(spread[0], spread[1]))
                )
    return costs


def _decode(model: InferenceModel, states: ModelStates, token: int, tokens: int) -> list[float]:
    """Seconds for each of `tokens` tokens. The first is left out: it copies the cache away from its other users."""
    import torch

    seconds = []
    for _ in range(tokens + 1):
        began = time.perf_counter()
        states = _advance(model, [token], states)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _advance(model: InferenceModel, tokens: Sequence[int], states: ModelStates) -> ModelStates:
    import torch

    out = model(torch.tensor([list(tokens)], device=model.device), states)
    assert out.states is not None
    return out.states


def middle_half(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and between what the middle half lies."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def training_speeds(spec: MeasureSpec, dataset: TokenDataset, device: str, tick: Any) -> dict[str, Speed]:
    """Tokens per second of whole training steps, each arm with the batches and options of its runs: the median, and
    between what the middle half of the steps lies."""
    if not spec.throughput_steps:
        return {}
    trainers = {arm.name: _steps(arm, dataset, device) for arm in spec.arms}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in spec.arms}
    for trainer in trainers.values():
        next(trainer)  # The first step allocates what the others use again.
    for _ in range(spec.throughput_steps):
        for name, trainer in trainers.items():
            seconds[name].append(next(trainer))
            tick()
    found = {}
    for arm in spec.arms:
        tokens = arm.train["rows"] * arm.train["length"]
        median, fast, slow = middle_half(seconds[arm.name])
        found[arm.name] = (tokens / median, tokens / slow, tokens / fast)
    return found


def _steps(arm: MeasuredArm, dataset: TokenDataset, device: str) -> Iterator[float]:
    """Train an arm from scratch, giving the seconds of each step."""
    import torch

    from intarsia.data import BatchLoader
    from intarsia.model import ModelConfig
    from intarsia.training import TrainConfig
    from intarsia.training.distributed import Processes
    from intarsia.training.learner import Learner

    # No step is faster for its learning rate; a small one cannot diverge.
    config = TrainConfig.from_dict({**arm.train, "lr": 1e-6})
    processes = Processes(device=torch.device(device))
    learner = Learner.new(ModelConfig.from_dict(arm.model), config, processes)
    loader = BatchLoader(dataset.train, rows=config.rows, length=config.length, seed=config.data_seed)
    step = 0
    while True:
        began = time.perf_counter()
        learner.step(loader.next(), step)
        if device == "cuda":
            torch.cuda.synchronize()
        step = min(step + 1, config.steps - 1)
        yield time.perf_counter() - began


def _samples(
    spec: MeasureSpec, models: Mapping[str, LanguageModel], dataset: TokenDataset, progress: _Counter
) -> list[Sample]:
    """A text of each trained model after each prompt, all with the same random numbers."""
    from intarsia.data import load_tokenizer
    from intarsia.inference import Sampling, generate

    tokenizer = load_tokenizer(dataset.directory / "tokenizer")
    sampling = Sampling(temperature=spec.temperature, top_p=spec.top_p)
    samples = []
    for prompt in spec.prompts or ("",):
        start = [tokenizer.separator, *tokenizer.encode(prompt)]
        for arm in spec.arms:
            if arm.run is None:
                continue
            tokens = generate(
                models[arm.name],
                start,
                max_tokens=spec.sample_tokens,
                sampling=sampling,
                seed=0,
                stop={tokenizer.separator},
            )
            samples.append(Sample(arm.name, prompt, tokenizer.decode(list(tokens))))
            progress.tick()
    return samples


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
