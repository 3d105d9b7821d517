"""What the choice of a learning rate may have cost an arm, since it rests on one run for each rate.

Rates are chosen by the lowest score of one tuning run each, on a few documents. Run again with another seed, a
neighbour might have won. Two runs' scores differ by chance with the variance

    2 * (noise of one run) + (scatter of their difference over the tuning documents),

where the noise of one run is that of the judged runs of all arms (`intarsia.ladder.scatter`). So another rate that was
tried may really be better than the chosen one by as much as the upper end of a one-sided interval of its difference
says, and the arm may have lost the largest of those. That bound is not put into the interval of a difference between
arms: it is a worst case, and an interval widened by it would hold the truth in nearly all cases, where it says 95 %. It
stands in the sentence, and a claim that would not survive it is said to be of the chosen rates only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from intarsia.ladder.results import ArmResult, RunResult
from intarsia.ladder.scatter import PooledScatter
from intarsia.ladder.student import student_t_quantile


def choice_loss(arm: ArmResult, scatter: PooledScatter | None, confidence: float) -> float | None:
    """Bits per byte by which another rate that was tried may be better than the chosen one, at most.

    Args:
        confidence: of the bound, over all the rates of the arm together (Bonferroni).

    Returns:
        0 where there was nothing to choose; None where it cannot be known, as with one seed.
    """
    tuning = [run for run in arm.runs if run.role == "tuning" and run.tuning_bits_per_byte is not None]
    chosen = next((run for run in tuning if run.learning_rate == arm.learning_rate), None)
    others = [run for run in tuning if run is not chosen]
    if chosen is None or not others:
        return 0.0
    if scatter is None:
        return None
    reach = float(student_t_quantile(1 - (1 - confidence) / len(others), scatter.degrees))
    return max(0.0, *(_bound(chosen, other, scatter.variance, reach) for other in others))


def _bound(chosen: RunResult, other: RunResult, noise: float, reach: float) -> float:
    """How much better the other rate may be."""
    assert chosen.tuning_bits_per_byte is not None
    assert other.tuning_bits_per_byte is not None
    behind = other.tuning_bits_per_byte - chosen.tuning_bits_per_byte
    return reach * math.sqrt(2 * noise + _of_documents(chosen, other, behind)) - behind


def _of_documents(chosen: RunResult, other: RunResult, behind: float) -> float:
    """The variance over documents of the difference of two scores."""
    if chosen.tuning_documents is None or other.tuning_documents is None:
        return 0.0
    bits, sizes = chosen.tuning_documents
    residuals = other.tuning_documents[0] - bits - behind * sizes
    return float((residuals**2).sum() / sizes.sum() ** 2)


def next_rate(tried: Sequence[float], best: float) -> float | None:
    """The rate to try next where the best of those that were tried is at an end of them: as far beyond it as its
    neighbour is on the other side, by ratio. None where it lies inside, or alone."""
    rates = sorted(tried)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    # Six digits, so that 0.008 * 2 is called 0.016.
    return float(f"{best * best / neighbour:.6g}")


def at_edge(arm: ArmResult) -> str:
    """`smallest` or `largest` where the chosen rate is at an end of what was tried; empty where it is inside."""
    if len(arm.tuning_scores) < 2 or arm.learning_rate is None:
        return ""
    if arm.learning_rate == min(arm.grid):
        return "smallest"
    return "largest" if arm.learning_rate == max(arm.grid) else ""
