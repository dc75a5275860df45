"""Tell whether this process holds only some of a layer's heads, and who holds the others.

Tensor parallelism (transformers' ``tp_plan``) splits the query projection's weight by its rows, so
each process computes its own heads from a weight that is a ``DTensor``. A router reads the mean
over *all* heads: what it reads is then reduced over the group of the weight's mesh, or the
processes would route one prompt differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fluxcompile.passes.site import AttentionSite

#: how far upstream of the query its projection's weight can be
_REACH = 64


def find_head_groups(
    gm: fx.GraphModule, sites: list[AttentionSite], example_inputs: Sequence[Any]
) -> int:
    """Set ``head_groups`` of every site; returns how many sites are split."""
    if _one_process():
        return 0
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, example_inputs, strict=False))
    for site in sites:
        weight = _projection(site.q, inputs)
        site.head_groups = () if weight is None else _groups(weight)
    return sum(bool(site.head_groups) for site in sites)


def _one_process() -> bool:
    return not torch.distributed.is_available() or not torch.distributed.is_initialized()


def _projection(query: fx.Node, inputs: dict[fx.Node, Any]) -> torch.Tensor | None:
    """Breadth first upstream: the nearest matrix among the parameters. Norms have vectors."""
    level, seen = [query], {query}
    for _ in range(_REACH):
        level = [s for node in level for s in node.all_input_nodes if s not in seen]
        seen.update(level)
        for source in level:
            value = inputs.get(source)
            if isinstance(value, torch.nn.Parameter) and value.dim() >= 2:
                return value
    return None


def _groups(weight: torch.Tensor) -> tuple[str, ...]:
    """Names of the process groups that the rows of ``weight`` are spread over."""
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        return ()
    mesh = weight.device_mesh
    rows = (0, -weight.dim())
    return tuple(
        mesh.get_group(axis).group_name
        for axis, placement in enumerate(weight.placements)
        # a fused projection is split in strides, which `is_shard` does not count as rows
        if getattr(placement, "dim", None) in rows and mesh.size(axis) > 1
    )
