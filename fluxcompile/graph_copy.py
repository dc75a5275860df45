"""A copy of Dynamo's graph that may gain inputs: Dynamo reads its own graph again afterwards."""

from __future__ import annotations

from torch import fx

#: what Dynamo hangs on the graph module and AOTAutograd reads back
_MODULE_ATTRIBUTES = ("_source_to_user_stacks", "_backend_id")


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy ``gm``'s graph (tensors shared) with the sources that Dynamo keeps on its inputs."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copied)
    original = next(iter(reversed(gm.graph.nodes)))
    output = graph.output(result)
    output.meta = dict(original.meta)
    for before, after in copied.items():
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    module = fx.GraphModule(gm, graph, gm.__class__.__name__)
    module.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        module._param_name_to_source = dict(gm._param_name_to_source)
    for name in _MODULE_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))
    return module
