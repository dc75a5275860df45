"""The ``torch.compile`` backend ``flux``: analyse, plan, rewrite, lower, run."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import fluxcompile.kernels.ops  # noqa: F401  registers torch.ops.flux
from fluxcompile.attachment import tie_of
from fluxcompile.ending_graph import EndingGraph
from fluxcompile.errors import FluxWarning, RewriteError
from fluxcompile.frozen_router import frozen_tensors, stand_ins
from fluxcompile.graph_copy import copy_graph
from fluxcompile.layer_table import LayerTable
from fluxcompile.lowering import lower, routes_example, without_graphs_of_prompts
from fluxcompile.options import CompileOptions
from fluxcompile.owner_guard import guard_owners
from fluxcompile.passes.arrange_operands import drop_unused
from fluxcompile.passes.graph_util import value_of
from fluxcompile.passes.pipeline import Rewrite, analyse, rewrite
from fluxcompile.passes.site import Skip, SkipReason
from fluxcompile.planning import Planner
from fluxcompile.recompile_limit import warn_of_last_graph
from fluxcompile.report import GraphReport
from fluxcompile.route_io import route_io
from fluxcompile.runtime import CompiledGraph
from fluxcompile.shared_graph import SharedGraph, Sharing, share_inference
from fluxcompile.torch_internals import naming_versions
from fluxcompile.training_graph import (
    TrainingGraph,
    prepare_training,
    refuse_checkpointed,
    refuse_untrained,
    share_training,
)

#: puts the lowered graph behind what passes its additional inputs and takes its additional outputs
_Runtime = Callable[[Callable[..., Any]], Callable[..., Any]]

log = logging.getLogger(__name__)

_stats: dict[str, Any] = {}
_warned: set[str] = set()


def flux(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one traced graph: what ``torch.compile(model, backend="flux")`` calls.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs; parameters are the model's own objects.
        mode: Inductor's mode.
        options: see ``fluxcompile.options.CompileOptions``.

    Returns:
        The compiled callable.

    Raises:
        OptionError: unknown option or bad value.
        RouterError: the router does not fit or cannot be loaded.
        TorchVersionError: this PyTorch lacks an internal that is needed.
        RewriteError: with ``strict``, whatever would have fallen back to full attention; with
            ``mode`` "train", an attention that cannot be trained.
    """
    with naming_versions():
        return compile_graph(gm, example_inputs, CompileOptions.parse(options, mode))


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: CompileOptions,
    reports: list[GraphReport] | None = None,
    table: LayerTable | None = None,
    lower_with: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """As ``flux``, with parsed options.

    Args:
        reports: gets a report of the graph.
        lower_with: makes a callable of the rewritten graph, instead of the options' lowering.
        table: the layers of the model whose decoder layers are compiled one by one and share
            graphs.
    """
    planner = Planner(options, example_inputs, table)
    if planner.training is not None:
        refuse_checkpointed(gm)
    gm = copy_graph(gm)
    result = analyse(gm, example_inputs, planner.layer_of, planner.layer_names)
    planner.share(result.gm, result.sites)
    if planner.follows_attachment:
        guard_owners(result.gm, result.sites, example_inputs, planner.roles)
    inputs = list(example_inputs)
    if planner.training is not None:
        run = _train(result, planner, inputs, refuse=reports is None)
    elif torch.is_grad_enabled() and any(_requires_grad(x) for x in inputs):
        run = _leave_alone(result)
    else:
        run = _infer(result, planner, inputs)
    _remember(result)
    if reports is not None:  # the report says it all: no warning, and none used up
        reports.append(GraphReport.of(result, planner))
    else:
        _explain_fallbacks(result, planner, options)
        _explain_untrimmed(result)
        if any(planner.routes_site(site) for site in result.sites):
            warn_of_last_graph()
    if lower_with is not None:
        lowered = lower_with(gm)
    else:
        lowered = lower(gm, inputs, without_graphs_of_prompts(options, result.sites))
    compiled = run(lowered)
    tie = tie_of(planner.attachment) if planner.attachment else None
    if tie is not None and isinstance(compiled, CompiledGraph | SharedGraph | TrainingGraph):
        return EndingGraph(compiled, tie)
    return compiled


