"""A frozen backbone split over the processes of a machine.

Every process keeps an equal part of each weight matrix of the decoder's layers and puts the whole
together where it is used, in the forward and again in the backward pass: what FSDP does, for
weights that do not change. That they do not is what makes it simple: processes read each other's
parts (:mod:`fluxcompile.training.peer_memory`) with no collective whose order all would have to
agree on, so each may run a graph compiled for its own sequence lengths. Each machine has one copy
of the backbone.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import linear

from fluxcompile.errors import TrainingError
from fluxcompile.training.peer_memory import Neighbours, shared

_weights: dict[int, "_Weight"] = {}
_keys = itertools.count()


class _Weight:
    """A matrix in pieces: how to put it together on one device."""

    def __init__(self, pieces: list[torch.Tensor], shape: torch.Size) -> None:
        self.pieces = pieces
        self.shape = shape

    def whole(self, device: torch.device) -> torch.Tensor:
        size = self.pieces[0].numel()
        flat = torch.empty(len(self.pieces) * size, dtype=self.pieces[0].dtype, device=device)
        for part, piece in zip(flat.split(size), self.pieces, strict=True):
            part.copy_(piece, non_blocking=True)
        return flat[: self.shape.numel()].view(self.shape)


class ShardedLinear(nn.Module):
    """A frozen ``nn.Linear`` of which each process of the machine keeps a part.

    Args:
        original: on any device; not kept.
        neighbours: the processes that share it; all make their own at the same time.
        device: where the part goes.

    Attributes:
        weight: ``[1, ceil(out * in / processes)]``, this process's part. Two axes, as a matrix
            has: by them the compiler tells a projection.
        bias: whole, or None.
    """

    def __init__(self, original: nn.Linear, neighbours: Neighbours, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = original.weight.shape
        parts = len(neighbours.ranks)
        flat = original.weight.detach().reshape(-1)
        size = -(-flat.numel() // parts)
        start = neighbours.position * size
        piece = torch.zeros(size, dtype=flat.dtype, device=device)
        own = flat[start : start + size]
        piece[: own.numel()].copy_(own)
        piece, pieces = shared(piece, neighbours)
        self.weight = nn.Parameter(piece[None], requires_grad=False)
        bias = original.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), False)
        self.key = next(_keys)
        _weights[self.key] = _Weight(pieces, original.weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out = torch.ops.flux_training.sharded_linear(
            x, self.weight, self.key, self.out_features, False
        )
        return out if self.bias is None else out + self.bias

    def release(self) -> None:
        """Let go of the other processes' memory."""
        del _weights[self.key]


@torch.library.custom_op("flux_training::sharded_linear", mutates_args=())
def _sharded_linear(
    x: torch.Tensor, piece: torch.Tensor, key: int, features: int, transpose: bool
) -> torch.Tensor:
    """``x @ W.T``, or ``x @ W`` if ``transpose``, to ``[..., features]``.

    ``piece`` is this process's part of W: it tells the compiler which layer this is.
    """
    weight = _weights[key].whole(x.device).to(x.dtype)
    return linear(x, weight.T if transpose else weight)


@_sharded_linear.register_fake
def _(
    x: torch.Tensor, piece: torch.Tensor, key: int, features: int, transpose: bool
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], features)


def _remember(ctx, inputs, output) -> None:
    x, piece, ctx.key, _, ctx.transpose = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(piece)  # neither x, as W has no gradient, nor the whole W


def _gradient(ctx, grad: torch.Tensor):
    (piece,) = ctx.saved_tensors
    dx = torch.ops.flux_training.sharded_linear(
        grad, piece, ctx.key, ctx.in_features, not ctx.transpose
    )
    return dx, None, None, None, None


_sharded_linear.register_autograd(_gradient, setup_context=_remember)


@contextlib.contextmanager
def sharded(model: nn.Module, body: nn.Module, device: torch.device) -> Iterator[None]:
    """Shard the matrices of ``body``'s layers; what is left of ``model`` moves to ``device``.

    Afterwards ``model`` has its own modules back, and is on the device where it was. They stay in
    that device's memory meanwhile: load the model to the CPU.

    Args:
        model: frozen.
        body: its decoder; layers are the entries of its ``ModuleList``s.
        device: that trains.

    Raises:
        TrainingError: the body has no layers, or a layer no plain ``nn.Linear``.
    """
    home = next(model.parameters()).device
    neighbours = Neighbours.find()
    found = [
        (parent, name, child)
        for stack in body.modules()
        if isinstance(stack, nn.ModuleList)
        for parent in stack.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise TrainingError.mismatch(
            f"shard_backbone: {type(body).__name__}", "layers with nn.Linear modules", "none"
        )
    replaced: dict[tuple[int, str], ShardedLinear] = {}
    try:
        for parent, name, child in found:
            if (id(parent), name) not in replaced:
                part = ShardedLinear(child, neighbours, device)
                replaced[id(parent), name] = part
                setattr(parent, name, part)
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)
        for part in replaced.values():
            part.release()
        model.to(home)
