"""`intarsia chat`: talk with a model in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from intarsia.cli.options import Device, Dtype, Greedy, MinP, Plugins, Sparse, Temperature, TopP, Weights

if TYPE_CHECKING:
    from types import FrameType

    from intarsia.inference.conversation import Conversation, Turn

FIRST = {"role": "user", "content": "Hello"}
"""What a dialogue can begin with, to try a template."""

HELP = """/reset  forget all that was said
/help   this list
/exit   leave, as Ctrl-D does
Ctrl-C stops an answer; what it has said stays."""


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The directory of a model, published or trained here, or of a training run; or a repository in the "
            "cache.",
        ),
    ],
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="An instruction before the dialogue.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue what you type as a text, without the chat template.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="What the chat template asks for, such as enable_thinking=false; JSON, or a text. Repeatable.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="Of an answer, at most.")
    ] = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    min_p: MinP = None,
    greedy: Greedy = False,
    seed: Annotated[int, typer.Option(help="Same seed and messages, same answers.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "",
    weights: Weights = None,
    sparse: Sparse = "",
    plugin: Plugins = None,
) -> None:
    """Talk with a model, turn by turn. What was said stays in the model's state: a turn reads its message alone.

    Answers go to stdout, all else to stderr; without a terminal each line of stdin is a message. Ctrl-C stops an
    answer, /exit or Ctrl-D leaves, /help lists the rest.

    \b
      intarsia chat Qwen/Qwen3.5-0.8B --weights int8
      intarsia chat my-model --system "Answer in one sentence." --temperature 0.3
      intarsia chat Qwen/Qwen3.5-0.8B --option enable_thinking=false
    """
    from intarsia.cli.generate import chosen_sampling
    from intarsia.cli.output import note
    from intarsia.cli.places import load, model_place
    from intarsia.data.chat import chat_template_of, parse_options
    from intarsia.errors import ConfigError
    from intarsia.inference.conversation import Conversation
    from intarsia.mixers.registry import use_plugins

    use_plugins(plugin)
    chosen_sampling(temperature, top_p, min_p, greedy)  # told before a model is read
    template = None if plain else chat_template_of(model_place(model))
    if template is not None:
        template = template.with_options(parse_options(option or ()))
        # What runs it is imported here, and what it does not take is told before a model is read.
        template.render([*([] if system is None else [{"role": "system", "content": system}]), FIRST])
    elif option:
        raise ConfigError(
            "--option is for a chat template, and " + ("--plain leaves it out" if plain else "there is none")
        )
    ready, tokenizer, conduct = load(model, device, dtype, weights, sparse)
    if template is None and not plain:
        note(
            f"{model} has no chat template (chat_template.jinja, or in tokenizer_config.json), so it has not learned "
            "to answer, or its files do not say how. Plain mode: what you type is continued as a text."
        )
    sampling = chosen_sampling(temperature, top_p, min_p, greedy, conduct)
    conversation = Conversation(
        ready,
        tokenizer,
        template,
        system=system,
        begin=conduct.begin or (tokenizer.separator,),
        stop={*conduct.stop, tokenizer.separator},
        sampling=sampling,
        seed=seed,
        max_tokens=max_tokens,
    )
    if sys.stdin.isatty():
        note("/help lists what there is beside talking")
    for line in _lines():
        if line in ("/exit", "/quit"):
            return
        if line == "/help":
            note(HELP)
        elif line == "/reset":
            conversation.reset()
            note("forgotten")
        elif line:
            _answer(conversation, line)


def _lines() -> Iterator[str]:
    """What is typed, or piped. Ctrl-C says how to leave, and twice leaves."""
    from intarsia.cli.output import note

    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (lines can be edited, and earlier ones come back)
    while True:
        try:
            line = input("> ") if terminal else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D leaves, and so does Ctrl-C once more")
            try:
                line = input("> ") if terminal else input()
            except EOFError:
                return
        yield line.strip()


def _answer(conversation: Conversation, message: str) -> None:
    from intarsia.cli.output import note
    from intarsia.errors import DataError
    from intarsia.files import message_of
    from intarsia.jobs.signals import handled

    stop = _Stop()
    try:
        with handled(stop, signal.SIGINT):
            for piece in conversation.say(message, stop.requested):
                sys.stdout.write(piece)
                sys.stdout.flush()
    except DataError as error:  # what the template does not take, another message may mend
        note(f"intarsia: {message_of(error)}")
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert conversation.last is not None
    note(summary(conversation.last))


class _Stop:
    """Ctrl-C while a model answers. The second one, if a step takes long, interrupts as it always does."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            raise KeyboardInterrupt
        self._seen = True

    def requested(self) -> bool:
        return self._seen


def summary(turn: Turn) -> str:
    """What a turn took, in a line."""
    decoding = turn.seconds - turn.seconds_to_first
    parts = [
        f"[{turn.read} tokens read in {turn.seconds_to_first:.2f} s, {turn.kept} kept",
        f"{turn.written} written" + (f" at {turn.written / decoding:.1f} tokens/s" if decoding > 0 else ""),
    ]
    if turn.ended != "stop":
        parts.append({"length": "cut at --max-tokens", "interrupted": "interrupted"}[turn.ended])
    return "; ".join(parts) + "]"