def last_compile_stats() -> dict[str, Any]:
    """Of the last graph compiled: ``passes_seconds``, ``sites``, and ``seconds`` by pass."""
    return dict(_stats)


def _train(result: Rewrite, planner: Planner, inputs: list[Any], refuse: bool) -> _Runtime:
    """Rewrite for training; adds what the graph then takes to ``inputs``."""
    rewrite(result, planner.plan(result.sites))
    if refuse:
        refuse_untrained(result)
    prepared = prepare_training(result, planner)
    if prepared is None:
        return _as_it_is
    io, examples = prepared
    inputs += examples
    if planner.shared is None:
        return functools.partial(TrainingGraph, io=io)
    sharing = Sharing(planner.shared, planner.layer_of, planner.layer_names)
    return functools.partial(share_training, io=io, sharing=sharing)


def _infer(result: Rewrite, planner: Planner, inputs: list[Any]) -> _Runtime:
    """Rewrite for inference; adds what the graph then takes to ``inputs``."""
    plan = planner.plan(result.sites)
    rewrite(result, plan)
    io = route_io(result, plan, planner, inputs)
    if io.takes_routes:
        query = value_of(result.routes.columns[0].q)
        inputs.append(routes_example(query.shape[0], len(io.layers), query.device))
    if io.is_idle:
        return _as_it_is
    if planner.shared is None:
        return functools.partial(CompiledGraph, io=io)
    sharing = Sharing(planner.shared, planner.layer_of, planner.layer_names)
    if result.routes.router_inputs:
        device = value_of(result.sites[0].q).device
        sharing = replace(sharing, tensors=frozen_tensors(planner.attachment, device))
        inputs += stand_ins(sharing.tensors[0])
    return functools.partial(share_inference, io=io, sharing=sharing)


def _leave_alone(result: Rewrite) -> _Runtime:
    for site in result.sites:
        site.skip = Skip(
            SkipReason.GRADIENTS,
            'compile under torch.no_grad() to route, with options={"mode": "train"} to train',
        )
        site.became = "left alone"
    drop_unused(result.sites)
    result.gm.recompile()
    return _as_it_is


def _as_it_is(compiled: Callable[..., Any]) -> Callable[..., Any]:
    return compiled


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _remember(result: Rewrite) -> None:
    total = sum(result.seconds.values())
    _stats.clear()
    _stats.update(passes_seconds=total, sites=len(result.sites), seconds=dict(result.seconds))
    log.info("flux: %d attentions, %.3f s in passes", len(result.sites), total)


def _explain_fallbacks(result: Rewrite, planner: Planner, options: CompileOptions) -> None:
    """One warning a reason for what runs full attention though the user may expect otherwise."""
    reasons: dict[str, list[str]] = {}
    for site in result.sites:
        skip = site.skip or site.not_routed
        if skip is not None and planner.expects(site):
            reasons.setdefault(str(skip), []).append(site.path or site.output.name)
    for reason, paths in reasons.items():
        where = paths[0] if len(paths) == 1 else f"{len(paths)} layers ({paths[0]} ...)"
        message = f"{where}: full attention, because {reason}"
        if options.strict:
            raise RewriteError(message)
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, FluxWarning, stacklevel=2)


def _explain_untrimmed(result: Rewrite) -> None:
    """One warning a reason where a cache that would forget keeps everything."""
    for reason in dict.fromkeys(site.not_trimmed for site in result.sites if site.not_trimmed):
        message = f"the FluxCache keeps every token, because {reason}"
        if message not in _warned:
            _warned.add(message)
            warnings.warn(message, FluxWarning, stacklevel=2)
