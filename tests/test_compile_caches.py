"""Inductor's caches on disk: hit by the same operators, never by others."""

import pytest
import torch
from torch._dynamo.utils import counters

from fluxcompile import lowering


def _misses(monkeypatch: pytest.MonkeyPatch, version: str) -> int:
    """Compile one graph of ours with the operators at ``version``."""
    monkeypatch.setattr(lowering, "kernels_version", lambda: version)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda x: torch.ops.flux.mask_bounds.default(x)[0] + 1, backend="flux")
    assert compiled(torch.ones(2, 5, dtype=torch.bool)).tolist() == [[1, 6], [1, 6]]
    return counters["inductor"]["fxgraph_cache_miss"]


@pytest.mark.filterwarnings("ignore::fluxcompile.FluxWarning")
def test_other_operators_miss(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert _misses(monkeypatch, "one") == 1
    assert _misses(monkeypatch, "one") == 0
    assert _misses(monkeypatch, "two") == 1


def test_version_is_a_hash():
    assert int(lowering.kernels_version(), 16) > 0
