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
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType, ModuleType, SimpleNamespace

import torch

from .memory import MBARRIER, TMA, TensorDescriptor, allocate, warpgroup_mma, warpgroup_mma_wait
from .program import Deadlock, Program, now, pause, start
from .values import LANGUAGE, Int, Pointer, irange, scalar

__all__ = ["Deadlock", "load", "order", "pause"]

_seed = 0


class Function:
    """What ``gluon.jit`` makes: called by others, or launched as a kernel."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner):
        return self if instance is None else MethodType(self.function, instance)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args, num_warps: int = 4, maxnreg: int | None = None, **constants) -> None:
            for index in itertools.product(*map(range, grid)):
                start(Program(index, grid, random.Random(f"{_seed} {index}")))
                self.function(*map(_argument, args), **constants)

        return launch


def _argument(x):
    return Pointer.to_tensor(x) if isinstance(x, torch.Tensor) else scalar(x)


def _jit(function: Callable | None = None, **_):
    return Function(function) if function is not None else Function


def _warp_specialize(groups: list, warps: list[int], registers: list[int]) -> None:
    now().run_groups(groups)


def _stand_ins() -> dict[str, ModuleType]:
    """For the modules that our kernels import, by name."""
    language = SimpleNamespace(
        **LANGUAGE,
        program_id=lambda axis: Int(now().index[axis]),
        num_programs=lambda axis: Int(now().grid[axis]),
        allocate_shared_memory=allocate,
        warp_specialize=_warp_specialize,
    )
    contents = {
        "triton.experimental.gluon": {
            "jit": _jit,
            "constexpr_function": lambda function: function,
            "language": language,
        },
        "triton.experimental.gluon.language.nvidia.hopper": {
            "fence_async_shared": lambda: None,
            "mbarrier": MBARRIER,
            "tma": TMA,
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait,
        },
        "triton.experimental.gluon.nvidia.hopper": {"TensorDescriptor": TensorDescriptor},
        "triton.language.core": {"_aggregate": lambda kind: kind},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, members in contents.items():
        vars(modules[name]).update(members)
    return modules


@contextmanager
def order(seed: int) -> Iterator[None]:
    """Draw the groups' order by ``seed`` meanwhile."""
    global _seed
    before, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = before


def load(*names: str) -> list[ModuleType]:
    """The modules of these names, imported anew over the stand-ins; what was imported stays.

    Args:
        names: every module that is to be new, those that others import first.
    """
    stand_ins = _stand_ins()
    kept = {name: importlib.import_module(name) for name in (*names, *stand_ins)}
    try:
        for name, module in stand_ins.items():
            _place(name, module)
        for name in names:
            _place(name, None)
        modules = [importlib.import_module(name) for name in names]
    finally:
        for name, module in kept.items():
            _place(name, module)
    for module in modules:
        module.range = irange
    return modules


def _place(name: str, module: ModuleType | None) -> None:
    """Make ``module`` what an import of this name gives; None: what its file does."""
    package, _, last = name.rpartition(".")
    if module is None:
        del sys.modules[name]
        delattr(sys.modules[package], last)
    else:
        sys.modules[name] = module
        setattr(sys.modules[package], last, module)
