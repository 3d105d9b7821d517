"""The table of tasks: one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intarsia.errors import ConfigError, OptionError, did_you_mean
from intarsia.settings import read
from intarsia.tasks.base import Task
from intarsia.tasks.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
)
from intarsia.tasks.mixed import Mixed
from intarsia.tasks.mqar import MQAR
from intarsia.tasks.multihop import Chains, KHop, Relations, Variables
from intarsia.tasks.palindrome import Palindrome
from intarsia.tasks.regression import Regression
from intarsia.tasks.retrieval import Copying, MultiRound, Needle
from intarsia.tasks.ruler import RULER
from intarsia.tasks.stack import Stack
from intarsia.tasks.state_tracking import ModularCounting, Parity, WordProblem
from intarsia.tasks.text import TextTask
from intarsia.tasks.zoology import ZoologyMQAR

TASKS: tuple[type[Task], ...] = (
    Palindrome,
    MQAR,
    Stack,
    ZoologyMQAR,
    InContextRecall,
    FuzzyRecall,
    NoisyRecall,
    SelectiveCopying,
    Compression,
    Memorization,
    Copying,
    Needle,
    MultiRound,
    Regression,
    Parity,
    ModularCounting,
    WordProblem,
    KHop,
    Chains,
    Variables,
    Relations,
)
"""The tasks of this package."""


TEXTS: tuple[type[TextTask], ...] = RULER
"""Tasks of text, on which models with tokenizers are examined."""
EXAMS: tuple[type[Task] | type[TextTask], ...] = (*TASKS, *TEXTS)
"""All of both."""


def names() -> list[str]:
    """The names of all tasks of tokens, which models can learn from scratch."""
    return [config.type for config in TASKS]


def text_names() -> list[str]:
    """The names of all tasks of text."""
    return [config.type for config in TEXTS]


def task(name: str) -> type[Task]:
    """The configuration of a task.

    Raises:
        ConfigError: there is none of that name.
    """
    for config in TASKS:
        if config.type == name:
            return config
    if name in text_names():
        raise ConfigError(
            f"the task {name!r} is of text: `intarsia exam` examines models that have a tokenizer on it"
        )
    raise ConfigError(f"there is no task {name!r}{did_you_mean(name, names() + text_names())}")


def make_exam(name: str, options: Mapping[str, Any]) -> Task | TextTask:
    """The task of that name with these options, of tokens or of text; errors as in `make_task`."""
    for config in TEXTS:
        if config.type == name:
            try:
                return read(config, options)
            except OptionError as error:
                raise error.under(("options",)) from None
    return make_task(name, options)


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of that name with these options.

    Raises:
        OptionError: there is none of that name, or an option is missing, unknown or cannot be right.
    """
    try:
        kind = task(name)
    except ConfigError as error:
        raise OptionError(str(error), ("task",)) from None
    try:
        return read(kind, options)
    except OptionError as error:
        raise error.under(("options",)) from None


def make_mixed(name: str, options: Mapping[str, Any], mixture: Sequence[Mapping[str, Any]]) -> Task:
    """The task with each of some changes to its options in turn; without any, the task itself.

    Raises:
        OptionError: as `make_task`.
        ConfigError: the changes make tasks of other lengths or tokens than one another.
    """
    if not mixture:
        return make_task(name, options)
    parts = tuple(make_task(name, {**options, **changes}) for changes in mixture)
    return Mixed(parts[0].length, parts)
