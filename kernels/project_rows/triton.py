"""Launches the kernel for one row, or the one for several."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fluxcompile.kernels.launch import ceil_div, limits_of, set_up_early, unit_stride
from fluxcompile.kernels.project_rows import few_rows, one_row
from fluxcompile.kernels.project_rows.op import result_shape

Config = one_row.Config | few_rows.Config


@dataclass(frozen=True)
class Plan:
    """What a launch takes from shapes alone.

    Attributes:
        sizes: rows of each of three matrices, 0 where there are fewer.
        more: arguments that one of the kernels has beside the other's.
        constants: by name, and the launch's own settings.
    """

    kernel: triton.JITFunction
    programs: int
    sizes: tuple[int, ...]
    more: tuple[int, ...]
    constants: dict[str, Any]


@functools.lru_cache(256)  # all layers of a step launch the same few
def plan_of(
    rows: int,
    inputs: int,
    features: tuple[int, ...],
    gated: bool,
    dtype: torch.dtype,
    device: torch.device,
    config: Config | None,
) -> Plan:
    """For ``rows`` rows of ``inputs``, and matrices of so many ``features``."""
    constants: dict[str, Any] = {}
    if rows == 1:
        kernel, more = one_row.one_row_kernel, ()
        config = config or one_row.choose_config(inputs, gated)
    else:
        kernel, more = few_rows.few_rows_kernel, (rows,)
        config = config or few_rows.choose_config(inputs, features, gated, limits_of(device))
        constants = {"num_stages": config.num_stages, "BLOCK_M": few_rows.BLOCK_M}
        constants["SCALE_FIRST"] = dtype == torch.float16
    constants |= {
        "IN": inputs, "ROWS": config.rows, "COLUMNS": config.columns, "GATED": gated,
        "num_warps": config.num_warps, **set_up_early(device),
    }  # fmt: skip
    tiles = sum(ceil_div(n, config.rows) for n in (features[:1] if gated else features))
    return Plan(kernel, tiles, features + (0,) * (3 - len(features)), more, constants)


def project_rows(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norm: Tensor | None,
    eps: float,
    added: Tensor | None,
    gated: bool,
    config: Config | None = None,
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
    features = tuple([weight.shape[0] for weight in weights])
    plan = plan_of(x.numel() // inputs, inputs, features, gated, x.dtype, x.device, config)
    y = x.new_empty(result_shape(x, weights, gated))
    weights = list(map(unit_stride, weights))
    of_three = [*weights, *[weights[0]] * (3 - len(weights))]
    bias_of_three = [*(bias.contiguous() for bias in biases), *[x] * (3 - len(biases))]
    with torch.cuda.device_of(x):
        plan.kernel[(plan.programs,)](
            x.contiguous(), x if norm is None else norm.contiguous(),
            x if added is None else added.contiguous(), y,
            *of_three, *bias_of_three, *plan.sizes, *[w.stride(0) for w in of_three], eps,
            *plan.more, HAS_BIAS=bool(biases), HAS_NORM=norm is not None,
            HAS_ADDED=added is not None, **plan.constants,
        )  # fmt: skip
    return y
