"""`intarsia chat` as one meets it: a process of its own at a terminal, keys and all."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import intarsia
from cli.test_chat import conversation, folder

pytest.importorskip("transformers")
pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
pytestmark = pytest.mark.slow
__all__ = ["folder"]

CTRL_C, CTRL_D = b"\x03", b"\x04"
# The process takes the terminal for its own, so that the terminal's Ctrl-C is sent to it.
CHAT = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from intarsia.cli import main; "
    "sys.exit(main(['chat', *sys.argv[1:]]))"
)


class Terminal:
    """What is typed at a chat, and what it shows."""

    def __init__(self, keys: int, process: subprocess.Popen[bytes]) -> None:
        self._keys, self._process, self._shown = keys, process, ""

    def press(self, keys: bytes) -> None:
        os.write(self._keys, keys)

    def interrupt_at_the_prompt(self) -> None:
        """CPython loses a signal that comes after readline has shown its prompt and before it waits for keys."""
        self.until("> $")
        time.sleep(0.5)
        self.press(CTRL_C)

    def say(self, line: str) -> None:
        self.press(line.encode() + b"\r")

    def until(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Wait until that is shown, and take all up to its end off the screen."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self._shown)) is None:
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} was not shown; on the screen: {self._shown[-2000:]!r}"
            if select.select([self._keys], [], [], left)[0]:
                try:
                    self._shown += os.read(self._keys, 4096).decode(errors="replace")
                except OSError:  # the process has ended
                    pytest.fail(f"it ended before {pattern!r} was shown: {self._shown[-2000:]!r}")
        self._shown = self._shown[found.end() :]
        return found

    def ended(self) -> int:
        return self._process.wait(timeout=60)


@contextmanager
def chat(*arguments: object) -> Iterator[Terminal]:
    keys, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHAT, *map(str, arguments)],
        stdin=screen, stdout=screen, stderr=screen, start_new_session=True, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(screen)
    try:
        yield Terminal(keys, process)
    finally:
        process.kill()
        process.wait()
        os.close(keys)


SUMMARY = r"\[(\d+) tokens read in [\d.]+ s, (\d+) kept; (\d+) written[^;\]]*(?:; ([^\]]+))?\]\s+> $"


def test_turns_end_at_the_models_own_tokens_and_go_on_from_its_state(folder: Path, tmp_path: Path) -> None:
    """`generation_config.json` says that answers are greedy and which tokens end them."""
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    tokenizer = intarsia.load_tokenizer(place)
    free = conversation(folder, stop=set(), max_tokens=12)
    answer = tokenizer.encode("".join(free.say("one two")))
    last = next(token for n, token in enumerate(answer) if n > 1 and token not in answer[:n])
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [last], "do_sample": False}))

    stop = {last, tokenizer.separator}
    talk = conversation(folder, stop=stop, max_tokens=40, system="three")
    ends, kept = [], 0
    with chat(place, "--system", "three", "-n", 40) as terminal:
        terminal.until("/help lists")
        terminal.until("> $")
        for message in ("one two", "two", "three one"):
            expected = "".join(talk.say(message))
            terminal.say(message)
            found = terminal.until(SUMMARY)
            assert talk.last is not None
            assert [int(found[n]) for n in (1, 2, 3)] == [talk.last.read, talk.last.kept, talk.last.written]
            assert expected.strip() in " ".join(found.string.split())
            assert talk.last.kept >= kept
            kept = talk.last.kept + talk.last.read
            assert (found[4] is None) == (talk.last.ended == "stop")
            ends.append(talk.last.ended)
        terminal.say("/exit")
        assert terminal.ended() == 0
    assert "stop" in ends
    assert kept > 20


def test_ctrl_c_stops_an_answer_and_not_the_program(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"][1] = 0  # the token that ends an answer is never the likeliest
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with chat(place, "-n", 1_000_000) as terminal:
        terminal.until("> $")
        read = 0
        for message in ("one", "two"):
            terminal.say(message)
            terminal.until(r"(?:\w+ ){30}")
            terminal.press(CTRL_C)
            found = terminal.until(SUMMARY)
            assert found[4] == "interrupted"
            assert int(found[3]) >= 30
            assert int(found[2]) == read
            read += int(found[1]) + int(found[3])
        terminal.press(CTRL_C)  # where nothing is answered, it says how to leave
        terminal.until("/exit or Ctrl-D leaves")
        terminal.say("/reset")
        terminal.until(r"forgotten\s+> $")
        terminal.say("one")
        terminal.until(r"(?:\w+ ){5}")
        terminal.press(CTRL_C)
        assert int(terminal.until(SUMMARY)[2]) == 0
        terminal.press(CTRL_D)
        assert terminal.ended() == 0


def test_ctrl_c_twice_leaves(folder: Path) -> None:
    with chat(folder) as terminal:
        terminal.interrupt_at_the_prompt()
        terminal.until("leaves, and so does Ctrl-C once more")
        terminal.interrupt_at_the_prompt()
        assert terminal.ended() == 130
