"""Stands beside a decode step's floor: a plain kernel that only reads the same keys and values.

The bytes over the rate of a large copy leave out what every short kernel pays: it starts, waits for
its first bytes, and drains. Sink and local keys are read where they lie, in the whole cache. For
GPUs: importing this imports Triton.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Launch:
    """Keys a block; programs a row and KV head, None for one a block; and loads in flight."""

    block: int
    programs: int | None
    stages: int


#: the best of these is taken, by `window_readers`' caller
LAUNCHES = (
    Launch(32, None, 1),
    Launch(64, None, 1),
    Launch(64, 2, 4),
    Launch(64, 4, 4),
    Launch(32, 4, 6),
    Launch(32, 8, 4),
    Launch(32, 16, 5),
)


@triton.jit(do_not_specialize=["n_sink", "i_local", "n_keys", "n_programs"])
def read_kernel(
    p_k, p_v, p_read,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    n_sink, i_local, n_keys, n_programs,
    KV_HEADS: tl.constexpr, W: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Read keys ``[0, n_sink)`` and ``[i_local, n_keys)`` of one row and KV head, ``W`` words each.

    Every bit read takes part in what is written, ``W`` words a program: nothing can be left out.
    """
    i_program = tl.program_id(0)
    i_lane = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_lane // KV_HEADS, i_lane % KV_HEADS
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    o_n, o_w = tl.arange(0, N), tl.arange(0, W)
    n_sink_blocks = tl.cdiv(n_sink, N)
    n_blocks = n_sink_blocks + tl.cdiv(n_keys - i_local, N)
    i_first = i_program * n_blocks // n_programs
    i_last = (i_program + 1) * n_blocks // n_programs
    b_read = tl.zeros([N, W], dtype=tl.int32)
    for i in tl.range(i_first, i_last, num_stages=STAGES):
        in_sink = i < n_sink_blocks
        o_key = tl.where(in_sink, i * N, i_local + (i - n_sink_blocks) * N) + o_n
        m_key = (o_key < tl.where(in_sink, n_sink, n_keys))[:, None]
        b_k = tl.load(p_k + o_key[:, None] * stride_ks + o_w[None, :], mask=m_key, other=0)
        b_v = tl.load(p_v + o_key[:, None] * stride_vs + o_w[None, :], mask=m_key, other=0)
        b_read ^= b_k ^ b_v
    tl.store(p_read + (i_lane * n_programs + i_program) * W + o_w, tl.xor_sum(b_read, 0))


def window_readers(sink: int, local: int) -> Iterator[Callable[..., torch.Tensor]]:
    """Functions of ``(q, k, v)`` that read k's and v's ``[B, HK, S, D]`` first and last keys.

    Args:
        sink, local: how many; a cache no longer than both is read whole.

    Yields:
        One function a launch. Each returns what its programs make of the bits they read.
    """
    for launch in LAUNCHES:
        yield lambda q, k, v, launch=launch: read_window(k, v, sink, local, launch)


def read_window(
    k: torch.Tensor, v: torch.Tensor, sink: int, local: int, launch: Launch
) -> torch.Tensor:
    """Read the first ``sink`` and the last ``local`` keys and values of every lane.

    Returns:
        ``[lanes, programs, words]``, each program's exclusive or of what it read.
    """
    batch, kv_heads, keys, _ = k.shape
    if keys <= sink + local:
        sink, local = 0, keys
    k, v = k.view(torch.int32), v.view(torch.int32)
    words = k.shape[-1]
    blocks = triton.cdiv(sink, launch.block) + triton.cdiv(local, launch.block)
    programs = launch.programs or blocks
    read = torch.empty(batch * kv_heads, programs, words, device=k.device, dtype=torch.int32)
    read_kernel[(programs, batch * kv_heads)](
        k, v, read, *k.stride()[:3], *v.stride()[:3], sink, keys - local, keys, programs,
        KV_HEADS=kv_heads, W=words, N=launch.block, STAGES=launch.stages,
    )  # fmt: skip
    return read


def is_whole(read: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether ``read`` is of every bit of ``k`` and ``v``, which are the window and no more."""
    words = torch.cat((k, v), dim=2).view(torch.int32).flatten(0, 1)  # [lanes, keys, words]
    return torch.equal(_folded(read), _folded(words))


def _folded(x: torch.Tensor) -> torch.Tensor:
    """Exclusive or over dimension 1."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = torch.cat((x[:, :half] ^ x[:, half : 2 * half], x[:, 2 * half :]), dim=1)
    return x[:, 0]
