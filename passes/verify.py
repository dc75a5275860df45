"""Check the rewritten graph: what was promised for each site is what stands there."""

from __future__ import annotations

from torch import fx

from fluxcompile.errors import RewriteError
from fluxcompile.passes.find_attention import find_attention
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
