"""Which layers are sparse: fixed patterns, and routers made to decide as they say."""

import torch
from transformers import PreTrainedModel

import fluxcompile
from fluxcompile import FluxConfig, FluxRouter

FORCED = 9.0  # logits of a decision that nothing a router reads can change
FITTED = 4.0  # logits that a fitted router gives for the rows it was fitted to


class WrongRoutes(Exception):
    """A router decided otherwise than it was made to: what it would be timed for is not run."""


def spread_dense(layers: int, omega: float) -> list[int]:
    """A 0/1 pattern with ``omega`` of the layers sparse (0), the dense ones evenly spread."""
    dense = layers - round(omega * layers)
    return [(i + 1) * dense // layers - i * dense // layers for i in range(layers)]


def rows_alike(layers: int, omega: float, batch: int) -> torch.Tensor:
    """bool ``[B, L]``, True for full attention: every row takes `spread_dense`."""
    return torch.tensor([spread_dense(layers, omega)] * batch, dtype=torch.bool)


def rows_mixed(layers: int, omega: float, batch: int) -> torch.Tensor:
    """bool ``[B, L]``: every row is `spread_dense`, turned by as many layers as its number.

    So no two neighbours agree, and no layer is the same in every row while 0 < Ω < 1.
    """
    pattern = torch.tensor(spread_dense(layers, omega), dtype=torch.bool)
    return torch.stack([pattern.roll(row) for row in range(batch)])


@torch.no_grad()
def router_for(
    model: PreTrainedModel, config: FluxConfig, full: torch.Tensor, prompt: torch.Tensor
) -> FluxRouter:
    """A router that decides ``full`` ``[B, L]`` for ``prompt`` ``[B, S]``.

    Its weights are random; the last layer's say what is wanted: the bias where rows agree, and
    otherwise weights fitted to what the rows' queries become in it. (The prompt must be short
    enough for sparse attention to be full attention: queries are those of the eager model.)
    """
    generator = torch.Generator().manual_seed(0)
    router = FluxRouter.from_model(model, config)
    for layer in router.layers:
        for parameter in layer.parameters():
            spread = 1.0 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.0
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        layer.head[-1].weight.zero_()
    router.to(model.device)
    alike = (full == full[:1]).all(0).tolist()
    queries = None if all(alike) else mean_queries(model, config, prompt)
    for index, layer in enumerate(router.layers):
        last = layer.head[-1]
        if alike[index]:
            last.bias.copy_(FORCED * torch.tensor([not full[0, index], full[0, index]]).float())
            continue
        seen = layer.head[:-1](layer.encoder(queries[index]))  # [B, D]
        wanted = torch.where(full[:, index].to(seen.device), FITTED, -FITTED).float()
        centre, level = seen.mean(0), wanted.mean()
        spread = torch.linalg.pinv((seen - centre).double(), rtol=1e-5).float()
        last.weight[1] = spread @ (wanted - level)
        last.bias[1] = level - (last.weight[1] * centre).sum()
    return router


@torch.no_grad()
def mean_queries(
    model: PreTrainedModel, config: FluxConfig, prompt: torch.Tensor
) -> list[torch.Tensor]:
    """What each layer's router reads of ``prompt``: fp32 ``[B, D]``."""
    pooling = config.pooling
    length, head_dim = prompt.shape[1], model.config.head_dim
    ends = range(min(pooling.prefix, length)), range(max(length - pooling.suffix, 0), length)
    read = sorted({token for end in ends for token in end})
    found: list[torch.Tensor] = []

    def keep(_module, _inputs, query: torch.Tensor) -> None:
        query = query.reshape(*prompt.shape, -1, head_dim)
        found.append(query[:, read].float().mean((1, 2)))

    layers = model.model.layers
    taps = [getattr(x.self_attn, "q_norm", x.self_attn.q_proj) for x in layers]
    hooks = [tap.register_forward_hook(keep) for tap in taps]
    try:
        model.model(input_ids=prompt, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def check_routes(model: PreTrainedModel, full: torch.Tensor) -> None:
    """Raises `WrongRoutes` unless the last prompt was routed as ``full`` ``[B, L]`` says."""
    decided = fluxcompile.routes(model)
    if decided is None or not torch.equal(decided.fa.cpu(), full.cpu()):
        expected = fluxcompile.Routes(full, ("",) * full.shape[1])
        raise WrongRoutes(f"expected these routes:\n{expected}\ngot:\n{decided}")
