"""Training: replace each attention by a mixture of full and sparse attention that can be trained.

==================  ==========================================================================
before              ``scaled_dot_product_attention(q, expand(k), expand(v), attn_mask=[S, S])``
soft                ``mix(full, sparse, share)``, the share from the layer's live router
locked              full in the rows that the router's argmax sends there, sparse in the others
static              full or sparse, as the pattern says
short prompt        full, which sparse equals; the share is left all the same
==================  ==========================================================================

Full attention is causal SDPA or ``flux::full_attention``, sparse attention
``flux::streaming_attention``; both have a backward. Triangle attention is made of the two: full
for the last queries of the row's prompt, streaming for the others. A row may hold an answer behind
its prompt: at inference that is decoded, and reads what ``FluxConfig.decode`` says, full or
streaming. Static patterns take whole rows for prompts.

Legal for the reason that ``branch_attention`` gives: the mask was proven, so both are what they
say they are; only the share changes numerics.
"""

from __future__ import annotations

from torch import fx

from fluxcompile.mixing import dense_queries, mix, pick
from fluxcompile.passes.branch_attention import (
    full_branch,
    is_full,
    redirect,
    replace,
    sparse_branch,
)
from fluxcompile.passes.emit import Emitter, UnknownSize
from fluxcompile.passes.insert_shares import ShareSource
from fluxcompile.passes.mask_operands import MaskOperandCache, MaskOperands
from fluxcompile.passes.plan import Policy, RoutingPlan, Training
from fluxcompile.passes.site import AttentionSite, CacheKind, GivenMask, Skip, SkipReason

#: sparse modes that can be differentiated
DIFFERENTIABLE = ("streaming", "triangle")


def mix_attention(gm: fx.GraphModule, sites: list[AttentionSite], plan: RoutingPlan) -> ShareSource:
    """Rewrite every site that may be rewritten; returns the shares that the graph makes.

    A site that keeps its attention says why in ``skip``; whether that is an error is the caller's.
    """
    emitter = Emitter(gm)
    mixer = _Mixer(emitter, MaskOperandCache(emitter), plan)
    for site in sites:
        if site.skip is None and site.cache is not CacheKind.NONE:
            site.skip = Skip(SkipReason.CACHE_IN_TRAINING, f"{site.cache.value} cache")
        if site.skip is None and mixer.policy(site) is Policy.ROUTER and site.query_tap is None:
            site.skip = site.not_routed or Skip(SkipReason.QUERY_NOT_FOUND)
        if site.skip is None and mixer.policy(site) is Policy.ROUTER and site.head_groups:
            site.skip = Skip(SkipReason.HEADS_ELSEWHERE, "training wants whole layers")
        if site.skip is not None:
            site.became = "left alone"
            continue
        output = site.output
        try:
            result = mixer.attention(site)
        except UnknownSize as problem:
            site.skip = Skip(SkipReason.MASK_UNREADABLE, f"size {problem} is not an input")
            site.became = "left alone"
        else:
            redirect(sites, output, replace(site, result, emitter))
    return mixer.source


class _Mixer:
    """Emits one site's attention after the other, on operands that they share."""

    def __init__(self, emitter: Emitter, masks: MaskOperandCache, plan: RoutingPlan) -> None:
        self._emitter = emitter
        self._masks = masks
        self._plan = plan
        self._dense: dict[tuple[MaskOperands, fx.Node | None], fx.Node] = {}
        self.source = ShareSource(emitter, masks, plan.config.pooling, plan.shared)

    def policy(self, site: AttentionSite) -> Policy:
        return self._plan.policies.get(site.layer, Policy.FULL)

    def attention(self, site: AttentionSite) -> fx.Node:
        """Emit what replaces the site, ``[B, Sq, H, D]``."""
        operands, config = self._masks.prefill(site), self._plan.config
        policy = self.policy(site)
        if policy is not Policy.FULL and 0 < site.window <= config.local:
            site.not_routed = Skip(
                SkipReason.WINDOW_WITHIN_LOCAL, f"{site.window} <= {config.local}"
            )
            if policy is Policy.ROUTER:
                self.source.fixed.append(site.layer)
            policy = Policy.FULL
        if policy is Policy.FULL:
            site.became = "full"
            return self._full(site, operands)
        if policy is Policy.SPARSE:
            return self._static(site, operands)
        if isinstance(site.mask, GivenMask) and operands.flags not in self.source.mask_flags:
            self.source.mask_flags.append(operands.flags)
        router = self._plan.routers[site.layer]
        if self._plan.training is Training.LOCKED:
            route = self.source.locked(site, router)
            return self._locked(site, operands, route)
        share = self.source.soft(site, router)
        return self._mixed(site, operands, share)

    def _static(self, site: AttentionSite, operands: MaskOperands) -> fx.Node:
        if self._short(site):
            return self._full(site, operands)
        site.became = self._plan.config.sparse
        return self._sparse(site, operands)

    def _locked(self, site: AttentionSite, operands: MaskOperands, route: fx.Node) -> fx.Node:
        if self._short(site):
            return self._full(site, operands)
        site.became = f"locked: full or {self._plan.config.sparse}"
        return self._sparse(site, operands, route=route)  # rows of both kinds in one launch

    def _mixed(self, site: AttentionSite, operands: MaskOperands, share: fx.Node) -> fx.Node:
        full = self._full(site, operands)
        if self._short(site):
            return full
        sparse = self._sparse(site, operands, full=full)
        site.became = f"mixed: full and {self._plan.config.sparse}"
        with self._emitter.graph.inserting_before(site.output):
            weight = self.source.weight(share)
            return self._emitter.call(mix, (full, sparse, weight), like=site.output)

    def _short(self, site: AttentionSite) -> bool:
        if not is_full(self._plan.config.sparse, site, self._plan.config):
            return False
        site.became = "full (short enough to be equal)"
        return True

    def _full(self, site: AttentionSite, operands: MaskOperands) -> fx.Node:
        with self._emitter.graph.inserting_before(site.output):
            return full_branch(site, operands).emit(self._emitter, site.output)

    def _sparse(
        self,
        site: AttentionSite,
        operands: MaskOperands,
        *,
        full: fx.Node | None = None,
        route: fx.Node | None = None,
    ) -> fx.Node:
        """What sparse attention is for each query of the row, decoded ones included.

        Args:
            full: the site's full attention, where it is there already.
            route: bool ``[B]``, rows that are full attention all the same.
        """
        config = self._plan.config
        branch = sparse_branch("streaming", site, operands, route, config)
        with self._emitter.graph.inserting_before(site.output):
            streaming = branch.emit(self._emitter, site.output)
        prompt_length = self._prompt_length(site)
        last = config.last if config.sparse == "triangle" else 0
        answer = config.decode == "dense" and prompt_length is not None
        if not last and not answer:
            return streaming
        full = self._full(site, operands) if full is None else full
        key = operands, prompt_length
        with self._emitter.graph.inserting_before(site.output):
            if key not in self._dense:
                self._dense[key] = self._emitter.call(
                    dense_queries, (site.q, operands.key_valid, prompt_length, last, answer)
                )
            return self._emitter.call(pick, (full, streaming, self._dense[key]), like=site.output)

    def _prompt_length(self, site: AttentionSite) -> fx.Node | None:
        """int64 ``[B]``; None in layers without a router, where whole rows are prompts."""
        return self.source.prompt_length if self.policy(site) is Policy.ROUTER else None
