"""Which mean queries a router reads, as plain numbers: the paper's one mean, or finer ones."""

from __future__ import annotations

from typing import NamedTuple


class Pooling(NamedTuple):
    """How the query of a prompt becomes a router's features.

    A named tuple, so that it can be an argument of a call in a graph.

    Attributes:
        prefix: valid tokens read at the beginning of the prompt.
        suffix: valid tokens read at its end.
        separate: each end has a mean of its own; False: one mean over both, no token counted twice.
        each_head: each query head has a mean of its own; False: one mean over the heads.
    """

    prefix: int
    suffix: int
    separate: bool = False
    each_head: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """Picked tokens that each mean is taken over: one entry, or two for separate ends."""
        if self.separate and self.prefix and self.suffix:
            return self.prefix, self.suffix
        return (self.prefix + self.suffix,)

    @property
    def is_one_mean(self) -> bool:
        """One mean over tokens and heads, as in the paper: features are ``[B, D]``."""
        return len(self.ends) == 1 and not self.each_head

    def features(self, head_dim: int, heads: int | None) -> int:
        """How many numbers the router reads; ``heads`` matters with ``each_head`` alone."""
        return len(self.ends) * (heads if self.each_head else 1) * head_dim
