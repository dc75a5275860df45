"""``flux::materialize``: a value that the compiler is to compute once and store."""

import torch
from torch import Tensor

from fluxcompile.kernels.registry import register


def materialize(x: Tensor) -> Tensor:
    """A copy of ``x``, of any shape and dtype, behind which a compiler cannot see.

    Inductor computes pointwise operations anew in every kernel that reads their result. Where
    hundreds of kernels read it, it is better written to memory once.
    """
    return torch.ops.flux.materialize(x)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _check(x: Tensor) -> None:
    """Every tensor can be copied."""


register(
    "materialize",
    "(Tensor x) -> Tensor",
    check=_check,
    cpu=_copy,
    cuda=_copy,
    fake=lambda x: x.new_empty(x.shape),
)
