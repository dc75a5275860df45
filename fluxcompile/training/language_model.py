"""A causal language model as its two halves: the decoder, and the head that makes logits.

Where the halves cannot be told apart, or do not give the model's own logits, the model is used
whole and its logits are computed for every position.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fluxcompile.errors import FluxWarning
from fluxcompile.model_layers import text_config
from fluxcompile.training.chunked_loss import Head, Targets, TokenLosses, token_losses

_CHECKED_TOKENS = 32
_TOLERANCE = 1e-3  # of a loss; the two ways run the same arithmetic on differently shaped tensors


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """How to get the losses of target tokens out of a model.

    Attributes:
        body: module to compile: ``(input_ids, attention_mask=, use_cache=)`` to an output with
            ``last_hidden_state``, or, if ``head`` is None, with ``logits``.
        head: hidden states ``[N, D]`` to logits ``[N, V]``; None if ``body`` makes logits.
    """

    body: nn.Module
    head: Head | None

    @classmethod
    def of(cls, model: nn.Module) -> "LanguageModel":
        """Split ``model`` into decoder and head, or take it whole if it does not come apart."""
        decoder, embedding = _decoder(model), _output_embedding(model)
        if decoder is None or embedding is None:
            return cls(model, None)
        return cls(decoder, _Head(embedding, text_config(model)))

    def states(self, output: Any) -> torch.Tensor:
        """Of what ``body`` returns the part that ``to_logits`` takes, ``[B, S, D]``."""
        return output.logits if self.head is None else output.last_hidden_state

    @property
    def to_logits(self) -> Head:
        """From ``states`` of any positions ``[N, D]`` to logits ``[N, V]``."""
        return self.head or _identity

    def losses(
        self, run: Callable[..., Any], input_ids: torch.Tensor, mask: torch.Tensor | None,
        targets: Targets, chunk: int,
        teacher: torch.Tensor | None = None,
    ) -> TokenLosses:  # fmt: skip
        """Losses of each target.

        Args:
            run: ``body``, or what ``torch.compile`` made of it.
            input_ids: int64 ``[B, S]``.
            mask: ``[B, S]``, 1 for valid tokens; None for all valid, which is cheaper. Of a single
                row all are: nothing has padded it.
            targets: from the labels of the batch.
            chunk: targets whose logits exist at one time.
            teacher: ``[N, D]``, what :meth:`target_states` gives of a model to agree with.
        """
        picked = self.target_states(run, input_ids, mask, targets)
        return token_losses(picked, targets.tokens, self.to_logits, chunk, teacher)

    def target_states(
        self, run: Callable[..., Any], input_ids: torch.Tensor, mask: torch.Tensor | None,
        targets: Targets,
    ) -> torch.Tensor:  # fmt: skip
        """What ``to_logits`` takes, at the positions that predict ``targets``: ``[N, D]``."""
        mask = None if len(input_ids) == 1 else mask
        states = self.states(run(input_ids, attention_mask=mask, use_cache=False))
        return states[targets.rows, targets.positions]

    @torch.no_grad()
    def checked(self, model: nn.Module, input_ids: torch.Tensor | None = None) -> "LanguageModel":
        """This, if its losses are those of ``model``'s own logits; else the whole model.

        Args:
            model: in eval mode.
            input_ids: int64 ``[B, S]``; its first few tokens are run, eager. None: a few tokens
                that every vocabulary has.
        """
        if self.head is None:
            return self
        if input_ids is None:
            input_ids = torch.arange(8, device=next(model.parameters()).device)[None] % 2
        ids = input_ids[:, :_CHECKED_TOKENS]
        mask, targets = torch.ones_like(ids), Targets.of(ids)
        whole = LanguageModel(model, None)
        given = ids, mask, targets, len(targets.tokens)
        expected = whole.losses(model, *given).cross_entropy
        found = self.losses(self.body, *given).cross_entropy
        if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return self
        warnings.warn(
            f"{type(model).__name__}: hidden states and output embedding do not give its logits "
            f"(losses differ by up to {float((found - expected).abs().max()):.3g}): logits of the "
            "whole sequence are computed, which takes more memory",
            FluxWarning,
            stacklevel=2,
        )
        return whole


class _Head:
    """Output embedding with what known configs do to its result."""

    def __init__(self, embedding: nn.Module, config: Any) -> None:
        self.embedding = embedding
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        self.scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.embedding(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _decoder(model: nn.Module) -> nn.Module | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return None if decoder is model else decoder


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None
