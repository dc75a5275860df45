"""The sparse prefills beyond streaming: one list of situations, tried with every mode."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxcompile.kernels import ops
from fluxcompile.kernels.block_sparse import reference as block_sparse_reference
from fluxcompile.kernels.power import reference as power_reference
from fluxcompile.kernels.triangle import reference as triangle_reference
from fluxcompile.kernels.xattention import reference as xattention_reference

from . import cases


@dataclass(frozen=True)
class SparseCase(cases.Case):
    """A case for one mode; every mode reads the options it has. Lengths in tokens."""

    mode: str = "block_sparse"
    sink: int = 8
    local: int = 40
    last: int = 37
    block: int = 16
    stride: int = 4
    threshold: float = 0.7
    shared: bool = False  # one block mask for all rows and heads


_MIXED = {"batch": 3, "route": (True, False, False)}
SITUATIONS = (
    *(SparseCase(f"{n}", n, n) for n in (1, 2, 63, 300)),
    *(SparseCase(f"groups-{g}", 63, 63, heads=2 * g) for g in (1, 3, 4, 8)),
    *(
        SparseCase(f"mixed-{pad}", padding=pad, **_MIXED)
        for pad in ("none", "left", "right", "both", "empty", "holes")
    ),
    SparseCase("softcap", 100, 100, softcap=5.0),
    SparseCase("window", window=100),
    SparseCase("window-small-both", window=20, padding="both", **_MIXED),
    SparseCase("blocks-of-64", block=64, padding="left", **_MIXED),
    SparseCase("chunk", queries=63),
    SparseCase("chunk-one", queries=1, **_MIXED),
    SparseCase("chunk-left", queries=63, padding="left", **_MIXED),
    SparseCase("static-cache", queries=130, padding="tail", q_start=96, **_MIXED),
    SparseCase("static-cache-odd", queries=130, padding="tail", q_start=101, **_MIXED),
    SparseCase("static-cache-start", queries=130, padding="tail", q_start=0, **_MIXED),
)
BIG = (
    SparseCase("1000", 1000, 1000, block=64, stride=8),
    SparseCase("mixed-1000", 1000, 1000, padding="both", block=128, stride=16, **_MIXED),
)
MODES = ("block_sparse", "power", "triangle", "xattention")


def named(mode: str, *names: str) -> tuple[SparseCase, ...]:
    """The situations of those names, or all of them, for ``mode``."""
    return tuple(
        replace(case, mode=mode, name=f"{mode}-{case.name}")
        for case in SITUATIONS + (BIG if names else ())
        if not names or case.name in names
    )


PREFILL = tuple(case for mode in MODES for case in named(mode))
BIG_PREFILL = tuple(case for mode in MODES for case in named(mode, "1000", "mixed-1000"))
SHARED = replace(named("block_sparse", "mixed-left")[0], name="block_sparse-shared", shared=True)


@dataclass(frozen=True)
class SparsePrefill(cases.Prefill):
    """Operands of a case for its mode."""

    case: SparseCase

    @property
    def key_mask(self) -> tuple[Tensor | None, ...]:
        return self.bounds, self.key_valid, self.flags, None, self.q_start

    @property
    def options(self) -> dict[str, int | float]:
        """What the mode's operator and its definition take alike, by name."""
        wanted = (*_OPTIONS[self.case.mode], "window", "softcap")
        return {name: getattr(self.case, name) for name in wanted} | {"scale": self.scale}

    @property
    def block_mask(self) -> Tensor:
        """A third of all blocks, drawn alike on every device; some query blocks get none."""
        case = self.case
        generator = torch.Generator().manual_seed(1)
        rows_heads = (1, 1) if case.shared else (case.batch, case.heads)
        blocks = (-(-n // case.block) for n in (case.queries, case.keys))
        return (torch.rand(*rows_heads, *blocks, generator=generator) < 0.35).to(self.q.device)

    @property
    def extra(self) -> tuple[Tensor, ...]:
        """Operands that only this mode takes."""
        return (self.block_mask,) if self.case.mode == "block_sparse" else ()

    def run(self) -> Tensor:
        op = getattr(ops, f"{self.case.mode}_attention")
        return op(self.q, self.k, self.v, *self.extra, *self.key_mask, self.route, **self.options)

    def reference(self, dtype: torch.dtype) -> Tensor:
        case = self.case
        return _REFERENCES[case.mode].attention(
            self.q, self.k, self.v, *self.extra, self.key_valid, case.q_start, self.route,
            **self.options, dtype=dtype,
        )  # fmt: skip


_OPTIONS = {
    "block_sparse": ("block",),
    "power": ("sink", "local", "block"),
    "triangle": ("sink", "local", "last"),
    "xattention": ("stride", "threshold", "block"),
}
_REFERENCES = {
    "block_sparse": block_sparse_reference,
    "power": power_reference,
    "triangle": triangle_reference,
    "xattention": xattention_reference,
}


def prefill(case: SparseCase, dtype: torch.dtype, device: str = "cpu") -> SparsePrefill:
    """Random operands for ``case``, as :func:`cases.prefill` makes them."""
    return SparsePrefill(**vars(cases.prefill(case, dtype, device)))


def sharpened(x: SparsePrefill) -> SparsePrefill:
    """The same operands with queries that prefer few keys: a threshold then leaves blocks out."""
    return replace(x, q=x.q * 8)


def chosen_by_definition(x: SparsePrefill) -> Tensor:
    """XAttention's blocks bool ``[B, H, Qb, KVb]``, none in dense rows."""
    options = {name: value for name, value in x.options.items() if name != "softcap"}
    mask = xattention_reference.block_mask(x.q, x.k, x.key_valid, x.case.q_start, **options)
    return mask if x.route is None else mask & ~x.route[:, None, None, None]
