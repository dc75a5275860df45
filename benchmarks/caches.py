"""Caches that are full without a long prompt: random keys and values, known token by token.

A step's time does not depend on what is in the cache, only on how much of it. So a short prompt is
run, which lays the cache out and decides the routes as any prompt does, and what it left is then
written over: the tokens of `Filling`, the same for every kind of cache, in the places where the
cache would have them. Routes stay those of the short prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

import fluxcompile
from fluxcompile import FluxConfig
from fluxcompile.cache_layer import FluxLayer
from fluxcompile.kept_routes import hand_over
from fluxcompile.kernels.ring.layout import RingPattern, pick, tokens_of_slots
from models import PEAKED_GAIN

KINDS = ("dynamic", "static", "flux", "flux-growing")
SHORT = 256  # tokens of the prompt: more than routers read


@dataclass(frozen=True)
class Filling:
    """``tokens`` random keys and values of every row of ``batch``, as `random_model` makes them.

    Drawn anew on every call, from a seed: a whole cache of them need not be kept.
    """

    model: PreTrainedModel
    batch: int
    tokens: int

    def layer(self, index: int) -> Iterator[torch.Tensor]:
        """Keys, then values, of a layer: ``[B, HK, tokens, D]``."""
        config = self.model.config
        shape = (self.batch, config.num_key_value_heads, self.tokens, config.head_dim)
        for part, gain in enumerate((PEAKED_GAIN, 1.0)):
            generator = torch.Generator(self.model.device).manual_seed(2 * index + part)
            yield torch.empty(shape, dtype=self.model.dtype, device=self.model.device).normal_(
                std=gain, generator=generator
            )


def new_cache(kind: str, model: PreTrainedModel, config: FluxConfig, room: int) -> Cache:
    """An empty cache; those of fixed size have room for ``room`` tokens."""
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=room)
    return fluxcompile.FluxCache(
        model,
        sink=config.sink,
        local=config.local,
        max_length=room if kind == "flux" else None,
    )


@torch.no_grad()
def fill(cache: Cache, filling: Filling) -> None:
    """Write ``filling`` over what a prompt left in ``cache``, which then has as many tokens.

    Where tensors stay, they are written through ``.data``: whoever counts writes, as the runtime
    does to tell whether a cache's routes are still its own, sees none.
    """
    for index, layer in enumerate(cache.layers):
        for name, made in zip(("keys", "values"), filling.layer(index), strict=True):
            _fill(layer, name, made)
        if isinstance(layer, FluxLayer):
            layer.length = filling.tokens
            for count in (layer.counts, layer.seen):
                if layer.is_ring and count is not None:
                    count.fill_(filling.tokens)
        elif isinstance(getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length.fill_(filling.tokens)
    if int(cache.get_seq_length()) != filling.tokens:
        raise AssertionError(f"expected {filling.tokens} tokens, got {cache.get_seq_length()}")


def _fill(layer: object, name: str, made: torch.Tensor) -> None:
    held = getattr(layer, name)
    if isinstance(layer, FluxLayer) and layer.is_ring:
        if layer.is_trimmed:
            batch, _, tokens, _ = made.shape
            counts = torch.full((batch,), tokens, device=made.device)
            sink = RingPattern.of_code(layer.code).sink
            made = pick(made, tokens_of_slots(None, counts, tokens, held.shape[2], sink))
    elif not hasattr(layer, "max_cache_len"):  # it grows
        hand_over(held, made)
        setattr(layer, name, made)
        return
    held.data[:, :, : made.shape[2]].copy_(made)
