"""The measurements of kernels.py: one function a kernel, from a setting to rows of its table."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peers import SDPA, flash_attention_4, flex_causal, flex_streaming, masked_sdpa, sdpa

from common import device_seconds, replayed_seconds, synchronise, typical_seconds
from fluxcompile import FluxConfig
from fluxcompile.kernels import ops
from fluxcompile.kernels.decode.bounds import decode_bounds
from fluxcompile.kernels.xattention.op import choose_blocks
from models import pairs_full, pairs_streaming

#: ||ours - peer|| over ||peer||: rounding of a bf16 result is 2e-3, a wrong mask 1e-1
ERROR_BOUND = 1e-2
CONFIG = FluxConfig()  # the paper's XAttention; 128 tokens a block
DENSITIES = (0.05, 0.10, 0.25, 0.50)
ROTATION_BYTES = 400e6  # caches that a decode step goes round: several times the L2 cache


class WrongResult(Exception):
    """A kernel and its peer disagree: neither time is reported."""


@dataclass(frozen=True)
class Setting:
    """One shape on one device, and the device's ceilings."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    sink: int
    local: int
    device: str
    dtype: torch.dtype
    flops: float
    bytes: float

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.length} tokens, head dim {self.head_dim}"

    def shape(self) -> dict[str, int]:
        names = ("batch", "length", "head_dim", "sink", "local")
        return {name: getattr(self, name) for name in names}

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def operands(self, queries: int | None = None) -> tuple[torch.Tensor, ...]:
        """Query tokens first in memory, keys and values heads first; ``[B, H or HK, S, D]``."""
        queries = queries or self.length
        make = {"device": self.device, "dtype": self.dtype}
        q = torch.randn(self.batch, queries, self.heads, self.head_dim, **make).transpose(1, 2)
        shape = self.batch, self.kv_heads, self.length, self.head_dim
        return q, torch.randn(shape, **make), torch.randn(shape, **make)

    def arithmetic_floor(self, pairs: float, products: int = 2) -> float:
        """Seconds of ``products`` matrix products over ``pairs`` (query, key) pairs a head."""
        return 2 * products * pairs * self.batch * self.heads * self.head_dim / self.flops

    def traffic_floor(self, keys: float) -> float:
        """Seconds to read ``keys`` keys and their values a batch row."""
        size = torch.finfo(self.dtype).bits // 8
        return 2 * keys * self.batch * self.kv_heads * self.head_dim * size / self.bytes


@dataclass(frozen=True)
class Measurement:
    """One line. ``goal`` says what is asked of ``achieved``: to reach or not to pass ``bound``."""

    kernel: str
    seconds: float
    floor: float
    peers: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    goal: str = ""
    achieved: float | None = None
    bound: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.achieved is None or self.bound is None:
            return None
        return self.achieved >= self.bound if self.at_least else self.achieved <= self.bound

    def columns(self) -> dict[str, str]:
        peers = ", ".join(f"{name} {_time(value)}" for name, value in self.peers.items())
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return {
            "kernel": self.kernel,
            "ours": _time(self.seconds),
            "floor": _time(self.floor),
            "of floor": f"{self.seconds / self.floor:.2f}×",
            "peers": peers or "—",
            "error": "—" if self.error is None else f"{self.error:.0e}",
            "asked": self.goal or "—",
            "achieved": "—" if self.achieved is None else f"{self.achieved:.3g} {verdict}",
        }


def asked(
    s: Setting,
    goal: str,
    achieved: float,
    bound: float,
    *,
    at_least: bool = False,
    lengths: tuple[int, ...] = (),
) -> dict:
    """The goal's fields of a measurement; without a verdict where the goal does not apply."""
    if s.device == "cpu" or (lengths and s.length not in lengths):
        return {"achieved": achieved}
    return {"goal": goal, "achieved": achieved, "bound": bound, "at_least": at_least}


def _time(value: float) -> str:
    return f"{1e3 * value:.3f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} µs"


