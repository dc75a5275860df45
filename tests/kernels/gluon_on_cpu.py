"""Gluon kernels on a CPU: their own Python is run, each group of warps in a thread of its own.

Triton interprets its own language without a GPU, Gluon it only compiles. This stands in for what
our kernels use of Gluon: tiles are tensors, scalars are integers that divide as a GPU's do, shared
memory starts as NaN. What runs beside a group runs late here: a copy at any time until somebody
waits for it, a product when its result is waited for, whatever its operands hold by then. Which
group goes on next is drawn, so that a seed is one of the orders that a GPU might take. A result
that depends on the order is wrong for some seed, and where nobody can go on, `Deadlock` says so.

Programs run one after the other; layouts, registers and instructions are left to the compiler.
"""

import importlib
import inspect
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

_PATIENCE = 60  # seconds that one group may compute between two waits


class Deadlock(Exception):
    """No group of a program can go on."""


class Int(int):
    """A scalar: division truncates."""

    def to(self, dtype: torch.dtype) -> "Int":
        return self

    def __floordiv__(self, other):
        return _scalar(abs(self) // abs(other) * (1 if (self < 0) == (other < 0) else -1))

    def __mod__(self, other):
        return _scalar(int(self) - int(self // other) * int(other))


def _scalar(value):
    return Int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _closed(name: str) -> Callable:
    operation = getattr(int, name)
    return lambda self, *other: _scalar(operation(self, *other))


for _name in (
    "add",
    "sub",
    "mul",
    "and",
    "or",
    "xor",
    "radd",
    "rsub",
    "rmul",
    "rand",
    "ror",
    "rxor",
):
    setattr(Int, f"__{_name}__", _closed(f"__{_name}__"))


class Block(torch.Tensor):
    """A tile. Its layout is not kept."""

    type = types.SimpleNamespace(layout=None)


def _block(x) -> Block:
    return torch.as_tensor(x).as_subclass(Block)


def _reduced(x: torch.Tensor):
    return Int(x.item()) if x.ndim == 0 else x


class Layout:
    """Any layout."""

    def __init__(self, *_, **__) -> None: ...

    @classmethod
    def get_default_for(cls, *_) -> "Layout":
        return cls()


@dataclass
class Pointer:
    """Elements of a tensor's storage from the tensor's first on."""

    memory: torch.Tensor
    offset: object = 0

    @classmethod
    def to_tensor(cls, x: torch.Tensor) -> "Pointer":
        behind = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return cls(x.as_strided((behind,), (1,)))

    def __add__(self, offset) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def __sub__(self, offset) -> "Pointer":
        return self + -offset


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
    def block_type(self) -> types.SimpleNamespace:
        elements = torch.Size(self.block_shape).numel()
        return types.SimpleNamespace(nbytes=elements * self.base.element_size())

    def part(self, at: list[int], block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What lies in the base of the block at ``at``, of the base and of ``block``."""
        sizes = [min(b, s - i) for b, s, i in zip(self.block_shape, self.shape, at, strict=True)]
        inside = tuple(slice(i, i + max(n, 0)) for i, n in zip(at, sizes, strict=True))
        assert all(i >= 0 for i in at), at
        return self.base[inside], block[tuple(slice(0, max(n, 0)) for n in sizes)]


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

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return self._view(self.memory.narrow(dim, start, length))

    def load(self, layout: Layout) -> Block:
        return _block(self.memory.clone())

    def store(self, value: torch.Tensor) -> None:
        self.memory.copy_(value)

    @property
    def barrier(self) -> Barrier:
        return self.barriers[self.memory.storage_offset()]


@dataclass
class Product:
    """A product of the tensor cores, which has its result once it has been waited for."""

    compute: Callable[[], Block]
    result: Block | None = None


@dataclass
class Group:
    """A group of warps."""

    may_go_on: Callable[[], bool] | None = None
    wakes: threading.Event = field(default_factory=threading.Event)
    products: list[Product] = field(default_factory=list)
    stores: list["Copy"] = field(default_factory=list)
    ended: bool = False


@dataclass
class Copy:
    """A copy on its way."""

    run: Callable[[], None]
    done: bool = False


class Program:
    """The groups of one program, of which one runs at a time, and its copies on their way."""

    def __init__(self, index: int, count: int, draw: random.Random) -> None:
        self.index, self.count, self.draw = index, count, draw
        self.copies: list[Copy] = []
        self.groups: list[Group] = []
        self.failure: BaseException | None = None
        self.finished = threading.Event()
        self.here = threading.local()

    @property
    def group(self) -> Group:
        return self.here.group

    def run_groups(self, bodies: list[tuple[Callable, tuple]]) -> None:
        self.groups = [Group() for _ in bodies]
        threads = [
            threading.Thread(target=self._run, args=(group, *body), daemon=True)
            for group, body in zip(self.groups, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.finished.wait()
        if self.failure is None:
            for copy in self.copies:
                copy.run()
            return
        raise self.failure

    def _run(self, group: Group, body: Callable, args: tuple) -> None:
        self.here.group = group
        group.wakes.wait()
        try:
            if self.failure is None:
                body(*args)
                assert not group.products, "a product that nobody has waited for"
        except BaseException as error:
            self.failure = self.failure or error
        group.ended = True
        self._pass_on()

    def wait(self, may_go_on: Callable[[], bool]) -> None:
        """Let others run, until this group may go on and is drawn."""
        group = self.group
        group.may_go_on = may_go_on
        group.wakes.clear()
        self._pass_on()
        assert group.wakes.wait(_PATIENCE)
        if self.failure is not None:
            raise self.failure

    def _pass_on(self) -> None:
        """Run copies, then wake one group, all drawn; with no group left, end."""
        while True:
            waiting = [group for group in self.groups if not group.ended]
            if not waiting:
                self.finished.set()
                return
            if self.failure is not None:
                waiting[0].wakes.set()
                return
            ready = [g for g in waiting if g.may_go_on is None or g.may_go_on()]
            if not ready and not self.copies:
                self.failure = Deadlock(f"program {self.index}: {len(waiting)} groups wait")
                continue
            chosen = self.draw.choice([*ready, *self.copies])
            if isinstance(chosen, Group):
                chosen.may_go_on = None
                chosen.wakes.set()
                return
            self.copies.remove(chosen)
            chosen.run()
            chosen.done = True


_now: Program | None = None  # the program that runs
_seed = 0


class Function:
    """What ``gluon.jit`` makes: called by others, or launched as a kernel."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner):
        return self if instance is None else types.MethodType(self.function, instance)

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def launch(*args, num_warps: int = 4, maxnreg: int | None = None, **constants) -> None:
            global _now
            for index in range(grid[0]):
                _now = Program(index, grid[0], random.Random(_seed * 1_000_003 + index))
                self.function(*map(_argument, args), **constants)

        return launch


def _argument(x):
    return Pointer.to_tensor(x) if isinstance(x, torch.Tensor) else _scalar(x)


def _jit(function: Callable | None = None, **_):
    return Function(function) if function is not None else Function


def _range(*bounds: int) -> Iterator[Int]:
    return map(Int, range(*bounds))


def _load(pointer: Pointer):
    return _reduced(_block(pointer.memory[int(pointer.offset)]))


def _atomic_add(pointer: Pointer, value, mask, sem: str) -> Block:
    before = torch.zeros_like(value)
    for lane in mask.nonzero().flatten().tolist():
        at = int(pointer.offset[lane])
        before[lane] = pointer.memory[at]
        pointer.memory[at] += value[lane]
    return before


def _where(condition, x, y):
    if isinstance(condition, torch.Tensor):
        return _block(torch.where(condition, x, y))
    return x if condition else y


def _elementwise(operation: Callable) -> Callable:
    return lambda x, y: _block(operation(torch.as_tensor(x), torch.as_tensor(y)))


def _allocate(dtype: torch.dtype, shape: list[int], layout) -> Shared:
    empty = float("nan") if dtype.is_floating_point else -(2**30)
    return Shared(torch.full(shape, empty, dtype=dtype))


def _warp_specialize(groups: list, warps: list[int], registers: list[int]) -> None:
    _now.run_groups(groups)


def _init(barrier: Shared, count: int) -> None:
    barrier.barriers[barrier.memory.storage_offset()] = Barrier(count)


def _wait(barrier: Shared, phase: int, pred=True) -> None:
    if pred:
        _now.wait(lambda: barrier.barrier.phase % 2 != phase)


def _arrive(barrier: Shared, count: int = 1, pred=True) -> None:
    if pred:
        barrier.barrier.arrive(count)


def _expect(barrier: Shared, nbytes: int) -> None:
    barrier.barrier.missing += nbytes
    barrier.barrier.arrive(1)


def _async_load(descriptor: TensorDescriptor, at: list[int], barrier: Shared, to: Shared) -> None:
    at = list(map(int, at))

    def run() -> None:
        source, target = descriptor.part(at, to.memory)
        to.memory.zero_()
        target.copy_(source)
        barrier.barrier.missing -= descriptor.block_type.nbytes
        barrier.barrier.advance()

    _now.copies.append(Copy(run))


def _async_store(descriptor: TensorDescriptor, at: list[int], source: Shared) -> None:
    at = list(map(int, at))

    def run() -> None:
        target, block = descriptor.part(at, source.memory)
        target.copy_(block)

    copy = Copy(run)
    _now.copies.append(copy)
    _now.group.stores.append(copy)


def _store_wait(pendings: int) -> None:
    stores = _now.group.stores
    _now.wait(lambda: sum(not copy.done for copy in stores) <= pendings)
    stores[:] = [copy for copy in stores if not copy.done]


def _warpgroup_mma(a, b: Shared, acc: Block, use_acc=True, is_async: bool = False):
    def compute() -> Block:
        left = a.memory if isinstance(a, Shared) else a
        out = left.float() @ b.memory.float()
        return _block(acc + out if use_acc else out)

    product = Product(compute)
    _now.group.products.append(product)
    return product if is_async else _warpgroup_mma_wait(0, [product])


def _warpgroup_mma_wait(outstanding: int = 0, deps: list = ()):
    products = _now.group.products
    while len(products) > outstanding:
        oldest = products.pop(0)
        oldest.result = oldest.compute()
    found = [x.result if isinstance(x, Product) else x for x in deps]
    assert all(x is not None for x in found), "waited for fewer products than are used"
    return found[0] if len(found) == 1 else tuple(found)


def _modules() -> dict[str, types.ModuleType]:
    """Stand-ins for the modules that our kernels import, by name."""
    layouts = (
        "NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout",
        "SwizzledSharedLayout", "NVMMASharedLayout",
    )  # fmt: skip
    language = types.SimpleNamespace(
        **dict.fromkeys(layouts, Layout),
        constexpr=lambda value: value, tensor=object, shared_memory_descriptor=object,
        float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32,
        int32=torch.int32, int64=torch.int64,
        program_id=lambda axis: Int(_now.index), num_programs=lambda axis: Int(_now.count),
        static_range=_range, to_tensor=_scalar, load=_load, atomic_add=_atomic_add,
        arange=lambda start, end, layout: _block(torch.arange(start, end)),
        full=lambda shape, value, dtype, layout: _block(torch.full(shape, value, dtype=dtype)),
        full_like=lambda x, value: _block(torch.full_like(x, value)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        split=lambda x: (x[..., 0], x[..., 1]), join=lambda x, y: torch.stack((x, y), -1),
        where=_where, maximum=_elementwise(torch.maximum), minimum=_elementwise(torch.minimum),
        exp2=torch.exp2, max=lambda x, axis: _reduced(x.amax(axis)),
        sum=lambda x, axis: _reduced(x.sum(axis)),
        allocate_shared_memory=_allocate, warp_specialize=_warp_specialize,
    )  # fmt: skip
    tma = types.SimpleNamespace(
        async_load=_async_load, async_store=_async_store, store_wait=_store_wait
    )
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=Layout, init=_init, wait=_wait, arrive=_arrive, expect=_expect
    )
    contents = {
        "triton.experimental.gluon": {
            "jit": _jit, "constexpr_function": lambda function: function, "language": language,
        },
        "triton.experimental.gluon.language.nvidia.hopper": {
            "fence_async_shared": lambda: None, "mbarrier": mbarrier, "tma": tma,
            "warpgroup_mma": _warpgroup_mma, "warpgroup_mma_wait": _warpgroup_mma_wait,
        },
        "triton.experimental.gluon.nvidia.hopper": {"TensorDescriptor": TensorDescriptor},
        "triton.language.core": {"_aggregate": lambda kind: kind},
    }  # fmt: skip
    modules = {}
    for name, members in contents.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(members)
    return modules


def pause() -> None:
    """Let others of this group's program run."""
    _now.wait(lambda: True)


@contextmanager
def order(seed: int) -> Iterator[None]:
    """Draw the groups' order by ``seed`` meanwhile."""
    global _seed
    before, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = before


def load(*names: str) -> list[types.ModuleType]:
    """The modules of these names, imported anew over the stand-ins; what was imported stays.

    Args:
        names: every module that is to be new, those that others import first.
    """
    kept = {name: importlib.import_module(name) for name in (*names, *_modules())}
    try:
        for name, module in _modules().items():
            _place(name, module)
        for name in names:
            _place(name, None)
        modules = [importlib.import_module(name) for name in names]
    finally:
        for name, module in kept.items():
            _place(name, module)
    for module in modules:
        module.range = _range
    return modules


def _place(name: str, module: types.ModuleType | None) -> None:
    """Make ``module`` what an import of this name gives; None: what its file does."""
    package, _, last = name.rpartition(".")
    if module is None:
        del sys.modules[name]
        delattr(sys.modules[package], last)
    else:
        sys.modules[name] = module
        setattr(sys.modules[package], last, module)
