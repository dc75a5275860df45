"""Check the rewritten graph: what was promised for each site is what stands there."""

from __future__ import annotations

import torch
from torch import fx

from fluxcompile.errors import RewriteError
from fluxcompile.mixing import full_share, harden, mix, pick
from fluxcompile.passes.find_attention import find_attention
from fluxcompile.passes.insert_shares import ShareSource
from fluxcompile.passes.site import AttentionSite


def verify(gm: fx.GraphModule, sites: list[AttentionSite]) -> None:
    """Raise RewriteError where the graph and the sites disagree.

    Every attention that still has a dense mask must be one that was left alone, and every
    attention that was left alone must still be there.
    """
    gm.graph.lint()
    left_alone = {site.output for site in sites if site.skip is not None}
    remaining = {site.output for site in find_attention(gm)}
    gone = [node.name for node in left_alone if node not in remaining]
    if gone:
        raise RewriteError(f"expected {gone} to be left alone, got a graph without them")
    masked = [
        site.output.name
        for site in find_attention(gm)
        if site.attn_mask is not None and site.output not in left_alone
    ]
    if masked:
        raise RewriteError(f"expected no dense mask after the rewrite, got one at {masked}")


def verify_mixture(gm: fx.GraphModule, sites: list[AttentionSite], source: ShareSource) -> None:
    """Raise RewriteError where a training graph does not hold what was promised.

    Every layer with a router has a share of its own, every mixture reads one and is read, and
    nothing of it stands where the model turned gradients off.
    """
    accounted = [*source.layers, *source.fixed]
    mixed = [site.layer for site in sites if site.became.startswith("mixed")]
    if len(set(accounted)) != len(accounted) or not set(mixed) <= set(source.layers):
        raise RewriteError(f"expected one share a layer of {mixed}, got {accounted}")
    mixtures = gm.graph.find_nodes(op="call_function", target=mix)
    if len(mixtures) != len(mixed):
        raise RewriteError(f"expected {len(mixed)} mixtures, got {len(mixtures)}")
    for node in mixtures:
        if node.args[2] not in source.weights or not node.users:
            raise RewriteError(f"expected {node.name} to mix by a share and to be read")
    grad = True
    for node in gm.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
        elif node.target in (mix, pick, full_share, harden) and not grad:
            raise RewriteError(f"expected {node.name} under gradients, got it without")
