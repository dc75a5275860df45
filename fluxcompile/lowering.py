"""Turn a rewritten graph into a callable: Inductor, or a cheap lowering for tests and reports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fluxcompile import kernels
from fluxcompile.cacheable import call_methods_by_function, our_functions
from fluxcompile.options import CompileOptions
from fluxcompile.passes.insert_router import ROUTES_INPUT
from fluxcompile.passes.site import AttentionSite


def lower(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions
) -> Callable[..., Any]:
    """Compile ``gm`` with the lowering that ``options`` names."""
    _name_constants(gm)
    if options.lowering == "eager":
        return gm.forward
    if options.lowering == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    call_methods_by_function(gm)
    return compile_fx(gm, list(example_inputs), config_patches=_patches(gm, options))


def without_graphs_of_prompts(
    options: CompileOptions, sites: Sequence[AttentionSite]
) -> CompileOptions:
    """``options`` without CUDA graphs, if a call of the graph may be a prompt.

    A prompt's guarded branches wait for the device, each length would be another recording, and
    what a prompt leaves behind, cache buffers that it creates and routes, lives on where a CUDA
    graph's memory does not. What it launches is large enough to hide the launches.
    """
    if options.lowering != "inductor" or all(site.is_decode for site in sites):
        return options
    if not options.inductor_patches().get("triton.cudagraphs"):
        return options
    return replace(options, inductor={**options.inductor, "triton.cudagraphs": False})


def _patches(gm: fx.GraphModule, options: CompileOptions) -> dict[str, Any]:
    from torch._inductor import config

    from fluxcompile.branch_operands import PrepareBranchOperands

    patches = options.inductor_patches()
    name = "post_grad_custom_post_pass"
    patches[name] = PrepareBranchOperands(patches.get(name, getattr(config, name)))
    patches["unsafe_marked_cacheable_functions"] = {
        **config.unsafe_marked_cacheable_functions,
        **our_functions(gm),
        # A guarded branch is cacheable: its branches are submodules of the graph in the key.
        "torch.ops.higher_order.cond": kernels_version(),
    }
    return patches


@functools.cache
def kernels_version() -> str:
    """Hash of our operators' sources, for the compile caches' keys.

    A graph names its operators only, yet what Inductor makes of it holds their shapes and strides:
    without this, graphs on disk would outlive the operators that they were compiled for.
    """
    from torch._inductor.custom_graph_pass import get_hash_for_files

    folder = Path(kernels.__file__).parent
    return get_hash_for_files(tuple(map(str, sorted(folder.rglob("*.py"))))).hex()


def routes_example(batch: int | torch.SymInt, columns: int, device: torch.device) -> torch.Tensor:
    """A stand-in for the routes input, bool ``[batch, columns]``, under Dynamo's fake mode."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return torch.ones(int(batch), columns, dtype=torch.bool, device=device)
    with context.fake_mode:
        return torch.empty(batch, columns, dtype=torch.bool, device=device)


def _name_constants(gm: fx.GraphModule) -> None:
    """AOTAutograd wants a source for every tensor that the graph module owns."""
    from torch._dynamo.source import ConstantSource  # Dynamo imports Triton, so not before it runs

    sources = getattr(gm, "_param_name_to_source", None)
    if sources is None:
        return
    names = [name for name, _ in gm.named_parameters()] + [name for name, _ in gm.named_buffers()]
    for name in names:
        sources.setdefault(name, ConstantSource(f"{ROUTES_INPUT}_{name.replace('.', '_')}"))
