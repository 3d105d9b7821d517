"""From the tokens of an answer to its text, up to the first of some strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from intarsia.errors import ConfigError

if TYPE_CHECKING:
    from intarsia.data.tokenizer import Tokenizer


class TextStream:
    """Text as the tokens come. What it has given is final: a character that takes several tokens comes when it is
    whole, and what may turn out to be the beginning of a stop string when it did not.

    Args:
        stops: strings that end the answer, of which they are no part.

    Attributes:
        stopped: whether one of them has come.

    Raises:
        ConfigError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise ConfigError("a stop string is empty: it would end every answer before its beginning")
        self._decoder, self._stops, self._held = tokenizer.decode_stream(), tuple(stops), ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token and give the text that is certain now."""
        return self._take(self._decoder.push(token))

    def finish(self) -> str:
        """The text that is still held back, at the end of the answer."""
        if self.stopped:
            return ""
        rest = self._take(self._decoder.finish())
        return rest if self.stopped else rest + self._held

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]
