"""Files that were damaged, cut off or lost, disks that are full, and code that has changed: noticed, and told what to
do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from intarsia.checkpoints.native import load_model, save_model
from intarsia.errors import CheckpointError, DataError
from intarsia.files import is_disk_full, message_of, naming, write_text
from intarsia.model import LanguageModel
from intarsia.ops import native
from intarsia.training import RunDirectory, TrainConfig, read_metrics
from intarsia.training.evaluate import Evaluation
from support.training_runs import Interrupt, Job, assert_same_run, finish, metrics_of, start


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no disk can be made here: {made.stderr}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk, leave=0):
    """Fill a disk up to some bytes."""
    with (disk / "filler").open("wb") as file:
        file.write(b"x" * (shutil.disk_usage(disk).free - leave))


def flip(path, start, count):
    """Invert some bytes of a file."""
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(255 - byte for byte in content[start : start + count])
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer.json", "checksums.json"])
def test_every_file_of_a_checkpoint_is_known_again(run, train_config, directory, tmp_path, name):
    run(train_config, progress=Interrupt(6))
    checkpoint = directory / "checkpoints" / "step-000006"
    middle = (checkpoint / name).stat().st_size // 2
    content = (checkpoint / name).read_bytes()

    def refused(words):
        with pytest.raises(CheckpointError, match=words) as caught:
            run(train_config)
        assert str(checkpoint) in str(caught.value)
        assert f"That of step 4 is sound: remove {checkpoint}" in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert not (directory / "result.json").exists()

    flip(checkpoint / name, middle, 1)
    refused("does not hold what was written" if name != "checksums.json" else "is damaged")
    (checkpoint / name).write_bytes(content[:middle])
    refused(rf"{name} has {middle:,} bytes and should have {len(content):,}|checksums.json is damaged")
    (checkpoint / name).unlink()
    refused(f"{name} is missing|cannot read .*{name}")

    # What it tells to do works, and the numbers are those of a run that nothing happened to.
    shutil.rmtree(checkpoint)
    run(train_config, tmp_path / "whole")
    run(train_config)
    assert_same_run(directory, tmp_path / "whole")


def test_the_sound_one_is_looked_for(run, train_config, directory):
    run(train_config.replace(checkpoint_every=2, keep_checkpoints=4), progress=Interrupt(8))
    for step in (8, 6):
        flip(directory / "checkpoints" / f"step-{step:06d}" / "__0_0.distcp", 5000, 4000)
    with pytest.raises(CheckpointError, match=r"step-000008 is damaged: .*That of step 4 is sound"):
        run(train_config)
    for step in (4, 2):
        (directory / "checkpoints" / f"step-{step:06d}" / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match="No older one is sound"):
        run(train_config)


def test_a_checkpoint_of_two_processes(model_config, dataset, train_config, directory, tmp_path):
    """Each process looks at its share, and all refuse alike."""
    (stopped,) = finish(
        start([Job(directory, train_config, interrupt=(1, 6))], model_config, dataset, processes=2)
    )
    assert [report["step"] for report in stopped] == [6, 6]
    checkpoint = directory / "checkpoints" / "step-000006"
    assert sorted(json.loads((checkpoint / "checksums.json").read_text())) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "trainer.json",
    ]  # fmt: skip
    flip(checkpoint / "__1_0.distcp", 3000, 10)
    jobs = [Job(directory, train_config), Job(tmp_path / "other", train_config.replace(steps=3))]
    refused, after = finish(start(jobs, model_config, dataset, processes=2))
    assert [report["finished"] for report in after] == [True, True]
    assert [report["error"] for report in refused] == ["CheckpointError"] * 2
    assert all("__1_0.distcp does not hold what was written" in report["message"] for report in refused)


def test_a_config_that_was_cut_off(run, model_config, dataset, train_config, directory):
    run(train_config, progress=Interrupt(6))
    config = directory / "config.json"
    content = config.read_text()
    config.write_text(content[: len(content) // 2])
    with pytest.raises(
        CheckpointError, match=r"config.json is damaged or was cut off: .* remove it, and give"
    ):
        run(train_config)
    config.unlink()
    # The checkpoint knows what the run is.
    with pytest.raises(CheckpointError, match=r"train.lr: 0.01 in the run, 0.5 now"):
        run(train_config.replace(lr=0.5))
    assert not config.exists()
    assert run(train_config).finished
    assert json.loads(config.read_text())["train"] == json.loads(content)["train"]


def test_a_config_that_was_cut_off_without_a_checkpoint(run, train_config, directory):
    run(train_config, progress=Interrupt(6))
    shutil.rmtree(directory / "checkpoints")
    (directory / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=rf"remove {directory} and start again"):
        run(train_config)


def test_a_result_that_was_cut_off(run, train_config, directory):
    run(train_config)
    (directory / "result.json").write_text('{"step": 12, ')
    with pytest.raises(
        CheckpointError, match=r"result.json is damaged.*Remove it and give the same command again"
    ):
        run(train_config)
    (directory / "result.json").unlink()
    assert run(train_config).finished


def test_a_model_whose_config_was_cut_off(run, train_config, directory):
    model = run(train_config).model_directory
    content = (model / "config.json").read_text()
    (model / "config.json").write_text(content[:200])
    with pytest.raises(
        CheckpointError, match=r"model/config.json is damaged or was cut off.*take the directory"
    ):
        load_model(model)


def test_an_evaluation_that_was_damaged(run, train_config, directory):
    run(train_config)
    path = RunDirectory(directory).evaluation(12)
    flip(path, path.stat().st_size // 3, 40)
    with pytest.raises(DataError, match="cannot read the evaluation"):
        Evaluation.load(path)


@pytest.mark.parametrize("damage", ["lost", "changed", "unreadable", "all"])
def test_metrics_that_were_lost_are_noticed(run, train_config, directory, damage):
    run(train_config, progress=Interrupt(6))
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    before = {
        "lost": [*lines[:2], *lines[4:]],
        "changed": [lines[0], lines[1].replace('"loss": ', '"loss": 1'), *lines[2:]],
        "unreadable": [lines[0], "\x00\n", *lines[2:]],
        "all": [],
    }[damage]
    path.write_text("".join(before))
    if damage == "unreadable":
        with pytest.raises(CheckpointError, match="its line 2 cannot be read"):
            read_metrics(path)
    with pytest.warns(UserWarning, match=r"metrics.jsonl is damaged: .* up to step 6 are"):
        run(train_config, progress=None)
    (gap,) = [line for line in metrics_of(directory) if line["kind"] == "gap"]
    assert (gap["step"], gap["lines"]) == (6, len(lines))
    assert gap["found"] == len(lines) - {"lost": 2, "changed": 0, "unreadable": 1, "all": len(lines)}[damage]
    assert metrics_of(directory)[-1]["step"] == 12


def test_a_gap_is_told_once(run, train_config, directory, recwarn):
    run(train_config, progress=Interrupt(6))
    path = directory / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    notes = []
    for step in (7, 8, 10):
        interrupt = Interrupt(step)
        run(train_config, progress=interrupt)
        notes += [note for note in interrupt.notes if "damaged" in note]
        if step == 7:  # killed before the next checkpoint: it begins at the same one again
            shutil.rmtree(directory / "checkpoints" / "step-000007")
    assert len(notes) == 1
    assert [line["step"] for line in metrics_of(directory) if line["kind"] == "gap"] == [6]


def test_a_full_disk(run, train_config, small_disk, tmp_path):
    directory = small_disk / "run"
    config = train_config.replace(steps=8, keep_checkpoints=1, checkpoint_every=4, eval_every=None)
    run(config, progress=Interrupt(3), where=directory)
    kept = directory / "checkpoints" / "step-000003"
    for leave in (0, 20_000, 200_000):  # nothing, a part of the tensors, more of them
        fill(small_disk, leave)
        with pytest.raises((CheckpointError, OSError)) as caught:
            run(config, where=directory)
        assert "the disk is full" in message_of(caught.value)
        assert str(directory) in message_of(caught.value)
        if leave == 200_000:
            assert isinstance(caught.value, CheckpointError)
            assert f"The last one is kept: {kept}" in str(caught.value)
            assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    (small_disk / "filler").unlink()
    run(config, where=directory)
    run(config, tmp_path / "whole")
    assert_same_run(directory, tmp_path / "whole")


def test_a_full_disk_when_the_model_is_saved(model_config, small_disk):
    model = LanguageModel(model_config)
    fill(small_disk, 50_000)
    with pytest.raises(CheckpointError, match=r"model.safetensors: the disk is full\. Make room"):
        save_model(small_disk / "model", model)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_errors_of_the_system_name_the_file(tmp_path):
    with pytest.raises(OSError) as caught, naming(tmp_path / "x"), open("/dev/full", "w") as full:
        full.write("x" * 100_000)
    assert is_disk_full(caught.value)
    assert message_of(caught.value).startswith(f"{tmp_path / 'x'}: the disk is full")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "file" / "below", "x")
    assert str(tmp_path / "file") in message_of(caught.value)
    assert not is_disk_full(caught.value)
    # As PyTorch tells of it: what the system said is behind words of its own.
    outer = RuntimeError("unexpected pos 704 vs 598")
    outer.__context__ = OSError(28, "No space left on device")
    assert is_disk_full(outer)


def test_other_kernels_are_told(run, train_config, directory, monkeypatch):
    if native.missing_reason() is not None:
        pytest.skip("there are no kernels here")
    run(train_config, progress=Interrupt(6))
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from intarsia.data import TokenDataset\n"
        "from intarsia.model import ModelConfig\n"
        "from intarsia.training import TrainConfig, train\n"
        "model, config, data, directory = sys.argv[1:]\n"
        "train(ModelConfig.from_dict(json.loads(model)), TrainConfig.from_dict(json.loads(config)),\n"
        "      TokenDataset(data), None, directory, device='cpu')\n"
    )
    record = json.loads((directory / "config.json").read_text())
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(record["model"]), json.dumps(train_config.to_dict()),
         os.fspath(dataset_directory(run)), os.fspath(directory)],
        env={**os.environ, "INTARSIA_CPU_ISA": "off"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Going on from step 6 with kernels was" in done.stderr
    assert "will differ in rounding" in done.stderr
    (entry,) = json.loads((directory / "config.json").read_text())["history"]
    assert entry["step"] == 6
    assert "kernels was" in entry["changed"][0]


def dataset_directory(run):
    """Where the data of the fixture are."""
    return run.__closure__[run.__code__.co_freevars.index("dataset")].cell_contents.directory


def test_other_code_is_refused(run, train_config, directory, tmp_path):
    """As if the run had been made by another version of a module: the checkpoint tells of other code, consistently."""
    from intarsia.training import Parent, checksums

    run(train_config.replace(keep_stable=True), progress=Interrupt(6))
    checkpoint = directory / "checkpoints" / "step-000006"
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    trainer["run"]["fingerprint"]["code"]["intarsia.mixers.kda"] = "0123456789abcdef"
    (checkpoint / "trainer.json").write_text(json.dumps(trainer))
    checksums.write(
        checkpoint, {name: checksums.Known.of(checkpoint / name) for name in checksums.names(checkpoint)}
    )
    with pytest.raises(
        CheckpointError, match=r"has changed:\n  the code of intarsia.mixers.kda changed"
    ) as caught:
        run(train_config)
    assert f"--from {directory}@6" in str(caught.value)
    with pytest.warns(UserWarning, match="the code of intarsia.mixers.kda changed"):
        run(train_config, tmp_path / "branch", parent=Parent(directory, 6))
    lineage = json.loads((tmp_path / "branch" / "config.json").read_text())["lineage"]
    assert lineage["changed"] == ["the code of intarsia.mixers.kda changed"]


def test_settings_that_do_not_hold_are_no_reason_to_write(run, train_config, directory):
    run(train_config, progress=Interrupt(6))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    with pytest.raises(CheckpointError):
        run(TrainConfig.from_dict({**train_config.to_dict(), "warmup_steps": 7}))
    assert {path: path.stat().st_mtime_ns for path in before} == before
