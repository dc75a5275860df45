"""What a Triton kernel must pass, on a GPU and through the interpreter alike."""

import torch

from fluxcompile.kernels.decode import triton as decode_triton
from fluxcompile.kernels.streaming import triton as streaming_triton
from fluxcompile.kernels.streaming.backward import triton as backward_triton

from . import cases, gradient_cases

# Masks with holes are served without Triton.
PREFILL = tuple(c for c in cases.PREFILL if c.padding != "holes")

GRADIENTS = tuple(c for c in gradient_cases.CASES if c.padding != "holes")


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


def check_gradients(
    case: cases.Case,
    dtype: torch.dtype,
    device: str,
    config: streaming_triton.Config | None = None,
    configs: tuple[streaming_triton.Config, streaming_triton.Config] | None = None,
) -> None:
    """The prefill kernel with its log-sum-exp, and the gradients' kernels, called directly."""
    x = cases.prefill(case, dtype, device)
    lse = torch.empty(x.q.shape[:3], device=device)
    mask = x.bounds, x.q_start, x.route
    options = {
        "sink": case.sink, "local": case.local, "window": case.window,
        "scale": x.scale, "softcap": case.softcap,
    }  # fmt: skip
    out = streaming_triton.attention(x.q, x.k, x.v, *mask, lse=lse, config=config, **options)
    cases.assert_within_bound(x, out)
    found = tuple(torch.full_like(t.transpose(1, 2).contiguous(), torch.nan).transpose(1, 2)
                  for t in (x.q, x.k, x.v))  # fmt: skip
    backward_triton.differentiate(
        found, gradient_cases.grad_out(x), out, lse, x.q, x.k, x.v, *mask,
        configs=configs, **options,
    )  # fmt: skip
    gradient_cases.assert_within_bound(x, found)


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
