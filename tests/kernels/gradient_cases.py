"""Gradients of the prefill cases, and the bound that they must keep."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import cases

_STREAMING = {"sink": 8, "local": 40}
_SHIFTED = {"batch": 3, "route": (True, False, False), "queries": 130, "keys": 130, **_STREAMING}

# What the table of forward cases lacks: lengths off the blocks, and patterns that the backward's
# runs of queries could miss.
CASES = (
    *cases.PREFILL,
    cases.Case("streaming-130", 130, 130, **_STREAMING),
    cases.Case("wide-sink", sink=100, local=20),
    cases.Case("narrow-local-right", sink=5, local=3, padding="right", batch=3),
    *(cases.Case(f"window-shorter-{pad}", window=20, padding=pad, **_SHIFTED)
      for pad in ("left", "right", "both")),
)  # fmt: skip


def named(name: str) -> cases.Case:
    """The case of that name."""
    return next(c for c in CASES if c.name == name)


def grad_out(x: cases.Prefill) -> Tensor:
    """A random gradient of the output of ``x``, ``[B, Sq, H, D]``."""
    generator = torch.Generator().manual_seed(1)
    batch, heads, queries, head_dim = x.q.shape
    grad = torch.randn(batch, queries, heads, head_dim, generator=generator)
    return grad.to(x.q.dtype).to(x.q.device)


def gradients(x: cases.Prefill, run: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    """Gradients of q, k and v through ``run``, which computes the output of ``x``."""
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    try:
        with torch.enable_grad():
            out = run()
        return torch.autograd.grad(out, leaves, grad_out(x).to(out.dtype))
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


def assert_within_bound(x: cases.Prefill, found: tuple[Tensor, ...]) -> None:
    """``max |found - exact| <= 2 max |eager's - exact|`` for each gradient, plus a floor."""
    exact = gradients(x, lambda: x.reference(torch.float64))
    eager = gradients(x, lambda: x.reference(x.q.dtype))
    # The kernels' tanh is off by as many rounding errors of the cap as eager's is of its result.
    floor = 2 * cases.FLOOR if x.case.softcap else cases.FLOOR
    for name, a, b, c in zip("qkv", found, eager, exact, strict=True):
        cases.assert_error_within(f"{x.case.name}: d{name}", a, b, c, floor)
