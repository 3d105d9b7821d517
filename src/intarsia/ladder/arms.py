"""From the arms of a plan to model configurations of one size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from intarsia.errors import ConfigError
from intarsia.ladder.plan import Arm, Plan, PlanError
from intarsia.ladder.schema import merge
from intarsia.model import ModelConfig, presets
from intarsia.model.language_model import cost_of
from intarsia.model.matching import match_parameters


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
    (`intarsia.model.matching`), or is an error where the plan forbids changes.

    Raises:
        PlanError: a preset or an option that does not exist, or sizes that cannot be brought together.
    """
    configs = {}
    for index, arm in enumerate(plan.arms):
        try:
            configs[arm.name] = _configuration(plan, arm, vocab_size)
        except (ConfigError, TypeError) as error:
            raise PlanError(f"{arm.name}: {error}", ("arms", index)) from None
    reference = plan.matching.reference or plan.arms[0].name
    target = cost_of(configs[reference]).non_embedding_parameters
    resolved = []
    for index, arm in enumerate(plan.arms):
        config, change = configs[arm.name], ""
        count = cost_of(config).non_embedding_parameters
        if abs(count - target) > plan.matching.tolerance * target:
            if not plan.matching.adjust:
                raise PlanError(
                    f"{arm.name} has {count:,} parameters without embeddings and {reference} has {target:,}: more "
                    f"than {plan.matching.tolerance:.1%} apart, and the plan forbids changes (matching.adjust)",
                    ("arms", index),
                )
            try:
                matched = match_parameters(config, target, plan.matching.tolerance)
            except ConfigError as error:
                raise PlanError(
                    f"{arm.name} cannot be matched to {reference}: {error}", ("arms", index)
                ) from None
            config, change = matched, _change(config, matched)
        cost = cost_of(config)
        resolved.append(ResolvedArm(arm, config, cost.parameters, cost.non_embedding_parameters, change))
    return tuple(resolved)


def _configuration(plan: Plan, arm: Arm, vocab_size: int) -> ModelConfig:
    base: dict[str, Any] = {"vocab_size": vocab_size}
    if arm.preset:
        base = presets.get(arm.preset, vocab_size=vocab_size).to_dict()
    shared = dict(plan.model)
    if arm.preset and "mixers" in shared:
        # A change to a mixer is for the arms that have it.
        shared["mixers"] = {
            name: change for name, change in shared["mixers"].items() if name in base["mixers"]
        }
    values = merge(merge(base, shared), arm.model)
    if values["vocab_size"] != vocab_size:
        raise ConfigError(
            f"vocab_size comes from the tokenizer ({vocab_size}) and cannot be {values['vocab_size']}"
        )
    return ModelConfig.from_dict(values)


def _change(before: ModelConfig, after: ModelConfig) -> str:
    changes = []
    for name in ("feed_forward", "experts"):
        old, new = getattr(before, name), getattr(after, name)
        if old == new or old is None or new is None:
            continue
        for field in dataclasses.fields(old):
            if getattr(old, field.name) != getattr(new, field.name):
                changes.append(f"{name}.{field.name} {getattr(old, field.name)} → {getattr(new, field.name)}")
    return ", ".join(changes)
