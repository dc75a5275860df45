"""What people use instead: torch's fused kernels through SDPA, and FlexAttention compiled."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}


def sdpa(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention ``[B, H, S, D]`` by one of torch's kernels; on a CPU by its only one.

    Raises:
        RuntimeError: the kernel cannot serve the operands.
    """
    backends = [SDPA[name]] if q.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    causal = q.shape[2] > 1
    with sdpa_kernel(backends):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def flash_attention_4() -> Callable[..., torch.Tensor] | None:
    """Causal attention ``[B, H, S, D]`` by FlashAttention 4, if it is installed.

    ``pip install --pre flash-attn-4 "nvidia-cutlass-dsl[cu13]"``; it compiles at its first call.
    """
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attention


def flex_causal(length: int, device: str) -> Callable[..., torch.Tensor]:
    return _flex(_block_mask(_causal, length, device))


def flex_streaming(length: int, sink: int, local: int, device: str) -> Callable[..., torch.Tensor]:
    """FlexAttention over sink and local keys; its block mask is built here, outside the clock."""

    def seen(b, h, i, j):
        return (j <= i) & ((j < sink) | (i - j < local))

    return _flex(_block_mask(seen, length, device))


def masked_sdpa(length: int, sink: int, local: int, device: str) -> Callable[..., torch.Tensor]:
    """The same by SDPA with the mask in memory: FlexAttention has no backward on a CPU."""
    i, j = (torch.arange(length, device=device).view(shape) for shape in ((-1, 1), (1, -1)))
    mask = (j <= i) & ((j < sink) | (i - j < local))
    attention = functional.scaled_dot_product_attention
    return functools.partial(attention, attn_mask=mask, enable_gqa=True)


def _causal(b, h, i, j):
    return j <= i


def _block_mask(seen: Callable, length: int, device: str) -> BlockMask:
    # Compiled, as the plain way would hold a mask of length x length.
    return create_block_mask(seen, None, None, length, length, device=device, _compile=True)


def _flex(mask: BlockMask) -> Callable[..., torch.Tensor]:
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask, enable_gqa=True)
