"""The child process that makes one run: `python -m intarsia.ladder.worker DIRECTORY`.

A process of its own keeps a crash, a lack of memory or a NaN from taking the comparison with it. It talks to its
parent in lines of JSON on standard output; everything else that is printed goes to the run's log.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

DONE, CRASHED, FAILED, INTERRUPTED = 0, 1, 3, 4
PARENT = "INTARSIA_LADDER_PARENT"


class Channel:
    """Lines of JSON to the parent. A parent that has gone is no error: this process is told so otherwise."""

    seconds_between_lines = 0.2

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._sent = 0.0

    def send(self, **values: Any) -> None:
        try:
            self._stream.write(json.dumps(values) + "\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            pass

    # The face of `intarsia.training.Progress`.
    def begin(self, label: str, total: int, done: int = 0) -> None:
        self.send(event="begin", total=total, done=done)

    def advance(self, done: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._sent >= self.seconds_between_lines:
            self._sent = now
            self.send(event="step", done=done, loss=values.get("loss"), speed=values.get("tokens/s"))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        pass


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, however it dies (Linux; elsewhere nothing happens)."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
    except (OSError, AttributeError):
        return
    parent = os.environ.get(PARENT)
    if parent and os.getppid() != int(parent):
        sys.exit(INTERRUPTED)


def open_channel() -> Channel:
    """Standard output for the parent alone; what others print goes where errors go."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return Channel(stream)


def hold_lock(path: Path, seconds: float = 60.0) -> TextIO:
    """Keep other processes out of a directory until this one ends.

    A run whose parent was killed may still be saving its checkpoint: wait for that.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"another process is still at work in {path.parent}") from None
            time.sleep(0.1)


def main(arguments: list[str]) -> int:
    """Make the run in the directory that is given; the exit status says how it went."""
    die_with_parent()
    channel = open_channel()
    path = Path(arguments[0])
    lock = hold_lock(path / ".lock")
    from intarsia.errors import TrainingError
    from intarsia.files import write_json

    try:
        return _run(path, channel)
    except TrainingError as error:
        write_json(path / "failure.json", {"kind": "diverged", "message": str(error)})
        return FAILED
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        write_json(path / "failure.json", {"kind": "crashed", "message": message})
        return CRASHED
    finally:
        lock.close()


def _run(path: Path, channel: Channel) -> int:
    import numpy as np
    import torch

    from intarsia.checkpoints.native import load_model
    from intarsia.data import TokenDataset, load_tokenizer
    from intarsia.errors import CheckpointError, TrainingError
    from intarsia.files import write_json
    from intarsia.ladder.runs import RunFolder, RunSpec
    from intarsia.model import ModelConfig
    from intarsia.model.fingerprint import changes, fingerprint
    from intarsia.training import TrainConfig, evaluate, train

    folder, spec = RunFolder(path), RunSpec.load(path)
    if folder.outcome.exists():  # A process that was thought lost has finished it.
        return DONE
    torch.set_num_threads(spec.threads)
    device = (
        "cuda" if spec.device == "auto" and torch.cuda.is_available() else spec.device.replace("auto", "cpu")
    )
    model_config = ModelConfig.from_dict(spec.model)
    changed = changes(spec.fingerprint, fingerprint(model_config, device).to_dict())
    if changed:
        raise CheckpointError(
            f"since the comparison was started, {'; '.join(changed)}: give the same command again to make new runs"
        )
    config = TrainConfig.from_dict(dict(spec.train))
    dataset = TokenDataset(spec.dataset)
    tokenizer = load_tokenizer(dataset.directory / "tokenizer")
    result = train(
        model_config,
        config,
        dataset,
        tokenizer,
        folder.train,
        progress=channel,
        device=spec.device,
    )
    if not result.finished:
        return INTERRUPTED
    channel.send(event="judging")
    evaluation = evaluate(
        load_model(folder.model, device=device),
        dataset.heldout,
        length=config.length,
        documents=spec.documents,
        tokens_per_document=spec.tokens_per_document,
        tokenizer=tokenizer,
        precision=config.precision,
    )
    if not np.all(np.isfinite(evaluation.nll)):
        raise TrainingError("the trained model's likelihood of some held-out document is not finite")
    evaluation.save(folder.evaluation)
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    write_json(
        folder.outcome,
        {
            "bits_per_byte": evaluation.bits_per_byte,
            "batches": result.batches,
            "steps": result.step,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        },
    )
    # The model is kept; what was needed to go on is not needed any more.
    shutil.rmtree(folder.train / "checkpoints", ignore_errors=True)
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
