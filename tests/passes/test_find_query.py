"""The query before rotary embedding, found by dataflow in models of many habits."""

import pytest
import torch
from torch import nn

from fluxcompile.passes.graph_util import op_name
from fluxcompile.passes.plan import Policy
from fluxcompile.passes.site import SkipReason
from tests.router_models import tiny_llama

from .graphs import Layer, causal_sdpa, hidden, record

LENGTH, HEADS, DIM = 10, 4, 8


def angles(q, length_axis=2):
    """``[S, D / 2]``, made of positions alone."""
    place = torch.arange(q.shape[length_axis], dtype=torch.float32)
    return place[:, None] * torch.arange(1.0, q.shape[-1] // 2 + 1)[None]


def half_split(q):
    angle = torch.cat((angles(q), angles(q)), -1)
    middle = q.shape[-1] // 2
    turned = torch.cat((-q[..., middle:], q[..., :middle]), -1)
    return q * angle.cos() + turned * angle.sin()


def interleaved(q):
    cos, sin = angles(q).cos(), angles(q).sin()
    even, odd = q[..., ::2], q[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def as_complex(q):
    turned = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
    turned = turned * torch.polar(torch.ones_like(angles(q)), angles(q))
    return torch.view_as_real(turned).flatten(3).type_as(q)


def as_complex_cast(q):
    turned = torch.view_as_complex(q.float().unflatten(-1, (-1, 2)))
    turned = turned * torch.polar(torch.ones_like(angles(q)), angles(q))
    return torch.view_as_real(turned).flatten(3).to(torch.float32)


def chunked(q):
    left, right = q.chunk(2, dim=-1)
    cos, sin = angles(q).cos(), angles(q).sin()
    return torch.cat((left * cos - right * sin, left * sin + right * cos), -1)


def unbound(q):
    even, odd = q.view(*q.shape[:-1], -1, 2).unbind(-1)
    cos, sin = angles(q).cos(), angles(q).sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(3)


def partial(q):
    return torch.cat((half_split(q[..., :4]), q[..., 4:]), -1)


def scaled(q):
    return half_split(q) * 0.5


def upcast(q):
    return half_split(q.float()).to(q.dtype)


def by_matrix(q):
    turn = torch.diag_embed(angles(q).repeat(1, 2).cos())
    return (q[..., None, :] @ turn)[..., 0, :]


def temperature(q):
    """Llama 4: queries are scaled by their position after rotation."""
    return half_split(q) * (1 + torch.arange(q.shape[2])).log()[:, None]


class RMSNorm(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(*shape))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


ROTARIES = {
    f.__name__: f
    for f in (
        half_split,
        interleaved,
        as_complex,
        as_complex_cast,
        chunked,
        unbound,
        partial,
        scaled,
        upcast,
        by_matrix,
        temperature,
    )
}


def query_of(model, x):
    """What the router should read: the layer's query before rotation, ``[B, H, S, D]``."""
    query = model.q_proj(x).view(*x.shape[:2], HEADS, DIM)
    return (query if model.norm is None else model.norm(query)).transpose(1, 2)


def tapped(recorded):
    """The value at the tap, permuted as the pass says, on the traced inputs."""
    result = recorded.analyse()
    (site,) = result.sites
    assert site.query_tap is not None, site.not_routed
    graph = result.gm.graph
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        query = graph.call_method("permute", (site.query_tap, *site.tap_axes))
    output.args = ((query,),)
    result.gm.recompile()
    return recorded.run(result.gm)[0], site


NORMS = {"plain": None, "norm": (DIM,), "head-norm": (HEADS, DIM)}


@pytest.mark.parametrize(
    ("norm", "dynamic"),
    [("plain", False), ("norm", True), ("head-norm", False)],
    ids=["plain", "norm-dynamic", "head-norm"],
)
@pytest.mark.parametrize("rotary", ROTARIES)
def test_before_rotation(rotary, norm, dynamic):
    norm = None if NORMS[norm] is None else RMSNorm(*NORMS[norm])
    model, x = Layer(rotary=ROTARIES[rotary], norm=norm), hidden()
    value, site = tapped(record(model, x, dynamic=dynamic))
    torch.testing.assert_close(value, query_of(model, x))
    assert isinstance(site.q_shape[2], torch.SymInt) == dynamic


def test_positions_that_count_up_to_a_hidden_state_s_size():
    """A length that was symbolic until a mask fixed it: Dynamo asks the embeddings for it."""
    model = tiny_llama().model
    ids, mask = torch.randint(3, 60, (4, 20)), torch.ones(4, 20, dtype=torch.int64)
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    recorded = record(model, ids, attention_mask=mask, use_cache=False, dynamic=None)
    assert recorded.before["size"] > 0
    assert [op_name(site.query_tap) for site in recorded.sites()] == ["transpose"] * 2


@pytest.mark.parametrize("norm", [None, (DIM,)], ids=["plain", "norm"])
def test_without_rotation(norm):
    model = Layer(norm=None if norm is None else RMSNorm(*norm))
    x = hidden()
    torch.testing.assert_close(tapped(record(model, x))[0], query_of(model, x))


class TokensFirst(Layer):
    """Rotates ``[B, S, H, D]`` and swaps heads and tokens afterwards."""

    def forward(self, x):
        batch, length = x.shape[:2]
        q, k, v = (
            p(x).view(batch, length, HEADS, DIM) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(*(self.swap(y) for y in (self.turn(q), self.turn(k), v)))
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def turn(self, q):
        cos, sin = angles(q, 1).cos()[:, None], angles(q, 1).sin()[:, None]
        left, right = q.chunk(2, -1)
        return torch.cat((left * cos - right * sin, left * sin + right * cos), -1)

    def swap(self, x):
        return x.transpose(1, 2)


class Permuted(TokensFirst):
    def swap(self, x):
        return x.permute(0, 2, 1, 3)


class Moved(TokensFirst):
    def swap(self, x):
        return x.movedim(1, 2)


@pytest.mark.parametrize("length", [LENGTH, HEADS], ids=["longer", "as-many-tokens-as-heads"])
@pytest.mark.parametrize("model", [TokensFirst, Permuted])
def test_rotation_before_the_heads_move(model, length):
    model, x = model(), hidden(length=length)
    value, site = tapped(record(model, x))
    torch.testing.assert_close(value, query_of(model, x))
    assert site.tap_axes == (0, 2, 1, 3)


@pytest.mark.parametrize("length", [LENGTH, HEADS], ids=["longer", "as-many-tokens-as-heads"])
def test_a_move_that_is_not_followed(length):
    """Equal sizes must not pass for equal axes."""
    site = record(Moved(), hidden(length=length)).site()
    assert site.query_tap is None
    assert site.not_routed.reason is SkipReason.QUERY_NOT_FOUND


class Fused(Layer):
    def __init__(self):
        super().__init__(rotary=half_split)
        self.qkv = nn.Linear(32, 96)

    def parts(self, x):
        return self.qkv(x).view(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.parts(x).unbind(0)
        out = causal_sdpa(half_split(q), half_split(k), v)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))


def test_fused_projection():
    model, x = Fused(), hidden()
    torch.testing.assert_close(tapped(record(model, x))[0], model.parts(x)[0])


class Added(Layer):
    """A low-rank adapter and a bias: the query has two projections."""

    def __init__(self):
        super().__init__(rotary=half_split)
        self.down, self.up = nn.Linear(32, 2), nn.Linear(2, 32)

    def query(self, x):
        return (self.q_proj(x) + self.up(self.down(x))).view(*x.shape[:2], HEADS, DIM)

    def forward(self, x):
        q = self.query(x).transpose(1, 2)
        k, v = (p(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
                for p in (self.k_proj, self.v_proj))  # fmt: skip
        out = causal_sdpa(half_split(q), half_split(k), v)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))


def test_two_projections():
    model, x = Added(), hidden()
    torch.testing.assert_close(tapped(record(model, x))[0], model.query(x).transpose(1, 2))


def norm_after_rotation(q):
    return nn.functional.rms_norm(half_split(q), (DIM,))


def test_a_norm_after_rotation_is_not_waited_for():
    model, x = Layer(rotary=norm_after_rotation), hidden()
    torch.testing.assert_close(tapped(record(model, x))[0], query_of(model, x))


def assigned(q):
    q = q.contiguous()
    q[..., :4] = half_split(q[..., :4])
    return q


def assigned_to_a_copy(q):
    q = q.clone()
    q[..., :4] = half_split(q[..., :4])
    return q


def multiplied(q):
    q = q * 1.0
    return q.mul_(angles(q).repeat(1, 2).cos())


@pytest.mark.parametrize("rotary", [assigned, assigned_to_a_copy])
def test_rotated_in_place(rotary):
    """No node holds the query as it was, so nothing is routed rather than misrouted."""
    recorded = record(Layer(rotary=rotary), hidden())
    site = recorded.site()
    assert site.query_tap is None
    assert site.not_routed.reason is SkipReason.QUERY_NOT_FOUND
    result = recorded.rewrite(Policy.ROUTER)
    recorded.check(result)
    assert result.sites[0].became == "full"


def test_multiplied_in_place():
    model, x = Layer(rotary=multiplied), hidden()
    recorded = record(model, x)
    if recorded.site().query_tap is not None:
        torch.testing.assert_close(tapped(recorded)[0], query_of(model, x))


def test_every_layer_has_its_own():
    model = nn.Sequential(*(Layer(rotary=half_split, norm=RMSNorm(DIM)) for _ in range(3)))
    sites = record(model, hidden()).sites()
    assert len({site.query_tap for site in sites}) == 3
    assert {op_name(site.query_tap) for site in sites} == {"transpose"}


def test_the_router_reads_the_tap():
    """A routed prefill pools the rotation-free query: rotating differently changes no route."""
    x = hidden()
    torch.manual_seed(1)
    routes = []
    for rotary in (half_split, interleaved):
        torch.manual_seed(2)
        recorded = record(Layer(rotary=rotary, norm=RMSNorm(DIM)), x)
        result = recorded.rewrite(Policy.ROUTER)
        (picked,) = [n for n in result.gm.graph.nodes if op_name(n) == "pick_tokens"]
        output = next(iter(reversed(result.gm.graph.nodes)))
        output.args = ((picked,),)
        result.gm.recompile()
        routes += recorded.run(result.gm)
    torch.testing.assert_close(*routes)
