"""Run one property on many generated examples: a fixed few, or as many as the minutes allow."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.strategies import SearchStrategy

#: examples between two looks at the clock
ROUND = 25


@dataclass
class Campaign:
    """How long to fuzz, from which seed, and what came of it.

    Attributes:
        minutes: for each property; 0 for a fixed number of examples.
        seed: of the first round; each round's is one more.
    """

    minutes: float
    seed: int
    rounds: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def run(self, check: Callable[..., str], examples: int, **strategies: SearchStrategy) -> None:
        """Check examples of ``strategies``; what ``check`` returns is counted."""
        end = time.monotonic() + 60 * self.minutes
        while True:
            self._round(check, min(examples, ROUND) if self.minutes else examples, strategies)
            if time.monotonic() >= end:
                return

    def share(self, outcome: str) -> float:
        return self.seen[outcome] / max(sum(self.seen.values()), 1)

    def __str__(self) -> str:
        first, last = self.seed, self.seed + self.rounds - 1
        total = sum(self.seen.values())
        outcomes = ", ".join(f"{count} {name}" for name, count in self.seen.most_common())
        return f"seeds {first} to {last}: {total} examples, {outcomes}"

    def _round(self, check: Callable[..., str], examples: int, strategies: dict) -> None:
        seed = self.seed + self.rounds
        self.rounds += 1

        @hypothesis.seed(seed)
        @settings(
            max_examples=examples,
            deadline=None,  # the first example of a shape compiles
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        @hypothesis.given(**strategies)
        def property_holds(**values: object) -> None:
            torch.manual_seed(seed)
            self.seen[check(**values)] += 1

        try:
            property_holds()
        except BaseException as error:
            error.add_note(f"found with --fuzz-seed {seed}")
            raise
