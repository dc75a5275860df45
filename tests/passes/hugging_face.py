"""Graphs of tiny Hugging Face models, each traced once a process."""

import functools

import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from .graphs import Recorded, record_all

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 8
BATCH, LENGTH, CAPACITY, WINDOW = 2, 12, 20, 8
_SETTINGS = {
    "hidden_size": HEADS * DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
_FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
}


@functools.cache
def model(family: str, attention: str = "sdpa"):
    """A tiny random model, frozen."""
    torch.manual_seed(0)
    kind, config, extra = _FAMILIES[family]
    settings = _SETTINGS | extra | {"attn_implementation": attention}
    return kind(config(**settings)).eval().requires_grad_(False)


def prompt(padded: bool) -> dict[str, torch.Tensor]:
    """Token ids, and left padding in row 1 where asked for."""
    torch.manual_seed(1)
    ids = torch.randint(0, 61, (BATCH, LENGTH))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def prefill(
    family: str = "llama",
    attention: str = "sdpa",
    cache: str = "dynamic",
    padded: bool = False,
    dynamic: bool | None = None,
) -> Recorded:
    """The graph of a first call."""
    return _graphs(family, attention, cache, padded, dynamic, 1)[0]


def decode(
    family: str = "llama",
    attention: str = "sdpa",
    cache: str = "dynamic",
    padded: bool = False,
    dynamic: bool | None = None,
    new: int = 1,
) -> Recorded:
    """The graph of a call of ``new`` tokens on top of a filled cache."""
    return _graphs(family, attention, cache, padded, dynamic, new)[1]


@functools.cache
def _graphs(
    family: str, attention: str, cache: str, padded: bool, dynamic: bool | None, new: int
) -> list[Recorded]:
    net, inputs = model(family, attention), prompt(padded)
    filled = None
    if cache == "dynamic":
        filled = DynamicCache(config=net.config)
    elif cache == "static":
        filled = StaticCache(config=net.config, max_cache_len=CAPACITY)

    def call(ids, mask):
        out = net(input_ids=ids, attention_mask=mask, past_key_values=filled,
                  use_cache=filled is not None, logits_to_keep=new)  # fmt: skip
        return out.logits

    mask = inputs.get("attention_mask")
    calls = [(inputs["input_ids"], mask)]
    if filled is not None:
        grown = None if mask is None else torch.nn.functional.pad(mask, (0, new), value=1)
        calls.append((torch.arange(7, 7 + new).repeat(BATCH, 1), grown))
    return record_all(call, calls, dynamic=dynamic)
