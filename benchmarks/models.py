"""Models of a known shape with random weights, made in place, and their arithmetic."""

from collections.abc import Sequence

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fluxcompile import smollm2

ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SHAPES = {
    "llama-3.1-8b": {
        "architecture": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "qwen3-8b": {
        "architecture": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "tiny": {
        "architecture": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "vocab_size": 1024,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
}

# Query and key weights are drawn wider than the others: softmax rows are then peaked as in a
# trained model, and a wrong attention shows in the logits instead of averaging out.
PEAKED_GAIN = 2.0
# What a layer adds to the residual stream is drawn narrower, as GPT-2's initialisation does:
# otherwise a deep random model amplifies rounding until no two correct runs agree.
ADDS_TO_RESIDUAL = ("o_proj", "down_proj")


@torch.no_grad()
def random_model(
    shape: str, layers: int | None, device: str, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model of `SHAPES[shape]`, its weights drawn directly on ``device`` (seconds, not minutes).

    Args:
        layers: overrides the shape's number of layers.
    """
    fields = dict(SHAPES[shape])
    theta = fields.pop("rope_theta")
    config_class, model_class = ARCHITECTURES[fields.pop("architecture")]
    if layers is not None:
        fields["num_hidden_layers"] = layers
    config = config_class(
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(dtype).to_empty(device=device).eval()
    # Its frequencies are a buffer that no checkpoint carries: made anew, in fp32.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_of_scores = "q_norm" in name or "k_norm" in name
            parameter.fill_(PEAKED_GAIN if is_of_scores else 1.0)
        elif "embed_tokens" in name:
            parameter.normal_(generator=generator)
        else:
            gain = PEAKED_GAIN if "q_proj" in name or "k_proj" in name else 1.0
            if any(part in name for part in ADDS_TO_RESIDUAL):
                gain = (2 * config.num_hidden_layers) ** -0.5
            parameter.normal_(std=gain * parameter.shape[1] ** -0.5, generator=generator)
    return model


def load_model(
    shape: str, layers: int | None, device: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict]:
    """The model of ``shape`` ("smollm2": the packaged one), and what a record says of it."""
    if shape == "smollm2":
        model = smollm2.load(device, dtype)[0]
        about = {"architecture": "llama", **smollm2.ARCHITECTURE, "name": smollm2.NAME}
    else:
        model, about = random_model(shape, layers, device, dtype), dict(SHAPES[shape])
    about |= {"shape": shape, "num_hidden_layers": model.config.num_hidden_layers}
    return model.requires_grad_(False), about


def prefill_flops(config: PreTrainedConfig, length: int, seen: list[int]) -> float:
    """Floating-point operations of one prompt of ``length`` tokens, logits of the last only.

    That is all that the task needs. The last layer's keys and values go to the cache; of what else
    it computes, the last token alone is read.

    Args:
        seen: for each layer, the (query, key) pairs its attention must score; see `pairs_full`. The
            last layer's are those of one query.
    """
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    kv_heads, inner = config.num_key_value_heads, config.intermediate_size
    keys_and_values = 2 * hidden * head_dim * kv_heads
    others = 2 * hidden * head_dim * heads + 3 * hidden * inner
    layers = config.num_hidden_layers
    linear = 2 * (length * layers * keys_and_values + (length * (layers - 1) + 1) * others)
    scores = sum(4 * pairs * heads * head_dim for pairs in seen)  # q·kᵀ and p·v
    return linear + scores + 2 * hidden * config.vocab_size


def pairs_full(length: int) -> int:
    """Pairs of causal attention."""
    return length * (length + 1) // 2


def pairs_streaming(length: int, sink: int, local: int) -> int:
    """Pairs of causal attention to the first ``sink`` and the latest ``local`` tokens."""
    reach = min(length, sink + local)
    return pairs_full(reach) + (length - reach) * reach


def kv_token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


def decode_bytes(model: PreTrainedModel, read: Sequence[Sequence[int]]) -> int:
    """Bytes that one decode step has to read: the weights once, and keys and values.

    An embedding that is no output layer too is read at a few rows, which do not count.

    Args:
        read: tokens that each layer of each row reads, ``[rows][layers]``.
    """
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    weights = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if tied or "embed_tokens" not in name
    )
    tokens = sum(sum(row) for row in read)
    return weights + tokens * kv_token_bytes(model.config, model.dtype)
