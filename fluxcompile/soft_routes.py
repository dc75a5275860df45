"""What a training-mode graph reads (temperature, noise, …) and leaves behind (shares).

Flux Attention (arXiv 2604.07394) trains its routers through a mixture: layer ``l`` of row ``b``
computes ``r * full + (1 - r) * sparse``, ``r = softmax((logits + noise) / temperature)[full]``.
A model compiled with ``options={"mode": "train"}`` computes that; ``soft_routes`` says with which
temperature and noise, and holds the shares ``r`` for the loss.

What such a compile asks for: a frozen model on the router's device, whole prompts without a cache
(``use_cache=False``), and no gradient checkpointing of the model's own, whose regions hide the
attentions from the compiler (RewriteError). To save memory set
``torch._functorch.config.activation_memory_budget`` below 1 before compiling: AOTAutograd's
partitioner then recomputes in the backward, our operators included. Add what the shares cost to the
loss and run one backward: compiled graphs free what they saved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fluxcompile.errors import RouterError
from fluxcompile.router import FluxRouter


@dataclass(eq=False)
class SoftRoutes:
    """Soft routes of the forwards inside one ``soft_routes`` block.

    The settings may be changed between forwards; no change recompiles anything.

    Attributes:
        router: whose layers are mixed.
        temperature: of the softmax over a layer's two logits, above 0.
        noise: added to the logits, fp32 ``[B, L, 2]`` with ``L = len(router.layer_names)`` and
            class 1 full attention (Gumbel noise in the paper); None for none.
        prompt_length: int64 ``[B]``, how many of a row's first valid tokens are its prompt: the
            routers read no further, as at inference, where the answer is not there yet, and sparse
            layers attend to what follows as ``FluxConfig.decode`` says. None where whole rows are
            prompts.
        hardness: in [0, 1]: how far a layer's mixture is drawn from its shares towards the 0 or 1
            that each is nearer to. 0 in the paper; at 1 a straight-through estimator: hard routes
            forward, the shares' gradient backward. The shares themselves stay soft.
    """

    router: FluxRouter
    temperature: float = 1.0
    noise: Tensor | None = None
    prompt_length: Tensor | None = None
    hardness: float = 0.0
    _columns: dict[int, Tensor | None] = field(default_factory=dict, repr=False)
    _features: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _forwards: Counter[int] = field(default_factory=Counter, repr=False)

    def shares(self) -> Tensor:
        """Share of full attention of every layer in the last forward, fp32 ``[B, L]``.

        Differentiable with respect to the routers. A layer that is never routed, because its own
        sliding window is no wider than the local window, has the constant 1: see :attr:`routed`.

        Raises:
            RouterError: some layer left no share in the last forward, named in the message.
        """
        self._check_complete()
        columns = self._columns
        example = next((x for x in columns.values() if x is not None), None)
        if example is None:
            raise RouterError.mismatch(
                "shares", "at least one routed layer", "windows no wider than the local window"
            )
        ones = torch.ones_like(example, requires_grad=False)
        layers = range(len(self.router.layer_names))
        # Layers of one model may live on several devices.
        found = [ones if columns[i] is None else columns[i].to(ones.device) for i in layers]
        return torch.stack(found, dim=1)

    @property
    def routed(self) -> Tensor:
        """Which columns of :meth:`shares` a router decides, bool ``[L]`` on the CPU.

        Raises:
            RouterError: as :meth:`shares`.
        """
        self._check_complete()
        layers = range(len(self.router.layer_names))
        return torch.tensor([self._columns[layer] is not None for layer in layers])

    def features(self) -> dict[int, Tensor]:
        """What each layer's router read in the last forward, fp32 ``[B, F]``, by layer.

        As it was before standardising, without gradient. Only routers of a configuration with
        ``standardize`` leave it, and only those of layers that are routed at all.

        Raises:
            RouterError: as :meth:`shares`.
        """
        self._check_complete()
        return dict(self._features)

    def leave_features(self, layers: Sequence[int], features: Tensor) -> None:
        """Called by each graph of routers that standardise: ``[B, len(layers), F]``."""
        self._features.update(zip(layers, features.unbind(dim=1), strict=True))

    def leave(self, layers: Sequence[int], shares: Tensor | None) -> None:
        """Called by each graph: ``shares`` ``[B, len(layers)]``, None for layers never routed."""
        columns = [None] * len(layers) if shares is None else shares.unbind(dim=1)
        for layer, column in zip(layers, columns, strict=True):
            self._columns[layer] = column
            self._forwards[layer] += 1

    def temperature_on(self, device: torch.device) -> Tensor:
        """The temperature as a graph takes it, fp32 ``[]``.

        Raises:
            RouterError: it is not a number above 0.
        """
        value = self.temperature
        if not _is_finite(value) or value <= 0:
            raise RouterError.mismatch("temperature", "a number above 0", repr(value))
        return torch.full((), float(value), dtype=torch.float32, device=device)

    def hardness_on(self, device: torch.device) -> Tensor:
        """The hardness as a graph takes it, fp32 ``[]``.

        Raises:
            RouterError: it is not a number in [0, 1].
        """
        value = self.hardness
        if not _is_finite(value) or not 0 <= value <= 1:
            raise RouterError.mismatch("hardness", "a number in [0, 1]", repr(value))
        return torch.full((), float(value), dtype=torch.float32, device=device)

    def noise_on(self, device: torch.device, batch: int) -> Tensor:
        """The noise as a graph takes it, fp32 ``[B, L, 2]``, contiguous; zeros for none.

        Raises:
            RouterError: it has another shape, or is not of floating point.
        """
        shape = batch, len(self.router.layer_names), 2
        if self.noise is None:
            return torch.zeros(shape, dtype=torch.float32, device=device)
        noise = self.noise
        if not isinstance(noise, Tensor) or tuple(noise.shape) != shape:
            got = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise RouterError.mismatch("noise [batch, layers, 2]", list(shape), got)
        if not noise.is_floating_point():
            raise RouterError.mismatch("noise dtype", "float32", noise.dtype)
        return noise.detach().to(device, torch.float32).contiguous()

    def prompt_length_on(self, device: torch.device, batch: int) -> Tensor:
        """The prompts' lengths as a graph takes them, int64 ``[B]``; beyond any length for none.

        Raises:
            RouterError: it has another shape, or is not of integers.
        """
        length = self.prompt_length
        if length is None:
            most = torch.iinfo(torch.int64).max
            return torch.full((batch,), most, dtype=torch.int64, device=device)
        if not isinstance(length, Tensor) or tuple(length.shape) != (batch,):
            got = list(length.shape) if isinstance(length, Tensor) else type(length).__name__
            raise RouterError.mismatch("prompt_length [batch]", [batch], got)
        if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
            raise RouterError.mismatch("prompt_length dtype", "int64", length.dtype)
        return length.to(device, torch.int64).contiguous()

    def _check_complete(self) -> None:
        names = self.router.layer_names
        last = max(self._forwards.values(), default=0)
        missing = [n for i, n in enumerate(names) if not last or self._forwards[i] < last]
        if missing:
            raise RouterError.mismatch(
                "shares",
                f"one from each of {len(names)} layers in the last forward (of a model compiled "
                'with options={"mode": "train"})',
                f"none from {missing}",
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_active: ContextVar[tuple[SoftRoutes, ...]] = ContextVar("flux_soft_routes", default=())


@contextmanager
def soft_routes(
    router: FluxRouter,
    *,
    temperature: float = 1.0,
    noise: Tensor | None = None,
    prompt_length: Tensor | None = None,
    hardness: float = 0.0,
) -> Iterator[SoftRoutes]:
    """Set what the forwards inside the block read, and collect their shares.

    For models compiled with ``options={"mode": "train"}``. Outside any block such a model runs at
    temperature 1, without noise or hardness, on whole rows. The backward may run after the block.
    Blocks may be nested: the innermost one of a router counts.

    Args:
        router: the router that the model was compiled with, itself.
        temperature: see :class:`SoftRoutes`.
        noise: see :class:`SoftRoutes`.
        prompt_length: see :class:`SoftRoutes`.
        hardness: see :class:`SoftRoutes`.
    """
    soft = SoftRoutes(router, temperature, noise, prompt_length, hardness)
    token = _active.set((*_active.get(), soft))
    try:
        yield soft
    finally:
        _active.reset(token)


def active_soft_routes(router: FluxRouter) -> SoftRoutes:
    """The innermost active block's; outside of all, temperature 1, no noise, whole rows."""
    for soft in reversed(_active.get()):
        if soft.router is router:
            return soft
    return SoftRoutes(router)
