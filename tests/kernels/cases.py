"""One table of attention cases for every implementation, and the bound that all must keep."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxcompile.kernels import ops
from fluxcompile.kernels.decode import reference as decode_reference
from fluxcompile.kernels.masks.flags import ALL_VALID
from fluxcompile.kernels.streaming import reference as streaming_reference

FLOOR = 16 * torch.finfo(torch.float32).eps  # absolute error that no dtype is blamed for


@dataclass(frozen=True)
class Case:
    """A prefill: lengths in tokens; ``padding`` names what :func:`key_validity` builds."""

    name: str
    queries: int = 300
    keys: int = 300
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    padding: str = "none"
    q_start: int | None = None
    sink: int | None = None
    local: int | None = None
    route: tuple[bool, ...] | None = None
    window: int = 0
    softcap: float = 0.0


_STREAMING = {"sink": 8, "local": 40}
_MIXED = {"batch": 3, "route": (True, False, False), **_STREAMING}

PREFILL = (
    *(Case(f"full-{n}", n, n) for n in (1, 2, 63, 300)),
    *(Case(f"streaming-{n}", n, n, **_STREAMING) for n in (1, 2, 63, 300)),
    *(Case(f"groups-{g}", 63, 63, heads=2 * g, **_STREAMING) for g in (1, 3, 4, 8)),
    *(Case(f"full-{pad}", padding=pad) for pad in ("left", "right", "both", "empty", "holes")),
    *(
        Case(f"mixed-{pad}", padding=pad, **_MIXED)
        for pad in ("none", "left", "right", "both", "empty", "holes")
    ),
    Case("full-window", window=50),
    Case("full-window-left", window=50, padding="left"),
    Case("full-softcap", softcap=5.0),
    Case("mixed-window-both", window=100, padding="both", **_MIXED),
    Case("mixed-window-small", window=20, **_MIXED),
    Case("mixed-softcap-left", softcap=5.0, padding="left", **_MIXED),
    Case("mixed-window-softcap-holes", window=100, softcap=5.0, padding="holes", **_MIXED),
    Case("no-sink", sink=0, local=40),
    Case("local-one", sink=3, local=1),
    Case("chunk-full", queries=63),
    Case("chunk-one", queries=1, **_MIXED),
    Case("chunk-mixed-left", queries=63, padding="left", **_MIXED),
    Case("static-cache-full", queries=63, padding="tail", q_start=100),
    Case("static-cache-mixed", queries=130, padding="tail", q_start=100, **_MIXED),
    Case("static-cache-start", queries=130, padding="tail", q_start=0, **_MIXED),
    Case("static-cache-holes", queries=130, padding="holes", q_start=100, **_MIXED),
)

BIG_PREFILL = (
    Case("full-1000", 1000, 1000, padding="left"),
    Case("streaming-1000", 1000, 1000, sink=64, local=200),
    Case("mixed-1000", 1000, 1000, padding="both", **_MIXED | {"sink": 64, "local": 200}),
)


@dataclass(frozen=True)
class Prefill:
    """Operands of a case, and what its result must be compared with."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    key_valid: Tensor | None
    q_start: Tensor | None
    route: Tensor | None
    bounds: Tensor | None
    flags: Tensor | None

    @property
    def scale(self) -> float:
        return self.case.head_dim**-0.5

    @property
    def needed_bounds(self) -> Tensor | None:
        """What the Hopper kernels take as bounds: None where every key is valid."""
        return None if self.flags is None or self.flags[ALL_VALID] else self.bounds

    def run(self) -> Tensor:
        """The operator on these operands."""
        case = self.case
        mask = self.bounds, self.key_valid, self.flags, None, self.q_start
        common = {"window": case.window, "scale": self.scale, "softcap": case.softcap}
        if case.sink is None:
            return ops.full_attention(self.q, self.k, self.v, *mask, **common)
        return ops.streaming_attention(
            self.q, self.k, self.v, *mask, self.route, sink=case.sink, local=case.local, **common
        )

    def reference(self, dtype: torch.dtype) -> Tensor:
        """The eager definition, with matmuls in ``dtype``."""
        case = self.case
        return streaming_reference.attention(
            self.q, self.k, self.v, self.key_valid, case.q_start, self.route,
            sink=case.sink, local=case.local, window=case.window,
            scale=self.scale, softcap=case.softcap, dtype=dtype,
        )  # fmt: skip


