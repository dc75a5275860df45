"""Graphs before and after the rewrite: what is gone, what stands there, what it computes."""

from collections import Counter

import pytest
import sympy
import torch
from torch import nn
from torch.nn import functional

from fluxcompile.config import FluxConfig
from fluxcompile.errors import RewriteError
from fluxcompile.kernels.streaming import cuda
from fluxcompile.passes import find_cache
from fluxcompile.passes.emit import Emitter, UnknownSize
from fluxcompile.passes.find_attention import find_attention
from fluxcompile.passes.graph_util import as_expr, op_name
from fluxcompile.passes.plan import Policy
from fluxcompile.passes.site import CacheKind, SkipReason
from fluxcompile.passes.verify import verify

from . import hugging_face as hf
from .graphs import CONFIG, SDPA, Layer, hidden, op_counts, qkv, record

FULL_OP, SPARSE_OP = "full_attention.default", "streaming_attention.default"
DECODE_OP, BOUNDS_OP = "decode_attention.default", "mask_bounds.default"
ROUTE_OP = "route_rows.default"
#: what masks are made of, and what expands keys and values
DENSE = {"le", "lt", "gt", "ge", "and_", "where", "masked_fill", "expand", "softmax", "__and__"}
LONG = FluxConfig(sink=128, local=2048)


def attention_ops(gm):
    counts = op_counts(gm)
    return {name: counts[name] for name in (SDPA, FULL_OP, SPARSE_OP, DECODE_OP) if counts[name]}


def same_logits(recorded, result):
    """Logits agree; keys of padding may differ, as eager attention gives them other values."""
    for got, expected in zip(recorded.run(result.gm), recorded.run(), strict=True):
        if expected.shape[-1:] == (61,):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


PREFILL = [
    ("llama", "sdpa", False),
    ("llama", "sdpa", True),
    ("llama", "eager", True),
    ("qwen3", "sdpa", True),
    ("qwen3", "eager", False),
    ("mistral", "sdpa", False),
    ("mistral", "eager", True),
]


@pytest.mark.parametrize(("family", "attention", "padded"), PREFILL)
def test_full_prefill(family, attention, padded):
    recorded = hf.prefill(family, attention, padded=padded)
    result = recorded.rewrite(config=LONG)
    plain = not padded and family != "mistral"
    assert attention_ops(result.gm) == {SDPA if plain else FULL_OP: hf.LAYERS}
    assert not DENSE & set(op_counts(result.gm))
    assert op_counts(result.gm)[BOUNDS_OP] == padded  # once for all layers
    for site in result.sites:
        assert site.became == "full"
        assert site.k_shape[1] == hf.KV_HEADS
        assert site.mask.window == (hf.WINDOW if family == "mistral" else 0)
        assert site.cache is CacheKind.DYNAMIC_NEW
    same_logits(recorded, result)


@pytest.mark.parametrize(("first", "op"), [(hf.LENGTH, FULL_OP), (hf.LENGTH + 1, SDPA)])
def test_our_kernel_where_it_may_be_faster(monkeypatch, first, op):
    """A length known to be too short for it is left to SDPA; the operator computes the same."""
    monkeypatch.setattr(cuda, "_in_half_on_hopper", lambda q: True)
    recorded = hf.prefill("llama")
    monkeypatch.setattr(cuda, "OUTRUNS_CUDNN_FROM", {hf.DIM: first})
    result = recorded.rewrite(config=LONG)
    # (The last layer has one query, which is not for that kernel.)
    assert attention_ops(result.gm) == Counter({op: hf.LAYERS - 1}) + Counter({SDPA: 1})
    same_logits(recorded, result)


def test_a_symbolic_length_may_be_long(monkeypatch):
    monkeypatch.setattr(cuda, "_in_half_on_hopper", lambda q: True)
    monkeypatch.setattr(cuda, "OUTRUNS_CUDNN_FROM", {hf.DIM: hf.LENGTH + 1})
    recorded = hf.prefill("llama", dynamic=True)
    result = recorded.rewrite(config=LONG)
    assert attention_ops(result.gm) == {FULL_OP: hf.LAYERS - 1, SDPA: 1}
    same_logits(recorded, result)


