"""A language model as lm-eval-harness asks it: likelihoods of continuations and of texts, and answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from intarsia.data import Tokenizer
from intarsia.inference.generate import generate, text_pieces
from intarsia.inference.sampling import Sampling
from intarsia.model import InferenceModel, LanguageModel
from intarsia.ops import Sequences

TOKENS, ANSWERED = 4096, 512
"""In one forward pass, at most: tokens that are read, and tokens whose logits are computed."""
LONGEST_ANSWER = 256
"""Tokens that are generated where a task does not say."""


class HarnessModel(TemplateLM):
    """The interface of lm-eval over a model of ours, on the model's device. Its texts begin with `begin`."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, begin: tuple[int, ...], stop: frozenset[int]
    ) -> None:
        super().__init__()
        self.model, self.own_tokenizer, self.begin, self.stop = model, tokenizer, begin, stop

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        """What an empty context is."""
        return self.begin[-1] if self.begin else self.own_tokenizer.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokens = self.own_tokenizer.encode(string)
        return tokens if add_special_tokens is False else [*self.begin, *tokens]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation behind its context, and whether greedy decoding would give it."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = {n: (0.0, True) for n, (_, continuation) in enumerate(pairs) if not continuation}
        for batch in _batches(pairs):
            rows = [[*pairs[n][0], *pairs[n][1]][:-1] for n in batch]
            wanted = [len(pairs[n][1]) for n in batch]
            with torch.no_grad():
                logits = self.model(
                    torch.tensor([[token for row in rows for token in row]], device=self.device),
                    seqs=Sequences(tuple(map(len, rows))),
                    last_only=wanted,
                ).logits
            assert logits is not None
            for n, of_row in zip(batch, logits[0].split(wanted), strict=True):
                answer = torch.tensor(pairs[n][1], device=self.device)
                likelihoods = of_row.log_softmax(-1).gather(-1, answer.unsqueeze(-1))
                found[n] = (likelihoods.double().sum().item(), bool((of_row.argmax(-1) == answer).all()))
        return [found[n] for n in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each read in one piece, however long."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [
            likelihood
            for likelihood, _ in self._loglikelihood_tokens(
                [(("", ""), [self.eot_token_id], tokens) for tokens in texts]
            )
        ]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to one of the task's ends."""
        ready = InferenceModel(self.model)
        return [self._say(ready, *request.args) for request in requests]

    def _say(self, ready: InferenceModel, context: str, wanted: dict[str, Any]) -> str:
        until = wanted.get("until") or []
        ends = [until] if isinstance(until, str) else [end for end in until if end]
        temperature = float(wanted.get("temperature") or 0)
        samples = bool(wanted.get("do_sample")) and temperature > 0
        tokens = generate(
            ready,
            self.tok_encode(context) or [self.eot_token_id],
            max_tokens=int(wanted.get("max_gen_toks", LONGEST_ANSWER)),
            sampling=Sampling(temperature, float(wanted.get("top_p", 1.0)))
            if samples
            else Sampling(greedy=True),
            stop=self.stop,
        )
        said = ""
        for piece in text_pieces(self.own_tokenizer, tokens):
            said += piece
            places = [place for end in ends if (place := said.find(end)) >= 0]
            if places:
                return said[: min(places)]
        return said


def _batches(pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
    """Numbers of pairs that go through the model together, packed in a row, the longest first."""
    batch: list[int] = []
    tokens = answered = 0
    asking = [n for n, (_, continuation) in enumerate(pairs) if continuation]
    for n in sorted(asking, key=lambda n: -len(pairs[n][0]) - len(pairs[n][1])):
        more, asked = len(pairs[n][0]) + len(pairs[n][1]) - 1, len(pairs[n][1])
        if batch and (tokens + more > TOKENS or answered + asked > ANSWERED):
            yield batch
            batch, tokens, answered = [], 0, 0
        batch.append(n)
        tokens, answered = tokens + more, answered + asked
    if batch:
        yield batch