def checked(kernel: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The relative error, over slices so that no fp32 copy of a large result is made.

    Raises:
        WrongResult: beyond `ERROR_BOUND`, or not a number.
    """
    difference = norm = 0.0
    for a, b in zip(ours.split(4096, dim=1), theirs.split(4096, dim=1), strict=True):
        difference += (a.float() - b.float()).square().sum().item()
        norm += b.float().square().sum().item()
    error = (difference / norm) ** 0.5
    if not error <= ERROR_BOUND:
        raise WrongResult(f"{kernel}: {error:.1e} from its peer, bound {ERROR_BOUND:.0e}")
    return error


def dense(s: Setting) -> list[Measurement]:
    """Dense rows in our own prefill kernel."""
    q, k, v = s.operands()
    ours = _ours_dense(s, q, k, v)
    peers = {name: lambda name=name: sdpa(name, q, k, v) for name in SDPA}
    flex = flex_causal(s.length, s.device)
    peers["Flex"] = lambda: flex(q, k, v)
    newest = flash_attention_4() if q.is_cuda else None
    if newest is not None:
        checked("FA4", newest(q, k, v).transpose(1, 2), peers["cuDNN"]().transpose(1, 2))
        peers["FA4"] = lambda: newest(q, k, v)
    error = checked("dense", ours(), peers["cuDNN"]().transpose(1, 2))
    seconds = device_seconds(ours, s.device)
    times = {name: device_seconds(peer, s.device) for name, peer in peers.items()}
    return [
        Measurement(
            "dense rows", seconds, s.arithmetic_floor(pairs_full(s.length)), times, error,
            **asked(s, "≥ 0.75 cuDNN", times["cuDNN"] / seconds, 0.75, at_least=True,
                    lengths=(32768,)),
        )
    ]  # fmt: skip


def streaming(s: Setting) -> list[Measurement]:
    """Sink and local keys; the same of FlexAttention."""
    q, k, v = s.operands()
    ours = _ours_streaming(s, q, k, v)
    flex = flex_streaming(s.length, s.sink, s.local, s.device)
    error = checked("streaming", ours(), flex(q, k, v).transpose(1, 2))
    seconds = device_seconds(ours, s.device)
    times = {"Flex": device_seconds(lambda: flex(q, k, v), s.device)}
    pairs = pairs_streaming(s.length, s.sink, s.local)
    return [
        Measurement(
            f"streaming {s.sink}+{s.local}", seconds, s.arithmetic_floor(pairs), times, error,
            **asked(s, "≥ 1.15 Flex", times["Flex"] / seconds, 1.15, at_least=True,
                    lengths=(32768, 131072)),
        )
    ]  # fmt: skip


def triangle(s: Setting) -> list[Measurement]:
    """Streaming with dense last queries, beside streaming."""
    q, k, v = s.operands()
    common = {"sink": s.sink, "local": s.local, "scale": s.scale}
    last = min(CONFIG.last, s.length)

    def ours():
        return ops.triangle_attention(q, k, v, last=last, **common)

    result = ours()
    full_rows = sdpa_last(q, k, v, last)
    error = checked("triangle, last queries", result[:, -last:], full_rows)
    plain = _ours_streaming(s, q, k, v)
    checked("triangle, other queries", result[:, :-last], plain()[:, :-last])
    seconds, base = (device_seconds(f, s.device) for f in (ours, plain))
    pairs = pairs_streaming(s.length - last, s.sink, s.local)
    pairs += pairs_full(s.length) - pairs_full(s.length - last)
    return [
        Measurement(
            f"triangle, last {last}", seconds, s.arithmetic_floor(pairs),
            {"streaming": base}, error,
            **asked(s, "≤ 1.10 streaming", seconds / base, 1.10, lengths=(131072,)),
        )
    ]  # fmt: skip


def sdpa_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, last: int) -> torch.Tensor:
    """Causal attention of the last queries, ``[B, last, H, D]``, one head at a time."""
    index = torch.arange(q.shape[2], device=q.device)
    seen = index <= index[-last:, None]
    out = q.new_empty(q.shape[0], last, *q.shape[1::2])
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        one = q[:, head : head + 1, -last:], *(x[:, head // group, None] for x in (k, v))
        out[:, :, head] = torch.nn.functional.scaled_dot_product_attention(*one, seen)[:, 0]
    return out


def block_sparse(s: Setting) -> list[Measurement]:
    """Random blocks of several densities, beside our dense kernel.

    What is asked is a share of the dense time beyond the scoring. Nothing is scored here, the mask
    is given; what a scoring's result costs before attention begins is turning it into lists, which
    a row of its own shows and the limit leaves out. Every time of a whole operator has it in.
    """
    q, k, v = s.operands()
    base = device_seconds(_ours_dense(s, q, k, v), s.device)
    blocks = -(-s.length // CONFIG.block)
    causal = torch.ones(blocks, blocks, dtype=torch.bool, device=s.device).tril()
    rows = []
    for wanted in DENSITIES:
        drawn = torch.rand(1, s.heads, blocks, blocks, device=s.device) < wanted
        mask = (drawn | torch.eye(blocks, dtype=torch.bool, device=s.device)) & causal
        density = (mask.sum() / (s.heads * causal.sum())).item()

        def ours(mask=mask):
            return ops.block_sparse_attention(q, k, v, mask, block=CONFIG.block, scale=s.scale)

        error = checked("block-sparse", ours()[:, -CONFIG.block :], last_block(s, q, k, v, mask))
        seconds = device_seconds(ours, s.device)
        lists = _listing_seconds(s, q, k, mask)
        rows.append(
            Measurement(
                f"block-sparse, density {density:.3f}", seconds,
                s.arithmetic_floor(density * pairs_full(s.length)), {"our dense": base}, error,
                **asked(
                    s, "≤ 1.25 density × dense + lists", (seconds - lists) / (density * base), 1.25
                ),
            )
        )  # fmt: skip
        if lists:
            rows.append(Measurement("  of it, its lists", lists, mask.nbytes / s.bytes))
    return rows


def _listing_seconds(s: Setting, q, k, mask: torch.Tensor) -> float:
    """Turning the mask into lists of blocks, a part of the operator; on a CPU there are none."""
    if s.device == "cpu":
        return 0.0
    from fluxcompile.kernels.block_sparse.triton import block_lists  # brings Triton

    options = {"block": CONFIG.block, "window": 0}
    return device_seconds(lambda: block_lists(q, k, mask, None, None, None, **options), s.device)


def last_block(s: Setting, q, k, v, mask: torch.Tensor) -> torch.Tensor:
    """What the last block of queries must give, ``[B, block, H, D]``, by its row of the mask."""
    last = min(CONFIG.block, s.length)
    index = torch.arange(s.length, device=s.device)
    causal = index <= index[-last:, None]
    out = q.new_empty(s.batch, last, s.heads, s.head_dim)
    for head in range(s.heads):
        rows = mask[0, head][index[-last:] // CONFIG.block][:, index // CONFIG.block] & causal
        one = q[:, head : head + 1, -last:]
        keys = (x[:, head * s.kv_heads // s.heads, None] for x in (k, v))
        out[:, :, head] = torch.nn.functional.scaled_dot_product_attention(one, *keys, rows)[:, 0]
    return out


def xattention(s: Setting) -> list[Measurement]:
    """Scoring and selection alone, beside cuDNN's dense attention."""
    q, k, v = s.operands()
    choice = {name: getattr(CONFIG, name) for name in ("stride", "threshold", "block")}

    def ours():
        return choose_blocks(q, k, scale=s.scale, **choice)

    chosen = ours()
    blocks = chosen.shape[-1]
    causal = torch.ones(blocks, blocks, dtype=torch.bool, device=s.device).tril()
    if (chosen & ~causal).any() or not chosen.diagonal(dim1=-2, dim2=-1).all():
        raise WrongResult("xattention: chosen blocks are not causal, or miss the diagonal")
    seconds = device_seconds(ours, s.device)
    dense_seconds = device_seconds(lambda: sdpa("cuDNN", q, k, v), s.device)
    # Each stride x stride tile of (query, key) pairs costs the products of its antidiagonal.
    floor = s.arithmetic_floor(pairs_full(s.length) / CONFIG.stride, products=1)
    return [
        Measurement(
            "XAttention choice", seconds, floor, {"cuDNN dense": dense_seconds},
            **asked(s, "≤ 0.08 cuDNN", seconds / dense_seconds, 0.08, lengths=(131072,)),
        )
    ]  # fmt: skip


def decode(s: Setting) -> list[Measurement]:
    """One token: every row sparse, every row dense, half of the rows each."""
    caches = _caches(s)
    window = min(s.length, s.sink + s.local)
    step = _DecodeStep(s, caches)
    sparse = step.seconds(None)
    windowed = [
        tuple(_sink_and_local(s, x) if i else x for i, x in enumerate(cache)) for cache in caches
    ]
    error = checked("decode", step.run(caches[0], None), sdpa_step(*windowed[0]))
    full = torch.ones(s.batch, dtype=torch.bool, device=s.device)
    dense_error = checked("dense decode", step.run(caches[0], full), sdpa_step(*caches[0]))
    dense_seconds = step.seconds(full)
    microseconds = {1: 12.0, 8: 20.0}.get(s.batch, float("inf"))
    dense_floor, long = s.traffic_floor(s.length), (131072,)

    def row(name: str, seconds: float, ours: list, theirs: list) -> Measurement:
        goal = asked(s, f"≤ {microseconds:.0f} µs", 1e6 * seconds, microseconds, lengths=long)
        peers = {"SDPA window": _rotated(sdpa_step, theirs, s.device)}
        if s.device == "cuda":
            peers["reading alone"] = _reading_seconds(s, ours, theirs)
        return Measurement(name, seconds, s.traffic_floor(window), peers, error, **goal)

    again = [caches[0]] * len(caches)
    rows = [
        row(f"decode {s.sink}+{s.local}", sparse, caches, windowed),
        # As a benchmark that repeats one call would have it: what fits comes from the L2 cache.
        row(
            "the same cache again", step.seconds(None, again), again, [windowed[0]] * len(caches)
        ),
        Measurement(
            "decode, dense", dense_seconds, dense_floor,
            {"SDPA": _rotated(sdpa_step, caches, s.device)}, dense_error,
            **asked(s, "≥ 0.85 copy", dense_floor / dense_seconds, 0.85, at_least=True,
                    lengths=long),
        ),
    ]  # fmt: skip
    if s.batch > 1:
        half = torch.arange(s.batch, device=s.device) % 2 == 0
        keys = (s.length + window) / 2
        mixed = step.seconds(half)
        rows.append(
            Measurement(
                "decode, half of it sparse", mixed, s.traffic_floor(keys),
                {"all dense": dense_seconds},
                **asked(s, "≤ 0.6 all dense", mixed / dense_seconds, 0.6, lengths=long),
            )
        )  # fmt: skip
    return rows


class _DecodeStep:
    """Our decode operator over several caches of one shape."""

    def __init__(self, s: Setting, caches: list[tuple[torch.Tensor, ...]]) -> None:
        self._s, self._caches = s, caches
        pattern = {"sink": s.sink, "local": s.local, "window": 0, "sparse": True, "queries": 1}
        self._bounds = decode_bounds(caches[0][1], None, None, **pattern)

    def run(self, cache: tuple[torch.Tensor, ...], route: torch.Tensor | None) -> torch.Tensor:
        return ops.decode_attention(*cache, self._bounds, None, route, scale=self._s.scale)

    def seconds(self, route: torch.Tensor | None, caches: list | None = None) -> float:
        caches = caches or self._caches
        return _rotated(lambda *cache: self.run(cache, route), caches, self._s.device)


def sdpa_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query a row over all of ``k``, ``[B, 1, H, D]``, by whichever kernel torch prefers."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, k, v, enable_gqa=True).transpose(1, 2)


def backward(s: Setting) -> list[Measurement]:
    """Gradients of streaming attention, the forward not counted; the same of FlexAttention."""
    operands = [x.requires_grad_() for x in s.operands()]
    ours = _ours_streaming(s, *operands)()
    name, peer = ("Flex", flex_streaming) if s.device == "cuda" else ("masked SDPA", masked_sdpa)
    theirs = peer(s.length, s.sink, s.local, s.device)(*operands).transpose(1, 2)
    grad = torch.randn_like(ours)

    def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, operands, grad, retain_graph=True)

    pairs = zip(gradients(ours), gradients(theirs), strict=True)
    error = max(checked("streaming backward", a, b) for a, b in pairs)
    seconds, peer_seconds = (
        typical_seconds(lambda out=out: gradients(out), s.device) for out in (ours, theirs)
    )
    # Five matrix products: the scores again, dv, dp, dq, dk.
    floor = s.arithmetic_floor(pairs_streaming(s.length, s.sink, s.local), products=5)
    return [
        Measurement(
            "streaming backward", seconds, floor, {name: peer_seconds}, error,
            **asked(s, "≥ 1 Flex", peer_seconds / seconds, 1.0, at_least=True),
        )
    ]  # fmt: skip


