"""A fixed pattern and a router that decides the same, in turns on one model and one cache.

Two contenders that are built one after the other differ in more than in what decides the routes: in
kernels that were tuned by timing them, and in where their caches lie. Here neither graph is tuned,
both read and write the same memory, and every block of steps begins with the same tokens in it.
"""

import statistics

import torch
from transformers.cache_utils import Cache

from caches import Filling, fill
from checking import checked_error
from decode_contenders import Runner
from fluxcompile.kept_routes import KeptRoutes, keep, kept
from router_cost import RouterCost, measured_cost
from routing import WrongRoutes
from stepping import Stepper

LEAD = 2  # steps before the clock starts, which give the host its lead, as earlier tokens do


class Turns:
    """Blocks of steps under the fixed pattern, or under the router.

    Args:
        runner: routed, its prompt in the cache and nothing after it.
        filling: what is in the cache before every block.
        token: int64 ``[B, 1]``, the first one.
    """

    def __init__(self, runner: Runner, filling: Filling, token: torch.Tensor) -> None:
        self.runner, self.filling, self.cache = runner, filling, runner.cache
        self.routes = routes_kept(self.cache)
        if self.routes is None:
            raise WrongRoutes("the prompt left no routes with the cache")
        self.fixed, self.routed = (
            Stepper(call, runner.cached, token) for call in runner.fixed_and_routed()
        )

    def check(self, tokens: torch.Tensor, expected: torch.Tensor) -> float:
        """The larger error of the two's logits after ``tokens``.

        Args:
            tokens: int64 ``[steps, B]``.
            expected: fp32 ``[steps, B, V]``.

        Raises:
            WrongLogits: they are too far from ``expected`` or from each other.
            WrongRoutes: routed steps did not take the prompt's routes.
        """
        dtype = self.runner.model.dtype
        fixed = self._logits(self.fixed, tokens)
        routed = self._logits(self.routed, tokens)
        self._check_routed()
        checked_error("routers against the fixed pattern", routed, fixed, dtype)
        return max(
            checked_error("fixed pattern", fixed, expected, dtype),
            checked_error("routers", routed, expected, dtype),
        )

    def cost(self, steps: int, pairs: int) -> RouterCost:
        """In seconds a step, from blocks of ``steps`` under one clock."""
        return measured_cost(
            lambda: self.seconds(self.fixed, steps), lambda: self.seconds(self.routed, steps), pairs
        )

    def seconds(self, stepper: Stepper, steps: int) -> float:
        """Of a step, the mean of a block."""
        self._rewind()
        times = stepper.seconds(LEAD + steps, self.runner.model.device.type)
        return statistics.fmean(times[LEAD:])

    def _logits(self, stepper: Stepper, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 ``[steps, B, V]`` after ``tokens`` ``[steps, B]``."""
        self._rewind()
        return torch.stack([stepper.logits(token[:, None]) for token in tokens])

    def _rewind(self) -> None:
        """Make the cache what it was before any step, its routes included.

        A cache keeps its routes while nobody else writes its keys. To the router's graph, that of
        the fixed pattern is somebody else.
        """
        fill(self.cache, self.filling)
        for layer in self.cache.layers:
            keep(layer.keys, self.routes)

    def _check_routed(self) -> None:
        """Of the last steps: only those that take routes hand them on with the keys they write."""
        left = routes_kept(self.cache)
        # Trimmed layers, which sparse attention alone can read, are routed no more.
        if left is None or not torch.equal(
            left.full.cpu(), self.runner.full[:, list(left.layers)].cpu()
        ):
            raise WrongRoutes("routed steps left other routes than the prompt's, or none")


def routes_kept(cache: Cache) -> KeptRoutes | None:
    """The routes that a routed call finds with ``cache``, if there are any."""
    found = (kept(layer.keys) for layer in cache.layers)
    return next((routes for routes in found if routes is not None), None)
