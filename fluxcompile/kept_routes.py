"""Routes of living caches, kept weakly under a cache's key tensors.

Routes belong to a sequence of tokens, not to a model: whoever holds the sequence's keys finds its
routes, and a tensor that was made otherwise, or written since by somebody else, has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True, eq=False)
class KeptRoutes:
    """Routes of one cache: bool ``[B, len(layers)]``, True for full attention.

    Attributes:
        layers: the router's layers, one a column.
        full: the routes.
        version: that of the key tensor when they were kept: a static buffer that somebody else has
            written since is the same object with other tokens in it.
        sparse: of each column, whether it is sparse in every row; None until somebody waited for
            the device to find out.
    """

    layers: tuple[int, ...]
    full: torch.Tensor
    version: int | None = None
    sparse: tuple[bool, ...] | None = None

    def for_layers(self, layers: tuple[int, ...], batch: int) -> KeptRoutes | None:
        """The columns of ``layers``; full attention where a layer is new; None on a mismatch."""
        if self.full.shape[0] != batch:
            return None
        if layers == self.layers:
            return self
        known = {layer: column for column, layer in enumerate(self.layers)}
        ones = torch.ones_like(self.full[:, 0])
        columns = [self.full[:, known[x]] if x in known else ones for x in layers]
        sparse = None
        if self.sparse is not None:
            sparse = tuple(x in known and self.sparse[known[x]] for x in layers)
        return KeptRoutes(layers, torch.stack(columns, dim=1), sparse=sparse)

    def lacks(self, layers: tuple[int, ...]) -> bool:
        """Whether some of ``layers`` have no column here."""
        return layers != self.layers and not set(layers) <= set(self.layers)

    def of_rows(self, rows: torch.Tensor) -> KeptRoutes:
        """Of a batch made of ``rows``, int64 ``[B']``."""
        return replace(self, full=self.full[rows.to(self.full.device)])

    def read(self) -> KeptRoutes:
        """With ``sparse`` known. Waits for the device if it was not."""
        if self.sparse is not None:
            return self
        return replace(self, sparse=tuple((~self.full).all(0).tolist()))


_routes_of_cache = WeakIdKeyDictionary()  # key tensor -> KeptRoutes


def keep(key: torch.Tensor, routes: KeptRoutes) -> None:
    """Keep ``routes`` for whoever brings ``key`` ``[B, ...]`` next."""
    _routes_of_cache[key] = replace(routes, version=version_of(key))


def kept(key: torch.Tensor) -> KeptRoutes | None:
    """The routes kept for ``key``, or None."""
    routes = _routes_of_cache.get(key)
    return routes if routes is not None and routes.version == version_of(key) else None


def hand_over(old: torch.Tensor, new: torch.Tensor) -> None:
    """Keep for ``new`` the routes of ``old``, if there are any."""
    if (routes := kept(old)) is not None:
        keep(new, routes)


def version_of(tensor: torch.Tensor) -> int | None:
    """How often ``tensor`` was written in place; inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version
