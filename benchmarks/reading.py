"""Stands beside a decode step's floor: a plain kernel that only reads the same keys and values.

The bytes over the rate of a large copy leave out what every short kernel pays: it starts, waits for
its first bytes, and drains. For GPUs: importing this imports Triton.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

#: programs a row and KV head, keys a step, loads in flight: the best of these is taken
_LAUNCHES = ((2, 32, 5), (4, 32, 3), (8, 32, 5), (16, 32, 5))


@triton.jit
def read_kernel(p_k, p_v, p_sums, n_keys, D: tl.constexpr, SPLITS: tl.constexpr, N: tl.constexpr):
    i_row, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n, o_d = tl.arange(0, N), tl.arange(0, D)
    n_blocks = tl.cdiv(n_keys, N)
    b_sum = tl.zeros([N, D], dtype=tl.float32)
    for i in range(i_split * n_blocks // SPLITS, (i_split + 1) * n_blocks // SPLITS):
        o_key = i * N + o_n
        o_element = (i_row * n_keys + o_key)[:, None] * D + o_d[None, :]
        m_key = (o_key < n_keys)[:, None]
        b_sum += tl.load(p_k + o_element, mask=m_key, other=0.0).to(tl.float32)
        b_sum += tl.load(p_v + o_element, mask=m_key, other=0.0).to(tl.float32)
    tl.store(p_sums + (i_row * SPLITS + i_split) * D + o_d, tl.sum(b_sum, 0))


def window_readers(device: str) -> Iterator[Callable[..., None]]:
    """Functions of ``(q, k, v)`` that read contiguous k and v ``[B, HK, S, D]``, and nothing else.

    Every program adds up what it reads and writes one row of sums.
    """
    for splits, block, stages in _LAUNCHES:

        def read(q, k, v, splits=splits, block=block, stages=stages):
            batch, kv_heads, keys, head_dim = k.shape
            sums = torch.empty(batch * kv_heads, splits, head_dim, device=device)
            read_kernel[(batch * kv_heads, splits)](
                k, v, sums, keys, D=head_dim, SPLITS=splits, N=block, num_stages=stages
            )

        yield read
