"""The few collectives that training needs, which do nothing in a single process."""

from typing import Any

import torch
from torch import distributed, nn


def is_distributed() -> bool:
    """Whether there is another process to talk to."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, of the same shape in each."""
    if is_distributed():
        distributed.all_reduce(tensor)
    return tensor


def gathered(value: Any) -> list[Any]:
    """Every process's ``value`` (picklable), by rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        distributed.barrier()


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give every process the first one's parameters."""
    if is_distributed():
        for parameter in module.parameters():
            distributed.broadcast(parameter.data, src=0)


def average_gradients(module: nn.Module) -> None:
    """Mean over the processes of the gradients of a module that no wrapper reduces."""
    if not is_distributed():
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()
