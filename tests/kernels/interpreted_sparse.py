"""The sparse prefills' Triton kernels through Triton's interpreter; see interpreted.py."""

from dataclasses import replace

import pytest
import torch

from fluxcompile.kernels.streaming.triton import Config

from . import cases, sparse_cases, sparse_checks
from .interpreted import small

TILES = Config(16, 16, 4, 1)


def shrunk(mode: str) -> list[sparse_cases.SparseCase]:
    """The mode's cases that kernels serve, as small as :func:`interpreted.small` makes them."""
    situations = [c for c in sparse_cases.named(mode) if c.padding != "holes"]
    return [replace(small(c), block=16) for c in situations]


@pytest.mark.parametrize("case", shrunk("triangle"), ids=cases.name)
def test_triangle(case):
    sparse_checks.check(case, torch.float32, "cpu", TILES)
