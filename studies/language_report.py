"""The tables and figures of the language-model study, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence

from training.optimizers import SCHEDULES


def ema(rate: float, count: int) -> list[float]:
    """The coefficients of an exponential moving average over `count` checkpoints, oldest first."""
    powers = [rate**age for age in reversed(range(count))]
    return [powers[0], *((1 - rate) * power for power in powers[1:])]


def of_decay(shape: str, count: int) -> list[float]:
    """The coefficients of checkpoints that stand for a decay of the rate over them, oldest first.

    WSM (Tian et al., 2025): the mean `Σ c_j w_j` is the first checkpoint plus the steps after it,
    those between checkpoint i and i + 1 weighted by `Σ_{j>i} c_j`, as if the rate had been so much
    lower there. Of the linear decay all coefficients are equal.
    """
    rates = [*(SCHEDULES[shape](i / count) for i in range(count)), 0.0]
    return [rates[i] - rates[i + 1] for i in range(count)]


def as_decay(coefficients: Sequence[float]) -> list[float]:
    """The decay that coefficients stand for: `of_decay` read backwards.

    Returns:
        The factor of the rate between checkpoint i and i + 1, one fewer than there are checkpoints.
    """
    return [sum(coefficients[i:]) for i in range(1, len(coefficients))]
