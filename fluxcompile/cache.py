"""``FluxCache``: a key/value cache that forgets what sparse layers can no longer read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from fluxcompile.attachment import attachment_of
from fluxcompile.cache_layer import FluxLayer, picked
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

    It keeps everything, which a warning and :meth:`memory` say, where routes are not known (no
    router, a model that is not compiled), where they may read more than sink and local
    (``decode="dense"``), where ``sink`` or ``local`` differ from those of the model's routes, and
    in layers with a sliding window of their own, whose cache is transformers'.

    Once trimmed, it can be read by a model compiled for these routes only: others raise an error.
    So does a call whose ``attention_mask`` is not that of the whole sequence; on a GPU, where that
    would mean to wait, its rows are NaN instead.

    A later call with several tokens (the next chat turn) reads sink and local in trimmed layers,
    and with ``max_length`` everything in the others, whatever the prompt's sparse and retrieval
    modes are.

    Compiled code is made for one set of trimmed layers. A model whose router trims ever other ones
    gets code for the first few sets; then the closest of these within a prompt's set is used.

    Args:
        model_or_config: the model, or its config.
        router: gives ``sink`` and ``local``; by default the router attached to the model.
        sink, local: valid tokens to keep, instead of the router's; those of ``FluxConfig`` if there
            is no router.
        spare: tokens kept beyond ``local``, for :meth:`crop` to take back. 7 or more also serve
            steps of up to 8 tokens without unrolling the ring.
        max_length: tokens to make room for once the prompt has run, in tensors that stay where they
            are, for CUDA graphs. Layers that keep everything then have ``max_length`` slots, and
            only models compiled with ``flux`` can read them. None: they grow.

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
        max_length: int | None = None,
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
        _check("sink", sink, 1)
        _check("local", local, 1)
        _check("spare", spare, 0)
        if max_length is not None:
            _check("max_length", max_length, sink + 1)
        self.max_length = max_length or 0
        self._most = 0  # tokens there ever were, as far as crop() has seen
        self.pattern = RingPattern(sink, local, spare, self.max_length)
        layers = DynamicCache(config=config).layers
        super().__init__(layers=[self._own(layer) for layer in layers])

    def _own(self, layer: object) -> object:
        """Ours for a layer that keeps every token; others stay as transformers makes them."""
        if type(layer) is not DynamicLayer:
            return layer
        return FluxLayer(self.pattern)

    @property
    def _ours(self) -> list[FluxLayer]:
        return [layer for layer in self.layers if isinstance(layer, FluxLayer)]

    @property
    def _rings(self) -> list[FluxLayer]:
        return [layer for layer in self._ours if layer.is_ring]

    @property
    def is_compileable(self) -> bool:
        """Whether transformers has to make masks of a fixed size: not in ``generate`` itself,
        which would then compile the model its own way."""
        return self.max_length > 0 and torch.compiler.is_compiling()

    def memory(self) -> CacheMemory:
        """Bytes of keys and values now, and of a cache that had kept every token."""
        now, untrimmed, trimmed = [], [], []
        for index, layer in enumerate(self.layers):
            kv = getattr(layer, "keys", None), getattr(layer, "values", None)
            now.append(bytes_behind(*kv, *getattr(layer, "old", ())[:2]))
            if not isinstance(layer, FluxLayer):
                untrimmed.append(now[-1])
                continue
            tokens = layer.max_length if layer.is_ring and layer.is_fixed else layer.length
            untrimmed.append(bytes_of(tokens, *kv))
            if layer.is_trimmed:
                trimmed.append(index)
        return CacheMemory(tuple(now), tuple(untrimmed), tuple(trimmed))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens.

        Args:
            tokens_to_remove: minus their number. More than 0: the tokens to keep.

        Raises:
            CacheError: there are not so many, or trimmed layers would need again what they have
                dropped: ``spare`` tokens can be taken back, counted from the most there ever were.
        """
        length, tokens_to_remove = int(self.get_seq_length()), int(tokens_to_remove)
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        most, left = max(self._most, length), length - remove
        if left < 0:
            raise CacheError.mismatch("crop", f"at most {length} tokens", remove)
        if most - left > self.pattern.spare and any(ring.is_trimmed for ring in self._rings):
            raise CacheError.mismatch(
                "crop of a trimmed cache",
                f"at least {most - self.pattern.spare} tokens to stay, as the trimmed layers spare "
                f"{self.pattern.spare} of {most} (see FluxCache(spare=...))",
                left,
            )
        for layer in self.layers:
            if not (isinstance(layer, FluxLayer) and layer.is_ring):
                layer.crop(-remove)
        if not remove:
            return
        self._most = most
        for counts in _distinct(ring.counts for ring in self._rings):
            counts.fill_(-1)
        for seen in _distinct(ring.seen for ring in self._rings):
            seen.sub_(remove)
        for ring in self._rings:
            ring.length -= remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make the batch of the rows ``beam_idx``, int64 ``[B]``; their routes go along."""
        self._pick_rows(beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times; routes go along."""
        batch = next((x.keys.shape[0] for x in self._ours if x.keys is not None), 0)
        rows = torch.arange(batch).repeat_interleave(repeats)
        self._pick_rows(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, int64 ``[B']`` or bool ``[B]``; their routes go along."""
        rows = torch.as_tensor(indices)
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        self._pick_rows(rows, lambda layer: layer.batch_select_indices(indices))

    def _pick_rows(self, rows: torch.Tensor, otherwise: Callable[[Any], None]) -> None:
        """Our layers share their counts, and go on sharing them."""
        counts = {
            id(x): picked(x, rows.to(x.device)) for x in _distinct(x.counts for x in self._rings)
        }
        for layer in self.layers:
            if not isinstance(layer, FluxLayer):
                otherwise(layer)
                continue
            layer.pick_rows(rows)
            if layer.is_ring:
                layer.counts = counts[id(layer.counts)]

    def reset(self) -> None:
        """Forget everything; rings of fixed size are used again, in their place, if they fit."""
        self._most = 0
        super().reset()


def _check(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CacheError.mismatch(f"FluxCache {name}", f"an int >= {least}", repr(value))


def _distinct(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())
