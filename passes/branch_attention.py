"""Replace each attention by what its route allows.

==================  ==========================================================================
before              ``scaled_dot_product_attention(q, expand(k), expand(v), attn_mask=[S, S])``
full                causal SDPA on unexpanded k and v, or ``flux::full_attention``: with ranges, or
                    where our kernel may be the faster one
sparse              the sparse mode's operator (prefill), ``flux::decode_attention`` (decode)
routed, prefill     ``cond(all rows full, full, sparse with per-row routes)``
retrieval mode      XAttention in the place of full; a mixed batch computes both and picks by row
routed, decode      ``flux::decode_attention`` reading the row's route on the device
rings               what ``read_ring`` makes of them
==================  ==========================================================================

Legal because the mask was proven equal to *causal + valid keys (+ window)* (or is checked at run
time), so full attention on ranges computes the same function; only a route may change numerics.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from fluxcompile.config import FluxConfig
from fluxcompile.kernels.streaming.cuda import may_outrun_cudnn
from fluxcompile.passes.emit import Branch, Emitter, UnknownSize
from fluxcompile.passes.graph_util import erase_dead, op_name, same_size, value_of
from fluxcompile.passes.insert_router import RouteSource
from fluxcompile.passes.last_token import read_all_tokens
from fluxcompile.passes.mask_operands import MaskOperandCache, MaskOperands
from fluxcompile.passes.plan import Policy, RoutingPlan
from fluxcompile.passes.read_ring import RingReader, allow_trimming, may_become_ring
from fluxcompile.passes.site import AttentionSite, CausalMask, OutputForm, Skip, SkipReason


def branch_attention(
    gm: fx.GraphModule, sites: list[AttentionSite], plan: RoutingPlan
) -> RouteSource:
    """Rewrite every site that may be rewritten; returns the routes the graph makes or needs."""
    emitter = Emitter(gm)
    masks = MaskOperandCache(emitter)
    routes = RouteSource(emitter, masks, plan.config.pooling, plan.shared)
    rings = RingReader(emitter, masks, routes)
    for site in sites:
        if site.skip is not None:
            site.became = "left alone"
            continue
        output = site.output
        try:
            replacement = _rewrite(site, plan, emitter, masks, routes, rings)
        except UnknownSize as problem:
            site.skip = Skip(SkipReason.MASK_UNREADABLE, f"size {problem} is not an input")
            read_all_tokens(site)
            site.became = "left alone"
        else:
            redirect(sites, output, replacement)
    return routes


def _rewrite(
    site: AttentionSite,
    plan: RoutingPlan,
    emitter: Emitter,
    masks: MaskOperandCache,
    routes: RouteSource,
    rings: RingReader,
) -> fx.Node:
    policy = _policy(site, plan)
    if site.ring is not None:
        return replace(site, rings.read(site, policy, plan), emitter)
    if may_become_ring(site):
        allow_trimming(site, policy, plan)
        site.key_valid = masks.key_valid(site)
    else:
        site.marker = None
    if site.is_decode:
        result = _decode(site, policy, plan, emitter, masks, routes)
    else:
        result = _prefill(site, policy, plan, emitter, masks, routes)
    return replace(site, result, emitter)


def replace(site: AttentionSite, result: fx.Node, emitter: Emitter) -> fx.Node:
    """Put ``result`` ``[B, Sq, H, D]`` where the site's output is; returns the new output."""
    with emitter.graph.inserting_before(site.output):
        replacement = _in_form(site, result, emitter)
        if any(op_name(user) == "view" for user in site.output.users):
            replacement = emitter.method("contiguous", replacement)  # memory order as traced
    replacement.meta = dict(site.output.meta)
    site.output.replace_all_uses_with(replacement)
    erase_dead(site.output)
    return replacement


def _in_form(site: AttentionSite, result: fx.Node, emitter: Emitter) -> fx.Node:
    """``result`` with its axes as the site's output has them."""
    form, shape = site.output_form, value_of(site.output).shape
    if form is OutputForm.BIHD:
        return emitter.method("contiguous", result)
    if form is OutputForm.BIKGD:
        return emitter.method("unflatten", result, 2, tuple(shape[2:4]))
    heads_first = emitter.method("transpose", result, 1, 2)
    if form is OutputForm.FLAT:
        return emitter.method("flatten", heads_first, 0, 1)
    if form is OutputForm.BKGID:
        return emitter.method("unflatten", heads_first, 1, tuple(shape[1:3]))
    return heads_first


