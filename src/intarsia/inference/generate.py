"""Generation: the prompt is read in pieces, then one token at a time with the state.

So a long prompt is read once, and each further token costs the same in every linear layer, however long the text has
become. Several prompts of different lengths go through the model together, packed in one row. States that are given are
values: they go into the model and new ones come out. Those of texts that begin go on in place, in a pool.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, overload

import torch

from intarsia.errors import ConfigError, PoolError
from intarsia.inference.sampling import Sampler, Sampling
from intarsia.ops.sequences import Sequences

if TYPE_CHECKING:
    from intarsia.data.tokenizer import Tokenizer
    from intarsia.model import InferenceModel, LanguageModel, ModelStates

AHEAD = 4096
"""For how many tokens behind its prompt a text has room at first."""

PREFILL_CHUNK = 2048
"""A prompt is read in pieces of so many tokens, where nobody says otherwise: in memory that does not grow with it
beyond the states."""

OnRead = Callable[[int, int], None]
"""Is told how many tokens of all prompts have been read, and how many there are."""


@overload
def generate(
    model: LanguageModel | InferenceModel,
    prompt: Sequence[int],
    *,
    max_tokens: int = ...,
    sampling: Sampling | None = ...,
    seed: int = ...,
    stop: Collection[int] = ...,
    prefill_chunk: int | None = ...,
    states: ModelStates | None = ...,
    on_read: OnRead | None = ...,
) -> Iterator[int]: ...


@overload
def generate(
    model: LanguageModel | InferenceModel,
    prompt: Sequence[Sequence[int]],
    *,
    max_tokens: int = ...,
    sampling: Sampling | None = ...,
    seed: int | Sequence[int] = ...,
    stop: Collection[int] = ...,
    prefill_chunk: int | None = ...,
    states: ModelStates | None = ...,
    on_read: OnRead | None = ...,
) -> Iterator[tuple[int, int]]: ...


def generate(
    model: LanguageModel | InferenceModel,
    prompt: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    stop: Collection[int] = (),
    prefill_chunk: int | None = PREFILL_CHUNK,
    states: ModelStates | None = None,
    on_read: OnRead | None = None,
) -> Iterator[int] | Iterator[tuple[int, int]]:
    """Continue a prompt, or several of different lengths together, a token at a time.

    Args:
        model: any language model; it is run in evaluation mode and left as it was. One that is called often can be
            handed over as an `InferenceModel`, which is made here otherwise.
        prompt: token ids of one sequence, at least one: whole numbers in a list, a tuple, a tensor or an array of one
            dimension. (A document begins with the tokenizer's separator.) Or several such prompts, which go through
            the model in one row and are continued as if each were alone.
        max_tokens: stop after this many tokens, of each prompt.
        sampling: how tokens are chosen; `Sampling()`, the model's own distribution, by default.
        seed: of this generation's own random generator. Same model, prompt, sampling and seed: same tokens. Of
            several prompts the one of number n has `seed + n`, or the n-th of several seeds.
        stop: ids that end a sequence; they are not yielded.
        prefill_chunk: prompts are read in pieces of this many tokens, which bounds the memory that a long one takes
            and changes the result by rounding alone. None reads them in one piece.
        states: go on from these states instead of from the beginning, one sequence for each prompt, which follows
            what that has seen. They are not changed, so one prefix can be continued many times.
        on_read: is called after each piece of the prompts, with how many of their tokens have been read and how many
            there are. What it raises ends the generation.

    Yields:
        Token ids, each as soon as it is chosen. Of several prompts pairs, the number of the prompt and the token.

    Raises:
        ConfigError: a prompt that is empty, or holds what is no id, an id outside the vocabulary, a number out of
            range, or not one seed or state for each prompt. Raised by the call itself, before the first token is
            asked for.
        IntarsiaError: the model's logits are not finite.
    """
    from intarsia.model import InferenceModel

    _check_count("max_tokens", max_tokens, 0)
    if prefill_chunk is not None:
        _check_count("prefill_chunk", prefill_chunk, 1)
    several = _holds_sequences(prompt)
    given = cast("Sequence[Sequence[int]]", prompt if several else [prompt])
    prompts = [_checked_prompt(each, model.config.vocab_size) for each in given]
    seeds = [seed + n for n in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ConfigError(f"each prompt has a seed; got {len(seeds)} for {len(prompts)}")
    if states is not None and states.count != len(prompts):
        raise ConfigError(f"each prompt goes on from one state; got {states.count} for {len(prompts)}")
    sampling = sampling or Sampling()
    texts = [
        _Text(n, ids, Sampler(sampling, s)) for n, (ids, s) in enumerate(zip(prompts, seeds, strict=True))
    ]
    ready = model if isinstance(model, InferenceModel) else InferenceModel(model)
    steps = _steps(ready, texts, max_tokens, frozenset(stop), prefill_chunk, states, on_read)
    return steps if several else (token for _, token in steps)


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    prefill_chunk: int | None = PREFILL_CHUNK,
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
    return text_pieces(tokenizer, tokens)


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text as the tokens come; none is empty, and none holds half a character."""
    decoder = tokenizer.decode_stream()
    for token in tokens:
        if text := decoder.push(token):
            yield text
    if rest := decoder.finish():
        yield rest


@dataclass
class _Text:
    """One sequence that is being continued: what goes into the model next begins at `read`."""

    number: int
    ids: list[int]
    sampler: Sampler
    read: int = 0
    produced: int = 0

    def take(self, most: int | None) -> list[int]:
        """The next tokens for the model."""
        end = len(self.ids) if most is None else min(self.read + most, len(self.ids))
        piece, self.read = self.ids[self.read : end], end
        return piece

    @property
    def wants_a_token(self) -> bool:
        """Whether the model has read all of it."""
        return self.read == len(self.ids)


def _steps(
    model: InferenceModel,
    texts: list[_Text],
    max_tokens: int,
    stop: frozenset[int],
    chunk: int | None,
    states: ModelStates | None,
    on_read: OnRead | None,
) -> Iterator[tuple[int, int]]:
    """A text that has been read gives a token while others, which are longer, are still being read."""
    if max_tokens == 0:
        return
    memory = _Memory(states) if states is not None else _begin(model, texts, max_tokens)
    read, total = 0, sum(len(text.ids) for text in texts)
    while True:
        pieces = [text.take(chunk) for text in texts]
        logits = memory.advance(model, pieces)
        if on_read is not None and read < total:
            read += sum(len(piece) for text, piece in zip(texts, pieces, strict=True) if not text.produced)
            on_read(read, total)
        going_on = []
        for n, text in enumerate(texts):
            if text.wants_a_token:
                token = text.sampler.choose(logits[n])
                if token in stop:
                    continue
                yield text.number, token
                text.ids, text.read, text.produced = [token], 0, text.produced + 1
                if text.produced == max_tokens:
                    continue
            going_on.append(n)
        if not going_on:
            return
        if len(going_on) < len(texts):
            memory.keep(going_on)
            texts = [texts[n] for n in going_on]


class _Memory:
    """What the model remembers of the texts, as values: those that it begins with stay what they are."""

    def __init__(self, states: ModelStates) -> None:
        self.states = states

    def keep(self, numbers: list[int]) -> None:
        """Let the texts go but for those of these numbers."""
        self.states = self.states.select(numbers)

    def advance(self, model: InferenceModel, pieces: list[list[int]]) -> torch.Tensor:
        """Feed some tokens of each text; the `[texts, vocab]` logits after the last of each."""
        row = torch.tensor([[token for piece in pieces for token in piece]], device=model.device)
        seqs = None if len(pieces) == 1 else Sequences(tuple(len(piece) for piece in pieces))
        out = model(row, self.states, seqs)
        assert out.logits is not None
        assert out.states is not None
        self.states = out.states
        return out.logits[0]


class _OwnPool(_Memory):
    """The same in a pool that nobody else has, in place. It is for `ahead` tokens more than the prompts have, and takes
    twice the room when it is full: most texts end long before the most tokens that they may have."""

    def __init__(self, model: InferenceModel, prompts: list[int], ahead: int) -> None:
        self._pool = model.new_pool(len(prompts), sum(prompts) + ahead * len(prompts))
        super().__init__(self._pool.view([self._pool.take() for _ in prompts]))
        self._slots = list(range(len(prompts)))

    def keep(self, numbers: list[int]) -> None:
        super().keep(numbers)
        for slot in set(self._slots) - {self._slots[n] for n in numbers}:
            self._pool.free(slot)
        self._slots = [self._slots[n] for n in numbers]

    def advance(self, model: InferenceModel, pieces: list[list[int]]) -> torch.Tensor:
        lengths = tuple(len(piece) for piece in pieces)
        try:
            self.states.check_room(lengths)
        except PoolError:
            self._pool = model.new_pool(len(pieces), 2 * (sum(self.states.tokens) + sum(lengths)))
            self._slots = list(self._pool.restore(self.states.snapshot()))
            self.states = self._pool.view(self._slots)
        return super().advance(model, pieces)


def _begin(model: InferenceModel, texts: list[_Text], max_tokens: int) -> _Memory:
    """The memory of texts that begin. Off the CPU attention reads pages by copying them, so values serve it better."""
    if model.device.type != "cpu":
        return _Memory(model.init_states(len(texts)))
    return _OwnPool(model, [len(text.ids) for text in texts], min(max_tokens, AHEAD))


def _holds_sequences(prompt: object) -> bool:
    """Whether it is several prompts: its first element is one."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Iterable):
        return False
    first = next(iter(prompt), None)
    return bool(getattr(first, "ndim", 0)) or isinstance(first, list | tuple)


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
            "the prompt holds sequences where token ids should be: several prompts are a list of them, and each "
            "holds token ids alone"
        )
    try:
        if isinstance(token, bool):
            raise TypeError
        return operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"the prompt must hold token ids, whole numbers; got {token!r}") from None
