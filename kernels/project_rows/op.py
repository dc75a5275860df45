"""``flux::project_rows``: a few tokens through the linear layers around attention.

To multiply a few tokens by a matrix takes as long as to read the matrix. What keeps it from the
memory's speed are launches: of each of several matrices that read the same tokens, of the norm
before them, of the activation and the residual sum behind. Here they are one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fluxcompile.errors import KernelError
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.registry import register

MAX_WEIGHTS = 3
MAX_ROWS = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def project_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """A few rows' products with up to three matrices; sums in fp32.

    More rows than :func:`most_rows` are right too, and as fast as the library makes them: a graph
    may serve any number.

    Args:
        x: ``[..., K]`` in bf16, fp16 or fp32.
        weights: ``[N_i, K]`` each, rows contiguous, in x's dtype.
        biases: ``[N_i]`` for each matrix, or none at all.
        norm: ``[K]``, the weight of an RMS norm that x passes first.
        eps: the norm's, inside its root.
        added: ``[..., N_0]``, added to the result of a single matrix, or of a gated pair.
        gated: of two matrices, the first one's result passes SiLU and scales the second one's.

    Returns:
        ``[..., N_0]`` of a single matrix or a gated pair. Of several matrices one vector: their
        results, ``[..., N_i]`` each and contiguous, one behind the other.
    """
    return torch.ops.flux.project_rows(x, list(weights), list(biases), norm, eps, added, gated)


def most_rows(dtype: torch.dtype) -> int:
    """Rows that a launch takes; 0: none."""
    return 1 if dtype == torch.float32 else MAX_ROWS if dtype in DTYPES else 0


def result_shape(x: Tensor, weights: Sequence[Tensor], gated: bool) -> tuple[int, ...]:
    """Of the result."""
    if gated or len(weights) == 1:
        return (*x.shape[:-1], weights[0].shape[0])
    return (math.prod(x.shape[:-1]) * sum(weight.shape[0] for weight in weights),)


def definition(x, weights, biases, norm, eps, added, gated):
    """What :func:`project_rows` computes, an operation after the other."""
    if norm is not None:
        x = functional.rms_norm(x, norm.shape, norm, eps)
    parts = [
        functional.linear(x, weight, biases[i] if biases else None)
        for i, weight in enumerate(weights)
    ]
    if len(parts) > 1 and not gated:
        return torch.cat([part.flatten() for part in parts])
    y = functional.silu(parts[0]) * parts[1] if gated else parts[0]
    return y if added is None else added + y


def _cuda(x, *operands):
    if 0 < math.prod(x.shape[:-1]) <= most_rows(x.dtype):
        return triton_module("project_rows").project_rows(x, *operands)
    return definition(x, *operands)


def _fake(x, weights, biases, norm, eps, added, gated):
    return x.new_empty(result_shape(x, weights, gated))


def _check(x, weights, biases, norm, eps, added, gated):
    if x.dim() < 1 or x.dtype not in DTYPES:
        expected = "[..., K] of bf16, fp16 or fp32"
        raise KernelError.mismatch("x", expected, f"{x.dtype} {list(x.shape)}")
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
        if len(weights) > 1 and not gated:
            raise KernelError.mismatch("weights with `added`", "one, or two gated", len(weights))
        due.append(("added", added, result_shape(x, weights, gated)))
    for name, operand, shape in due:
        if tuple(operand.shape) != shape or operand.dtype != x.dtype:
            got = f"{operand.dtype} {list(operand.shape)}"
            raise KernelError.mismatch(name, f"{x.dtype} {list(shape)}", got)


register(
    "project_rows",
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? norm, float eps, Tensor? added, "
    "bool gated) -> Tensor",
    check=_check,
    cpu=definition,
    cuda=_cuda,
    fake=_fake,
)
