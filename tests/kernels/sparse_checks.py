"""The Triton kernels of the sparse prefills, called directly, on a GPU or interpreted."""

import torch
from torch import Tensor

from fluxcompile.kernels.block_sparse import triton as block_sparse_triton
from fluxcompile.kernels.block_sparse.grid import query_offset
from fluxcompile.kernels.power.op import block_mask as power_mask
from fluxcompile.kernels.streaming import triton as streaming_triton
from fluxcompile.kernels.xattention import triton as xattention_triton

from . import cases, sparse_cases


def check(case: sparse_cases.SparseCase, dtype: torch.dtype, device: str, config=None) -> None:
    """The mode's kernels keep the error bound; ``config`` holds their tiles."""
    x = sparse_cases.prefill(case, dtype, device)
    cases.assert_within_bound(x, _KERNELS[case.mode](x, config))


def _triangle(x: sparse_cases.SparsePrefill, config) -> Tensor:
    return streaming_triton.attention(
        x.q, x.k, x.v, x.bounds, x.q_start, x.route, **x.options, config=config
    )


def _block_sparse(x: sparse_cases.SparsePrefill, config) -> Tensor:
    return _over_blocks(x, x.block_mask, config)


def _power(x: sparse_cases.SparsePrefill, config) -> Tensor:
    case = x.case
    offset = query_offset(x.bounds, x.q_start, case.queries, case.keys, x.q.device)
    mask = power_mask(
        offset, case.queries, case.keys, sink=case.sink, local=case.local, block=case.block
    )
    return _over_blocks(x, mask, config)


def check_choice(case: sparse_cases.SparseCase, device: str, config=None, **options) -> None:
    """XAttention's kernels choose the defined blocks for fp32 operands; dense rows do not count."""
    x = sparse_cases.sharpened(sparse_cases.prefill(case, torch.float32, device))
    chosen = _choose(x, config, **options)
    if x.route is not None:
        chosen &= ~x.route[:, None, None, None]
    assert torch.equal(chosen, sparse_cases.chosen_by_definition(x))


def _xattention(x: sparse_cases.SparsePrefill, config) -> Tensor:
    scores, tiles = config or (None, None)
    return _over_blocks(x, _choose(x, scores), tiles)


def _choose(x: sparse_cases.SparsePrefill, config, **options) -> Tensor:
    case = x.case
    return xattention_triton.block_mask(
        x.q, x.k, x.bounds, x.q_start, x.route, stride=case.stride, threshold=case.threshold,
        block=case.block, window=case.window, scale=x.scale, config=config, **options,
    )  # fmt: skip


def _over_blocks(x: sparse_cases.SparsePrefill, mask: Tensor, config) -> Tensor:
    case = x.case
    return block_sparse_triton.attention(
        x.q, x.k, x.v, mask, x.bounds, x.q_start, x.route,
        block=case.block, window=case.window, scale=x.scale, softcap=case.softcap, config=config,
    )  # fmt: skip


_KERNELS = {
    "block_sparse": _block_sparse,
    "power": _power,
    "triangle": _triangle,
    "xattention": _xattention,
}
