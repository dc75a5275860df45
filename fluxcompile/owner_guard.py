"""Tie a compiled graph to the attachment and the layers that it was compiled for.

A graph takes the model's weights as inputs, so what Dynamo compiled for one model fits another of
its class and shape, and one decoder layer's graph fits every layer; yet each holds the routers of
one. The backend therefore adds guards of its own to Dynamo's:

- for each attention, that the weight next to its query belongs to the same layer of the same
  attachment (or to none): another model and another layer fail it. Where decoder layers share a
  graph (``fluxcompile.compile(regional=True)``) it may be any layer of one plan: see ``Roles``. For
  the weight of the last call that is one comparison, 0.15 microseconds, for others a look-up;
- for the graph, once something was attached or detached, that its weights belong there still;
- that what it compiles for one attachment, the same layers and caches of one layout has a
  ``recompile_limit`` of its own (Dynamo knows the like for modules it matches by identity): decoder
  layers compiled one by one, several models, and caches trimmed in ever other layers would soon
  exceed a common one, and run eagerly.

A shared graph takes its router's tensors as inputs. Other graphs have them as constants: Hugging
Face caches make Dynamo trace each decoder layer on its own, unless the layer sees a view of its
part alone, so little would be shared. Inductor's cache shares code between equal layers even so.

The guards go where Dynamo collects its own, from inside the backend call, and reach Dynamo through
:func:`guard_owners` and ``recompile_limit`` alone.

Whoever tells PyTorch to skip guards (``guard_filter_fn``, ``skip_guard_eval_unsafe``) skips these.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from fluxcompile.attachment import NOBODY, changes, owner_of
from fluxcompile.passes.graph_util import hint, value_of
from fluxcompile.passes.site import AttentionSite
from fluxcompile.recompile_limit import Allowance, allow, allowance_of
from fluxcompile.torch_internals import internal, naming_versions

Guard = internal("torch._guards", "Guard")
TracingContext = internal("torch._guards", "TracingContext")


@dataclass(frozen=True)
class Roles:
    """``tensor -> role``: graphs serve only weights of the role that they were compiled for.

    A role is the attachment and its layer, as :func:`owner_of` says. A graph that is shared serves
    all layers of one attachment that have one static route, or none; not those without a layer.

    Attributes:
        layer_of: finds the layer, where not only attachments know it.
        static: the static routes, one a layer.
    """

    layer_of: Callable[[torch.Tensor], int | None] | None = None
    shared: bool = False
    static: tuple[int, ...] | None = None

    def __call__(self, tensor: torch.Tensor) -> Hashable:
        generation, layer = owner_of(tensor)
        if self.layer_of is not None:
            layer = self.layer_of(tensor)
        if not self.shared or layer is None:
            return generation, layer
        return generation, "any layer", self.static and self.static[layer]


def guard_owners(
    gm: fx.GraphModule,
    sites: Sequence[AttentionSite],
    example_inputs: Sequence[Any],
    roles: Roles,
) -> None:
    """Let Dynamo reuse what becomes of ``gm`` only where the same routers apply.

    Does nothing outside Dynamo's tracing, where nothing is reused.
    """
    if TracingContext.try_get() is None or not sites:
        return
    from torch._dynamo.guards import install_guard  # imports Triton, so not before it runs

    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = dict(zip(placeholders, example_inputs, strict=False))
    weights = [site.weight for site in sites if site.weight is not None] or _any_weight(values)
    sources = {node: getattr(node, "_dynamo_source", None) for node in weights}
    known = [node for node, source in sources.items() if source is not None]
    same = {node: SameOwner(values[node], roles) for node in known}
    owners = Owners(tuple(same.values()))
    for node, check in same.items():
        create = functools.partial(_guard_weight, check)
        install_guard(Guard(sources[node], create))
    if same:
        allowance = allowance_of((owners.key, tuple(_layout(site) for site in sites)))
        create = functools.partial(_guard_graph, owners, allowance)
        install_guard(Guard(next(iter(sources.values())), create))


class SameOwner:
    """``tensor -> bool``: whether it belongs where the first one did."""

    def __init__(self, tensor: torch.Tensor, roles: Roles) -> None:
        self.owner = roles(tensor)
        self._roles = roles
        self._last = weakref.ref(tensor)
        self._known = WeakIdKeyDictionary({tensor: None})

    def __call__(self, tensor: object) -> bool:
        if self._last() is tensor:
            return True  # what changes around a known tensor is for `Owners` to see
        if not isinstance(tensor, torch.Tensor) or self._roles(tensor) != self.owner:
            return False
        self._last = weakref.ref(tensor)
        self._known[tensor] = None
        return True

    def still(self) -> bool:
        """Whether all tensors that passed so far would pass again."""
        return all(self._roles(tensor) == self.owner for tensor in list(self._known))


class Owners:
    """``object -> bool``: whether nothing was attached or detached that changes who owns a graph.

    Apart from the weights, as Dynamo may skip guards inside of modules it has met before.
    """

    allowance: Allowance | None = None  # kept for as long as Dynamo keeps the guard

    def __init__(self, checks: tuple[SameOwner, ...]) -> None:
        self.key = tuple(check.owner for check in checks)
        self._checks = checks
        self._changes = changes()

    def __call__(self, _: object) -> bool:
        now = changes()
        if self._changes != now:
            if not all(check.still() for check in self._checks):
                return False
            self._changes = now
        return True


def _layout(site: AttentionSite) -> int:
    """Slots of the layer's ring, 0 for none: a cache of other rings cannot use the graph."""
    return 0 if site.ring is None else hint(value_of(site.ring.keys).shape[2])


def _any_weight(values: dict[fx.Node, Any]) -> list[fx.Node]:
    """Stands in where no attention is made of a weight in sight: one of the model's parameters."""
    parameters = [node for node, x in values.items() if isinstance(x, torch.nn.Parameter)]
    owned = [node for node in parameters if owner_of(values[node]) != NOBODY]
    return (owned or parameters)[:1]


def _guard_weight(check: SameOwner, builder: Any, guard: Guard) -> None:
    reason = f"flux: {guard.name} is of another model or layer"
    with naming_versions():
        _add(builder.get_guard_manager(guard), check, reason, guard)


def _guard_graph(owners: Owners, allowance: Allowance | None, builder: Any, guard: Guard) -> None:
    with naming_versions():
        _add(builder.guard_manager.root, owners, "flux: a router was attached or detached", guard)
        if allowance is not None:
            owners.allowance = allowance
            allow(builder, allowance)


def _add(manager: Any, check: Any, reason: str, guard: Guard) -> None:
    try:
        manager.add_lambda_guard(check, [reason], guard.user_stack)
    except TypeError:  # not every PyTorch takes the stack
        manager.add_lambda_guard(check, [reason])
