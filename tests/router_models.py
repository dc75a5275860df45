"""Tiny models and routers shared by the router tests."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fluxcompile.config import FluxConfig
from fluxcompile.router import FluxRouter


def tiny_llama(**overrides) -> LlamaForCausalLM:
    """Two layers, hidden 64, four heads of 16, two KV heads."""
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


def random_router(head_dim: int = 4, layers: int = 2, **fields) -> FluxRouter:
    """A router with every weight random, so that a misplaced one shows."""
    names = [f"model.layers.{index}.self_attn" for index in range(layers)]
    config = fields.pop("config", FluxConfig(sink=3, local=9))
    router = FluxRouter(config, layer_names=names, head_dim=head_dim, **fields).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


class HandWritten(nn.Module):
    """A model outside Hugging Face: nothing on it tells its layers or head dimensions."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(dim, dim)}) for _ in range(3))
