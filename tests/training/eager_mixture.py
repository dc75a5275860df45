"""The mixture that training differentiates, written out in eager mode (arXiv 2604.07394).

In layer ``l``, row ``b``:

``r = softmax((router_l(pooled query) + noise[b, l]) / temperature)[1]``
``attention = w * full + (1 - w) * sparse``, with ``w = r`` where nothing is hardened

The pooled query is the layer's query before rotary embedding, as ``tests.router_features`` defines
what a router reads. Full and sparse attention are the
kernels' eager definitions. Nothing of the compiler is used: it is HF's own model with one attention
function, registered through transformers' interfaces, and hooks that keep the query.

Sparse attention is what inference has: a row's prompt in one call, whose last queries triangle
attention leaves dense, then its answer, decoded token by token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fluxcompile.kernels.streaming import reference as streaming
from fluxcompile.router import FluxRouter
from tests.router_features import features

NAME = "flux_eager_mixture"


@dataclass
class Mixture:
    """One forward's settings, and the shares ``[B]`` that it leaves by layer.

    ``locked``: rows take full attention where the router's argmax says so, sparse elsewhere.
    """

    router: FluxRouter
    temperature: float = 1.0
    noise: torch.Tensor | None = None
    prompt_length: torch.Tensor | None = None
    locked: bool = False
    hardness: float = 0.0
    columns: dict[int, torch.Tensor] = field(default_factory=dict)

    def shares(self) -> torch.Tensor:
        return torch.stack([self.columns[layer] for layer in sorted(self.columns)], dim=1)

    def share(self, layer: int, query: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """``r`` of each row, from the query ``[B, S, H, D]`` and token validity ``[B, S]``."""
        rows = range(len(query))
        prompts = [None] * len(query) if self.prompt_length is None else self.prompt_length.tolist()
        config = self.router.config
        read = [features(query[i], valid[i].tolist(), config, prompts[i]) for i in rows]
        logits = self.router.layers[layer](torch.stack(read))
        if self.locked:
            return (logits[:, 1] > logits[:, 0]).float()
        noise = 0.0 if self.noise is None else self.noise[:, layer]
        return ((logits + noise) / self.temperature).softmax(-1)[:, 1]

    def dense(self, valid: torch.Tensor) -> torch.Tensor:
        """Queries that see everything in a sparse layer too, bool ``[B, S]``."""
        config, dense = self.router.config, torch.zeros_like(valid)
        for row, tokens in enumerate(valid):
            places = tokens.nonzero()[:, 0].tolist()
            asked = None if self.prompt_length is None else int(self.prompt_length[row])
            prompt, answer = places[:asked], places[len(places[:asked]) :]
            if config.sparse == "triangle":
                dense[row, prompt[-config.last :]] = True
            if config.decode == "dense":
                dense[row, answer] = True
        return dense


@contextlib.contextmanager
def eager_mixture(model: PreTrainedModel, mixture: Mixture) -> Iterator[Mixture]:
    """Inside, ``model.forward`` computes the mixture."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    hooks = [
        getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj).register_forward_hook(
            lambda _module, _inputs, out, attention=layer.self_attn: _queries.update(
                {attention: out}
            )
        )
        for layer in model.get_decoder().layers
    ]
    _active.append(mixture)
    try:
        yield mixture
    finally:
        _active.pop()
        _queries.clear()
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


_active: list[Mixture] = []
_queries: dict[torch.nn.Module, torch.Tensor] = {}


def _mask(
    batch_size: int, q_length: int, attention_mask: torch.Tensor | None = None, **_: object
) -> torch.Tensor:
    """Token validity, bool ``[B, S]``: nothing is decided before the attention itself."""
    if attention_mask is None:
        return torch.ones(batch_size, q_length, dtype=torch.bool)
    return attention_mask.bool()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    mixture, valid = _active[-1], attention_mask.to(query.device)
    config, layer = mixture.router.config, module.layer_idx
    batch, _heads, length, head_dim = query.shape
    # Padding, too: keys that are no tokens have no influence whatever they hold.
    common = {"window": sliding_window or 0, "scale": scaling, "dtype": query.dtype}
    full = streaming.attention(query, key, value, valid, **common)
    sparse = streaming.attention(
        query, key, value, valid, sink=config.sink, local=config.local, **common
    )
    sparse = torch.where(mixture.dense(valid)[:, :, None, None], full, sparse)
    before_rotary = _queries[module].reshape(batch, length, -1, head_dim)
    share = mixture.share(layer, before_rotary, valid)
    mixture.columns[layer] = share
    # Straight through: the value of a step, the slope of the share.
    step = torch.where(share > 0.5, 1.0, 0.0)
    weight = mixture.hardness * (step + share - share.detach()) + (1 - mixture.hardness) * share
    weight = weight[:, None, None, None]
    return (weight * full + (1 - weight) * sparse).to(query.dtype), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