def redirect(sites: list[AttentionSite], old: fx.Node, new: fx.Node) -> None:
    """An attention may read another one's output directly."""
    for site in sites:
        for role in ("q", "k", "v", "query_tap"):
            if getattr(site, role) is old:
                setattr(site, role, new)


def _policy(site: AttentionSite, plan: RoutingPlan) -> Policy:
    """The layer's policy, lowered to full attention where sparse attention cannot be had."""
    policy = plan.policies.get(site.layer, Policy.FULL)
    if policy is Policy.FULL:
        return policy
    config, window = plan.config, site.window
    if window and window <= config.local:
        site.not_routed = Skip(SkipReason.WINDOW_WITHIN_LOCAL, f"{window} <= {config.local}")
    elif site.forgets and not _sink_known(site):
        site.not_routed = Skip(SkipReason.SLIDING_CACHE, f"window {window}" if window else "")
    elif policy is Policy.ROUTER and site.query_tap is None and site.may_start_prompt:
        site.not_routed = site.not_routed or Skip(SkipReason.QUERY_NOT_FOUND)
    elif policy is Policy.ROUTER and site.head_groups and config.pooling.each_head:
        site.not_routed = Skip(SkipReason.HEADS_ELSEWHERE, 'heads="each" under tensor parallelism')
    else:
        return policy
    return Policy.FULL


def _sink_known(site: AttentionSite) -> bool:
    """Decode can count the dropped sink tokens where the mask reads validity at an offset, or the
    cache counts what it has seen and all of it was valid."""
    if not site.is_decode or not isinstance(site.mask, CausalMask):
        return False
    return site.mask.valid is not None or site.past_length is not None


def _decode(
    site: AttentionSite,
    policy: Policy,
    plan: RoutingPlan,
    emitter: Emitter,
    masks: MaskOperandCache,
    routes: RouteSource,
) -> fx.Node:
    route = None
    if policy is Policy.ROUTER:
        route = routes.route(site, plan.routers[site.layer])
    sparse = policy is not Policy.FULL and plan.config.decode == "sparse"
    bounds, valid = masks.decode(site, plan.config.sink, plan.config.local, sparse)
    site.became = {
        Policy.FULL: "full decode",
        Policy.SPARSE: "streaming decode" if sparse else "full decode",
        Policy.ROUTER: "decode by device-side route" if sparse else "full decode",
    }[policy]
    with emitter.graph.inserting_before(site.output):
        return emitter.call(
            torch.ops.flux.decode_attention.default,
            (
                *(site.q, site.k, site.v, bounds, valid, route if sparse else None),
                *(site.scale, site.softcap),
            ),
            like=site.output,
        )


def _prefill(
    site: AttentionSite,
    policy: Policy,
    plan: RoutingPlan,
    emitter: Emitter,
    masks: MaskOperandCache,
    routes: RouteSource,
) -> fx.Node:
    operands, config = masks.prefill(site), plan.config
    # Branches must give the same strides. Of one query SDPA's are others: its heads come first.
    one_routed = policy is Policy.ROUTER and site.all_tokens is not None

    def branch(mode: str, route: fx.Node | None = None) -> Branch:
        if mode == "full":
            ours = one_routed or may_outrun_cudnn(value_of(site.q))
            return full_branch(site, operands, ours)
        return sparse_branch(mode, site, operands, route, config)

    dense = plan.retrieval if _retrieves(site, plan) else "full"
    if policy is Policy.FULL:
        site.became = dense
        return _emit(branch(dense), emitter, site)
    route = None
    if policy is Policy.ROUTER:
        route = routes.route(site, plan.routers[site.layer])
    sparse = "full" if is_full(config.sparse, site, config) else config.sparse
    if policy is Policy.SPARSE or sparse == dense:
        site.became = "full (short enough to be equal)" if sparse == "full" else sparse
        return _emit(branch(sparse), emitter, site)
    site.became = f"routed: {dense} or {sparse}"
    if dense != "full":
        return _pick_by_row(emitter, site, route, branch(dense), branch(sparse))
    every_row = _decision(emitter, site, route, "all")
    with emitter.graph.inserting_before(site.output):
        return emitter.cond(every_row, branch(dense), branch(sparse, route), like=site.output)


