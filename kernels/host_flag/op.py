"""``flux::send_flag`` and ``flux::await_flag``: a branch's predicate without an idle device.

Reading a predicate where the branch stands would let the device run dry until the host has launched
what comes next. The flag is sent as soon as it is known instead, the work in between is launched,
and the host waits only for the flag.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.dispatch import triton_module
from fluxcompile.kernels.registry import KEEPS_LAYOUT, register

#: flags under way: address of the host's flag -> event behind the write, and the flag kept alive
_under_way: dict[int, tuple[torch.cuda.Event, Tensor]] = {}


def send_flag(rows: Tensor, any_row: bool = False) -> Tensor:
    """Start telling the host whether all of ``rows``, bool ``[B]``, are true, or any of them.

    Returns:
        bool ``[]`` on the CPU, not to be read before :func:`await_flag`.
    """
    return torch.ops.flux.send_flag(rows, any_row)


def await_flag(sent: Tensor, behind: Sequence[Tensor] = ()) -> Tensor:
    """Wait for what :func:`send_flag` started; returns the flag, bool ``[]`` on the CPU.

    Args:
        behind: only ever looked at by a scheduler: what must have been launched before the wait.
    """
    return torch.ops.flux.await_flag(sent, list(behind))


def _reduce(rows: Tensor, any_row: bool) -> Tensor:
    return rows.any() if any_row else rows.all()


def _send_from_cuda(rows: Tensor, any_row: bool) -> Tensor:
    # The device writes straight to the host's memory: a copy would cost two more launches.
    sent = torch.empty((), dtype=torch.bool, pin_memory=True)
    triton_module("host_flag").write_flag(rows, any_row, sent)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(rows.device))
    _under_way[sent.data_ptr()] = event, sent
    return sent


def _await(sent: Tensor, behind: list[Tensor]) -> Tensor:
    event, _ = _under_way.pop(sent.data_ptr(), (None, None))
    if event is not None:
        event.synchronize()
    return sent.clone()


def _check_rows(rows: Tensor, any_row: bool) -> None:
    if rows.dtype != torch.bool or rows.dim() != 1:
        raise KernelError.mismatch("rows", "bool [B]", f"{rows.dtype} {list(rows.shape)}")


def _check_sent(sent: Tensor, behind: list[Tensor]) -> None:
    if sent.dtype != torch.bool or sent.dim() != 0 or sent.device.type != "cpu":
        got = f"{sent.dtype} {list(sent.shape)} on {sent.device.type}"
        raise KernelError.mismatch("sent flag", "bool [] on cpu", got)


def _fake(*operands) -> Tensor:
    return torch.empty((), dtype=torch.bool, device="cpu")


register(
    "send_flag", "(Tensor rows, bool any_row) -> Tensor",
    check=_check_rows, cpu=_reduce, cuda=_send_from_cuda, fake=_fake,
)  # fmt: skip
register(
    "await_flag", "(Tensor sent, Tensor[] behind) -> Tensor", layout=KEEPS_LAYOUT,
    check=_check_sent, cpu=_await, cuda=_await, fake=_fake,
)  # fmt: skip
