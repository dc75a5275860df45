"""What the user asked for, resolved for one graph: who decides each layer's route, and how."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from fluxcompile.config import FluxConfig
from fluxcompile.layer_router import LayerRouter


class Policy(enum.Enum):
    """Who decides a layer's route."""

    FULL = "full"
    SPARSE = "sparse"
    ROUTER = "router"


class Training(enum.Enum):
    """How a training graph follows its routers."""

    SOFT = "soft"  #: mixed by the router's share, which is trained
    LOCKED = "locked"  #: routed by the router's argmax, without a gradient to it


@dataclass(frozen=True)
class RoutingPlan:
    """Routes of one graph's layers.

    ``policies`` maps a layer to its policy and ``routers`` a layer to its trained router; a layer
    that is missing from ``policies`` gets full attention. ``retrieval`` is what full attention
    means in a layer that a router or a static pattern routes: the configuration's, or ``"full"``
    where full attention is what the user asked for. ``training`` is None in inference. With
    ``shared`` the graph serves several layers: its router's tensors are inputs, not constants.
    """

    config: FluxConfig
    policies: Mapping[int, Policy] = field(default_factory=dict)
    routers: Mapping[int, LayerRouter] = field(default_factory=dict)
    strict: bool = False
    retrieval: str = "full"
    training: Training | None = None
    shared: bool = False
