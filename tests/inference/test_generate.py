"""Generation with state against the whole text run anew, for every mixer."""

from __future__ import annotations

import itertools
import threading
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.errors import ConfigError
from intarsia.inference import GREEDY, Sampling, generate
from intarsia.model import LanguageModel, presets
from intarsia.model.config import ExpertsConfig
from support.small_models import LAYOUTS, MIXERS, VOCAB, build, tokens_of


def uncached_logits(model: LanguageModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits
    assert logits is not None
    return logits[0]


def uncached_greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(uncached_logits(model, text)[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cuts", [[70], [1] * 12, [64, 1, 5], [3, 63, 1, 1, 2]], ids=str)
def test_cached_logits_are_the_uncached_ones(layout: str, cuts: list[int]) -> None:
    """However a text is split between calls. In float64, where nothing but rounding of 1e-16 may differ."""
    model = build(layout).double()
    tokens = tokens_of(sum(cuts))
    states, pieces, start = model.init_states(1), [], 0
    with torch.no_grad():
        for cut in cuts:
            out = model(torch.tensor([tokens[start : start + cut]]), states=states)
            states, start = out.states, start + cut
            assert states.tokens == (start,)
            pieces.append(out.logits[0])
    torch.testing.assert_close(torch.cat(pieces), uncached_logits(model, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_error_is_that_of_rounding(layout: str) -> None:
    """Against the float64 model, the cached float32 logits err at most twice as much as the uncached ones.

    A small absolute term allows for positions where the uncached error happens to be tiny.
    """
    model = build(layout)
    tokens = tokens_of(80)
    with torch.inference_mode():
        states, logits = model.init_states(1), []
        for piece in (tokens[:48], *([token] for token in tokens[48:])):
            out = model(torch.tensor([piece]), states=states)
            states = out.states
            logits.append(out.logits[0])
    uncached = uncached_logits(model, tokens).double()
    exact = uncached_logits(model.double(), tokens)
    budget = 2 * (uncached - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (torch.cat(logits).double() - exact).abs().max() <= budget


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_generation_equals_the_uncached_loop(layout: str) -> None:
    model = build(layout)
    prompt = tokens_of(9)
    expected = uncached_greedy(model, prompt, 24)
    assert len(set(expected)) > 1
    assert list(generate(model, prompt, max_tokens=24, sampling=GREEDY)) == expected


def test_with_experts() -> None:
    model = build("kda mla", depth=3, experts=ExpertsConfig(num_experts=8, d_hidden=16, num_active=2))
    prompt = tokens_of(5)
    got = list(generate(model, prompt, max_tokens=10, sampling=GREEDY))
    assert got == uncached_greedy(model, prompt, 10)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_prefill_changes_nothing(chunk: int) -> None:
    model = build("kda*3 mla").double()
    prompt = tokens_of(130)
    whole = list(generate(model, prompt, max_tokens=8, sampling=GREEDY))
    assert list(generate(model, prompt, max_tokens=8, sampling=GREEDY, prefill_chunk=chunk)) == whole


def test_same_seed_same_tokens() -> None:
    model = build("kda mla")
    prompt = tokens_of(5)

    def draw(seed: int) -> list[int]:
        return list(generate(model, prompt, max_tokens=30, sampling=Sampling(temperature=1.5), seed=seed))

    first = draw(3)
    torch.manual_seed(11)  # the global generator has no part in it
    assert draw(3) == first
    assert draw(4) != first


def test_stop_ends_and_is_not_yielded() -> None:
    model = build("kda mla")
    prompt = tokens_of(5)
    free = list(generate(model, prompt, max_tokens=20, sampling=GREEDY))
    stop = free[6]
    got = list(generate(model, prompt, max_tokens=20, sampling=GREEDY, stop={stop}))
    assert got == free[: free.index(stop)]


def test_states_continue_a_prefix_many_times() -> None:
    model = build("kda*3 mla").double()
    prefix, rest = tokens_of(40), tokens_of(3, seed=1)
    with torch.inference_mode():
        states = model(torch.tensor([prefix]), states=model.init_states(1), last_only=True).states
    expected = list(generate(model, prefix + rest, max_tokens=6, sampling=GREEDY))
    for _ in range(2):
        assert list(generate(model, rest, max_tokens=6, sampling=GREEDY, states=states)) == expected
    assert states.tokens == (40,)


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
SMALLEST = [name for name in presets.names() if name.endswith("-nano")]


def mode(name: str) -> AbstractContextManager[object]:
    return MODES[name]()


@pytest.mark.parametrize("name", [*SMALLEST, *MIXERS])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(MODES, 2)))
def test_a_prefix_of_one_mode_goes_on_in_another(name: str, before: str, after: str) -> None:
    """A state that was made under inference mode, say, and continued by training, or the other way round."""
    if name in MIXERS:
        model = build(name)
    else:
        model = LanguageModel(presets.get(name, vocab_size=VOCAB)).eval()
        model.init_weights(0)
    tokens = torch.tensor([tokens_of(12)])
    cuts = [slice(0, 6), slice(6, 7), slice(7, 12)]

    def logits(*modes: str) -> Tensor:
        states, pieces = model.init_states(1), []
        for cut, kind in zip(cuts, modes, strict=True):
            with mode(kind):
                out = model(tokens[:, cut], states=states)
            states = out.states
            pieces.append(out.logits)
        with mode(modes[-1]):
            return torch.cat(pieces[1:], dim=1)

    found = logits(before, after, after)
    torch.testing.assert_close(found, logits(after, after, after), rtol=1e-5, atol=1e-5)
    if after == "grad":
        found.sum().backward()
        assert model.blocks[0].mixer_norm.weight.grad.any()
    back = logits(before, after, before)
    torch.testing.assert_close(back, logits(before, before, before), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full-nano", "kimi-linear-nano", "gpt-oss-nano"])
def test_threads_continue_one_prefix_each_by_itself(name: str) -> None:
    model = LanguageModel(presets.get(name, vocab_size=VOCAB)).eval()
    model.init_weights(0)
    with torch.inference_mode():
        states = model(torch.tensor([tokens_of(20)]), states=model.init_states(1), last_only=True).states

    def draw(seed: int) -> list[int]:
        return list(generate(model, tokens_of(9, seed), max_tokens=6, seed=seed, states=states))

    expected = [draw(seed) for seed in range(4)]
    for _ in range(3):
        with torch.inference_mode():  # one token more, so that there is room behind the prefix
            states = model(
                torch.tensor([tokens_of(20)[:-1]]), states=model.init_states(1), last_only=True
            ).states
            states = model(torch.tensor([tokens_of(20)[-1:]]), states=states, last_only=True).states
        got: list[list[int]] = [[], [], [], []]
        begin = threading.Barrier(4)

        def run(seed: int, got: list[list[int]] = got, begin: threading.Barrier = begin) -> None:
            begin.wait()
            got[seed] = draw(seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == expected


def test_interleaved_generations_do_not_meet() -> None:
    model = build("gdn mla")
    prompts = [tokens_of(6, seed=1), tokens_of(11, seed=2)]
    expected = [list(generate(model, prompt, max_tokens=12, sampling=GREEDY)) for prompt in prompts]
    running = [generate(model, prompt, max_tokens=12, sampling=GREEDY) for prompt in prompts]
    got = [list(pair) for pair in zip(*(zip(*running, strict=True)), strict=True)]
    assert got == expected


def test_the_callers_modes_are_left_alone() -> None:
    """Training, gradients and inference mode are the caller's own between two tokens and after the last."""
    model = build("kda mla").train()
    running = generate(model, [1, 2], max_tokens=3)
    next(running)
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert len(list(running)) == 2
    assert model.training


def test_prompts_of_any_kind_of_whole_numbers() -> None:
    model = build("kda mla")
    expected = list(generate(model, [3, 1, 4], max_tokens=3, sampling=GREEDY))
    ids = torch.tensor([3, 1, 4])
    for prompt in ((3, 1, 4), ids, ids.numpy(), list(ids), ids.to(torch.int32)):
        assert list(generate(model, prompt, max_tokens=3, sampling=GREEDY)) == expected


def test_no_tokens() -> None:
    assert list(generate(build("kda"), [1], max_tokens=0)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "holds no token"),
        ([1, VOCAB], {}, f"token {VOCAB}, which is outside"),
        ([-1], {}, "token -1"),
        ([[1, 2], []], {}, "holds no token"),
        ([[1, 2], [[3]]], {}, "several prompts are a list of them"),
        ([1, [2]], {}, "several prompts are a list of them"),
        ([[1], [2]], {"seed": [1, 2, 3]}, "got 3 for 2"),
        ([1, 2.0], {}, "whole numbers; got 2.0"),
        ([1, "2"], {}, "whole numbers; got '2'"),
        ([1, None], {}, "whole numbers; got None"),
        ("12", {}, "encode a text with its tokenizer"),
        (7, {}, "token ids, got 7"),
        (None, {}, "token ids, got None"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"max_tokens": 2.5}, "max_tokens"),
        ([1], {"max_tokens": None}, "max_tokens"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_wrong_input_is_an_error_at_once(prompt: Any, options: dict[str, Any], message: str) -> None:
    """By the call, not by the first token that is asked for."""
    with pytest.raises(ConfigError, match=message):
        generate(build("kda"), prompt, **options)
