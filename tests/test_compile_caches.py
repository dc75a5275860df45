"""Inductor's caches on disk: hit by the same operators, never by others."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

import fluxcompile
from fluxcompile import lowering
from tests.test_owner import llama, routed, router_for


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


def _routed(letters: str, regional: bool, **fields) -> tuple[str, dict[str, int]]:
    """The routes of a prompt, and how AOTAutograd's cache fared, as in a process of its own."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = llama(None)
    router = router_for(model, letters)
    config = dataclasses.replace(router.config, **fields)
    fluxcompile.compile(model, router, regional=regional, config=config)
    found = routed(model, torch.arange(40)[None], use_cache=False)
    return found, {k: n for k, n in counters["aot_autograd"].items() if k.startswith("autograd")}


@pytest.mark.parametrize(
    "regional",
    [
        pytest.param(False, id="whole"),
        pytest.param(True, id="regional", marks=pytest.mark.slow),
    ],
)
def test_guarded_branches_hit_in_every_cache(monkeypatch, tmp_path, regional):
    """Other routers hit too, with routes of their own; what only a branch holds must miss."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    missed = {"autograd_cache_miss": 1, "autograd_cache_saved": 1}
    cases = [
        ("SF", {}, missed),
        ("SF", {}, {"autograd_cache_hit": 1}),
        ("FS", {}, {"autograd_cache_hit": 1}),
        ("SS", {"sink": 5}, missed),
        ("SS", {"prefix_size": 4}, missed),
        ("SS", {"sparse": "triangle", "last": 4}, missed),
        ("SS", {"sparse": "triangle", "last": 5}, missed),
    ]
    for letters, fields, fared in cases:
        assert _routed(letters, regional, **fields) == (letters, fared)
