"""Files and directories that are wholly there or not at all."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from intarsia import files
from intarsia.files import directory_atomically, link_or_copy, message_of, write_text


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.fixture(params=["in one step", "in two"])
def replaced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a system that can let two names change places."""
    if request.param == "in two":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def fill(target: Path, **texts: str) -> None:
    with directory_atomically(target) as partial:
        for name, text in texts.items():
            (partial / name).write_text(text)


@pytest.mark.usefixtures("replaced")
def test_a_directory_is_made_and_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "below" / "target"
    fill(target, a="1", b="1")
    assert content(target) == {"a": "1", "b": "1"}
    fill(target, a="2")
    assert content(target) == {"a": "2"}, "nothing is left of the old one"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == (tmp_path / "below").stat().st_mode & 0o777


@pytest.mark.usefixtures("replaced")
def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for before in ({}, {"a": "1"}):
        with pytest.raises(OSError), directory_atomically(target) as partial:
            write_text(partial / "a" / "x", (partial / "a").write_text("2") * "x")
        assert (content(target) if target.exists() else {}) == before
        assert list(tmp_path.iterdir()) == ([target] if before else [])
        fill(target, a="1")


def test_a_file_of_that_name_stays(tmp_path: Path) -> None:
    """Told before anything is made, and in words that say what to do."""
    target = tmp_path / "target"
    target.write_text("mine")
    with pytest.raises(NotADirectoryError) as caught, directory_atomically(target):
        raise AssertionError("nothing is to be filled")
    assert (
        message_of(caught.value)
        == f"{target}: this is a file, and a directory is to be written: choose another name"
    )
    assert target.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


def test_readers_see_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    """Where the system can exchange names, no moment is between them."""
    target = tmp_path / "target"
    fill(target, a="0")
    fill(other := tmp_path / "other", a="x")
    if not files._exchange(target, other):
        pytest.skip("names cannot be exchanged here")
    fill(target, a="0")
    stop, missed = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if not target.is_dir():
                missed.append("gone")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        fill(target, a=str(number))
    stop.set()
    reader.join()
    assert not missed
    assert content(target) == {"a": "49"}


def test_who_was_faster_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with directory_atomically(target, unless=lambda found: (found / "done").exists()) as partial:
        (partial / "a").write_text("slow")
        fill(target, a="fast", done="")
    assert content(target)["a"] == "fast"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_a_directory_stays_one(tmp_path: Path) -> None:
    fill(tmp_path / "real", a="1")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", a="2")
    assert content(tmp_path / "real") == {"a": "2"}
    assert (tmp_path / "link").is_symlink()


def test_the_current_directory_is_not_pulled_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "here", a="1")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OSError) as caught:
        fill(Path("."), a="2")
    assert "here: this is the current directory" in message_of(caught.value)
    assert content(tmp_path / "here") == {"a": "1"}
    fill(Path("below"), a="2")


def test_a_system_without_exchange_is_known(tmp_path: Path) -> None:
    fill(tmp_path / "one", a="1")
    with pytest.raises(OSError) as caught:
        files._exchange(tmp_path / "one", tmp_path / "nowhere")
    assert caught.value.errno == errno.ENOENT


def test_links_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "1")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "1"
    assert not (tmp_path / "a").samefile(tmp_path / "c")
