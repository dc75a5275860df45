"""What a decode step under given routes has to say, from the eager model alone.

A sparse layer is one whose cache holds sink and local tokens only: with one query and no mask,
attention reads all there is. Rows may be routed differently, so they run one by one.
"""

import torch
from transformers import DynamicCache

from caches import Filling
from fluxcompile import FluxConfig
from fluxcompile.cache_argument import cache_argument


@torch.no_grad()
def reference_logits(
    filling: Filling, config: FluxConfig, full: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """fp32 logits ``[steps, B, V]`` after each of ``tokens`` ``[steps, B]``, one after the other.

    Args:
        filling: what is in the cache before.
        config: sink and local.
        full: bool ``[B, L]``, True for full attention.
    """
    rows = [
        _row(filling, config, full[row].tolist(), tokens[:, row], row)
        for row in range(filling.batch)
    ]
    return torch.stack(rows, dim=1)


def _row(
    filling: Filling, config: FluxConfig, full: list[bool], tokens: torch.Tensor, row: int
) -> torch.Tensor:
    model, sink = filling.model, config.sink
    past = sink + config.local - 1  # of a sparse layer, which then adds the query's own token
    cache = DynamicCache(config=model.config)
    for index in range(len(cache.layers)):
        held = (made[row : row + 1] for made in filling.layer(index))
        cache.update(*(kv if full[index] else _latest(kv, sink, past) for kv in held), index)
    cached = {cache_argument(model): cache}
    logits = []
    for step, token in enumerate(tokens):
        place = torch.tensor([[filling.tokens + step]], device=model.device)
        output = model(input_ids=token[None, None], position_ids=place, use_cache=True, **cached)
        logits.append(output.logits[0, -1].float())
        for layer, reads_all in zip(cache.layers, full, strict=True):
            if not reads_all:
                layer.keys, layer.values = (
                    _latest(kv, sink, past) for kv in (layer.keys, layer.values)
                )
    return torch.stack(logits)


def _latest(kv: torch.Tensor, sink: int, tokens: int) -> torch.Tensor:
    """The first ``sink`` and the latest of ``kv`` ``[1, HK, T, D]``, ``tokens`` together."""
    if kv.shape[2] <= tokens:
        return kv
    return torch.cat((kv[:, :, :sink], kv[:, :, kv.shape[2] - (tokens - sink) :]), dim=2)
