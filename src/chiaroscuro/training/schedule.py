"""Shares that change from step to step: lowered along a ramp, or drawn anew for each step.

A share depends on the number of the step alone, and where it is drawn on the seed. So a resumed run and every process
have the same shares, without any state to save.
"""

from dataclasses import dataclass
from random import Random
from typing import Protocol


class Course(Protocol):
    """A share through a run."""

    def during(self, step: int) -> float:
        """The share that step `step` trains with; the first step is 1."""
        ...

    def after(self, step: int) -> float:
        """The share after `step` steps, that the model is validated and saved with."""
        ...


@dataclass(frozen=True)
class Ramp:
    """ρ(n) = start + (end − start) · min(max(n − wait, 0) / steps, 1) after n steps; step n + 1 trains with ρ(n).

    Attributes:
        start: the share of the first step.
        end: the share after `wait` + `steps` steps and from then on.
        steps: the length of the ramp, 1 or more.
        wait: steps before it.

    """

    start: float
    end: float
    steps: int
    wait: int = 0

    def during(self, step: int) -> float:
        """ρ(step − 1)."""
        return self.after(step - 1)

    def after(self, step: int) -> float:
        """ρ(step)."""
        passed = max(0, step - self.wait)
        if passed >= self.steps:
            return self.end
        return _between(self.start, self.end, passed / self.steps)


@dataclass(frozen=True)
class Draws:
    """A share drawn evenly between two for each step, and a stated one outside the steps.

    Attributes:
        low: the smallest share.
        high: the largest share.
        stated: what the model is validated and saved with.
        seed: of the draws; another one, or text, gives other draws.

    """

    low: float
    high: float
    stated: float
    seed: int | str

    def during(self, step: int) -> float:
        """A draw of (seed, step)."""
        return _between(self.low, self.high, Random(f"share {self.seed} {step}").random())

    def after(self, step: int) -> float:
        """The stated share."""
        return self.stated


def _between(start: float, end: float, part: float) -> float:
    """A part of the way from one number to another, and between them whatever the rounding."""
    return min(max(start + (end - start) * part, min(start, end)), max(start, end))
