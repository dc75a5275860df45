"""How long each layer's attention took."""

from __future__ import annotations

from dataclasses import dataclass

#: what the numbers are, for whoever prints them
HOW = (
    "Median over {repeats} runs of the prompt's attention alone (no projections, no router), in "
    "the rewritten graph run node by node, without Inductor, on {device}."
)


@dataclass(frozen=True)
class LayerTimes:
    """Median seconds of each layer's attention for the whole batch.

    Attributes:
        routed: module path -> seconds, on the routes that were taken.
        full: the same with all routes pinned to full.
        how: how they were measured, in words.
    """

    routed: dict[str, float]
    full: dict[str, float]
    how: str