def _decision(emitter: Emitter, site: AttentionSite, route: fx.Node, over_rows: str) -> fx.Node:
    return emitter.decision(route, over_rows, site.output, behind=(site.q, site.k, site.v))


def _pick_by_row(
    emitter: Emitter, site: AttentionSite, route: fx.Node, dense: Branch, sparse: Branch
) -> fx.Node:
    """Neither branch can serve the other's rows: each is computed if some row wants it."""
    every_row = _decision(emitter, site, route, "all")
    with emitter.graph.inserting_before(site.output):
        if same_size(site.q_shape[0], 1):
            return emitter.cond(every_row, dense, sparse, like=site.output)
    nothing = Branch(torch.zeros_like, (site.q,), to_tokens_first=True)
    some_row = _decision(emitter, site, route, "any")
    with emitter.graph.inserting_before(site.output):
        both = (
            emitter.cond(some_row, dense, nothing, like=site.output),
            emitter.cond(every_row, nothing, sparse, like=site.output),
        )
        return emitter.call(torch.where, (emitter.method("view", route, -1, 1, 1, 1), *both))


def _emit(branch: Branch, emitter: Emitter, site: AttentionSite) -> fx.Node:
    with emitter.graph.inserting_before(site.output):
        return branch.emit(emitter, site.output)


def _retrieves(site: AttentionSite, plan: RoutingPlan) -> bool:
    """True where full attention is to be replaced: in a routed layer without a window of its own
    (which is cheap as it is), on a prompt long enough to make a difference."""
    routed = site.layer in plan.policies and site.not_routed is None and not site.window
    return routed and plan.retrieval != "full" and not is_full(plan.retrieval, site, plan.config)


def is_full(mode: str, site: AttentionSite, config: FluxConfig) -> bool:
    """True where no key is out of the mode's reach. With a symbolic length this guards on the
    answer, so that lengths on one side of the boundary share a compiled graph."""
    reach = config.sink + config.local  # what every query sees in most modes
    if mode == "xattention":
        reach = 2 * config.block  # it always takes a row's first block and the query's own
    return bool(value_of(site.k).shape[2] <= reach)


def full_branch(site: AttentionSite, operands: MaskOperands, ours: bool = False) -> Branch:
    """Full attention: torch's SDPA where that can say it, else ``flux::full_attention``.

    Args:
        ours: the operator, even where SDPA could: it knows the length when it runs.
    """
    plain = operands.is_plain_causal and not site.window and not site.softcap
    last = site.all_tokens is not None  # and sees all keys
    if plain and not ours and (last or same_size(site.q_shape[2], site.k_shape[2])):
        grouped = not same_size(site.q_shape[1], site.k_shape[1])
        return Branch(
            functional.scaled_dot_product_attention,
            (site.q, site.k, site.v),
            {"is_causal": not last, "scale": site.scale, "enable_gqa": grouped},
            to_tokens_first=True,
        )
    return Branch(
        torch.ops.flux.full_attention.default,
        (site.q, site.k, site.v, *operands.as_args(), site.window, site.scale, site.softcap),
    )


#: sparse mode: the configuration that its operator ``flux::<mode>_attention`` takes
FIELDS = {
    "streaming": ("sink", "local"),
    "triangle": ("sink", "local", "last"),
    "power": ("sink", "local", "block"),
    "xattention": ("stride", "threshold", "block"),
}


def sparse_branch(
    mode: str,
    site: AttentionSite,
    operands: MaskOperands,
    route: fx.Node | None,
    config: FluxConfig,
) -> Branch:
    return Branch(
        getattr(torch.ops.flux, f"{mode}_attention").default,
        (
            *(site.q, site.k, site.v, *operands.as_args(), route),
            *(getattr(config, field) for field in FIELDS[mode]),
            *(site.window, site.scale, site.softcap),
        ),
    )
