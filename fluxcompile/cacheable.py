"""Let the on-disk caches take a rewritten graph: AOTAutograd's knows only what Dynamo may trace.

Two things that the passes emit would make it look away, and compile anew in every process:
functions of ours, which are safe to cache as the cache's key has their sources' hash, and methods
of values that Dynamo has not seen, which are called by such a function instead.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import fx

from fluxcompile import kernels, passes

_PACKAGE = "fluxcompile."


def tensor_method(name: str, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``tensor.name(...)`` as a function."""
    return getattr(tensor, name)(*args, **kwargs)


def call_methods_by_function(gm: fx.GraphModule) -> None:
    """Replace ``x.method(...)`` by ``tensor_method`` where Dynamo did not trace ``x``."""
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and "example_value" not in node.args[0].meta:
            with gm.graph.inserting_before(node):
                args = (node.target, *node.args)
                call = gm.graph.call_function(tensor_method, args, node.kwargs)
            call.meta = node.meta
            node.replace_all_uses_with(call)
            gm.graph.erase_node(node)
    gm.recompile()


def our_functions(gm: fx.GraphModule) -> dict[str, str]:
    """Names of the functions of ours that ``gm`` calls, and the version of their sources."""
    called = (node.target for node in gm.graph.nodes)
    ours = (f for f in called if isinstance(f, FunctionType) and f.__module__.startswith(_PACKAGE))
    return {f"{f.__module__}.{f.__name__}": sources_version() for f in ours}


@functools.cache
def sources_version() -> str:
    """Hash of the sources that functions in a graph may be of."""
    from torch._inductor.custom_graph_pass import get_hash_for_files

    folders = [Path(module.__file__).parent for module in (kernels, passes)]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    files += Path(__file__).parent.glob("*.py")
    return get_hash_for_files(tuple(sorted(map(str, files)))).hex()
