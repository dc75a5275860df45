"""The matrix: one entry a model family."""

from __future__ import annotations

import torch

from tests.families.family import HEADS, WINDOW, Family, by_heads
from tests.families.unusual import EncoderDecoder, HandWritten

_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_PARTIAL = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }
}


def as_it_is(output: torch.Tensor) -> torch.Tensor:
    """``[B, S, H, D]``, of a norm over each head."""
    return output


def heads_first(output: torch.Tensor) -> torch.Tensor:
    """``[B, H, S, D]``, of a norm after the transpose."""
    return output.transpose(1, 2)


def fused(output: torch.Tensor) -> torch.Tensor:
    """Query, key and value behind one another, 64 features of query."""
    return by_heads(output[..., :64])


def fused_by_head(output: torch.Tensor) -> torch.Tensor:
    """Each head's query, key and value behind one another."""
    return output.unflatten(-1, (HEADS, -1)).chunk(3, dim=-1)[0]


FAMILIES: tuple[Family, ...] = (
    Family("Llama", "grouped-query attention", "LlamaConfig", "LlamaForCausalLM"),
    Family("Qwen2", "biased projections", "Qwen2Config", "Qwen2ForCausalLM"),
    Family(
        "Qwen3",
        "a norm of each head's query and key",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"head_dim": 16},
        query="q_norm",
        read=as_it_is,
    ),
    Family(
        "Mistral",
        "sliding window in every layer",
        "MistralConfig",
        "MistralForCausalLM",
        {"sliding_window": WINDOW},
        windows=(WINDOW, WINDOW),
    ),
    Family(
        "Gemma 2",
        "softcapped scores, every other layer slides",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _ALTERNATING
        | {
            "head_dim": 16,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
            "attn_implementation": "eager",
        },
        windows=(WINDOW, 0),
    ),
    Family(
        "Gemma 3",
        "sliding and full layers, each with rotary embedding of its own",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _ALTERNATING | {"head_dim": 16, "query_pre_attn_scalar": 16},
        windows=(WINDOW, 0),
        query="q_norm",
        read=heads_first,
    ),
    Family(
        "Phi-3",
        "one projection for query, key and value, partial rotary embedding",
        "Phi3Config",
        "Phi3ForCausalLM",
        _PARTIAL,
        query="qkv_proj",
        read=fused,
    ),
    Family(
        "GPT-NeoX",
        "one projection interleaved by head, partial rotary embedding, parallel residual",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        kv_heads=HEADS,
        query="query_key_value",
        read=fused_by_head,
    ),
    Family(
        "OLMo 2",
        "a norm of the whole query and key",
        "Olmo2Config",
        "Olmo2ForCausalLM",
        query="q_norm",
    ),
    Family(
        "Granite",
        "a softmax scale of its own",
        "GraniteConfig",
        "GraniteForCausalLM",
        {"attention_multiplier": 0.3},
    ),
    Family(
        "Cohere",
        "interleaved rotary embedding, a norm of each head, parallel residual",
        "CohereConfig",
        "CohereForCausalLM",
        {"use_qk_norm": True, "logit_scale": 1.0},
        query="q_norm",
        read=as_it_is,
    ),
    Family(
        "StableLM",
        "partial rotary embedding, a norm for each head",
        "StableLmConfig",
        "StableLmForCausalLM",
        {"qk_layernorm": True},
        query="q_layernorm",
        read=heads_first,
    ),
    Family(
        "GPT-2",
        "learned positions, no rotary embedding",
        "GPT2Config",
        "GPT2LMHeadModel",
        kv_heads=HEADS,
        query="c_attn",
        read=fused,
    ),
    Family(
        "Qwen3-MoE",
        "mixture of experts",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        query="q_norm",
        read=as_it_is,
    ),
    Family(
        "Mixtral",
        "mixture of experts",
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    EncoderDecoder(
        "BART",
        "the decoder of an encoder-decoder: cross-attention beside its own",
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "init_std": 0.2,
            "decoder_start_token_id": 1,
        },
        kv_heads=HEADS,
    ),
    HandWritten(
        "hand-written",
        "an `nn.Module` that calls `scaled_dot_product_attention`",
        query="query",
        layers=("blocks.0", "blocks.1"),
        kv_heads=HEADS,
    ),
)

#: what runs full attention only, and why
LEFT_ALONE = {"T5": "a learned bias of the distance is added to its scores"}
