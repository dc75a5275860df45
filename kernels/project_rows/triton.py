"""Launches the kernel for one row, or the one for several."""

from typing import Any

import torch
import triton
from torch import Tensor

from fluxcompile.kernels.launch import limits_of, overlaps, unit_stride
from fluxcompile.kernels.project_rows import few_rows, one_row
from fluxcompile.kernels.project_rows.op import result_shape


def project_rows(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norm: Tensor | None,
    eps: float,
    added: Tensor | None,
    gated: bool,
    config: one_row.Config | few_rows.Config | None = None,
) -> Tensor:
    """Launch the kernel for as many rows.

    Args:
        x: ``[..., K]``; for the operands see
            :func:`fluxcompile.kernels.project_rows.op.project_rows`.
        config: None: chosen for the matrices.

    Returns:
        As the operator does.
    """
    inputs = x.shape[-1]
    rows = x.numel() // inputs
    y = x.new_empty(result_shape(x, weights, gated))
    features = [weight.shape[0] for weight in weights]
    launch: dict[str, Any] = {}
    if rows == 1:
        kernel, more = one_row.one_row_kernel, ()
        config = config or one_row.choose_config(inputs, gated)
    else:
        kernel, more = few_rows.few_rows_kernel, (rows,)
        config = config or few_rows.choose_config(inputs, features, gated, limits_of(x.device))
        launch = {"num_stages": config.num_stages, "BLOCK_M": few_rows.BLOCK_M}
        launch["SCALE_FIRST"] = x.dtype == torch.float16
    weights = list(map(unit_stride, weights))
    of_three = [*weights, *[weights[0]] * (3 - len(weights))]
    bias_of_three = [*(bias.contiguous() for bias in biases), *[x] * (3 - len(biases))]
    features += [0] * (3 - len(features))
    tiles = sum(triton.cdiv(n, config.rows) for n in (features[:1] if gated else features))
    overlap = overlaps(x.device)
    if overlap:
        launch["launch_pdl"] = True
    with torch.cuda.device_of(x):
        kernel[(tiles,)](
            x.contiguous(), x if norm is None else norm.contiguous(),
            x if added is None else added.contiguous(), y,
            *of_three, *bias_of_three, *features, *(w.stride(0) for w in of_three), eps, *more,
            IN=inputs, ROWS=config.rows, COLUMNS=config.columns,
            HAS_BIAS=bool(biases), HAS_NORM=norm is not None, HAS_ADDED=added is not None,
            GATED=gated, OVERLAP=overlap, num_warps=config.num_warps, **launch,
        )  # fmt: skip
    return y
