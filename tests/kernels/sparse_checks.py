"""The Triton kernels of the sparse prefills, called directly, on a GPU or interpreted."""

import torch
from torch import Tensor

from fluxcompile.kernels.streaming import triton as streaming_triton

from . import cases, sparse_cases


def check(case: sparse_cases.SparseCase, dtype: torch.dtype, device: str, config=None) -> None:
    """The mode's kernels keep the error bound; ``config`` holds the attention's tiles."""
    x = sparse_cases.prefill(case, dtype, device)
    cases.assert_within_bound(x, _KERNELS[case.mode](x, config))


def _triangle(x: sparse_cases.SparsePrefill, config) -> Tensor:
    return streaming_triton.attention(
        x.q, x.k, x.v, x.bounds, x.q_start, x.route, **x.options, config=config
    )


_KERNELS = {
    "triangle": _triangle,
}