def prefill(case: Case, dtype: torch.dtype, device: str = "cpu") -> Prefill:
    """Random operands for ``case``; keys that are not valid hold NaN and huge values."""
    generator = torch.Generator().manual_seed(0)
    valid = key_validity(case, generator)
    q = torch.randn(case.batch, case.queries, case.heads, case.head_dim, generator=generator)
    kv = torch.randn(2, case.batch, case.kv_heads, case.keys, case.head_dim, generator=generator)
    if valid is not None:
        poison(kv[0], valid)
        poison(kv[1], valid)
        valid = valid.to(device)
    bounds, flags = (None, None) if valid is None else ops.mask_bounds(valid)
    route = None if case.route is None else torch.tensor(case.route, device=device)
    start = case.q_start
    q_start = None if start is None else torch.tensor([start], dtype=torch.int32, device=device)
    k, v = kv.to(dtype).to(device)
    # Queries come as models make them: [B, S, H, D] seen as [B, H, S, D].
    q = q.to(dtype).to(device).transpose(1, 2)
    return Prefill(case, q, k, v, valid, q_start, route, bounds, flags)


def key_validity(case: Case, generator: torch.Generator) -> Tensor | None:
    """Validity bool ``[B, Skv]`` of the case's padding; row 0 is the least padded."""
    if case.padding == "none":
        return None
    valid = torch.ones(case.batch, case.keys, dtype=torch.bool)
    cut = case.keys // 3
    for row in range(case.batch):
        if case.padding in ("left", "both"):
            valid[row, : row * cut] = False
        if case.padding in ("right", "both"):
            valid[row, case.keys - row * cut // 2 - row :] = False
        if case.padding == "tail":
            valid[row, : row * 17] = False
            valid[row, case.q_start + case.queries :] = False
    if case.padding == "empty":
        valid[-1] = False
    if case.padding == "holes":
        valid &= torch.rand(valid.shape, generator=generator) < 0.6
        valid[-1, :3] = False
    return valid


def poison(x: Tensor, valid: Tensor) -> None:
    """Fill ``x`` ``[B, HK, Skv, D]`` with NaN or a huge value, in turn, where it is not valid."""
    index = torch.arange(valid.shape[1])
    for remainder, value in ((0, float("nan")), (1, 3e4)):
        here = ~valid & (index % 2 == remainder)
        x.masked_fill_(here[:, None, :, None], value)


@dataclass(frozen=True)
class DecodeCase:
    """A decode step: ``query_bounds`` by row and query; ``valid``: share of valid keys or None."""

    name: str
    query_bounds: tuple[tuple[tuple[int, int, int, int], ...], ...]
    keys: int = 300
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    route: tuple[bool, ...] | None = None
    valid: float | None = None
    softcap: float = 0.0


def step(queries: int, *rows: tuple[int, int, int, int]) -> tuple:
    """``query_bounds`` of rows whose last query has these; each before it ends a key earlier."""
    return tuple(
        tuple(
            (low, min(sink_end, end - back), max(local_start - back, 0), end - back)
            for back in reversed(range(queries))
        )
        for low, sink_end, local_start, end in rows
    )


_TWO = ((0, 8, 260, 300), (30, 38, 200, 280))
_TWO_ROWS = step(1, *_TWO)
_DENSE_AND_SPARSE = (True, False)

DECODE = (
    DecodeCase("sparse", _TWO_ROWS),
    DecodeCase("dense", _TWO_ROWS, route=(True, True)),
    DecodeCase("mixed", _TWO_ROWS, route=_DENSE_AND_SPARSE),
    DecodeCase("mixed-holes-decode", _TWO_ROWS, route=_DENSE_AND_SPARSE, valid=0.5),
    DecodeCase("mixed-none-valid", _TWO_ROWS, route=_DENSE_AND_SPARSE, valid=0.0),
    DecodeCase("softcap", _TWO_ROWS, route=_DENSE_AND_SPARSE, softcap=5.0),
    *(DecodeCase(f"decode-groups-{g}", _TWO_ROWS, heads=2 * g) for g in (1, 3, 4, 8)),
    *(
        DecodeCase(f"length-{n}", step(1, (0, 8, 0, n), (0, 0, 0, n)), keys=n)
        for n in (1, 2, 63, 1000)
    ),
    DecodeCase("empty-row", step(1, (0, 8, 260, 300), (5, 5, 5, 5)), route=(False, True)),
    DecodeCase("no-sink", step(1, (0, 0, 260, 300), (0, 0, 0, 300))),
    DecodeCase("sink-only", step(1, (0, 70, 300, 300), (10, 80, 280, 280))),
    DecodeCase("ranges-touch", step(1, (0, 64, 64, 300), (0, 100, 50, 300))),
    DecodeCase("local-before-low", step(1, (40, 48, 10, 300), (40, 40, 10, 200))),
    *(DecodeCase(f"step-{n}", step(n, *_TWO), route=_DENSE_AND_SPARSE) for n in (2, 3, 8)),
    DecodeCase("step-sparse", step(3, *_TWO)),
    DecodeCase("step-holes", step(3, *_TWO), route=_DENSE_AND_SPARSE, valid=0.5),
    DecodeCase("step-none-valid", step(2, *_TWO), route=_DENSE_AND_SPARSE, valid=0.0),
    DecodeCase("step-softcap", step(3, *_TWO), route=_DENSE_AND_SPARSE, softcap=5.0),
    DecodeCase("step-local-one", step(8, (0, 3, 99, 100), (0, 0, 99, 100)), keys=100),
    DecodeCase("step-touch", step(8, (0, 64, 66, 300), (0, 64, 72, 300))),
    DecodeCase("step-first-tokens", step(8, (0, 8, 0, 8), (3, 8, 0, 8)), keys=8),
    DecodeCase("step-full-tile", step(8, (0, 8, 60, 100)), keys=100, heads=8, kv_heads=1),
    DecodeCase("step-two-tiles", step(8, (0, 8, 60, 100)), keys=100, heads=12, kv_heads=1),
    # A query without keys beside one with: its range is empty somewhere else.
    DecodeCase("step-empty", (((9, 0, 0, 0), (200, 208, 260, 300)), ((5, 5, 5, 5),) * 2)),
    # No step has such ranges, the operator does: apart, nested, and meeting another's sinks.
    DecodeCase(
        "step-apart", (((0, 8, 40, 60), (100, 108, 250, 260)), ((50, 60, 90, 99), (0, 9, 9, 9)))
    ),
    DecodeCase(
        "step-meet", (((90, 98, 120, 130), (10, 10, 20, 110)), ((0, 80, 90, 95), (7, 9, 50, 300)))
    ),
)


@dataclass(frozen=True)
class Decode:
    """Operands of a decode case, and what its result must be compared with."""

    case: DecodeCase
    q: Tensor
    k: Tensor
    v: Tensor
    query_bounds: Tensor
    key_valid: Tensor | None
    route: Tensor | None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.query_bounds, self.key_valid, self.route

    @property
    def options(self) -> dict[str, float]:
        return {"scale": self.case.head_dim**-0.5, "softcap": self.case.softcap}

    def run(self) -> Tensor:
        """The operator on these operands."""
        return ops.decode_attention(*self.operands, **self.options)

    def reference(self, dtype: torch.dtype) -> Tensor:
        """The eager definition, with matmuls in ``dtype``."""
        return decode_reference.attention(*self.operands, **self.options, dtype=dtype)


def decode(case: DecodeCase, dtype: torch.dtype, device: str = "cpu") -> Decode:
    """Random operands for ``case``; keys no row may read hold NaN and huge values."""
    generator = torch.Generator().manual_seed(0)
    query_bounds = torch.tensor(case.query_bounds, dtype=torch.int32)
    batch, queries, _ = query_bounds.shape
    q = torch.randn(batch, queries, case.heads, case.head_dim, generator=generator).transpose(1, 2)
    kv = torch.randn(2, batch, case.kv_heads, case.keys, case.head_dim, generator=generator)
    valid = None
    if case.valid is not None:
        valid = torch.rand(batch, case.keys, generator=generator) < case.valid
    route = None if case.route is None else torch.tensor(case.route)
    seen = decode_reference.visible_keys(query_bounds, case.keys, valid, route).any(1)
    poison(kv[0], seen)
    poison(kv[1], seen)
    k, v = kv.to(dtype).to(device)
    if route is not None:  # a column of all layers' routes, as a graph hands it over
        route = torch.stack([~route, route, ~route], dim=1).to(device)[:, 1]
    query_bounds, valid = (None if x is None else x.to(device) for x in (query_bounds, valid))
    return Decode(case, q.to(dtype).to(device), k, v, query_bounds, valid, route)


def assert_within_bound(operands: Prefill | Decode, out: Tensor) -> None:
    """``max |out - exact| <= 2 max |eager in out's dtype - exact|``, plus an absolute floor."""
    assert out.is_contiguous()
    exact = operands.reference(torch.float64)
    assert_error_within(operands.case.name, out, operands.reference(out.dtype), exact)


def assert_error_within(
    what: str, found: Tensor, eager: Tensor, exact: Tensor, floor: float = FLOOR
) -> None:
    """``max |found - exact| <= 2 max |eager - exact|``, plus an absolute floor."""
    assert found.shape == exact.shape
    assert not found.isnan().any(), what
    error = (found - exact).abs().max().item()
    allowed = 2 * (eager - exact).abs().max().item() + floor
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def named(name: str) -> Case | DecodeCase:
    """The case of that name."""
    return next(c for c in PREFILL + BIG_PREFILL + DECODE if c.name == name)


def at(case: Case | DecodeCase, **changes: object) -> Case | DecodeCase:
    """The same case with other sizes, its name saying so."""
    words = "-".join(f"{key}{value}" for key, value in changes.items())
    return replace(case, name=f"{case.name}-{words}", **changes)


def name(case: object) -> str:
    """A readable test id for a case or a dtype."""
    return getattr(case, "name", None) or str(case).removeprefix("torch.")
