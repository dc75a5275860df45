"""A recording backend, and small hand-written attentions for it to record.

``record`` traces one call and keeps the graph; ``Recorded.rewrite`` runs the passes on a copy, so
that one trace serves many tests. ``Recorded.check`` runs the graph before and after on the traced
inputs: whatever a pass claims, the numbers must agree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

import fluxcompile.kernels.ops  # noqa: F401  registers torch.ops.flux
from fluxcompile.config import FluxConfig
from fluxcompile.graph_copy import copy_graph
from fluxcompile.layer_router import LayerRouter
from fluxcompile.passes.graph_util import op_name
from fluxcompile.passes.pipeline import Rewrite, analyse, rewrite
from fluxcompile.passes.plan import Policy, RoutingPlan
from fluxcompile.passes.site import AttentionSite

SDPA = "scaled_dot_product_attention"
#: reach so small that every test's prompt outgrows it
CONFIG = FluxConfig(sink=2, local=4, pool_size=3)


def op_counts(gm: fx.GraphModule) -> Counter[str]:
    """How often each operation stands in a graph, by plain name."""
    return Counter(op_name(node) for node in gm.graph.nodes if node.op.startswith("call"))


@dataclass
class Recorded:
    """One traced graph. ``inputs`` are those it was traced with."""

    gm: fx.GraphModule
    inputs: list[Any]
    before: Counter[str] = field(default_factory=Counter)

    def analyse(self) -> Rewrite:
        return analyse(copy_graph(self.gm), self.inputs)

    def sites(self) -> list[AttentionSite]:
        return self.analyse().sites

    def site(self) -> AttentionSite:
        (site,) = self.sites()
        return site

    def rewrite(self, policy: Policy = Policy.FULL, config: FluxConfig = CONFIG) -> Rewrite:
        """The rewritten copy; a routed one gets an untrained router (full attention) a layer."""
        result = self.analyse()
        layers = [site.layer for site in result.sites if site.layer is not None]
        routers = {}
        if policy is Policy.ROUTER:
            dims = {s.layer: s.q_shape[3] for s in result.sites if s.layer is not None}
            routers = {layer: LayerRouter(int(dims[layer])) for layer in layers}
        policies = dict.fromkeys(layers, policy)
        return rewrite(result, RoutingPlan(config, policies, routers, retrieval=config.retrieval))

    def run(self, gm: fx.GraphModule | None = None) -> list[torch.Tensor]:
        """Outputs on the traced inputs, cloned first where the graph may write to them."""
        inputs = [_fresh(x) for x in self.inputs]
        with torch.no_grad():
            return [x for x in (gm or self.gm)(*inputs) if isinstance(x, torch.Tensor)]

    def check(self, result: Rewrite) -> None:
        """The rewritten graph computes what the traced one does."""
        for got, expected in zip(self.run(result.gm), self.run(), strict=True):
            assert got.dtype == expected.dtype
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def _fresh(value: Any) -> Any:
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value.node.hint
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        return value.clone()
    return value


def record(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = False, **kwargs: Any
) -> Recorded:
    """Trace ``model(*args, **kwargs)`` without gradients into exactly one graph."""
    graphs = record_all(model, [args], dynamic=dynamic, **kwargs)
    assert len(graphs) == 1, f"expected one graph, got {len(graphs)}"
    return graphs[0]


def record_all(
    model: Callable[..., Any], calls: list[tuple], dynamic: bool | None = None, **kwargs: Any
) -> list[Recorded]:
    """Trace several calls; one entry a compilation."""
    graphs: list[Recorded] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kept = [x if isinstance(x, torch.SymInt) else _fresh(x) for x in inputs]
        graphs.append(Recorded(gm, kept, op_counts(gm)))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for args in calls:
            compiled(*args, **kwargs)
    return graphs


def eager_softmax(q, k, v, mask=None, scale=None):
    """Attention written out, as Hugging Face's eager implementation has it."""
    scores = torch.matmul(q, k.transpose(2, 3)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores + mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def causal_sdpa(q, k, v, **kwargs):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, **kwargs)


class Layer(nn.Module):
    """Projections, heads and an output projection around ``attend(q, k, v, *rest)``."""

    def __init__(
        self,
        attend: Callable[..., torch.Tensor] = causal_sdpa,
        heads: int = 4,
        kv_heads: int = 4,
        head_dim: int = 8,
        rotary: Callable[..., torch.Tensor] | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.shape, self.head_dim = (heads, kv_heads, head_dim), head_dim
        self.attend, self.rotary, self.norm = attend, rotary, norm
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, dim = self.shape
        batch, length = x.shape[:2]
        q = self.q_proj(x).view(batch, length, heads, dim)
        if self.norm is not None:
            q = self.norm(q)
        q = q.transpose(1, 2)
        k = self.k_proj(x).view(batch, length, kv_heads, dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, kv_heads, dim).transpose(1, 2)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        out = self.attend(q, k, v, *rest)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, heads * dim))


class Stack(nn.Module):
    """Layers at the paths that routers of Hugging Face models name, and nothing else to trace."""

    def __init__(self, layers: int = 2, **layer: Any) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for block in self.model.layers:
            block.self_attn = Layer(**layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.model.layers:
            x = x + block.self_attn(x)
        return x


def hidden(batch: int = 2, length: int = 10, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, length, width)


def qkv(batch: int = 2, heads: int = 4, length: int = 10, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, dim) for _ in range(3)]
