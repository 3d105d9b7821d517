"""`intarsia generate`: continue a text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli.options import Device, Dtype, Greedy, MinP, Plugins, Sparse, Temperature, TopP, Weights
from intarsia.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from intarsia.data import Tokenizer
    from intarsia.data.published import Conduct
    from intarsia.inference import Sampling
    from intarsia.model import InferenceModel


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The directory of a model, trained here or published, or of a training run; or a repository in the "
            "cache.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; `-` reads it from stdin. None: a new document."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from this file.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Stop after so many tokens.")
    ] = 200,
    temperature: Temperature = None,
    top_p: TopP = None,
    min_p: MinP = None,
    greedy: Greedy = False,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    prefill_chunk: Annotated[
        int,
        typer.Option(min=1, help="Read a long prompt in pieces of so many tokens, to bound the memory."),
    ] = 2048,
    device: Device = "auto",
    dtype: Dtype = "",
    weights: Weights = None,
    sparse: Sparse = "",
    plugin: Plugins = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")
    ] = False,
) -> None:
    """Continue a text with a model, trained here or published.

    The text streams to stdout, prompt included; how many tokens there were and how fast goes to stderr, and at a
    terminal how far the reading of a long prompt is.

    \b
      intarsia generate runs/my-run "def fibonacci(n):"
      intarsia generate runs/my-run --file prompt.txt --max-tokens 500 --greedy
      cat prompt.txt | intarsia generate runs/my-run - --temperature 1 --seed 7 > text.txt
      intarsia generate Qwen/Qwen3.5-0.8B "def fibonacci(n):" --weights int8
    """
    from intarsia.cli.output import note, print_json
    from intarsia.cli.places import load
    from intarsia.mixers.registry import use_plugins

    use_plugins(plugin)
    text = read_prompt(prompt, file)
    chosen_sampling(temperature, top_p, min_p, greedy)  # told before a model is read
    ready, tokenizer, conduct = load(model, device, dtype, weights, sparse)
    sampling = chosen_sampling(temperature, top_p, min_p, greedy, conduct)
    run = Generation(ready, tokenizer, text, max_tokens, sampling, seed, prefill_chunk, conduct)
    if json:
        pieces = list(run)
        print_json({"prompt": text, "text": "".join(pieces), **run.facts()})
        return
    coming = iter(run)
    # What shows how far the reading is has a line of its own: the text begins when it is done.
    first = next(coming, "")
    sys.stdout.write(text + first)
    sys.stdout.flush()
    for piece in coming:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    note(run.summary())


def chosen_sampling(
    temperature: float | None,
    top_p: float | None,
    min_p: float | None,
    greedy: bool,
    conduct: Conduct | None = None,
) -> Sampling:
    """How to sample: as the options say, or else the model's files, or else as is usual.

    Raises:
        ConfigError: a value that cannot be.
    """
    from intarsia.data.published import Conduct
    from intarsia.inference import Sampling

    files = conduct or Conduct()
    return Sampling(
        _first(temperature, files.temperature, 0.8),
        _first(top_p, files.top_p, 1.0),
        _first(min_p, files.min_p, 0.05),
        greedy,
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it was given."""
    if prompt is not None and file is not None:
        raise ConfigError("give the prompt or --file, not both")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text: {error}") from None
    if prompt == "-":
        return sys.stdin.read()
    return prompt or ""


class Generation:
    """One generation that counts its tokens and its seconds. Iterate over it for the pieces of text."""

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: Tokenizer,
        prompt: str,
        max_tokens: int,
        sampling: Sampling,
        seed: int,
        prefill_chunk: int,
        conduct: Conduct,
    ) -> None:
        from intarsia.inference import generate

        self._tokenizer, self._model = tokenizer, model
        # A prompt of nothing begins behind the end of another text.
        ids = [*conduct.begin, *tokenizer.encode(prompt)] or [tokenizer.separator]
        self._tokens = generate(
            model,
            ids,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            stop=set(conduct.stop),
            prefill_chunk=prefill_chunk,
            on_read=self._show_reading if len(ids) > prefill_chunk and sys.stderr.isatty() else None,
        )
        self.max_tokens = max_tokens
        self.prompt_tokens = len(ids)
        self.tokens = 0
        self._started = self._first = self._last = 0.0

    def __iter__(self) -> Iterator[str]:
        from intarsia.inference import text_pieces

        self._started = self._first = self._last = time.perf_counter()
        yield from text_pieces(self._tokenizer, self._counted())

    def _show_reading(self, read: int, total: int) -> None:
        """A line at the terminal that is written over, and goes away at the end."""
        speed = read / (time.perf_counter() - self._started)
        line = f"reading the prompt: {read:,} of {total:,} tokens, {speed:,.0f} tokens/s, Ctrl-C stops"
        sys.stderr.write(f"\r{line}\x1b[K" if read < total else "\r\x1b[K")
        sys.stderr.flush()

    def _counted(self) -> Iterator[int]:
        for token in self._tokens:
            self.tokens += 1
            self._last = time.perf_counter()
            if self.tokens == 1:
                self._first = self._last
            yield token

    def facts(self) -> dict[str, Any]:
        """What was measured: seconds of the prompt (to the first token) and speed of the tokens after it."""
        decoding = self._last - self._first
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "stopped": "length" if self.tokens == self.max_tokens else "end of document",
            "seconds_to_first_token": self._first - self._started,
            "tokens_per_second": (self.tokens - 1) / decoding if decoding > 0 else None,
            "weight_bytes": self._model.weight_bytes,
            "state_bytes": self._model.model.cost().state_bytes(self.prompt_tokens + self.tokens),
        }

    def summary(self) -> str:
        """The same in a line."""
        from intarsia.cli.output import size

        facts = self.facts()
        speed = facts["tokens_per_second"]
        parts = [
            f"prompt of {self.prompt_tokens} tokens read in {facts['seconds_to_first_token']:.2f} s",
            f"{self.tokens} written" + (f" at {speed:.1f} tokens/s" if speed else ""),
            f"weights {size(facts['weight_bytes'])}, state {size(facts['state_bytes'])}",
        ]
        if facts["stopped"] != "length":
            parts.append("the model ended the document")
        return "; ".join(parts)
