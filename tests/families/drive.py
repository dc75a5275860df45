"""Feed a family's model tokens in several calls; what a router reads and decides of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fluxcompile.config import FluxConfig
from fluxcompile.router import FluxRouter
from tests.families.family import LAYERS, Family
from tests.parity.models import Prompt, random_router
from tests.parity.reference import RoutedDefinition
from tests.router_features import features

#: a call closer to a tie than this may be decided either way by rounding
MARGIN = 1e-3


@torch.no_grad()
def in_steps(
    family: Family, model: nn.Module, tokens: Prompt, steps: Sequence[int], static: bool = False
) -> torch.Tensor:
    """Logits ``[B, S, V]`` of calls of ``steps`` tokens on one cache."""
    cache = family.cache(model, static) if family.has_cache else None
    logits, start = [], 0
    for length in steps:
        now = slice(start, start + length)
        inputs = (
            tokens.ids[:, now],
            tokens.valid[:, : now.stop],
            tokens.positions[:, now],
            cache,
        )
        logits.append(_logits(family, model, *inputs))
        start = now.stop
    return torch.cat(logits, dim=1)


@torch.no_grad()
def defined(
    family: Family, model: nn.Module, definition: RoutedDefinition, tokens: Prompt
) -> torch.Tensor:
    """The reference's logits ``[B, S, V]``, all tokens at once and without a cache."""
    with family.defined(model, definition):
        return _logits(family, model, tokens.ids, tokens.valid, tokens.positions, None)


def _logits(family: Family, model: nn.Module, *inputs: Any) -> torch.Tensor:
    args, kwargs = family.inputs(*inputs)
    out = model(*args, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.logits


def router_options(family: Family) -> dict[str, Any]:
    """What ``FluxRouter.from_model`` has to be told."""
    return {"layers": family.layers, "head_dim": 16} if family.layers else {}


def make_router(family: Family, model: nn.Module, config: FluxConfig, seed: int) -> FluxRouter:
    """Random weights, large enough that rows of one batch decide differently."""
    return random_router(model, config, seed, **router_options(family))


def mixed_router(
    family: Family, twin: nn.Module, config: FluxConfig, prompt: Prompt
) -> tuple[int, torch.Tensor]:
    """A seed whose router decides for both routes, without near ties; and what it decides."""
    for seed in range(40):
        router = make_router(family, twin, config, seed)
        full, margin = decide(family, twin, router, prompt)
        mixed = any(0 < int(column.sum()) < full.shape[0] for column in full.T)
        if mixed and margin > MARGIN:
            return seed, full
    raise AssertionError("expected a random router that tells the rows apart, found none")


def decide(
    family: Family, model: nn.Module, router: FluxRouter, prompt: Prompt
) -> tuple[torch.Tensor, float]:
    """bool ``[B, layers]``, True for full attention, and the closest call.

    A layer's query depends on the routes of the layers before it.
    """
    full, closest = torch.ones(prompt.ids.shape[0], LAYERS, dtype=torch.bool), float("inf")
    for layer, name in enumerate(router.layer_names):
        definition = RoutedDefinition(full, router.config.sink, router.config.local)
        query = _query(family, model, name, definition, prompt)
        for row in range(full.shape[0]):
            read = features(query[row], prompt.valid[row].tolist(), router.config)
            with torch.no_grad():
                sparse_logit, full_logit = router.layers[layer](read[None])[0].tolist()
            full[row, layer] = full_logit > sparse_logit
            closest = min(closest, abs(full_logit - sparse_logit))
    return full, closest


def _query(
    family: Family, model: nn.Module, layer: str, definition: RoutedDefinition, prompt: Prompt
) -> torch.Tensor:
    """``[B, S, H, D]`` before rotary embedding, as the family says where to find it."""
    seen: list[Any] = []
    module = model.get_submodule(f"{layer}.{family.query}")
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        defined(family, model, definition, prompt)
    finally:
        hook.remove()
    return family.read(seen[0])
