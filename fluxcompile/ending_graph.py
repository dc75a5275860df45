"""A compiled callable that empties itself: Dynamo keeps it, of use or not, until its own reset."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from fluxcompile.errors import RouterError


class EndingGraph:
    """Holds ``compiled``, and the router's weights in it, for as long as ``tie`` lives."""

    #: no attributes for functools.wraps, hence Dynamo, to copy
    __slots__ = ("__weakref__", "_compiled")

    def __init__(self, compiled: Callable[..., Any], tie: object) -> None:
        self._compiled = compiled
        weakref.finalize(tie, _end, weakref.ref(self)).atexit = False

    def __call__(self, *inputs: Any) -> Any:
        return self._compiled(*inputs)

    def end(self) -> None:
        """Free what is held. Dynamo's guards keep calls away from then on."""
        self._compiled = _ended


def _end(graph: weakref.ref[EndingGraph]) -> None:
    if (alive := graph()) is not None:
        alive.end()


def _ended(*inputs: Any) -> Any:
    raise RouterError.mismatch(
        "compiled code", "the router that it was compiled for", "none (are guards skipped?)"
    )
