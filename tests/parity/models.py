"""Tiny random models, prompts and routers of the parity matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fluxcompile.config import FluxConfig
from fluxcompile.router import FluxRouter

SINK, LOCAL, POOL = 4, 16, 4
VOCABULARY = 97
WINDOW = 32

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    # Far from HF's 0.02, so that attention is peaked and a wrong mask shows in the logits.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-eager": (LlamaConfig, LlamaForCausalLM, {"attn_implementation": "eager"}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
}
MODELS = tuple(_KINDS)


def tiny_model(kind: str, **overrides) -> PreTrainedModel:
    """A random fp32 model in eval mode: hidden 64, 2 layers, 4 heads of 64, 2 KV heads."""
    config_class, model_class, fields = _KINDS[kind]
    torch.manual_seed(7)
    model = model_class(config_class(**(_COMMON | fields | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones in a new model, which would hide a skipped norm
                parameter.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


def flux_config(**fields) -> FluxConfig:
    """Sink 4, local 16, pool 4 unless said otherwise."""
    return FluxConfig(**({"sink": SINK, "local": LOCAL, "pool_size": POOL} | fields))


def forced_router(model: nn.Module, full: bool, config: FluxConfig | None = None, **named):
    """A router that decides one way whatever it reads, by the bias of its last layer."""
    router = FluxRouter.from_model(model, config or flux_config(), **named)
    bias = torch.tensor([0.0, 9.0]) if full else torch.tensor([9.0, 0.0])
    with torch.no_grad():
        for layer in router.layers:
            layer.head[-1].weight.zero_()
            layer.head[-1].bias.copy_(bias)
    return router


def random_router(model: nn.Module, config: FluxConfig | None = None, seed: int = 3, **named):
    """A router with random weights, large enough that prompts of one batch decide differently.

    ``named`` says where the layers are in a model of no known kind.
    """
    router = FluxRouter.from_model(model, config or flux_config(), **named)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in router.layers:
            for parameter in layer.parameters():
                spread = 1.0 if parameter.dim() == 1 else 2.0 / parameter.shape[1] ** 0.5
                parameter.normal_(0.0, spread, generator=generator)
            layer.head[-1].weight.mul_(20.0)
            layer.head[-1].bias.zero_()
    return router


@dataclass(frozen=True)
class Prompt:
    """Token ids and validity, both ``[B, S]``; validity None where no mask is given."""

    ids: torch.Tensor
    mask: torch.Tensor | None

    @property
    def valid(self) -> torch.Tensor:
        return torch.ones_like(self.ids) if self.mask is None else self.mask

    @property
    def positions(self) -> torch.Tensor:
        """Positions among a row's valid tokens, 0 for padding: as ``generate`` counts."""
        return (self.valid.cumsum(-1) - 1) * self.valid

    def then(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, validity and positions with ``tokens`` ``[B, N]`` generated after the prompt.

        ``generate`` counts positions on from the last one, which is 0 after padding on the right.
        """
        positions = self.positions
        onward = positions[:, -1:] + 1 + torch.arange(tokens.shape[1])
        return (
            torch.cat((self.ids, tokens), dim=1),
            torch.cat((self.valid, torch.ones_like(tokens)), dim=1),
            torch.cat((positions, onward), dim=1),
        )

    def row(self, index: int) -> Prompt:
        """One row without its padding."""
        keep = self.valid[index].bool()
        return Prompt(self.ids[index : index + 1, keep], None)


PADDINGS = ("none", "ones", "left", "right")


def prompt(batch: int, length: int, padding: str = "ones", seed: int = 0) -> Prompt:
    """Random tokens; rows of a padded batch have different amounts of padding."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * length + batch)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    if padding == "none":
        return Prompt(ids, None)
    mask = torch.ones_like(ids)
    if padding in ("left", "right"):
        pads = [5] if batch == 1 else [0, 17, 3, 40][:batch]
        for row, pad in enumerate(pads):
            pad = min(pad, length - 1)
            span = slice(0, pad) if padding == "left" else slice(length - pad, length)
            mask[row, span] = 0
    return Prompt(ids * mask, mask)
