"""One layer's view of a key/value cache, in which no code depends on the layer's number.

A decoder layer asks the whole cache for its part by its own ``layer_idx``. Dynamo would specialise
on that number and compile each layer anew; the view hands every layer its own part.
"""

from __future__ import annotations

from typing import Any

import torch


class OneLayerCache:
    """``cache`` whose updates go to ``layer``, its part for the one layer that sees it."""

    def __init__(self, cache: Any, layer: Any) -> None:
        self._cache = cache
        self._layer = layer

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Cache.update``; ``layer_idx`` is not looked at, so nothing depends on it."""
        return self._layer.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def view_of(cache: Any, layer_idx: int) -> Any:
    """The view of layer ``layer_idx``, or ``cache`` itself where a view might not do the same.

    That is, unless its ``update`` is transformers' own, which finds or makes the layer's part and
    passes the call on; with offloading it does more than that.
    """
    from transformers.cache_utils import Cache

    if not isinstance(cache, Cache) or type(cache).update is not Cache.update or cache.offloading:
        return cache
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer_idx >= len(cache.layers):
        return cache
    return OneLayerCache(cache, cache.layers[layer_idx])
