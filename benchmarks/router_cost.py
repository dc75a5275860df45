"""What routers add to the same routes as a fixed pattern, from pairs of runs."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Run = Callable[[], float]  # runs once and returns the seconds that it took
STATIC_RUNS = 3


@dataclass(frozen=True)
class RouterCost:
    """What routers add to the same routes as a fixed pattern.

    Attributes:
        static: seconds of the fixed pattern, median.
        added: seconds by which routed runs took longer, pair by pair.
        control: the same of a graph against itself.
    """

    static: float
    added: list[float]
    control: list[float]

    def __str__(self) -> str:
        share, control = statistics.median(self.added) / self.static, _middle(self.control)
        return f"{_middle(self.added)}, {share:+.2%}; a graph against itself: {control}"


def _middle(added: list[float]) -> str:
    low, median, high = (1000 * value for value in statistics.quantiles(added, n=4))
    return f"{median:+.3f} ms (quartiles {low:+.3f} to {high:+.3f})"


def measured_cost(fixed: Run, routed: Run, pairs: int) -> RouterCost:
    """What ``routed`` takes longer than ``fixed``, both warmed up before.

    Clocks and power drift by more than routers cost, and the second run of a pair meets a warmer
    GPU: each pair is timed in both orders, and the same graph against itself tells what is left of
    either.
    """
    return RouterCost(
        static=statistics.median(fixed() for _ in range(STATIC_RUNS)),
        added=[difference(fixed, routed) for _ in range(pairs)],
        control=[difference(fixed, fixed) for _ in range(pairs)],
    )


def difference(one: Run, other: Run) -> float:
    """Seconds that ``other`` takes longer than ``one``, the mean over both orders."""
    return sum(sign * run() for run, sign in ((one, -0.5), (other, 0.5), (other, 0.5), (one, -0.5)))


def untuned(device: str) -> dict[str, Any]:
    """Options of Inductor under which two graphs on ``device`` have the same kernels.

    Inductor tunes pointwise kernels by timing them, so that the same kernel may come out slower in
    one of two graphs.
    """
    return {"triton.autotune_pointwise": False} if device == "cuda" else {}
