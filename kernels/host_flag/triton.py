"""One truth value over the rows of a batch, written to the host's pinned memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def flag_kernel(p_rows, p_flag, n_rows, stride, ANY: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for i in range(0, n_rows, BLOCK):
        b = tl.load(p_rows + (i + o) * stride, mask=i + o < n_rows, other=0)
        count += (b != 0).to(tl.int32)
    total = tl.sum(count, 0)
    flag = total > 0 if ANY else total == n_rows
    tl.store(p_flag, flag.to(tl.uint8))


def write_flag(rows: Tensor, any_row: bool, flag: Tensor) -> None:
    """Write whether any or all of ``rows``, bool ``[B]``, are true to ``flag``, bool ``[]``.

    Args:
        flag: on the device, or pinned memory of the host.
    """
    with torch.cuda.device_of(rows):
        flag_kernel[(1,)](
            rows.view(torch.uint8), flag.view(torch.uint8), rows.shape[0], rows.stride(0),
            ANY=any_row, BLOCK=32, num_warps=1,
        )  # fmt: skip
