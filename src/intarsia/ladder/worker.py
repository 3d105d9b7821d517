"""The child process that makes one run: `python -m intarsia.ladder.worker DIRECTORY`.

A process of its own keeps a crash, a lack of memory or a NaN from taking the comparison with it. What it prints goes
to the run's log.
"""

from __future__ import annotations

import resource
import shutil
import sys
import traceback
from pathlib import Path

from intarsia.jobs.child import CRASHED, DONE, FAILED, INTERRUPTED, Channel, child_process


def main(arguments: list[str]) -> int:
    """Make the run in the directory that is given; the exit status says how it went."""
    path = Path(arguments[0])
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


def _run(path: Path, channel: Channel) -> int:
    import numpy as np
    import torch

    from intarsia.checkpoints.native import load_model
    from intarsia.data import TokenDataset, load_tokenizer
    from intarsia.errors import CheckpointError, TrainingError
    from intarsia.files import write_json
    from intarsia.ladder.run_folder import RunFolder, RunSpec
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
