"""What a Triton kernel must pass, on a GPU and through the interpreter alike."""

import torch

from fluxcompile.kernels.decode import triton as decode_triton
from fluxcompile.kernels.streaming import triton as streaming_triton

from . import cases

# Masks with holes are served without Triton.
PREFILL = tuple(c for c in cases.PREFILL if c.padding != "holes")


def check_prefill(
    case: cases.Case,
    dtype: torch.dtype,
    device: str,
    config: streaming_triton.Config | None = None,
) -> None:
    """The prefill kernel, called directly, keeps the error bound."""
    x = cases.prefill(case, dtype, device)
    out = streaming_triton.attention(
        x.q, x.k, x.v, x.bounds, x.q_start, x.route,
        sink=case.sink, local=case.local, window=case.window,
        scale=x.scale, softcap=case.softcap, config=config,
    )  # fmt: skip
    cases.assert_within_bound(x, out)


def check_decode(
    case: cases.DecodeCase,
    dtype: torch.dtype,
    device: str,
    config: decode_triton.Config | None = None,
    splits: int | None = None,
) -> None:
    """The decode kernels, called directly, keep the error bound."""
    x = cases.decode(case, dtype, device)
    out = decode_triton.decode_attention(*x.operands, **x.options, config=config, splits=splits)
    cases.assert_within_bound(x, out)