@pytest.mark.parametrize(
    ("family", "padded", "dynamic"),
    [
        ("llama", False, None),
        ("llama", True, None),
        ("llama", True, True),
        ("mistral", False, None),
        ("mistral", True, None),
    ],
)
def test_full_decode(family, padded, dynamic):
    recorded = hf.decode(family, padded=padded, dynamic=dynamic)
    result = recorded.rewrite(config=LONG)
    assert attention_ops(result.gm) == {DECODE_OP: hf.LAYERS}
    assert not DENSE & set(op_counts(result.gm))
    assert op_counts(result.gm)["decode_bounds"] == 1
    assert {site.cache for site in result.sites} == {CacheKind.DYNAMIC}
    assert all(site.past_key.op == "placeholder" for site in result.sites)
    same_logits(recorded, result)


def test_a_sliding_cache_says_what_it_has_dropped():
    """Without padding no mask tells: the cache's own count of tokens does."""
    config = FluxConfig(sink=2, local=3)
    recorded = hf.decode("mistral")
    result = recorded.rewrite(Policy.SPARSE, config)
    assert {site.became for site in result.sites} == {"streaming decode"}
    (bounds,) = [node for node in result.gm.graph.nodes if op_name(node) == "decode_bounds"]
    result.gm.graph.find_nodes(op="output")[0].args = ((bounds,),)
    result.gm.recompile()
    dropped = hf.LENGTH + 1 - hf.WINDOW
    assert dropped >= config.sink, "the case must have lost its sink"
    (ranges,) = recorded.run(result.gm)
    assert ranges[:, 0].tolist() == [[0, 0, hf.WINDOW - config.local, hf.WINDOW]] * hf.BATCH


def test_a_sliding_cache_that_does_not_count_is_full(monkeypatch):
    monkeypatch.setattr(find_cache, "_SEEN", "tokens_so_far")
    sites = hf.decode("mistral").rewrite(Policy.SPARSE, FluxConfig(sink=2, local=3)).sites
    assert {site.not_routed.reason for site in sites} == {SkipReason.SLIDING_CACHE}
    assert {site.became for site in sites} == {"full decode"}


@pytest.mark.parametrize(
    ("attention", "padded"), [("sdpa", False), ("sdpa", True), ("eager", True)]
)
def test_static_cache(padded, attention):
    first = hf.prefill("llama", attention, cache="static", padded=padded)
    second = hf.decode("llama", attention, cache="static", padded=padded)
    for recorded, kind in ((first, CacheKind.STATIC_NEW), (second, CacheKind.STATIC)):
        result = recorded.rewrite(config=LONG)
        assert {site.cache for site in result.sites} == {kind}
        assert not {"le", "and_", "expand", "softmax"} & set(op_counts(result.gm))
        assert op_counts(result.gm)["index_copy_"] == 2 * hf.LAYERS
        same_logits(recorded, result)
    assert attention_ops(result.gm) == {DECODE_OP: hf.LAYERS}
    for site in result.sites:
        assert site.write_positions is not None
        assert site.past_key.op == "placeholder"


def test_no_cache():
    result = hf.prefill(cache="none").rewrite()
    assert {site.cache for site in result.sites} == {CacheKind.NONE}
    assert not DENSE & set(op_counts(result.gm))


