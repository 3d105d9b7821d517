"""How many tokens of prompts a step may read, so that those who wait for their next token do not wait long."""

from __future__ import annotations

LEAST = 16
"""Tokens that are read in any case: a machine that is slow beyond hope goes on all the same."""
WEIGHT = 0.3
"""Of the newest step in the means."""


class Pace:
    """Learns from each step what it costs to continue texts, and what each token of a prompt costs beside.

    Args:
        seconds: that a step may take where texts are being continued.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._continuing = 0.0
        self._token: float | None = None

    def note(self, read: int, continued: bool, seconds: float) -> None:
        """A step took so many seconds, in which so many tokens of prompts were read, and texts continued or not."""
        if not read:
            self._continuing += WEIGHT * (seconds - self._continuing)
            return
        each = max(seconds - (self._continuing if continued else 0.0), 0.0) / read
        self._token = each if self._token is None else self._token + WEIGHT * (each - self._token)

    def tokens(self, most: int) -> int:
        """How many tokens of prompts may be read beside texts that are continued, `most` at most."""
        if not self._token:
            return most
        fit = (self._seconds - self._continuing) / self._token
        return min(most, max(LEAST, int(fit)))
