"""Name each site's layer: by the weights its query is made of, else by its module path.

Weights are matched by identity, so it works whatever the modules are called and wherever the
compiled region starts (a whole model or one decoder layer). The weight is kept on the site: the
graph serves other weights only as long as they are the same layers of the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fluxcompile.passes.site import AttentionSite, SkipReason

#: how far upstream of the query its projection's weight can be
_REACH = 64

LayerOf = Callable[[torch.Tensor], int | None]


def assign_layers(
    gm: fx.GraphModule,
    sites: list[AttentionSite],
    example_inputs: Sequence[Any],
    layer_of: LayerOf | None,
    layer_names: Sequence[str],
) -> None:
    """Set ``site.weight``, and ``site.layer``: index into ``layer_names``, or the order of causal
    self-attentions.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    weights = dict(zip(placeholders, example_inputs, strict=False))
    for site in sites:
        site.weight = _nearest_weight(site.q, weights, layer_of)
    if not layer_names:
        own = [site for site in sites if not _is_not_causal(site)]
        for layer, site in enumerate(own):
            site.layer = layer
        return
    for site in sites:
        by_weight = layer_of is not None and site.weight is not None
        layer = layer_of(weights[site.weight]) if by_weight else None
        site.layer = layer if layer is not None else _by_path(site.path, layer_names)


def _is_not_causal(site: AttentionSite) -> bool:
    return site.skip is not None and site.skip.reason is SkipReason.NOT_CAUSAL


def _nearest_weight(
    query: fx.Node, weights: dict[fx.Node, Any], layer_of: LayerOf | None
) -> fx.Node | None:
    """Breadth first upstream: the input that is the nearest parameter, or of a layer."""
    level, seen = [query], {query}
    for _ in range(_REACH):
        onward = []
        for node in level:
            for source in node.all_input_nodes:
                if source in seen:
                    continue
                seen.add(source)
                value = weights.get(source)
                if isinstance(value, torch.nn.Parameter):
                    return source
                buffer = layer_of is not None and isinstance(value, torch.Tensor)
                if buffer and layer_of(value) is not None:
                    return source
                onward.append(source)
        level = onward
    return None


def _by_path(path: str, layer_names: Sequence[str]) -> int | None:
    matches = [
        layer
        for layer, name in enumerate(layer_names)
        if path == name or path.endswith("." + name) or path.startswith(name + ".")
    ]
    return matches[0] if len(matches) == 1 else None
