"""A small model, routers that differ from row to row, and prompts of uneven lengths."""

import torch

from fluxcompile.config import FluxConfig
from fluxcompile.evaluation.prompts import Prompt
from fluxcompile.router import FluxRouter
from tests.router_models import tiny_llama

CONFIG = FluxConfig(sink=4, local=16, pool_size=8)
LAYERS = 3


def model(**overrides):
    """Three layers whose attention is peaked: a key left out shows in the loss."""
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=LAYERS, initializer_range=0.2, **overrides)


def divided_router(llama, prompts, config: FluxConfig = CONFIG) -> FluxRouter:
    """Random weights, each layer's bias moved to where about half of ``prompts`` are full."""
    torch.manual_seed(1)
    router = FluxRouter.from_model(llama, config).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for layer, logits in zip(router.layers, _logits(llama, router, prompts), strict=True):
            ordered = logits.diff(dim=1).flatten().sort().values
            layer.head[-1].bias[1] -= ordered[len(ordered) // 2 - 1 :][:2].mean()
    return router


def prompts(count: int, shortest: int = 70, targets: int = 9, seed: int = 0) -> list[Prompt]:
    """Random tokens; lengths of prompts and targets differ by row."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> tuple[int, ...]:
        # Each row has a part of the vocabulary to itself, so that routers can tell rows apart.
        first = int(torch.randint(3, 40, (), generator=generator))
        return tuple(torch.randint(first, first + 20, (n,), generator=generator).tolist())

    return [Prompt(tokens(shortest + 3 * i), tokens(targets - i % 3)) for i in range(count)]


@torch.no_grad()
def _logits(llama, router, prompts) -> list[torch.Tensor]:
    """Each layer's logits ``[rows, 2]`` under full attention; q_proj is the query, unrotated."""
    found: list[list[torch.Tensor]] = [[] for _ in router.layers]

    def reads(i_layer):
        def hook(module, args, query):
            ends = torch.cat([query[:, :8], query[:, -8:]], dim=1)
            pooled = ends.unflatten(2, (-1, router.head_dim)).mean(dim=(1, 2))
            found[i_layer].append(router.layers[i_layer](pooled))

        return hook

    hooks = [
        layer.self_attn.q_proj.register_forward_hook(reads(i))
        for i, layer in enumerate(llama.model.layers)
    ]
    for prompt in prompts:
        llama(torch.tensor([prompt.prompt]))
    for hook in hooks:
        hook.remove()
    return [torch.cat(rows) for rows in found]
