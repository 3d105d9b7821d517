"""The child process that makes one run: `python -m intarsia.ladder.worker DIRECTORY`.

A process of its own keeps a crash, a lack of memory or a NaN from taking the comparison with it. What it prints goes
to the run's log.
"""

from __future__ import annotations

import resource
import sys
import traceback
from pathlib import Path

from intarsia.jobs.child import CRASHED, DONE, FAILED, INTERRUPTED, Channel, child_process, die_with_parent
from intarsia.jobs.ranks import my_rank


def main(arguments: list[str]) -> int:
    """Make the run in the directory that is given; the exit status says how it went."""
    path = Path(arguments[0])
    if my_rank():
        return _help(path)
    with child_process(path / ".lock") as channel:
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


def _help(path: Path) -> int:
    """Be one of the other processes of a run: the first one tells of it, and writes what comes out."""
    die_with_parent()
    from intarsia.errors import TrainingError

    try:
        return _run(path, Channel(sys.stderr))
    except TrainingError:
        return FAILED
    except Exception:
        traceback.print_exc()
        return CRASHED


def _run(path: Path, channel: Channel) -> int:
    import torch

    from intarsia.errors import CheckpointError
    from intarsia.files import write_json
    from intarsia.jobs.freed_memory import keep_freed_memory
    from intarsia.ladder.branches import keep_stable_alone
    from intarsia.ladder.lessons import learn
    from intarsia.ladder.run_folder import RunFolder
    from intarsia.ladder.run_spec import RunSpec
    from intarsia.model import ModelConfig
    from intarsia.model.fingerprint import changes, fingerprint
    from intarsia.training import TrainConfig

    folder, spec = RunFolder(path), RunSpec.load(path)
    if folder.outcome.exists():  # A process that was thought lost has finished it.
        return DONE
    torch.set_num_threads(spec.threads)
    keep_freed_memory()
    device = spec.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    now = fingerprint(ModelConfig.from_dict(spec.model), device, modules=spec.lesson.modules)
    changed = changes(spec.fingerprint, now.to_dict())
    if changed:
        raise CheckpointError(
            f"since the comparison was started, {'; '.join(changed)}: give the same command again to make new runs"
        )
    outcome = learn(folder, spec, device, channel)
    if outcome is None:
        return INTERRUPTED
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    write_json(folder.outcome, {**outcome, "peak_bytes": peak})
    # The model is kept; what was needed to go on is not needed any more, unless by longer runs.
    keep_stable_alone(folder, TrainConfig.from_dict(dict(spec.train)))
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
