"""Memory that the processes of one machine read from each other, without asking.

For data that never changes after :func:`shared`: nobody has to wait for anybody, so readers need
not agree on an order, as they would with a collective. On a GPU the pieces are opened through CUDA
IPC (every process must see every GPU, as under ``torchrun``); on a CPU they are a mapped file.
"""

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from fluxcompile.training.processes import barrier, gathered, is_distributed


@dataclass(frozen=True)
class Neighbours:
    """The processes of this machine.

    Attributes:
        ranks: of all processes on this machine, rising.
        position: of this process among them.
    """

    ranks: tuple[int, ...]
    position: int

    @classmethod
    def find(cls) -> "Neighbours":
        """Ask every process for its host; all take part."""
        if not is_distributed():
            return cls((0,), 0)
        rank, host = distributed.get_rank(), socket.gethostname()
        ranks = tuple(r for r, other in enumerate(gathered(host)) if other == host)
        return cls(ranks, ranks.index(rank))


def shared(piece: torch.Tensor, neighbours: Neighbours) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Let the machine's other processes read ``piece``; every process takes part.

    Args:
        piece: contiguous, of the same dtype and size in each process. Not to be changed any more.
        neighbours: who shares.

    Returns:
        This process's piece, which must be kept alive, and everyone's in order, this one's
        included.
    """
    share = _share_gpu if piece.is_cuda else _share_cpu
    piece, ticket, open_ticket = share(piece)
    tickets = gathered(ticket)
    everyone = [
        piece if position == neighbours.position else open_ticket(tickets[rank])
        for position, rank in enumerate(neighbours.ranks)
    ]
    barrier()  # nobody goes on, and lets go of a ticket, before all have opened theirs
    if not piece.is_cuda:
        os.unlink(ticket)  # the mappings stay
    return piece, everyone


Opener = Callable[[Any], torch.Tensor]


def _share_gpu(piece: torch.Tensor) -> tuple[torch.Tensor, Any, Opener]:
    from torch.multiprocessing.reductions import reduce_tensor

    torch.cuda.synchronize(piece.device)  # what is shared must have been written
    return piece, reduce_tensor(piece), lambda ticket: ticket[0](*ticket[1])


def _share_cpu(piece: torch.Tensor) -> tuple[torch.Tensor, Any, Opener]:
    handle, path = tempfile.mkstemp(prefix="fluxcompile-")
    os.close(handle)

    def map_file(name: str) -> torch.Tensor:
        flat = torch.from_file(name, shared=True, size=piece.numel(), dtype=piece.dtype)
        return flat.view(piece.shape)

    os.truncate(path, piece.nbytes)
    mapped = map_file(path)
    mapped.copy_(piece)
    return mapped, path, map_file