def test_a_rolling_static_cache_is_not_routed():
    """Mistral's static cache rolls: where a key stands does not tell which token it is."""
    sites = hf.decode("mistral", cache="static").rewrite().sites
    assert {site.cache for site in sites} == {CacheKind.UNKNOWN}


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("llama", True), ("qwen3", True)])
def test_sparse_prefill_has_no_branch(family, padded):
    result = hf.prefill(family, padded=padded).rewrite(Policy.SPARSE)
    assert attention_ops(result.gm) == {SPARSE_OP: hf.LAYERS}
    assert op_counts(result.gm)["cond"] == 0
    assert not DENSE & set(op_counts(result.gm))
    assert {site.became for site in result.sites} == {"streaming"}
    assert result.routes.columns == []


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("llama", True), ("qwen3", True)])
def test_routed_prefill_has_one_branch_a_layer(family, padded):
    recorded = hf.prefill(family, padded=padded)
    result = recorded.rewrite(Policy.ROUTER)
    counts = op_counts(result.gm)
    assert counts["cond"] == hf.LAYERS
    assert attention_ops(result.gm) == {}  # all inside the branches
    assert not DENSE & set(counts)
    assert counts["pick_tokens"] == counts[ROUTE_OP] == hf.LAYERS
    assert counts["pool_positions"] == 1
    assert counts[BOUNDS_OP] == padded
    branches = [m for name, m in result.gm.named_children() if name.startswith("flux_branch")]
    inside = sum((op_counts(branch) for branch in branches), start=op_counts(result.gm))
    assert inside[SPARSE_OP] == hf.LAYERS
    assert inside[FULL_OP] + inside[SDPA] == hf.LAYERS
    assert [site.layer for site in result.routes.columns] == [0, 1]
    assert result.routes.routes_input is None
    same_logits(recorded, result)  # an untrained router chooses full attention


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_routed_decode_reads_routes_on_the_device(cache):
    result = hf.decode(cache=cache).rewrite(Policy.ROUTER)
    counts = op_counts(result.gm)
    assert counts["cond"] == 0
    assert attention_ops(result.gm) == {DECODE_OP: hf.LAYERS}
    assert result.routes.routes_input.op == "placeholder"
    last = [node for node in result.gm.graph.nodes if node.op == "placeholder"][-1]
    assert last is result.routes.routes_input
    assert counts[ROUTE_OP] == 0
    assert {site.became for site in result.sites} == {"decode by device-side route"}


@pytest.mark.parametrize(
    ("family", "padded"), [("llama", False), ("llama", True), ("mistral", True)]
)
def test_a_step_of_a_few_tokens_is_decode(family, padded):
    """Without dynamic lengths: a symbolic one may be anything, and is a prefill."""
    recorded = hf.decode(family, padded=padded, dynamic=False, new=3)
    result = recorded.rewrite(config=LONG)
    assert attention_ops(result.gm) == {DECODE_OP: hf.LAYERS}
    assert not DENSE & set(op_counts(result.gm))
    assert op_counts(result.gm)["decode_bounds"] == 1
    same_logits(recorded, result)
    result = recorded.rewrite(Policy.ROUTER)
    assert op_counts(result.gm)["cond"] == op_counts(result.gm)[ROUTE_OP] == 0
    assert result.routes.routes_input.op == "placeholder"
    assert {site.became for site in result.sites} == {"decode by device-side route"}
    assert not any(site.may_start_prompt for site in result.sites)


def test_a_few_tokens_on_a_static_cache_may_start_a_prompt():
    recorded = hf.decode(cache="static", dynamic=False, new=3)
    result = recorded.rewrite(config=LONG)
    assert attention_ops(result.gm) == {FULL_OP: hf.LAYERS}
    assert all(site.may_start_prompt for site in result.sites)
    same_logits(recorded, result)


def test_dense_decode():
    config = FluxConfig(sink=2, local=4, pool_size=3, decode="dense")
    recorded = hf.decode()
    result = recorded.rewrite(Policy.ROUTER, config)
    assert {site.became for site in result.sites} == {"full decode"}
    for node in result.gm.graph.nodes:
        if op_name(node) == DECODE_OP:
            assert node.args[5] is None


@pytest.mark.parametrize("policy", Policy)
def test_a_short_prompt_has_no_branch(policy):
    """Where sparse equals full attention it is full; the route is still decided and kept."""
    recorded = hf.prefill(padded=True)
    result = recorded.rewrite(policy, LONG)
    assert attention_ops(result.gm) == {FULL_OP: hf.LAYERS}
    assert op_counts(result.gm)["cond"] == 0
    assert len(result.routes.decided) == (hf.LAYERS if policy is Policy.ROUTER else 0)
    same_logits(recorded, result)


@pytest.mark.parametrize(("reach", "became"), [(12, "full"), (11, "streaming")])
def test_the_boundary_of_a_short_prompt(reach, became):
    result = hf.prefill().rewrite(Policy.SPARSE, FluxConfig(sink=2, local=reach - 2))
    assert all(site.became.startswith(became) for site in result.sites)


def test_a_window_within_local_is_full():
    sites = hf.prefill("mistral").rewrite(Policy.SPARSE, FluxConfig(sink=1, local=hf.WINDOW)).sites
    assert {site.not_routed.reason for site in sites} == {SkipReason.WINDOW_WITHIN_LOCAL}
    sites = hf.prefill("mistral").rewrite(Policy.SPARSE, FluxConfig(sink=1, local=7)).sites
    assert {site.became for site in sites} == {"streaming"}


