"""Scalars, tiles and pointers, and what Gluon does with them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch


class Int(int):
    """A scalar: division truncates."""

    def to(self, dtype: torch.dtype) -> "Int":
        return self

    def __floordiv__(self, other):
        return scalar(abs(self) // abs(other) * (1 if (self < 0) == (other < 0) else -1))

    def __mod__(self, other):
        return scalar(int(self) - int(self // other) * int(other))


def scalar(value):
    """Of an integer one that divides as a GPU's do; anything else as it is."""
    return Int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _closed(name: str) -> Callable:
    operation = getattr(int, name)
    return lambda self, *other: scalar(operation(self, *other))


for _name in ("add", "sub", "mul", "and", "or", "xor"):
    for _method in (f"__{_name}__", f"__r{_name}__"):
        setattr(Int, _method, _closed(_method))


class Block(torch.Tensor):
    """A tile. Its layout is not kept."""

    type = SimpleNamespace(layout=None)


def block(x) -> Block:
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


def irange(*bounds: int) -> Iterator[Int]:
    """``range`` of scalars."""
    return map(Int, range(*bounds))


def _load(pointer: Pointer):
    return _reduced(block(pointer.memory[int(pointer.offset)]))


def _atomic_add(pointer: Pointer, value, mask, sem: str) -> Block:
    before = torch.zeros_like(value)
    for lane in mask.nonzero().flatten().tolist():
        at = int(pointer.offset[lane])
        before[lane] = pointer.memory[at]
        pointer.memory[at] += value[lane]
    return before


def _where(condition, x, y):
    if isinstance(condition, torch.Tensor):
        return block(torch.where(condition, x, y))
    return x if condition else y


def _elementwise(operation: Callable) -> Callable:
    return lambda x, y: block(operation(torch.as_tensor(x), torch.as_tensor(y)))


LANGUAGE = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
    "constexpr": lambda value: value,
    "tensor": object,
    "shared_memory_descriptor": object,
    "static_range": irange,
    "to_tensor": scalar,
    "load": _load,
    "atomic_add": _atomic_add,
    "arange": lambda start, end, layout: block(torch.arange(start, end)),
    "full": lambda shape, value, dtype, layout: block(torch.full(shape, value, dtype=dtype)),
    "convert_layout": lambda x, layout, assert_trivial=False: x,
    "where": _where,
    "maximum": _elementwise(torch.maximum),
    "minimum": _elementwise(torch.minimum),
    "exp2": torch.exp2,
    "max": lambda x, axis: _reduced(x.amax(axis)),
    "sum": lambda x, axis: _reduced(x.sum(axis)),
    "NVMMADistributedLayout": Layout,
    "SliceLayout": Layout,
    "DotOperandLayout": Layout,
    "BlockedLayout": Layout,
    "SwizzledSharedLayout": Layout,
    "NVMMASharedLayout": Layout,
}
