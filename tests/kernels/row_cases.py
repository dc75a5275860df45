"""Operands of ``flux::project_rows`` and the error bound of its result."""

from dataclasses import dataclass, replace

import torch

from fluxcompile.kernels.project_rows.op import definition


@dataclass(frozen=True)
class Case:
    """Columns, rows of each matrix, what happens around the product, and tokens."""

    inputs: int
    rows: tuple[int, ...]
    bias: bool = False
    norm: bool = False
    added: bool = False
    gated: bool = False
    tokens: int = 1

    def __str__(self) -> str:
        flags = [name for name in ("bias", "norm", "added", "gated") if getattr(self, name)]
        tokens = f"{self.tokens}x{self.inputs}"
        return "-".join([tokens, *map(str, self.rows), *flags])


SMALL = (
    Case(16, (5,)),
    Case(48, (3, 2), bias=True),
    Case(24, (1, 2, 3), norm=True),
    Case(24, (7, 2, 3), bias=True, norm=True),
    Case(16, (6,), added=True),
    Case(24, (5, 5), gated=True),
    Case(24, (5, 5), bias=True, norm=True, added=True, gated=True),
)
FEW = tuple(
    replace(case, tokens=tokens) for case, tokens in zip(SMALL, (2, 16, 3, 5, 7, 8, 9), strict=True)
)
LARGE = (
    Case(4096, (4096, 1024, 1024), norm=True),
    Case(4096, (4096,), added=True),
    Case(4096, (14336, 14336), norm=True, gated=True),
    Case(14336, (4096,), added=True),
    Case(576, (576, 192, 192), norm=True),
    Case(1536, (576,), added=True),
    Case(12288, (4099, 3), bias=True, norm=True),
    Case(5000, (333,), bias=True, added=True),
    Case(8192, (77, 77), bias=True, gated=True, norm=True),
)
LARGE_FEW = tuple(
    replace(case, tokens=tokens)
    for case, tokens in zip(LARGE, (8, 8, 8, 8, 2, 16, 3, 5, 4), strict=True)
)


def operands(case: Case, dtype=torch.float32, device="cpu"):
    """Arguments of the operator."""
    torch.manual_seed(case.inputs)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    weights = [random(n, case.inputs, scale=case.inputs**-0.5) for n in case.rows]
    return (
        random(case.tokens, 1, case.inputs, scale=3.0),
        weights,
        [random(n) for n in case.rows] if case.bias else [],
        1 + random(case.inputs, scale=0.2) if case.norm else None,
        1e-5,
        random(case.tokens, 1, case.rows[0]) if case.added else None,
        case.gated,
    )


def check(implementation, x) -> None:
    """No further from the definition in fp64 than twice the definition in x's dtype."""

    def double(operand):
        if isinstance(operand, torch.Tensor):
            return operand.double()
        return [w.double() for w in operand] if isinstance(operand, list) else operand

    expected = definition(*map(double, x))
    got = implementation(*x)
    assert got.dtype == x[0].dtype
    assert got.shape == expected.shape
    allowed = 2 * (definition(*x).double() - expected).abs().max()
    resolution = torch.finfo(got.dtype).eps * expected.abs().max()
    if got.dtype == torch.float32:
        resolution *= 8  # sums in another order
    assert (got.double() - expected).abs().max() <= torch.maximum(allowed, resolution)