def test_symbolic_prefill_keeps_its_symbols():
    recorded = hf.prefill(padded=True, dynamic=True)
    result = recorded.rewrite(config=LONG)
    same_logits(recorded, result)
    for site in result.sites:
        batch, _, length, _ = site.q_shape
        assert isinstance(batch, torch.SymInt)
        assert isinstance(length, torch.SymInt)


def test_static_sparse_equals_its_definition():
    """The sparse graph computes the dense one under sink, local and causal masks."""
    recorded = record(Layer(), hidden(length=20))
    result = recorded.rewrite(Policy.SPARSE)

    def sink_and_local(q, k, v):
        i, j = torch.arange(20)[:, None], torch.arange(20)
        seen = (j <= i) & ((j < CONFIG.sink) | (i - j < CONFIG.local))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    model = Layer(sink_and_local)
    weights = [x for x in recorded.inputs if isinstance(x, nn.Parameter)]
    with torch.no_grad():
        for mine, traced in zip(model.parameters(), weights, strict=True):
            mine.copy_(traced)
        (x,) = [x for x in recorded.inputs if not isinstance(x, nn.Parameter)]
        torch.testing.assert_close(recorded.run(result.gm)[0], model(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", [(2, 40, 8), (8, 10, 8), (2, 320)])
def test_memory_order_of_the_output(shape):
    """A view of the output must still be one."""

    def attend(q, k, v):
        i = torch.arange(10)
        mask = (i[None] <= i[:, None])[None, None]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(shape)

    recorded = record(attend, *qkv())
    recorded.check(recorded.rewrite())


def test_provenance_is_kept():
    result = hf.prefill(padded=True).rewrite()
    nodes = [node for node in result.gm.graph.nodes if op_name(node) == FULL_OP]
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in nodes]
    assert all(f"{layer}" in path and "self_attn" in path for layer, path in enumerate(paths))


def test_left_alone_is_untouched():
    recorded = record(Layer(functional.scaled_dot_product_attention), hidden())
    result = recorded.rewrite(Policy.SPARSE)
    assert op_counts(result.gm) == recorded.before
    assert result.sites[0].became == "left alone"


def test_attention_on_attention():
    def twice(q, k, v):
        first = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.scaled_dot_product_attention(first, first, v, is_causal=True)

    recorded = record(twice, *qkv())
    result = recorded.rewrite()
    recorded.check(result)
    assert op_counts(result.gm)[SDPA] == 2


def test_batches_of_two_sizes_in_one_graph():
    """Mask operands are per row: what was made for one batch must not serve another."""

    def attend(q, k, v):
        i = torch.arange(10)
        mask = (i[None] <= i[:, None])[None, None] & (i > -1)
        short = functional.scaled_dot_product_attention(q[:1], k[:1], v[:1], attn_mask=mask)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) + short

    recorded = record(attend, *qkv())
    for policy in (Policy.FULL, Policy.SPARSE):
        result = recorded.rewrite(policy)
        recorded.run(result.gm)
    recorded.check(recorded.rewrite())


def test_one_validity_row_for_batches_of_two_sizes():
    def attend(q, k, v, m):
        i = torch.arange(10)
        mask = (i[None] <= i[:, None])[None, None] & m.bool()[:, None, None, :]
        short = functional.scaled_dot_product_attention(q[:1], k[:1], v[:1], attn_mask=mask)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) + short

    valid = torch.ones(1, 10)
    valid[0, 7:] = 0
    recorded = record(attend, *qkv(), valid)
    recorded.check(recorded.rewrite())


