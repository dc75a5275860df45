"""What a router decides for a prompt, computed apart from the compiled graph.

The query is read with forward hooks in an eager run of the routed definition, layer after layer
(a layer's query depends on what the layers before it were routed to), pooled token by token in
plain Python, and given to the router's own modules.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from fluxcompile.router import FluxRouter
from tests.parity.models import Prompt
from tests.parity.reference import RoutedDefinition, routed_logits
from tests.router_features import features


def decide(
    model: PreTrainedModel, router: FluxRouter, prompt: Prompt, positions: bool = True
) -> torch.Tensor:
    """bool ``[B, layers]``, True for full attention."""
    batch, layers = prompt.ids.shape[0], len(router.layers)
    full = torch.ones(batch, layers, dtype=torch.bool)
    for layer in range(layers):
        query = _query_before_rotary(model, layer, full, router, prompt, positions)
        for row in range(batch):
            pooled = features(query[row], prompt.valid[row].tolist(), router.config)
            with torch.no_grad():
                sparse_logit, full_logit = router.layers[layer](pooled[None])[0].tolist()
            full[row, layer] = full_logit > sparse_logit
    return full


def margins(model: PreTrainedModel, router: FluxRouter, prompt: Prompt) -> float:
    """The closest call among all rows and layers: how far the two logits are apart."""
    full = decide(model, router, prompt)
    closest = float("inf")
    for layer in range(len(router.layers)):
        query = _query_before_rotary(model, layer, full, router, prompt, True)
        for row in range(full.shape[0]):
            pooled = features(query[row], prompt.valid[row].tolist(), router.config)
            with torch.no_grad():
                sparse_logit, full_logit = router.layers[layer](pooled[None])[0].tolist()
            closest = min(closest, abs(full_logit - sparse_logit))
    return closest


def _query_before_rotary(
    model: PreTrainedModel,
    layer: int,
    full: torch.Tensor,
    router: FluxRouter,
    prompt: Prompt,
    positions: bool,
) -> torch.Tensor:
    """``[B, S, H, D]`` of one layer, after q_norm where there is one."""
    attention = model.get_submodule(router.layer_names[layer])
    source: nn.Module = getattr(attention, "q_norm", None) or attention.q_proj
    seen: list[torch.Tensor] = []
    hook = source.register_forward_hook(lambda _module, _args, output: seen.append(output))
    definition = RoutedDefinition(full, router.config.sink, router.config.local)
    inputs = {"position_ids": prompt.positions} if positions else {}
    try:
        routed_logits(
            model, definition, prompt.ids, attention_mask=prompt.valid, use_cache=False, **inputs
        )
    finally:
        hook.remove()
    return seen[0].unflatten(-1, (-1, router.head_dim)) if seen[0].dim() == 3 else seen[0]
