"""Keep requests that share a row from compiled code: continuous batching, padding-free batches.

A router decides for a row, and a route travels with a row's cache: requests packed into one row
would be routed as one. ``generate_batch`` and ``transformers serve`` pack them, beside a paged
cache that Dynamo cannot trace in one graph. Such calls run as if nothing was compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fluxcompile.errors import FluxWarning, RewriteError
from fluxcompile.options import CompileOptions

#: what transformers passes on to a model and its layers, to tell where in a row a request begins
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")


class ModelCall:
    """A model's compiled call, ``compiled`` on rows that hold one sequence each."""

    def __init__(
        self, compiled: Callable[..., Any], model: nn.Module, options: CompileOptions
    ) -> None:
        self._compiled = compiled
        self._model = model
        self._raises = options.strict or options.mode == "train"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not holds_packed_rows(kwargs):
            return self._compiled(*args, **kwargs)
        message = (
            "requests packed into one row (continuous batching, padding-free batches) cannot be "
            "routed one by one: they run uncompiled, with full attention"
        )
        if self._raises:
            raise RewriteError(message)
        warnings.warn(message, FluxWarning, stacklevel=2)
        return self._model._call_impl(*args, **kwargs)


def holds_packed_rows(kwargs: Mapping[str, Any]) -> bool:
    """Whether a model, or a layer, is called with rows of several requests."""
    return any(kwargs.get(name) is not None for name in _BOUNDARIES)
