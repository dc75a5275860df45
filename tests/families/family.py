"""One model family: how to make a tiny random model of it, how to call it, what defines it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import DynamicCache, StaticCache

from tests.parity.models import VOCABULARY
from tests.parity.reference import RoutedDefinition, reference

LAYERS, HEADS, WINDOW = 2, 4, 24
CAPACITY = 128

#: gets the query before rotary embedding, ``[B, S, H, D]``, out of a module's output
Read = Callable[[torch.Tensor], torch.Tensor]

_FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    # Far from HF's 0.02, so that attention is peaked and a wrong mask shows in the logits.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def by_heads(output: torch.Tensor) -> torch.Tensor:
    """``[B, S, H * D]`` as ``[B, S, H, D]``."""
    return output.unflatten(-1, (HEADS, -1))


@dataclass(frozen=True)
class Family:
    """A Hugging Face decoder.

    Attributes:
        name: the test id, and a row of docs/models.md.
        what: what is peculiar about its attention, in a few words.
        config, model: names of its transformers classes.
        fields: of the config, beside those that all families have.
        windows: sliding window of each layer, 0 for none.
        query: the module of an attention whose output holds the query before rotary embedding.
        read: gets the query out of that.
        layers: the attentions' paths, where a router cannot find them by itself.
        kv_heads: heads of keys and values.
    """

    name: str
    what: str
    config: str = ""
    model: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int, ...] = (0, 0)
    query: str = "q_proj"
    read: Read = by_heads
    layers: tuple[str, ...] = ()
    kv_heads: int = 2

    #: whether calls may build on a cache, and rows may be padded
    has_cache: ClassVar[bool] = True

    def make(self) -> nn.Module:
        """A random fp32 model in eval mode."""
        config = getattr(transformers, self.config)(**(_FIELDS | self.fields))
        torch.manual_seed(7)
        model = getattr(transformers, self.model)(config).eval()
        return spread(model)

    def cache(self, model: nn.Module, static: bool) -> Any:
        if static:
            return StaticCache(config=model.config, max_cache_len=CAPACITY)
        return DynamicCache(config=model.config)

    def inputs(
        self, ids: torch.Tensor, valid: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[tuple, dict[str, Any]]:
        """What to call the model with, for ``ids`` ``[B, N]`` on top of ``cache`` or without one.

        Args:
            valid: ``[B, past + N]``; positions: ``[B, N]``.
        """
        return (), {
            "input_ids": ids,
            "attention_mask": valid,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def defined(
        self, model: nn.Module, definition: RoutedDefinition
    ) -> contextlib.AbstractContextManager:
        """Inside, the model computes the definition instead of its own attention."""
        return reference(model, definition)


def spread(model: nn.Module) -> nn.Module:
    """Frozen, with norms that are not ones: a skipped norm would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
    return model.requires_grad_(False)