def _ours_dense(s: Setting, q, k, v) -> Callable[[], torch.Tensor]:
    route = torch.ones(s.batch, dtype=torch.bool, device=s.device)
    pattern = {"sink": s.sink, "local": s.local, "scale": s.scale}
    return lambda: ops.streaming_attention(q, k, v, route=route, **pattern)


def _ours_streaming(s: Setting, q, k, v) -> Callable[[], torch.Tensor]:
    pattern = {"sink": s.sink, "local": s.local, "scale": s.scale}
    return lambda: ops.streaming_attention(q, k, v, **pattern)


def _caches(s: Setting) -> list[tuple[torch.Tensor, ...]]:
    """Queries of one token and caches, enough of them that none stays in the L2 cache."""
    window = min(s.length, s.sink + s.local)
    size = s.traffic_floor(window) * s.bytes  # what a sparse step reads is the least
    count = 2 if s.device == "cpu" else max(2, min(64, round(ROTATION_BYTES / size)))
    whole = s.traffic_floor(s.length) * s.bytes
    return [s.operands(queries=1) for _ in range(min(count, max(2, int(40e9 / whole))))]


def _sink_and_local(s: Setting, x: torch.Tensor) -> torch.Tensor:
    if s.length <= s.sink + s.local:
        return x
    return torch.cat((x[:, :, : s.sink], x[:, :, -s.local :]), dim=2)


def _reading_seconds(s: Setting, caches: list, windows: list) -> float:
    """The fastest launch that only reads sink and local keys, where they lie in the caches."""
    from reading import is_whole, window_readers  # brings Triton

    times = []
    for reader in window_readers(s.sink, s.local):
        if not is_whole(reader(*caches[0]), *windows[0][1:]):
            raise WrongResult("reading: a launch does not read the window, or not all of it")
        times.append(_rotated(reader, caches, s.device))
    return min(times)


def _rotated(function: Callable, caches: list[tuple[torch.Tensor, ...]], device: str) -> float:
    synchronise(device)
    return replayed_seconds([lambda c=c: function(*c) for c in caches], device)


MEASURED: dict[str, Callable[[Setting], list[Measurement]]] = {
    "dense": dense,
    "streaming": streaming,
    "triangle": triangle,
    "block-sparse": block_sparse,
    "xattention": xattention,
    "decode": decode,
    "backward": backward,
}
