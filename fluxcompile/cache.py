"""``FluxCache``: a key/value cache that forgets what sparse layers can no longer read."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fluxcompile.attachment import attachment_of
from fluxcompile.cache_layer import FluxLayer
from fluxcompile.cache_memory import CacheMemory, bytes_behind, bytes_of
from fluxcompile.config import FluxConfig
from fluxcompile.errors import CacheError
from fluxcompile.kernels.ring.layout import RingPattern
from fluxcompile.router import FluxRouter


class FluxCache(Cache):
    """Keys and values of a model compiled with backend ``flux``, sparse layers trimmed.

    Once the prompt has been routed, a layer whose rows are all sparse keeps the first ``sink`` and
    the latest ``local + spare`` valid tokens of each row, and the rest of its memory is returned.
    Layers that some row reads in full keep everything. What is generated is the same as with any
    other cache. Reading the prompt's routes waits for the device, once a prompt, and not at all
    with static routes or where the prompt fits into what is kept anyway.

    ::

        cache = fluxcompile.FluxCache(model)
        model.generate(**inputs, past_key_values=cache)
        print(cache.memory())

    It keeps everything, and says so by :meth:`memory`, where routes are not known (no router, a
    model that is not compiled), where they may read more than sink and local (``decode="dense"``),
    where ``sink`` or ``local`` differ from those of the model's routes, and in layers with a
    sliding window of their own, whose cache is transformers'. Once trimmed, it can be read by a
    model compiled for these routes only: others raise an error.

    A later call with several tokens (the next chat turn) reads sink and local in trimmed layers
    whatever the sparse mode of prompts is.

    Args:
        model_or_config: the model, or its config.
        router: gives ``sink`` and ``local``; by default the router attached to the model.
        sink, local: valid tokens to keep, instead of the router's; those of ``FluxConfig`` if there
            is no router.
        spare: tokens kept beyond ``local``, for :meth:`crop` to take back. 7 or more also serve
            steps of up to 8 tokens without unrolling the ring.

    Raises:
        CacheError: an argument does not fit.
    """

    def __init__(
        self,
        model_or_config: nn.Module | PreTrainedConfig,
        router: FluxRouter | None = None,
        *,
        sink: int | None = None,
        local: int | None = None,
        spare: int = 64,
    ) -> None:
        config = getattr(model_or_config, "config", model_or_config)
        if not isinstance(config, PreTrainedConfig):
            raise CacheError.mismatch(
                "FluxCache", "a transformers model or its config", type(model_or_config).__name__
            )
        if router is None and isinstance(model_or_config, nn.Module):
            attachment = attachment_of(model_or_config)
            router = attachment.router if attachment else None
        default = router.config if router else FluxConfig()
        sink = default.sink if sink is None else sink
        local = default.local if local is None else local
        for name, value, least in (("sink", sink, 1), ("local", local, 1), ("spare", spare, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CacheError.mismatch(f"FluxCache {name}", f"an int >= {least}", repr(value))
        self.pattern = RingPattern(sink, local, spare)
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[self._own(layer) for layer in layers])

    def _own(self, layer: object) -> object:
        """Ours for a layer that keeps every token; others stay as transformers makes them."""
        return FluxLayer(self.pattern) if type(layer) is DynamicLayer else layer

    def memory(self) -> CacheMemory:
        """Bytes of keys and values now, and of a cache that had kept every token."""
        now, untrimmed, trimmed = [], [], []
        for index, layer in enumerate(self.layers):
            kv = getattr(layer, "keys", None), getattr(layer, "values", None)
            now.append(bytes_behind(*kv))
            if isinstance(layer, FluxLayer):
                untrimmed.append(bytes_of(int(layer.get_seq_length()), *kv))
                if layer.is_trimmed:
                    trimmed.append(index)
            else:
                untrimmed.append(now[-1])
        return CacheMemory(tuple(now), tuple(untrimmed), tuple(trimmed))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search; their routes go along."""
        super().reorder_cache(beam_idx)
