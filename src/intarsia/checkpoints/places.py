"""Where a checkpoint is: a folder, or a repository that has been downloaded. Nothing is ever fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from intarsia.errors import CheckpointError

_REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?")


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository, and is not that of a file or folder."""
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).expanduser().exists()


def find_folder(path_or_repo: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint.

    Args:
        path_or_repo: a folder, or `OWNER/NAME` (`OWNER/NAME@REVISION`) of a repository in Hugging Face's cache on this
            machine.

    Raises:
        CheckpointError: it is neither; the message says what to download.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the folder that it is in")
    name = os.fspath(path_or_repo)
    found = _REPOSITORY.fullmatch(name)
    if found is None:
        raise CheckpointError(f"there is no folder {name}{_meant(name)}")
    repository, revision = found[1], found[2] or "main"
    cached = _cache() / f"models--{repository.replace('/', '--')}"
    reference = cached / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = cached / "snapshots" / commit
    if snapshot.is_dir() and (snapshot / "config.json").exists():
        return snapshot
    of = "" if found[2] is None else f" --revision {revision}"
    raise CheckpointError(
        f"there is no folder {name}, and the repository {repository} ({revision}) is not in the cache {cached.parent}. "
        f"Nothing is downloaded here: fetch it with `hf download {repository}{of}` (of huggingface_hub), or give the "
        "folder where you have it, its config.json, *.safetensors, their index.json and the tokenizer files"
    )


def _meant(name: str) -> str:
    """What may be meant by a name that is neither of a folder nor of a repository."""
    from intarsia.model import presets

    if name in presets.names():
        return f": it is a preset's name, a model without weights, which `intarsia train {name}` makes"
    if (address := re.match(r"https?://huggingface\.co/([^/]+/[^/?#]+)", name)) is not None:
        return f": a repository that has been downloaded is named {address[1]}"
    return (
        "; give that of a model or of a training run, or, as OWNER/NAME, a repository in Hugging Face's cache on this "
        "machine"
    )


def _cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
