"""Resolve options, attached router and graph into a routing plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fluxcompile.attachment import any_attached, find, layer_of
from fluxcompile.config import FluxConfig
from fluxcompile.errors import OptionError, RouterError
from fluxcompile.layer_table import LayerTable
from fluxcompile.options import CompileOptions
from fluxcompile.owner_guard import Roles
from fluxcompile.passes.assign_layers import LayerOf
from fluxcompile.passes.mix_attention import DIFFERENTIABLE
from fluxcompile.passes.plan import Policy, RoutingPlan, Training
from fluxcompile.passes.site import AttentionSite, CacheKind, Skip, SkipReason
from fluxcompile.router import FluxRouter


class Planner:
    """Who routes this graph: an explicit router, the attached one, static routes, or nobody.

    Args:
        table: of the model whose decoder layers are compiled one by one, which then may share
            graphs; None otherwise.
    """

    def __init__(
        self,
        options: CompileOptions,
        example_inputs: Sequence[Any],
        table: LayerTable | None = None,
    ) -> None:
        attachment = find(example_inputs)
        self._options = options
        self._inputs = example_inputs
        self.router: FluxRouter | None = options.router or (attachment and attachment.router)
        attached = attachment is not None and self.router is attachment.router
        self.layer_of: LayerOf | None = layer_of if attached else table and table.layer_of
        #: whose router routes the graph, if it is an attached one
        self.attachment = attachment if attached else None
        #: what is compiled depends on what is attached to the model
        self.follows_attachment = options.router is None or attached
        known = self.router.layer_names if self.router else table and table.names
        self.layer_names: tuple[str, ...] = known or ()
        default = self.router.config if self.router else FluxConfig()
        self.config = options.config or default
        self.routes = options.routes or ("router" if self.router else None)
        self.training = self._training(example_inputs) if options.mode == "train" else None
        self._table = table
        #: position among the inputs of the weight that tells the layer, if the graph is shared
        self.shared: int | None = None

    def _training(self, example_inputs: Sequence[Any]) -> Training:
        """How training follows the router; refuses what cannot be trained."""
        for name, known in (("sparse", DIFFERENTIABLE), ("retrieval", ("full",))):
            value = getattr(self.config, name)
            if value not in known and self.routes != "full":
                raise OptionError(
                    f'mode "train": expected FluxConfig.{name} to be one of {list(known)}, which '
                    f"have a backward, got {value!r}"
                )
        if self.routes != "router":
            return Training.LOCKED
        trained = sum(isinstance(x, nn.Parameter) and x.requires_grad for x in example_inputs)
        if trained and torch.is_grad_enabled():
            raise OptionError(
                'mode "train": expected a frozen model (model.requires_grad_(False)) while its '
                f"router is trained, got {trained} parameters that require grad; to adapt the "
                'model to its router use options={"mode": "train", "routes": "locked"}'
            )
        return Training.SOFT

    def share(self, gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> None:
        """Let the graph serve all layers of one plan, if a weight tells which one it is called for.

        Legal because such a graph has one attention, and what is compiled into it depends on the
        layer by its ``Roles`` alone: its router's tensors become inputs.
        """
        if self._table is None or len(sites) != 1:
            return
        (site,) = sites
        if site.weight is None or site.layer is None:
            return
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        position = placeholders.index(site.weight)
        if self.layer_of(self._inputs[position]) is not None:
            self.shared = position

    @property
    def roles(self) -> Roles:
        """What of the model and the layer that a weight belongs to the graph depends on."""
        if self._table is None:
            return Roles()
        static = self.routes if isinstance(self.routes, tuple) else None
        return Roles(self.layer_of, shared=self.shared is not None, static=static)

    def plan(self, sites: Sequence[AttentionSite]) -> RoutingPlan:
        """Policies for the layers found; says on the sites why one is not routed."""
        layers = sorted({site.layer for site in sites if site.layer is not None})
        if self.training is not None and self.routes is None and layers:
            raise OptionError(
                'mode "train": expected a router (fluxcompile.attach, or the option "router") or '
                '"routes", got none'
            )
        if self.by_router:
            if self.router is None:
                raise OptionError(
                    f'routes: expected a router for "{self.routes}", got none attached'
                )
            self._check_features()
            self._check_dims(sites)
            policies = dict.fromkeys(layers, Policy.ROUTER)
            routers = {layer: self.router.layers[layer] for layer in layers}
        elif isinstance(self.routes, tuple):
            policies, routers = self._static(sites, layers), {}
        else:
            policy = Policy.SPARSE if self.routes == "sparse" else Policy.FULL
            policies, routers = dict.fromkeys(layers, policy), {}
        for site in sites:
            if self.routes is None:
                site.not_routed = Skip(SkipReason.NO_ROUTER, _who_has_one())
                continue
            if not self.by_router and _lacks_query(site):
                site.not_routed = None  # only a router reads the query
            if site.layer is None and site.not_routed is None:
                site.not_routed = Skip(SkipReason.NO_ROUTER_FOR_LAYER)
            elif self.routes != "full" and site.skip is None and site.cache is CacheKind.UNKNOWN:
                site.not_routed = Skip(SkipReason.CACHE_UNKNOWN)
                policies.pop(site.layer, None)
        routed = self.by_router or isinstance(self.routes, tuple)
        retrieval = self.config.retrieval if routed else "full"
        return RoutingPlan(
            self.config,
            policies,
            routers,
            self._options.strict,
            retrieval,
            self.training,
            shared=self.shared is not None,
        )

    @property
    def generation(self) -> int:
        """Of the attachment, 0 for none."""
        return self.attachment.generation if self.attachment else 0

    @property
    def by_router(self) -> bool:
        return self.routes in ("router", "locked")

    def _static(self, sites: Sequence[AttentionSite], layers: list[int]) -> dict[int, Policy]:
        if not layers:  # a part of the model between its layers
            return {}
        expected = len(self.layer_names) or len(layers)
        if len(self.routes) != expected:
            raise OptionError(
                f"routes: expected {expected} entries, one a layer, got {len(self.routes)}"
            )
        return {layer: Policy.FULL if self.routes[layer] else Policy.SPARSE for layer in layers}

    def _check_features(self) -> None:
        """Options may say how many tokens a router reads, not what it makes of them."""
        for name in ("segments", "heads", "standardize"):
            trained, asked = (getattr(config, name) for config in (self.router.config, self.config))
            if trained != asked:
                raise RouterError.mismatch(
                    f"FluxConfig.{name} of the options", f"{trained!r} (the router's)", f"{asked!r}"
                )
        trained, asked = (len(c.pooling.ends) for c in (self.router.config, self.config))
        if trained != asked:
            raise RouterError.mismatch(
                "ends read by FluxConfig of the options", f"{trained} (the router's)", asked
            )

    def _check_dims(self, sites: Sequence[AttentionSite]) -> None:
        for site in sites:
            head_dim = site.q_shape[3] if site.skip is None else self.router.head_dim
            if site.layer is not None and head_dim != self.router.head_dim:
                raise RouterError.mismatch(
                    f"router's head_dim for {site.path}", head_dim, self.router.head_dim
                )
            expected = self.router.heads
            heads = site.q_shape[1] if site.skip is None else expected
            if site.layer is not None and expected is not None and heads != expected:
                raise RouterError.mismatch(f"router's heads for {site.path}", heads, expected)

    def expects(self, site: AttentionSite) -> bool:
        """False where full attention is what the user asked for or what is simply right."""
        if site.skip is not None:
            return site.skip.reason is not SkipReason.NOT_CAUSAL
        if site.not_routed.reason is SkipReason.WINDOW_WITHIN_LOCAL:
            return False
        return self.routes != "full"

    def routes_site(self, site: AttentionSite) -> bool:
        """Whether the site may be anything but full attention."""
        routed = self.routes not in (None, "full")
        return routed and site.skip is None and site.not_routed is None

    def layer_name(self, site: AttentionSite) -> str:
        if self.layer_names and site.layer is not None:
            return self.layer_names[site.layer]
        return site.path or site.output.name


def _who_has_one() -> str:
    if not any_attached():
        return ""
    return "other models of this process have one, which a copy of a model does not take along"


def _lacks_query(site: AttentionSite) -> bool:
    return site.not_routed is not None and site.not_routed.reason is SkipReason.QUERY_NOT_FOUND
