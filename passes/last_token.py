"""Compute only what is read: of a prompt whose last token's logits are wanted, the last layer's
query, output projection and MLP for that token alone.

======  ==========================================================================
before  ``hidden = x + mlp(norm(x)); logits = lm_head(norm(hidden)[:, -1:])``
after   ``x = x[:, -1:]; hidden = x + mlp(norm(x)); logits = lm_head(norm(hidden))``
======  ==========================================================================

The slice moves upstream as ``passes/last_rows.py`` says, up to the attention and over it. Keys and
values, which the cache keeps, stay whole.

Legal because an attention's last output is made of its last query: all that is known of its keys
stays true. A sparse mode that chooses keys for a block of queries would choose others for one, so
such layers are left alone, and so is what reads a cache of rings.
"""

from __future__ import annotations

from torch import fx

from fluxcompile.passes.graph_util import erase_dead
from fluxcompile.passes.last_rows import LastRows
from fluxcompile.passes.plan import Policy, RoutingPlan
from fluxcompile.passes.site import AllTokens, AttentionSite, OutputForm

NOTE = "only the last token's query is read"
#: modes in which what a query sees does not depend on other queries
_BY_QUERY = {"full", "streaming", "triangle"}
_TOKENS = {
    OutputForm.BHID: 2,
    OutputForm.BIHD: 1,
    OutputForm.FLAT: 1,
    OutputForm.BKGID: 3,
    OutputForm.BIKGD: 1,
}


def read_last_token(gm: fx.GraphModule, sites: list[AttentionSite], plan: RoutingPlan) -> int:
    """Move slices of last tokens up to the attentions; returns how many then have one query.

    Each of them still stands for all tokens, with a slice of its output, as long as it may yet be
    left alone. :func:`ask_last_token` does the rest.
    """
    if all(site.skip is not None for site in sites):
        return 0
    may = {site.output: site for site in sites if _may_ask_one(site, plan)}
    rows = LastRows()
    rows.find(gm.graph)
    asked = 0
    for attention, (output, axis) in rows.move_up(may).items():
        site = may[attention]
        if axis == _TOKENS[site.output_form]:
            site.all_tokens = AllTokens(site.q, site.output)
            with gm.graph.inserting_before(output):
                site.q, site.output = rows.slice(site.q, 2), output
            site.notes.append(NOTE)
            asked += 1
    return asked


def ask_last_token(sites: list[AttentionSite]) -> None:
    """Move the slices of queries up too, once the attentions for all tokens are gone."""
    rows = LastRows()
    asked = [site for site in sites if site.all_tokens is not None]
    for site in asked:
        with site.q.graph.inserting_before(site.q):
            row = rows.slice(site.all_tokens.q, 2)
        site.q.replace_all_uses_with(row)
        erase_dead(site.q)
        site.q = row
    rows.move_up()
    for site in asked:
        site.q = rows.became.get(site.q, site.q)


def read_all_tokens(site: AttentionSite) -> None:
    """Undo what :func:`read_last_token` did to a site; only its output's slice stays."""
    if site.all_tokens is not None:
        query, site.q, site.output = site.q, site.all_tokens.q, site.all_tokens.output
        site.all_tokens = None
        site.notes.remove(NOTE)
        erase_dead(query)


def _may_ask_one(site: AttentionSite, plan: RoutingPlan) -> bool:
    if site.skip is not None or site.is_decode or site.ring is not None:
        return False
    policy = plan.policies.get(site.layer)
    modes = set() if policy is None else {plan.retrieval}
    if policy not in (None, Policy.FULL):
        modes.add(plan.config.sparse)
    return modes <= _BY_QUERY
