"""What the files of a checkpoint were when they were written, to know them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from intarsia.errors import CheckpointError
from intarsia.files import message_of, sha256, write_json
from intarsia.training.run_directory import read_json

FILE = "checksums.json"


@dataclass(frozen=True)
class Known:
    """A file's length and the SHA-256 of its content."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Known:
        """Those of a file that is there."""
        return cls(path.stat().st_size, sha256(path))


def names(directory: Path) -> list[str]:
    """The files in a checkpoint's directory that have checksums: all but the list of them."""
    return sorted(path.name for path in directory.iterdir() if path.name != FILE)


def write(directory: Path, known: dict[str, Known]) -> None:
    """Write the list."""
    write_json(directory / FILE, {name: asdict(one) for name, one in sorted(known.items())})


def read(directory: Path) -> dict[str, Known]:
    """The list of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return {name: Known(**one) for name, one in read_json(directory / FILE).items()}
    except TypeError as error:
        raise CheckpointError(f"{directory / FILE} is damaged: {error}") from error


def problem(directory: Path, name: str, known: Known) -> str | None:
    """What is wrong with a file, if anything."""
    path = directory / name
    try:
        size = path.stat().st_size
        if size != known.bytes:
            return f"{name} has {size:,} bytes and should have {known.bytes:,}"
        if sha256(path) != known.sha256:
            return f"{name} does not hold what was written (its checksum differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return message_of(error)
    return None


def problems(directory: Path, share: Sequence[int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, in all files or in the share `(rank, of how many)` of one process."""
    try:
        known = read(directory)
    except CheckpointError as error:
        return [str(error)]
    rank, size = share
    found = (problem(directory, name, known[name]) for name in sorted(known)[rank::size])
    return [one for one in found if one is not None]
