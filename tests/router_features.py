"""What a router reads of one row, token by token in plain Python: what tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluxcompile.config import FluxConfig


def features(
    query: torch.Tensor, valid: Sequence[int], config: FluxConfig, prompt_length: int | None = None
) -> torch.Tensor:
    """fp32 ``[F]`` of one row.

    Args:
        query: ``[S, H, D]``, before rotary embedding.
        valid: of each token, whether it is one.
        config: says what the router reads.
        prompt_length: how many of the valid tokens are the prompt; None for all.
    """
    tokens = [token for token, is_valid in enumerate(valid) if is_valid]
    if prompt_length is not None:
        tokens = tokens[:prompt_length]
    prefix = config.pool_size if config.prefix_size is None else config.prefix_size
    suffix = config.pool_size if config.suffix_size is None else config.suffix_size
    beginning, end = tokens[:prefix], tokens[max(len(tokens) - suffix, 0) :]
    if config.segments == "joint":
        spans = [sorted({*beginning, *end})]
    else:
        spans = [span for size, span in ((prefix, beginning), (suffix, end)) if size]
    found = []
    for span in spans:
        mean = torch.zeros(query.shape[1:], device=query.device)
        for token in span:
            mean = mean + query[token].float() / len(span)
        found.append(mean.reshape(-1) if config.heads == "each" else mean.mean(dim=0))
    return torch.cat(found)