class TestVerify:
    """Each planted corruption is caught."""

    @staticmethod
    def rewritten(attend=None):
        recorded = record(Layer(*([attend] if attend else [])), hidden())
        return recorded.rewrite()

    def test_a_sound_rewrite_passes(self):
        result = self.rewritten()
        verify(result.gm, result.sites)

    def test_an_attention_that_vanished(self):
        result = self.rewritten(functional.scaled_dot_product_attention)
        (site,) = result.sites
        site.output.replace_all_uses_with(site.q)
        result.gm.graph.erase_node(site.output)
        with pytest.raises(RewriteError, match="left alone"):
            verify(result.gm, result.sites)

    def test_a_dense_mask_that_came_back(self):
        result = self.rewritten()
        (node,) = [node for node in result.gm.graph.nodes if op_name(node) == SDPA]
        with result.gm.graph.inserting_before(node):
            mask = result.gm.graph.call_function(torch.ones, (10, 10))
        node.kwargs = {**node.kwargs, "attn_mask": mask, "is_causal": False}
        with pytest.raises(RewriteError, match="dense mask"):
            verify(result.gm, result.sites)

    def test_a_mask_on_an_attention_that_was_not_rewritten(self):
        recorded = hf.prefill(padded=True)
        result = recorded.analyse()
        with pytest.raises(RewriteError, match="dense mask"):
            verify(result.gm, result.sites)

    def test_a_malformed_graph(self):
        result = self.rewritten()
        (node,) = [node for node in result.gm.graph.nodes if op_name(node) == SDPA]
        user = next(iter(node.users))
        node.append(user)
        user.append(node)
        with pytest.raises(RuntimeError):
            verify(result.gm, result.sites)


class TestEmit:
    """Sizes as nodes of the graph, whatever expression they are."""

    @staticmethod
    def emitter():
        def model(a, b):
            return a.sum() + b.sum(), a.shape[0] + b.shape[1]

        recorded = record(model, torch.ones(5, 3), torch.ones(5, 7), dynamic=True)
        nodes = [node for node in recorded.gm.graph.nodes if node.op == "placeholder"]
        tensors = [node for node in nodes if isinstance(node.meta["example_value"], torch.Tensor)]
        symbols = [as_expr(size) for node in tensors for size in node.meta["example_value"].shape]
        return recorded, Emitter(recorded.gm), symbols

    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (lambda a, b, c, d: a, 5),
            (lambda a, b, c, d: d - b, 4),
            (lambda a, b, c, d: 2 * a + b - 1, 12),
            (lambda a, b, c, d: a * d, 35),
            (lambda a, b, c, d: sympy.Max(0, b - d), 0),
            (lambda a, b, c, d: sympy.Min(a, d), 5),
            (lambda a, b, c, d: sympy.Integer(9), 9),
        ],
        ids=["symbol", "difference", "linear", "product", "max", "min", "number"],
    )
    def test_sizes(self, build, expected):
        recorded, emitter, symbols = self.emitter()
        output = next(iter(reversed(recorded.gm.graph.nodes)))
        with recorded.gm.graph.inserting_before(output):
            size = emitter.size(build(*symbols))
            filled = emitter.call(torch.full, ((1,), size))
        output.args = ((filled,),)
        recorded.gm.graph.lint()
        recorded.gm.recompile()
        assert recorded.run()[0].item() == expected

    @pytest.mark.parametrize(
        "build",
        [
            lambda a, b, c, d: sympy.Symbol("unseen"),
            lambda a, b, c, d: a**2,
            lambda a, b, c, d: sympy.floor(a / 2),
        ],
        ids=["unseen", "power", "floor"],
    )
    def test_sizes_that_cannot_be_had(self, build):
        recorded, emitter, symbols = self.emitter()
        output = next(iter(reversed(recorded.gm.graph.nodes)))
        with recorded.gm.graph.inserting_before(output), pytest.raises(UnknownSize):
            emitter.size(build(*symbols))

    def test_an_offset_that_cannot_be_had_leaves_the_attention_alone(self):
        """Half the length is no input's size: the dense mask stays and the graph is as it was."""

        def attend(q, k, v):
            half = k.shape[2] // 2
            i, j = torch.arange(q.shape[2])[:, None] + half, torch.arange(k.shape[2])
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i)[None, None])

        for dynamic in (False, True):
            recorded = record(attend, *qkv(), dynamic=dynamic)
            result = recorded.rewrite()
            recorded.check(result)
        assert result.sites[0].skip.reason is SkipReason.MASK_UNREADABLE
        assert len(find_attention(result.gm)) == 1


def test_seconds_of_every_pass():
    result = hf.prefill().rewrite()
    assert list(result.seconds) == [
        *("find_attention", "arrange_operands", "recover_mask", "recover_kv"),
        *(
            "find_head_groups",
            "find_query",
            "find_cache",
            "assign_layers",
            "start_cache",
        ),
        *("read_last_token", "branch_attention", "ask_last_token", "store_rotary"),
        "project_rows",
        *("verify", "recompile"),
    ]
    assert sum(result.seconds.values()) < 5.0
