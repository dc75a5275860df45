"""``flux::send_flag`` and ``flux::await_flag``: a branch's predicate without an idle device.

Reading a predicate where the branch stands would let the device run dry until the host has launched
what comes next. The flag is sent as soon as it is known instead, the work in between is launched,
and the host waits only for the copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxcompile.errors import KernelError
from fluxcompile.kernels.registry import KEEPS_LAYOUT, register

#: copies under way: address of the host's flag -> event behind the copy
_under_way: dict[int, torch.cuda.Event] = {}


def send_flag(flag: Tensor) -> Tensor:
    """Start copying ``flag``, bool ``[]``, to the host.

    Returns:
        bool ``[]`` on the CPU, not to be read before :func:`await_flag`.
    """
    return torch.ops.flux.send_flag(flag)


def await_flag(sent: Tensor, behind: Sequence[Tensor] = ()) -> Tensor:
    """Wait for the copy that :func:`send_flag` started; returns the flag, bool ``[]`` on the CPU.

    Args:
        behind: only ever looked at by a scheduler: what must have been launched before the wait.
    """
    return torch.ops.flux.await_flag(sent, list(behind))


def _send_from_cuda(flag: Tensor) -> Tensor:
    sent = torch.empty((), dtype=torch.bool, pin_memory=True)
    sent.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flag.device))
    _under_way[sent.data_ptr()] = event
    return sent


def _await(sent: Tensor, behind: list[Tensor]) -> Tensor:
    event = _under_way.pop(sent.data_ptr(), None)
    if event is not None:
        event.synchronize()
    return sent.clone()


def _check_flag(flag: Tensor) -> None:
    if flag.dtype != torch.bool or flag.dim() != 0:
        raise KernelError.mismatch("flag", "bool []", f"{flag.dtype} {list(flag.shape)}")


def _check_sent(sent: Tensor, behind: list[Tensor]) -> None:
    _check_flag(sent)
    if sent.device.type != "cpu":
        raise KernelError.mismatch("sent flag's device", "cpu", sent.device)


def _fake(flag: Tensor, *behind) -> Tensor:
    return torch.empty((), dtype=torch.bool, device="cpu")


register(
    "send_flag", "(Tensor flag) -> Tensor",
    check=_check_flag, cpu=torch.clone, cuda=_send_from_cuda, fake=_fake,
)  # fmt: skip
register(
    "await_flag", "(Tensor sent, Tensor[] behind) -> Tensor", layout=KEEPS_LAYOUT,
    check=_check_sent, cpu=_await, cuda=_await, fake=_fake,
)  # fmt: skip
