"""Shared memory and its barriers, copies to and from it, and products that read it."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from .program import Copy, Product, now
from .values import Block, Layout, block


@dataclass
class TensorDescriptor:
    """Copies of ``block_shape``: zeros from beyond the base, nothing to there."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Layout

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def block_type(self) -> SimpleNamespace:
        elements = torch.Size(self.block_shape).numel()
        return SimpleNamespace(nbytes=elements * self.base.element_size())

    def part(self, at: list[int], place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What lies in the base of the block at ``at``: there, and in the block's ``place``."""
        assert all(i >= 0 for i in at), at
        reach = zip(self.block_shape, self.shape, at, strict=True)
        sizes = [max(min(width, length - i), 0) for width, length, i in reach]
        inside = tuple(slice(i, i + n) for i, n in zip(at, sizes, strict=True))
        return self.base[inside], place[tuple(map(slice, sizes))]


@dataclass
class Barrier:
    """Completes a phase when ``count`` have arrived and all bytes are there."""

    count: int
    phase: int = 0
    arrived: int = 0
    missing: int = 0  # bytes

    def arrive(self, count: int) -> None:
        self.arrived += count
        assert self.arrived <= self.count, "more arrivals than a phase has"
        self.advance()

    def advance(self) -> None:
        if self.arrived == self.count and self.missing == 0:
            self.phase, self.arrived = self.phase + 1, 0


@dataclass
class Shared:
    """A part of shared memory, or barriers."""

    memory: torch.Tensor
    barriers: dict[int, Barrier] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def _view(self, memory: torch.Tensor) -> "Shared":
        return Shared(memory, self.barriers)

    def index(self, i: int) -> "Shared":
        return self._view(self.memory[int(i)])

    def reshape(self, shape: list[int]) -> "Shared":
        return self._view(self.memory.view(shape))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return self._view(self.memory.permute(order))

    def load(self, layout: Layout) -> Block:
        return block(self.memory.clone())

    def store(self, value: torch.Tensor) -> None:
        self.memory.copy_(value)

    @property
    def barrier(self) -> Barrier:
        return self.barriers[self.memory.storage_offset()]


def allocate(dtype: torch.dtype, shape: list[int], layout: Layout) -> Shared:
    """Shared memory as it is found: full of NaN."""
    empty = float("nan") if dtype.is_floating_point else -(2**30)
    return Shared(torch.full(shape, empty, dtype=dtype))


def _init(barrier: Shared, count: int) -> None:
    barrier.barriers[barrier.memory.storage_offset()] = Barrier(count)


def _wait(barrier: Shared, phase: int, pred=True) -> None:
    if pred:
        now().wait(lambda: barrier.barrier.phase % 2 != phase)


def _arrive(barrier: Shared, count: int = 1, pred=True) -> None:
    if pred:
        barrier.barrier.arrive(count)


def _expect(barrier: Shared, nbytes: int) -> None:
    barrier.barrier.missing += nbytes
    barrier.barrier.arrive(1)


def _async_load(descriptor: TensorDescriptor, at: list[int], barrier: Shared, to: Shared) -> None:
    def run() -> None:
        source, target = descriptor.part(at, to.memory)
        to.memory.zero_()
        target.copy_(source)
        barrier.barrier.missing -= descriptor.block_type.nbytes
        barrier.barrier.advance()

    now().copies.append(Copy(run))


def _async_store(descriptor: TensorDescriptor, at: list[int], source: Shared) -> None:
    def run() -> None:
        target, inside = descriptor.part(at, source.memory)
        target.copy_(inside)

    copy = Copy(run)
    now().copies.append(copy)
    now().group.stores.append(copy)


def _store_wait(pendings: int) -> None:
    stores = now().group.stores
    now().wait(lambda: sum(not copy.done for copy in stores) <= pendings)
    stores[:] = [copy for copy in stores if not copy.done]


def warpgroup_mma(a, b: Shared, acc: Block, use_acc=True, is_async: bool = False):
    """``acc + a @ b`` in fp32, in time."""

    def compute() -> Block:
        left = a.memory if isinstance(a, Shared) else a
        out = left.float() @ b.memory.float()
        return block(acc + out if use_acc else out)

    product = Product(compute)
    now().group.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: list = ()):
    """``deps`` with their results, when no more than so many products of this group are left."""
    products = now().group.products
    while len(products) > num_outstanding:
        oldest = products.pop(0)
        oldest.result = oldest.compute()
    found = [x.result if isinstance(x, Product) else x for x in deps]
    assert all(x is not None for x in found), "waited for fewer products than are used"
    return found[0] if len(found) == 1 else tuple(found)


TMA = SimpleNamespace(async_load=_async_load, async_store=_async_store, store_wait=_store_wait)
MBARRIER = SimpleNamespace(
    MBarrierLayout=Layout, init=_init, wait=_wait, arrive=_arrive, expect=_expect
)
