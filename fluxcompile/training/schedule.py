"""The temperature of soft routing over the run (arXiv 2604.07394, §4.2)."""

from dataclasses import dataclass

from fluxcompile.errors import ConfigError


@dataclass(frozen=True)
class TemperatureSchedule:
    """Linear from ``start`` to ``end`` over the first ``fraction`` of ``steps``, then constant.

    Attributes:
        start: temperature of step 0.
        end: temperature once the annealing is over.
        fraction: share of the run that anneals, in [0, 1]; 0 means ``end`` throughout.
        steps: optimiser steps of the whole run.

    Raises:
        ConfigError: a temperature that is not positive, or a fraction outside [0, 1].
    """

    start: float
    end: float
    fraction: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError.mismatch(f"temperature_{name}", "a number > 0", f"{value!r}")
        if not 0 <= self.fraction <= 1:
            raise ConfigError.mismatch(
                "temperature_anneal", "a share of the steps in [0, 1]", f"{self.fraction!r}"
            )

    def __call__(self, step: int) -> float:
        """Temperature of the optimiser step ``step``, counted from 0."""
        return self.start + (self.end - self.start) * self.progress(step)

    def progress(self, step: int) -> float:
        """How far the annealing has come at ``step``, in [0, 1]."""
        annealing = self.fraction * self.steps
        return min(1.0, step / annealing) if annealing else 1.0
