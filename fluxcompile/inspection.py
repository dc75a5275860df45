"""``explain`` and ``routes``: what the compiler did with a model, and what its router decided."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fluxcompile.backend import compile_graph
from fluxcompile.errors import FluxWarning
from fluxcompile.model_layers import unwrap
from fluxcompile.options import CompileOptions
from fluxcompile.report import FluxReport, GraphReport
from fluxcompile.route_record import Routes, routes_of


def explain(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> FluxReport:
    """Trace one call ``model(*args, **kwargs)`` and report on every attention in it.

    The call runs once, without gradients and without Inductor.

    Args:
        model: the model, compiled or not; an attached router counts.
        options: as for ``torch.compile(model, backend="flux", options=...)``.
    """
    parsed = CompileOptions.parse({**(options or {}), "lowering": "eager", "strict": False}, None)
    graphs: list[GraphReport] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, example_inputs, parsed, graphs)

    with torch.no_grad():
        torch.compile(forward_apart(unwrap(model)), backend=backend)(*args, **kwargs)
    return FluxReport(tuple(graphs))


def forward_apart(fn: nn.Module) -> Callable[..., Any]:
    """``fn.forward`` inside a code object of its own.

    Dynamo counts recompilations by code object: tracing ``forward`` itself would use up what the
    user's own compile of the model is allowed.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn.forward(*args, **kwargs)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, "explained", None, call.__closure__
    )


def routes(model: nn.Module) -> Routes | None:
    """The routes of the model's last prompt, bool ``[batch, layers]`` with its Ω; None before one.

    Reading them waits for the device.

    Warns if there are none because ``generate`` was called on what ``torch.compile`` returned.
    """
    found = routes_of(model)
    if found is None and hasattr(model, "_orig_mod"):
        warnings.warn(
            "no routes: generate() of torch.compile's wrapper runs the model uncompiled; compile "
            'the model itself, with fluxcompile.compile(model) or model.compile(backend="flux")',
            FluxWarning,
            stacklevel=2,
        )
    return found
