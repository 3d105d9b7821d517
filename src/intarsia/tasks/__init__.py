"""What a model is examined on: examples from a seed alone, and scores. One file a task; `registry.py` is the table."""

from intarsia.model.loss import IGNORED
from intarsia.tasks.base import Examples, ExampleSplit, Task
from intarsia.tasks.exam import Answers, examine
from intarsia.tasks.mqar import MQAR
from intarsia.tasks.palindrome import Palindrome
from intarsia.tasks.registry import make_task, names, task
from intarsia.tasks.score import NOTHING, Score, score
from intarsia.tasks.stack import Stack

__all__ = [
    "IGNORED",
    "MQAR",
    "NOTHING",
    "Answers",
    "ExampleSplit",
    "Examples",
    "Palindrome",
    "Score",
    "Stack",
    "Task",
    "examine",
    "make_task",
    "names",
    "score",
    "task",
]
