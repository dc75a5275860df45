"""``explain_prompt``: run one prompt, and gather what there is to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fluxcompile.backend import compile_graph
from fluxcompile.cache_argument import CACHE_ARGUMENTS, cache_argument
from fluxcompile.cache_memory import CacheMemory
from fluxcompile.errors import OptionError
from fluxcompile.explaining.layer_times import HOW, LayerTimes
from fluxcompile.explaining.timed_graph import Stopwatch, TimedGraph
from fluxcompile.inspection import forward_apart
from fluxcompile.model_layers import unwrap
from fluxcompile.options import CompileOptions
from fluxcompile.report import FluxReport, GraphReport
from fluxcompile.route_record import Routes, routes_of


@dataclass(frozen=True)
class PromptReport:
    """One prompt, layer by layer.

    Attributes:
        layers: one row an attention, as :func:`fluxcompile.explain` gives them.
        routes: which attention each row of the batch took; None if nobody routed it.
        times: of each layer's attention; None if it was not asked for.
        memory: of a :class:`fluxcompile.FluxCache` once the prompt has run; None where there was
            none: a model that is not transformers', an encoder-decoder, a cache of the caller's.
        facts: what else a reader wants to know: model, device, tokens, versions.
    """

    layers: FluxReport
    routes: Routes | None
    times: LayerTimes | None = None
    memory: CacheMemory | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """One page that needs nothing else: style, script and pictures are inside."""
        from fluxcompile.html_page import render

        return render(self)


def explain_prompt(
    model: nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    repeats: int = 3,
    facts: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> PromptReport:
    """Run ``model(*args, **kwargs)`` and report on its layers, routes, times and KV memory.

    The rewritten graph runs node by node, without Inductor: the attentions are the compiled model's
    own operators, all else is PyTorch's. A model of transformers gets a fresh
    :class:`fluxcompile.FluxCache` each run, unless the call has a cache or ``use_cache``.

    Args:
        options: as for ``torch.compile(model, backend="flux", options=...)``.
        repeats: runs that are timed, once for the routes and once pinned to full; 0 times nothing.

    Raises:
        OptionError: unknown option or bad value.
    """
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 0:
        raise OptionError.mismatch("repeats", "an int >= 0", repr(repeats))
    inner = unwrap(model)
    full = None
    if repeats:  # first, so that fluxcompile.routes(model) afterwards gives the routes taken
        full = _run(inner, args, kwargs, {**(options or {}), "routes": "full"}, repeats)
    before = routes_of(inner)
    routed = _run(inner, args, kwargs, dict(options or {}), repeats)
    after = routes_of(inner)
    stale = after is not None and before is not None and after.fa is before.fa
    times = None
    if full is not None:
        how = HOW.format(repeats=repeats, device=_device(inner))
        times = LayerTimes(routed.stopwatch.medians(), full.stopwatch.medians(), how)
    return PromptReport(
        FluxReport(routed.graphs),
        None if stale else after,
        times,
        routed.memory,
        dict(facts or {}),
    )


@dataclass
class _Runs:
    """``graphs`` are those of the first run: what a later one compiles is the same layers again."""

    stopwatch: Stopwatch
    graphs: tuple[GraphReport, ...] = ()
    memory: CacheMemory | None = None


def _run(
    model: nn.Module, args: Sequence[Any], kwargs: dict, options: dict[str, Any], repeats: int
) -> _Runs:
    """Once to warm up, and ``repeats`` times."""
    parsed = CompileOptions.parse({**options, "lowering": "eager", "strict": False}, None)
    runs, reports = _Runs(Stopwatch()), []

    def timed(gm: fx.GraphModule) -> TimedGraph:
        return TimedGraph(gm, runs.stopwatch)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, example_inputs, parsed, reports, lower_with=timed)

    call = torch.compile(forward_apart(model), backend=backend)
    with torch.no_grad():
        for _ in range(1 + repeats):
            runs.stopwatch.next_call()
            cache = _cache(model, parsed, kwargs)
            more = {} if cache is None else {cache_argument(model): cache, "use_cache": True}
            call(*args, **kwargs, **more)
            runs.memory = cache.memory() if cache is not None else None
            runs.graphs = runs.graphs or tuple(reports)
    return runs


def _cache(model: nn.Module, options: CompileOptions, kwargs: Mapping[str, Any]) -> Any:
    """A cache that forgets what these routes do not read; None where there is to be none."""
    from transformers import PreTrainedConfig

    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or config.is_encoder_decoder:
        return None
    if not kwargs.keys().isdisjoint({*CACHE_ARGUMENTS, "use_cache"}):
        return None
    from fluxcompile.cache import FluxCache

    sizes = {"sink": options.config.sink, "local": options.config.local} if options.config else {}
    return FluxCache(model, options.router, **sizes)


def _device(model: nn.Module) -> str:
    """Of the first parameter, with the GPU's name."""
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type.upper()}"
    )
