"""Families that are not called as decoders are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from tests.families.family import CAPACITY, HEADS, LAYERS, Family, spread
from tests.parity.models import VOCABULARY
from tests.parity.reference import Keys, RoutedDefinition, visible

DIM, SOURCE = 64, 30


@dataclass(frozen=True)
class EncoderDecoder(Family):
    """The decoder of an encoder-decoder: the encoder's output is always the same."""

    def cache(self, model: nn.Module, static: bool) -> Any:
        def half(capacity: int) -> DynamicCache:
            if static:
                return StaticCache(config=model.config, max_cache_len=capacity)
            return DynamicCache()

        return EncoderDecoderCache(half(CAPACITY), half(SOURCE))

    def inputs(
        self, ids: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[tuple, dict[str, Any]]:
        generator = torch.Generator().manual_seed(5)
        encoded = torch.randn(ids.shape[0], SOURCE, DIM, generator=generator)
        return (), {
            "encoder_outputs": (encoded,),
            "decoder_input_ids": ids,
            "decoder_attention_mask": valid,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }


class Block(nn.Module):
    """What somebody writes by hand: no cache, no mask, no position, names of its own."""

    attend = staticmethod(functional.scaled_dot_product_attention)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        batch, length, _ = y.shape
        q, k, v = (
            projection(y).view(batch, length, HEADS, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        y = self.attend(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, DIM))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class HandWritten(Family):
    """A plain ``nn.Module``: whole sequences without padding only."""

    has_cache: ClassVar[bool] = False

    def make(self) -> nn.Module:
        torch.manual_seed(7)
        model = Decoder().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2)
        return spread(model)

    def inputs(
        self, ids: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[tuple, dict[str, Any]]:
        return (ids,), {}

    @contextlib.contextmanager
    def defined(self, model: nn.Module, definition: RoutedDefinition) -> Iterator[None]:
        for layer, block in enumerate(model.blocks):
            block.attend = _masked(definition, layer)
        try:
            yield
        finally:
            for block in model.blocks:
                del block.attend


def _masked(definition: RoutedDefinition, layer: int):
    def attend(q, k, v, is_causal):
        seen = visible(definition, layer, Keys(None, 0, 0), q.shape[2], k.shape[2], 0)[:, None]
        scores = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v.double()).to(q.dtype)

    return attend
