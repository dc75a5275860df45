"""Checks on operands, shared by every device and by the fakes.

Lengths are compared only when both are plain integers: under a trace they may be symbols, and a
comparison would add a guard that the operator itself does not need.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.masks.flags import COUNT, READABLE

_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_DECODE_QUERIES = 8  # queries a row of one decode step: a token and seven drafts
BLOCKS = (16, 32, 64, 128)  # tokens a block of a block-sparse pattern may have


def check_key_valid(key_valid: Tensor) -> None:
    """``key_valid`` must be bool ``[B, Skv]``."""
    check_tensor("key_valid", key_valid, torch.bool, ("B", "Skv"))


def check_mask(mask: Tensor, q_start: Tensor) -> None:
    """``mask`` must be bool ``[B, 1, Sq, Skv]`` with a query, ``q_start`` int32 ``[1]``."""
    check_tensor("mask", mask, torch.bool, ("B", 1, "Sq", "Skv"))
    check_tensor("q_start", q_start, torch.int32, (1,), device=mask.device)
    if _known(mask.shape[2], 0):
        raise KernelError.mismatch("mask queries", "at least 1", "0")


def check_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    key_valid: Tensor | None,
    flags: Tensor | None,
    dense_mask: Tensor | None,
    q_start: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
) -> None:
    """Check the operands of ``full_attention``."""
    _check_qkv(q, k, v)
    _check_score(scale, softcap)
    check_at_least("window", window, 0)
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    present = [name for name, x in (("bounds", bounds), ("key_valid", key_valid), ("flags", flags))
               if x is not None]  # fmt: skip
    if present and len(present) < 3:
        raise KernelError.mismatch(
            "key mask", "bounds, key_valid and flags together, or none", f"only {present}"
        )
    if bounds is not None:
        check_tensor("bounds", bounds, torch.int32, (batch, 2), device=q.device)
        check_tensor("key_valid", key_valid, torch.bool, (batch, keys), device=q.device)
        check_tensor("flags", flags, torch.bool, (COUNT,), device=torch.device("cpu"))
    if dense_mask is not None:
        rows = 1 if _known(dense_mask.shape[0], 1) else batch
        check_tensor(
            "dense_mask", dense_mask, torch.bool, (rows, 1, queries, keys), device=q.device
        )
    if q_start is not None:
        check_tensor("q_start", q_start, torch.int32, (1,), device=q.device)
    elif isinstance(queries, int) and isinstance(keys, int) and queries > keys:
        raise KernelError.mismatch("Sq without q_start", f"at most Skv = {keys}", queries)


def check_streaming(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    key_valid: Tensor | None,
    flags: Tensor | None,
    dense_mask: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    sink: int,
    local: int,
    window: int,
    scale: float,
    softcap: float,
) -> None:
    """Check the operands of ``streaming_attention``."""
    check_routed(
        q, k, v, bounds, key_valid, flags, dense_mask, q_start, route, window, scale, softcap
    )
    check_at_least("sink", sink, 0)
    check_at_least("local", local, 1)


def check_routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    key_valid: Tensor | None,
    flags: Tensor | None,
    dense_mask: Tensor | None,
    q_start: Tensor | None,
    route: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
) -> None:
    """Check the operands that the sparse prefills share."""
    check_full(q, k, v, bounds, key_valid, flags, dense_mask, q_start, window, scale, softcap)
    if route is not None:
        check_tensor("route", route, torch.bool, (q.shape[0],), device=q.device)


def check_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_valid: Tensor | None,
    route: Tensor | None,
    scale: float,
    softcap: float,
) -> None:
    """Check the operands of ``decode_attention``."""
    _check_qkv(q, k, v)
    _check_score(scale, softcap)
    batch, _, queries, _ = q.shape
    if isinstance(queries, int) and not 1 <= queries <= MAX_DECODE_QUERIES:
        raise KernelError.mismatch("queries a row at decode", f"1 to {MAX_DECODE_QUERIES}", queries)
    check_tensor("query_bounds", query_bounds, torch.int32, (batch, queries, 4), device=q.device)
    if key_valid is not None:
        check_tensor("key_valid", key_valid, torch.bool, (batch, k.shape[2]), device=q.device)
    if route is not None:
        check_tensor("route", route, torch.bool, (batch,), device=q.device)


def check_readable(flags: Tensor | None, dense_mask: Tensor | None) -> bool:
    """Whether the key mask may be used; if not, ``dense_mask`` must be there."""
    if flags is None or bool(flags[READABLE]):
        return True
    if dense_mask is None:
        raise KernelError.mismatch("dense_mask", "the mask, as flags say it is unreadable", "None")
    return False


def check_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int | str],
    device: torch.device | None = None,
) -> None:
    """Check rank, dtype, device and lengths; a word in ``shape`` stands for any length."""
    fits = len(shape) == tensor.dim() and all(map(_same, shape, tensor.shape))
    if not fits or tensor.dtype != dtype:
        wanted = ", ".join(map(str, shape))
        raise KernelError.mismatch(
            name, f"{dtype} [{wanted}]", f"{tensor.dtype} {list(tensor.shape)}"
        )
    if device is not None and tensor.device != device:
        raise KernelError.mismatch(f"{name} device", device, tensor.device)


def check_at_least(name: str, tokens: int, least: int) -> None:
    """``tokens`` must not be below ``least``."""
    if isinstance(tokens, int) and tokens < least:
        raise KernelError.mismatch(name, f"at least {least} tokens", tokens)


def check_block(block: int) -> None:
    """``block`` must be one of :data:`BLOCKS`."""
    if block not in BLOCKS:
        raise KernelError.mismatch("block", f"one of {BLOCKS} tokens", block)


def _check_score(scale: float, softcap: float) -> None:
    if isinstance(scale, float) and not scale > 0:
        raise KernelError.mismatch("scale", "more than 0", scale)
    if isinstance(softcap, float) and not softcap >= 0:
        raise KernelError.mismatch("softcap", "at least 0", softcap)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    dtypes = _HALF_AND_SINGLE + ((torch.float64,) if q.device.type == "cpu" else ())
    if q.dtype not in dtypes:
        raise KernelError.mismatch("q dtype", " or ".join(map(str, dtypes)), q.dtype)
    check_tensor("q", q, q.dtype, ("B", "H", "Sq", "D"))
    batch, heads, _, head_dim = q.shape
    check_tensor("k", k, q.dtype, (batch, "HK", "Skv", head_dim), device=q.device)
    check_tensor("v", v, q.dtype, tuple(k.shape), device=q.device)
    kv_heads = k.shape[1]
    if isinstance(heads, int) and isinstance(kv_heads, int) and (not kv_heads or heads % kv_heads):
        raise KernelError.mismatch("query heads", f"a multiple of {kv_heads} KV heads", heads)
    if isinstance(head_dim, int) and not 0 < head_dim <= MAX_HEAD_DIM:
        raise KernelError.mismatch("head dim", f"1 to {MAX_HEAD_DIM}", head_dim)


def _known(length: int | torch.SymInt, value: int) -> bool:
    return isinstance(length, int) and length == value


def _same(expected: int | str | torch.SymInt, got: int | torch.SymInt) -> bool:
    if isinstance(expected, int) and isinstance(got, int):
        return expected == got
    return True
