"""Training: optimizers, schedules, the loop, checkpoints and evaluation."""

from intarsia.jobs.progress import NoProgress, Progress, RichProgress
from intarsia.training.baselines import NGrams
from intarsia.training.beginning import Beginning
from intarsia.training.config import TrainConfig
from intarsia.training.evaluate import Evaluation, evaluate
from intarsia.training.lineage import Parent
from intarsia.training.metrics import read_metrics
from intarsia.training.result import TrainResult
from intarsia.training.run_directory import RunDirectory
from intarsia.training.start_or_resume import train

__all__ = [
    "Beginning",
    "Evaluation",
    "NGrams",
    "NoProgress",
    "Parent",
    "Progress",
    "RichProgress",
    "RunDirectory",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "read_metrics",
    "train",
]
