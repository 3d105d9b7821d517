"""From the arms of a plan to model configurations of one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from intarsia.errors import ConfigError, OptionError, did_you_mean
from intarsia.ladder.plan import Plan
from intarsia.ladder.plan_tables import Arm, Matching, PlanError
from intarsia.model import ModelConfig, presets
from intarsia.model.cost import ModelCost
from intarsia.model.language_model import cost_of
from intarsia.model.matching import Count, match_parameters, match_states
from intarsia.settings import merge


@dataclass(frozen=True)
class ResolvedArm:
    """An arm with the configuration that is trained."""

    arm: Arm
    config: ModelConfig
    parameters: int
    non_embedding_parameters: int
    change: str
    """What matching changed, in words; empty if nothing."""

    @property
    def name(self) -> str:
        return self.arm.name


def resolve(plan: Plan, vocab_size: int) -> tuple[ResolvedArm, ...]:
    """The configurations of all arms, matched to the reference arm by the plan's rule.

    The rule: parameters are counted without the embedding and the head. An arm that is within the tolerance of
    the reference stays as it is; another has its feed-forward width changed, and nothing else
    (`intarsia.model.matching`), or is an error where the plan forbids changes. Where states are matched too, the
    windows of arms with sliding windows are chosen first, which changes no parameter.

    Raises:
        PlanError: a preset or an option that does not exist, or sizes that cannot be brought together.
    """
    configs = _configurations(plan, vocab_size)
    reference = plan.matching.reference or plan.arms[0].name
    target = cost_of(configs[reference])
    resolved = []
    for index, arm in enumerate(plan.arms):
        try:
            config = _matched(configs[arm.name], target, plan.matching)
        except ConfigError as error:
            raise PlanError(
                f"{arm.name} cannot be matched to {reference}: {error}", ("arms", index)
            ) from None
        cost = cost_of(config)
        change = _change(configs[arm.name], config)
        resolved.append(ResolvedArm(arm, config, cost.parameters, cost.non_embedding_parameters, change))
    return tuple(resolved)


_COUNTS: Mapping[str, tuple[str, Count]] = MappingProxyType(
    {
        "total": ("parameters without embeddings", attrgetter("non_embedding_parameters")),
        "active": ("active parameters without embeddings", attrgetter("active_non_embedding_parameters")),
    }
)


def _matched(config: ModelConfig, target: ModelCost, rule: Matching) -> ModelConfig:
    """The configuration of an arm as the plan's rule brings it to the reference.

    Raises:
        ConfigError: it cannot be brought there.
    """
    if rule.state_at is not None:
        bytes_wanted = target.state_bytes(rule.state_at)
        near = (
            abs(cost_of(config).state_bytes(rule.state_at) - bytes_wanted)
            <= rule.state_tolerance * bytes_wanted
        )
        if not near and not rule.adjust:
            raise ConfigError("its states have another size, and the plan forbids changes (matching.adjust)")
        config = match_states(config, bytes_wanted, rule.state_at, rule.state_tolerance)
    chosen = "active" if rule.of == "active" else "total"
    _, count = _COUNTS[chosen]
    if abs(count(cost_of(config)) - count(target)) > rule.tolerance * count(target) and rule.adjust:
        config = match_parameters(config, count(target), rule.tolerance, count)
    for name in ("total", "active") if rule.of == "both" else (chosen,):
        words, count = _COUNTS[name]
        has, wanted = count(cost_of(config)), count(target)
        if abs(has - wanted) > rule.tolerance * wanted:
            why = (
                "the widths that match all parameters leave the active ones apart (matching.of says which are matched)"
                if rule.adjust
                else "the plan forbids changes (matching.adjust)"
            )
            raise ConfigError(
                f"it has {has:,} {words}, where {wanted:,} are wanted: more than {100 * rule.tolerance:g}% apart, and "
                f"{why}"
            )
    return config


def check_models(plan: Plan) -> None:
    """Make sure, before there are data, that the configuration of every arm can be right.

    Raises:
        PlanError: one cannot; with the place in the plan.
    """
    _configurations(plan, None)


def mixers_of(plan: Plan, names: Sequence[str]) -> set[str]:
    """The mixers that these arms have."""
    configs = _configurations(plan, None)
    return {mixer for name in names for mixer in configs[name].mixers}


def _configurations(plan: Plan, vocab_size: int | None) -> dict[str, ModelConfig]:
    """The configuration of each arm, before matching. Without a vocabulary yet, of any."""
    configs = {}
    for index, arm in enumerate(plan.arms):
        try:
            configs[arm.name] = _configuration(plan, arm, vocab_size)
        except ConfigError as error:
            if not isinstance(error, OptionError) or not error.path:
                raise PlanError(f"{arm.name}: {error}", ("arms", index)) from None
            shared = not _says(arm.model, error.path) and _says(plan.model, error.path)
            place = ("model",) if shared else ("arms", index, "model")
            raise PlanError(error.message, (*place, *error.path)) from None
    have = {name for config in configs.values() for name in config.mixers}
    for name in plan.model.get("mixers", {}):
        # A change to a mixer is for the arms that have it, so somebody has to.
        if name not in have:
            raise PlanError(
                f"no arm has a mixer {name!r}{did_you_mean(name, sorted(have))}", ("model", "mixers", name)
            )
    return configs


def _says(values: Any, path: tuple[str | int, ...]) -> bool:
    """Whether nested tables have something at `path`."""
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


def _configuration(plan: Plan, arm: Arm, vocab_size: int | None) -> ModelConfig:
    if vocab_size is None:
        vocab_size = arm.model.get("vocab_size", plan.model.get("vocab_size", 1024))
    shared = dict(plan.model)
    if arm.preset and isinstance(shared.get("mixers"), Mapping):
        # A change to a mixer is for the arms that have it.
        has = presets.get(arm.preset, vocab_size=vocab_size).mixers
        shared["mixers"] = {name: change for name, change in shared["mixers"].items() if name in has}
    return presets.configure(arm.preset, merge(shared, arm.model), vocab_size)


def _change(before: ModelConfig, after: ModelConfig) -> str:
    changes = []
    tables = [(name, getattr(before, name), getattr(after, name)) for name in ("feed_forward", "experts")]
    tables += [(name, options, after.mixers[name]) for name, options in before.mixers.items()]
    for name, old, new in tables:
        if old == new or old is None or new is None:
            continue
        for field in dataclasses.fields(old):
            if getattr(old, field.name) != getattr(new, field.name):
                changes.append(f"{name}.{field.name} {getattr(old, field.name)} → {getattr(new, field.name)}")
    return ", ".join(changes)
