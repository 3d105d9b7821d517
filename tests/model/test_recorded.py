"""Steps that are recorded give what the model gives, whatever is in the batch, and wait for nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from intarsia.errors import ConfigError, PoolError, UnsupportedError
from intarsia.inference import GREEDY, generate
from intarsia.model import InferenceModel, LanguageModel
from intarsia.model.recorded import CudaGraphs, Plainly, RecordedModel, Recorder
from intarsia.ops import native
from support.device import device
from support.small_models import LAYOUTS, MIXERS, VOCAB, build, preset, tokens_of
from support.waiting import Waits

WINDOW = next(name for name, config in MIXERS.items() if config.type == "window")
SINKS = next(name for name, config in MIXERS.items() if getattr(config, "sinks", False))


class Traced:
    """Records a step as a list of PyTorch's operations on the tensors that it met: like a CUDA graph it plays these,
    and none of the host's numbers, branches or tensors made anew."""

    def __init__(self) -> None:
        self.waited: list[str] = []

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        step()  # as CUDA graphs are warmed up
        traced = make_fx(step)()

        def play() -> None:
            with Waits() as waits:
                traced()
            self.waited += waits.found

        return play


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The forms that GPUs compute."""
    monkeypatch.setenv(native.ISA_VARIABLE, native.OFF)
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def expected(model: LanguageModel, texts: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        rows = [model(torch.tensor([text]), last_only=True).logits[0, -1] for text in texts]
    return torch.stack(rows)


def comings_and_goings(model: LanguageModel, recorder: Recorder) -> RecordedModel:
    """Sequences that begin, are read, go on together in any order, fork, end, and leave their slots to others."""
    decoder = RecordedModel(model, slots=5, tokens=400, recorder=recorder)
    texts: dict[int, list[int]] = {}
    pool = decoder.pool

    def begin(length: int, seed: int) -> int:
        slot = pool.take()
        texts[slot] = tokens_of(length, seed)
        logits = decoder.read(slot, texts[slot])
        torch.testing.assert_close(logits, expected(model, [texts[slot]])[0], atol=1e-9, rtol=1e-9)
        return slot

    def step(slots: list[int], seed: int) -> None:
        tokens = tokens_of(len(slots), seed)
        for slot, token in zip(slots, tokens, strict=True):
            texts[slot].append(token)
        logits = decoder.step(slots, tokens)
        assert logits.shape == (len(slots), VOCAB)
        torch.testing.assert_close(
            logits.double(), expected(model, [texts[s] for s in slots]), atol=1e-5, rtol=1e-5
        )

    a, b = begin(3, 1), begin(30, 2)
    step([a], 3)
    step([b, a], 4)
    c = begin(60, 5)  # grows over the first recording's pages
    for seed in range(6, 12):
        step([a, c, b], seed)
    pool.free(a)
    d = begin(1, 13)
    assert d == a
    step([d, b, c], 14)
    e = pool.fork(b)
    texts[e] = list(texts[b])
    step([b, e, d, c], 15)
    step([e], 16)
    f = begin(17, 17)
    step([f, e, b, c, d], 18)
    saved = pool.evict([c])
    step([e, b], 19)
    (back,) = pool.restore(saved)
    texts[back] = texts[c]
    step([back, f], 20)
    return decoder


def test_every_mixer_is_recorded_or_refused() -> None:
    refused = []
    for layout in LAYOUTS:
        model = build(layout).double()
        try:
            decoder = RecordedModel(model, slots=2, tokens=64)
        except UnsupportedError:
            refused.append(layout)
            continue
        slot = decoder.pool.take()
        text = tokens_of(5)
        decoder.read(slot, text)
        for token in tokens_of(3, 1):
            text.append(token)
            logits = decoder.step([slot], [token])
            torch.testing.assert_close(logits.double(), expected(model, [text]), atol=1e-5, rtol=1e-5)
    types = {MIXERS[layout].type for layout in refused}
    assert types == {
        "fox",
        "path",
        "deltaformer",
        "simplicial",
        "dsa",
        "msa",
        "qsa",
        "moba",
        "infllm2",
        "nsa",
        "static",
        "parallel",
    }


@pytest.mark.parametrize("layout", ["kda*3 mla", "gdn*3 mla-rotated", "mamba2", "rwkv7"])
def test_sequences_come_and_go(layout: str) -> None:
    comings_and_goings(build(layout).double(), Plainly())


def test_sequences_come_and_go_in_what_was_traced() -> None:
    comings_and_goings(build("gdn kda attention mla").double(), Traced())


@pytest.mark.parametrize("layout", ["kda mla-rotated", f"{WINDOW} {SINKS}"])
def test_no_step_waits(layout: str, without_kernels: None) -> None:
    recorder = Traced()
    model = build(layout).double()
    decoder = RecordedModel(model, slots=3, tokens=200, recorder=recorder)
    texts = [tokens_of(5), tokens_of(63, 1)]
    slots = [decoder.pool.take() for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        decoder.read(slot, text)
    for seed in range(2, 5):
        tokens = tokens_of(2, seed)
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        logits = decoder.step(slots, tokens)
    torch.testing.assert_close(logits.double(), expected(model, texts), atol=1e-5, rtol=1e-5)
    assert not recorder.waited


def test_a_window_needs_no_longer_table() -> None:
    """Of a text that is many windows long, the pages that the window has not left."""
    model = build(WINDOW).double()
    decoder = RecordedModel(model, slots=1, tokens=400, recorder=Traced())
    text = tokens_of(3)
    slot = decoder.pool.take()
    decoder.read(slot, text)
    for token in tokens_of(90, 1):
        text.append(token)
        logits = decoder.step([slot], [token])
    torch.testing.assert_close(logits.double(), expected(model, [text]), atol=1e-5, rtol=1e-5)
    assert decoder.recordings == 1


def test_recordings_are_made_once_for_a_size() -> None:
    decoder = RecordedModel(build("kda*3 mla"), slots=4, tokens=400)
    slots = [decoder.pool.take() for _ in range(4)]
    for slot in slots:
        decoder.read(slot, tokens_of(5))
    seen = []
    for count in (1, 2, 3, 4, 3, 1):
        decoder.step(slots[:count], tokens_of(count))
        seen.append(decoder.recordings)
    assert seen == [1, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_most_likely_tokens_go_on_by_themselves(weights: str | None) -> None:
    model = build("gdn kda attention mla")
    ready = InferenceModel(model, weights)  # type: ignore[arg-type]
    prompts = [tokens_of(4, 1), tokens_of(9, 2)]
    texts: dict[int, list[int]] = {0: [], 1: []}
    for number, token in generate(ready, prompts, max_tokens=12, sampling=GREEDY):
        texts[number].append(token)
    decoder = RecordedModel(ready, slots=2, tokens=100)
    slots = [decoder.pool.take() for _ in prompts]
    found = [[int(decoder.read(slot, prompt).argmax())] for slot, prompt in zip(slots, prompts, strict=True)]
    for _ in range(11):
        for text, row in zip(found, decoder.step(slots), strict=True):
            text.append(int(row.argmax()))
    assert found == [texts[0], texts[1]]


def test_experts_are_recorded() -> None:
    model = preset("kimi-linear-tiny-moe")
    decoder = RecordedModel(model, slots=2, tokens=64, recorder=Traced())
    texts = [tokens_of(5), tokens_of(9, 1)]
    slots = [decoder.pool.take() for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        decoder.read(slot, text)
    for seed in range(2, 5):
        tokens = tokens_of(2, seed)
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        logits = decoder.step(slots, tokens)
    torch.testing.assert_close(logits.double(), expected(model, texts), atol=1e-5, rtol=1e-5)


def test_bad_input_is_named_and_nothing_is_written() -> None:
    decoder = RecordedModel(build("kda*3 mla").double(), slots=2, tokens=32)
    a, b = decoder.pool.take(), decoder.pool.take()
    decoder.read(a, tokens_of(15))
    decoder.read(b, tokens_of(15, 1))
    states = decoder.pool.view([a, b]).snapshot()
    for slots, tokens, what in (
        ([a], [1, 2], "a token of each of 1"),
        ([a, a], [1, 2], "different slots"),
        ([a, 2], [1, 2], "in the slots before 2"),
        ([a, b, 0], [1, 2, 3], "2 sequences at most"),
        ([], [], "different slots"),
    ):
        with pytest.raises(ConfigError, match=what):
            decoder.step(slots, tokens)
    for _ in range(33):  # to the end of the last page
        decoder.step([a], [1])
    with pytest.raises(PoolError, match="the pool is full"):
        decoder.step([b, a], [1, 1])
    assert decoder.pool.tokens([a, b]) == (48, 15)
    decoder.pool.free(a)
    decoder.pool.free(b)
    with pytest.raises(ConfigError, match="holds no sequence"):
        decoder.step([a], [1])
    (a, b) = decoder.pool.restore(states)
    text = tokens_of(15, 1)
    torch.testing.assert_close(
        decoder.step([b], [7])[0].double(), expected(decoder.model, [[*text, 7]])[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.skipif(device().type != "cuda", reason="CUDA graphs need a GPU")
def test_cuda_graphs_give_the_same() -> None:
    model = preset("kimi-linear-nano").float().to(device())
    plain, graphs = (RecordedModel(model, 3, 400, recorder) for recorder in (Plainly(), CudaGraphs()))
    for decoder in (plain, graphs):
        for length in (3, 30):
            decoder.read(decoder.pool.take(), tokens_of(length))
    for seed in range(40):
        tokens = tokens_of(2, seed)
        torch.testing.assert_close(
            graphs.step([0, 1], tokens), plain.step([0, 1], tokens), atol=1e-4, rtol=1e-4
        )
