"""Generation: the prompt is read in one pass (or in chunks), then one token at a time with the state.

The state is a value: it goes into the model and a new one comes out. So a long prompt is read once, and
each further token costs the same in every linear layer, however long the text has become.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch

from intarsia.errors import ConfigError
from intarsia.inference.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from intarsia.data.tokenizer import Tokenizer
    from intarsia.model import LanguageModel
    from intarsia.model.language_model import ModelStates


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
    prefill_chunk: int | None = None,
    states: ModelStates | None = None,
) -> Iterator[int]:
    """Continue a prompt, a token at a time.

    Args:
        model: any language model; it is run in evaluation mode and left as it was.
        prompt: token ids of one sequence, at least one: whole numbers in a list, a tuple, a tensor or an array of one
            dimension. (A document begins with the tokenizer's separator.)
        max_tokens: stop after this many tokens.
        sampling: how tokens are chosen; `Sampling()`, the model's own distribution, by default.
        seed: of this generation's own random generator. Same model, prompt, sampling and seed: same tokens.
        stop: ids that end the generation; they are not yielded.
        prefill_chunk: read the prompt in pieces of this many tokens, which bounds the memory that a long
            prompt takes and changes the result by rounding alone. None reads it in one piece.
        states: go on from these states instead of from the beginning. The prompt follows what they have seen.
            They are not changed, so one prefix can be continued many times.

    Yields:
        Token ids, each as soon as it is chosen.

    Raises:
        ConfigError: a prompt that is empty, holds several sequences or what is no id, an id outside the vocabulary,
            or a number out of range. Raised by the call itself, before the first token is asked for.
        IntarsiaError: the model's logits are not finite.
    """
    _check_count("max_tokens", max_tokens, 0)
    if prefill_chunk is not None:
        _check_count("prefill_chunk", prefill_chunk, 1)
    ids = _checked_prompt(prompt, model.config.vocab_size)
    sampler = Sampler(sampling or Sampling(), seed)
    return _steps(model, ids, max_tokens, sampler, frozenset(stop), prefill_chunk, states)


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    prefill_chunk: int | None = None,
) -> Iterator[str]:
    """Continue a text, as a document of its own, until the model ends it or `max_tokens` are reached.

    Yields pieces of text as they come; a character that takes several tokens comes when it is whole. An
    empty prompt starts a new document. Arguments and errors are those of `generate`.
    """
    tokens = generate(
        model,
        [tokenizer.separator, *tokenizer.encode(prompt)],
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop={tokenizer.separator},
        prefill_chunk=prefill_chunk,
    )
    return decode(tokenizer, tokens)


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text as the tokens come; none is empty, and none holds half a character."""
    decoder = tokenizer.decode_stream()
    for token in tokens:
        if text := decoder.push(token):
            yield text
    if rest := decoder.finish():
        yield rest


def _steps(
    model: LanguageModel,
    prompt: list[int],
    max_tokens: int,
    sampler: Sampler,
    stop: frozenset[int],
    prefill_chunk: int | None,
    states: ModelStates | None,
) -> Iterator[int]:
    if max_tokens == 0:
        return
    if states is None:
        states = model.init_states(1)
    pending = prompt
    for produced in range(1, max_tokens + 1):
        logits, states = _advance(model, pending, states, prefill_chunk)
        token = sampler.choose(logits)
        if token in stop:
            return
        yield token
        if produced == max_tokens:
            return
        pending = [token]


@torch.inference_mode()
def _advance(
    model: LanguageModel, tokens: list[int], states: ModelStates, chunk: int | None
) -> tuple[torch.Tensor, ModelStates]:
    """Feed tokens; the `[vocab]` logits after the last of them, and the new states.

    Inference and evaluation mode are held for the length of this call alone, never while the caller of the
    generator has control.
    """
    device = model.embed.weight.device
    training = model.training
    if training:
        model.eval()
    try:
        rest = iter(tokens)
        while piece := list(islice(rest, chunk or len(tokens))):
            out = model(torch.tensor([piece], device=device), states=states, last_only=True)
            states = out.states
        return out.logits[0, -1], states
    finally:
        if training:
            model.train()


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _checked_prompt(prompt: Sequence[int], vocab_size: int) -> list[int]:
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Iterable):
        raise ConfigError(
            f"the prompt must be token ids, got {prompt!r}: encode a text with its tokenizer, or call stream_text"
        )
    ids = [_checked_id(token) for token in prompt]
    if not ids:
        raise ConfigError(
            "the prompt holds no token: begin with the tokenizer's separator to start a new document"
        )
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConfigError(
            f"the prompt holds token {wrong}, which is outside the model's vocabulary of {vocab_size}: "
            "was it made with another tokenizer?"
        )
    return ids


def _checked_id(token: object) -> int:
    """One token's id, from any kind of whole number."""
    if getattr(token, "ndim", 0) or isinstance(token, list | tuple):
        raise ConfigError(
            "the prompt holds sequences where token ids should be: one call continues one sequence, so call "
            "generate for each"
        )
    try:
        if isinstance(token, bool):
            raise TypeError
        return operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"the prompt must hold token ids, whole numbers; got {token!r}") from None
