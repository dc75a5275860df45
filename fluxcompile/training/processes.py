"""The few collectives that training needs, which do nothing in a single process."""

from typing import Any

import torch
from torch import distributed


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
