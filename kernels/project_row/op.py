"""``flux::project_row``: one token through the linear layers around attention.

A token's product with a matrix is nothing but reading the matrix. What keeps it from the memory's
speed are launches: of each of several matrices that read the same token, of the norm before them,
of the activation and the residual sum behind. Here they are one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fluxcompile.errors import KernelError
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.registry import register

MAX_WEIGHTS = 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def project_row(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """One token's products with up to three matrices, side by side; products in fp32.

    Args:
        x: ``[..., K]`` with all dimensions but the last of size 1; bf16, fp16 or fp32.
        weights: ``[N_i, K]`` each, rows contiguous, in x's dtype.
        biases: ``[N_i]`` for each matrix, or none at all.
        norm: ``[K]``, the weight of an RMS norm that x passes first.
        eps: the norm's, inside its root.
        added: ``[..., N]``, added to the result.
        gated: of two matrices, the first one's result passes SiLU and scales the second one's.

    Returns:
        ``[..., N]``, N being the sum of all ``N_i``, or ``N_0`` if ``gated``.
    """
    return torch.ops.flux.project_row(x, list(weights), list(biases), norm, eps, added, gated)


def outputs(weights: Sequence[Tensor], gated: bool) -> int:
    """Features of the result."""
    return weights[0].shape[0] if gated else sum(weight.shape[0] for weight in weights)


def _cpu(x, weights, biases, norm, eps, added, gated):
    """The definition."""
    if norm is not None:
        x = functional.rms_norm(x, norm.shape, norm, eps)
    parts = [
        functional.linear(x, weight, biases[i] if biases else None)
        for i, weight in enumerate(weights)
    ]
    y = functional.silu(parts[0]) * parts[1] if gated else torch.cat(parts, -1)
    return y if added is None else added + y


def _cuda(*operands):
    return triton_module("project_row").project_row(*operands)


def _fake(x, weights, biases, norm, eps, added, gated):
    return x.new_empty((*x.shape[:-1], outputs(weights, gated)))


def _check(x, weights, biases, norm, eps, added, gated):
    if x.dim() < 1 or any(size != 1 for size in x.shape[:-1]) or x.dtype not in DTYPES:
        got = f"{x.dtype} {list(x.shape)}"
        raise KernelError.mismatch("x", "one row [1, ..., K] of bf16, fp16 or fp32", got)
    if not 1 <= len(weights) <= MAX_WEIGHTS or (gated and len(weights) != 2):
        expected = "two when gated" if gated else f"1 to {MAX_WEIGHTS}"
        raise KernelError.mismatch("weights", expected, len(weights))
    if len(biases) not in (0, len(weights)):
        raise KernelError.mismatch("biases", f"none or {len(weights)}", len(biases))
    inputs = x.shape[-1]
    due = []
    for i, weight in enumerate(weights):
        rows = weights[0].shape[0] if gated else weight.shape[0]
        due.append((f"weights[{i}]", weight, (rows, inputs)))
        due += [(f"biases[{i}]", biases[i], (rows,))] if biases else []
    if norm is not None:
        due.append(("norm", norm, (inputs,)))
    if added is not None:
        due.append(("added", added, (*x.shape[:-1], outputs(weights, gated))))
    for name, operand, shape in due:
        if tuple(operand.shape) != shape or operand.dtype != x.dtype:
            got = f"{operand.dtype} {list(operand.shape)}"
            raise KernelError.mismatch(name, f"{x.dtype} {list(shape)}", got)


register(
    "project_row",
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? norm, float eps, Tensor? added, "
    "bool gated) -> Tensor",
    check=_check,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
