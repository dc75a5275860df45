"""The rewrite for training, on small graphs: what it emits, what it keeps, what it checks."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fluxcompile.config import FluxConfig
from fluxcompile.errors import RewriteError
from fluxcompile.layer_router import LayerRouter
from fluxcompile.mixing import dense_queries, mix
from fluxcompile.passes.mix_attention import mix_attention
from fluxcompile.passes.pipeline import Rewrite, rewrite
from fluxcompile.passes.plan import Policy, RoutingPlan, Training
from fluxcompile.passes.site import SkipReason
from fluxcompile.passes.verify import verify_mixture
from tests.passes import hugging_face as hf
from tests.passes.graphs import CONFIG, SDPA, Recorded, Stack, hidden, op_counts, record

SPARSE_OP = "streaming_attention.default"
PARAMETERS = len(list(LayerRouter(8).parameters()))


def plan_for(result: Rewrite, training=Training.SOFT, config=CONFIG, policy=Policy.ROUTER):
    layers = {site.layer: LayerRouter(site.q_shape[3]) for site in result.sites}
    return RoutingPlan(config, dict.fromkeys(layers, policy), layers, training=training)


def mixed(recorded: Recorded, *args, **kwargs) -> Rewrite:
    result = recorded.analyse()
    return rewrite(result, plan_for(result, *args, **kwargs))


@pytest.fixture(scope="module")
def stack() -> Recorded:
    torch.manual_seed(0)
    return record(Stack().requires_grad_(False), hidden())


def test_soft(stack):
    result = mixed(stack)
    counts = op_counts(result.gm)
    assert counts["mix"] == counts[SPARSE_OP] == counts["full_share"] == 2
    assert counts[SDPA] == 2
    assert counts["cond"] == counts["route_rows.default"] == 0
    assert [site.became for site in result.sites] == ["mixed: full and streaming"] * 2
    assert result.shares.layers == [0, 1]


def test_inputs_in_order(stack):
    result = mixed(stack)
    traced = sum(node.op == "placeholder" for node in stack.gm.graph.nodes)
    names = [node.name for node in result.gm.graph.nodes if node.op == "placeholder"][traced:]
    assert names[:3] == ["flux_temperature", "flux_noise", "flux_hardness"]
    assert names[3:5] == ["flux_prompt_length", "flux_router_0_encoder_0_weight"]
    assert len(names) == 4 + 2 * PARAMETERS
    assert [(t.layer, t.path) for t in result.shares.tensors][PARAMETERS] == (1, "encoder.0.weight")


def test_router_is_no_constant(stack):
    result = mixed(stack)
    assert not list(result.gm.parameters())
    assert not any(node.op == "get_attr" for node in result.gm.graph.nodes)


def test_locked(stack):
    result = mixed(stack, training=Training.LOCKED)
    counts = op_counts(result.gm)
    assert counts[SPARSE_OP] == counts["full_attention_rows"] == 2
    assert counts["mix"] == counts[SDPA] == counts["full_share"] == 0
    assert result.shares.noise is None


def test_triangle_is_made_of_both(stack):
    result = mixed(stack, config=FluxConfig(sink=2, local=4, sparse="triangle", last=2))
    counts = op_counts(result.gm)
    assert counts["pick"] == counts["mix"] == counts[SPARSE_OP] == counts[SDPA] == 2
    assert counts["dense_queries"] == 1


@pytest.mark.parametrize("training", [Training.SOFT, Training.LOCKED])
def test_dense_decode_is_the_answer_in_full(stack, training):
    result = mixed(stack, training, config=FluxConfig(sink=2, local=4, decode="dense"))
    counts = op_counts(result.gm)
    assert counts["pick"] == counts[SPARSE_OP] == counts[SDPA] == 2
    assert counts["dense_queries"] == 1


@pytest.mark.parametrize("decode", ["sparse", "dense"])
def test_static_patterns_take_whole_rows_for_prompts(stack, decode):
    config = FluxConfig(sink=2, local=4, decode=decode)
    counts = op_counts(mixed(stack, policy=Policy.SPARSE, config=config).gm)
    assert counts["pick"] == counts[SDPA] == 0
    counts = op_counts(
        mixed(stack, policy=Policy.SPARSE, config=replace(config, sparse="triangle")).gm
    )
    assert counts["pick"] == counts[SDPA] == 2


def test_short_prompts_keep_their_share(stack):
    result = mixed(stack, config=FluxConfig(sink=4, local=8))
    counts = op_counts(result.gm)
    assert counts["mix"] == counts[SPARSE_OP] == 0
    assert counts[SDPA] == counts["full_share"] == 2
    assert result.sites[0].became == "full (short enough to be equal)"


@pytest.mark.parametrize("policy", [Policy.FULL, Policy.SPARSE])
def test_static(stack, policy):
    result = mixed(stack, policy=policy)
    name = SPARSE_OP if policy is Policy.SPARSE else SDPA
    assert op_counts(result.gm)[name] == 2
    assert result.shares.layers == []


def test_full_computes_what_was_traced(stack):
    stack.check(mixed(stack, policy=Policy.FULL))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hugging_face(family, padded):
    result = mixed(hf.prefill(family, cache="none", padded=padded))
    counts = op_counts(result.gm)
    assert counts["mix"] == 2
    assert counts["mask_bounds.default"] == padded
    assert counts["full_attention.default"] == 2 * padded


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_are_left_alone(cache):
    for recorded in (hf.prefill(cache=cache), hf.decode(cache=cache)):
        result = mixed(recorded)
        assert {site.skip.reason for site in result.sites} == {SkipReason.CACHE_IN_TRAINING}
        recorded.check(result)


def test_window_within_local():
    result = mixed(hf.prefill("mistral", cache="none"), config=FluxConfig(sink=1, local=hf.WINDOW))
    assert result.shares.fixed == [0, 1]
    assert op_counts(result.gm)["mix"] == 0


def test_unreadable_mask_is_left_alone():
    def attend(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.mT)

    recorded = record(Stack(attend=attend).requires_grad_(False), hidden())
    result = mixed(recorded)
    assert {site.skip.reason for site in result.sites} == {SkipReason.MASK_UNREADABLE}
    recorded.check(result)


class TestVerify:
    def unverified(self, stack) -> Rewrite:
        result = stack.analyse()
        result.shares = mix_attention(result.gm, result.sites, plan_for(result))
        return result

    def mixture(self, result):
        return result.gm.graph.find_nodes(op="call_function", target=mix)[0]

    def test_a_mixture_is_gone(self, stack):
        result = self.unverified(stack)
        node = self.mixture(result)
        node.replace_all_uses_with(node.args[0])
        result.gm.graph.erase_node(node)
        with pytest.raises(RewriteError, match="2 mixtures, got 1"):
            verify_mixture(result.gm, result.sites, result.shares)

    def test_a_mixture_by_something_else(self, stack):
        result = self.unverified(stack)
        node = self.mixture(result)
        node.update_arg(2, result.shares.shares[0])
        with pytest.raises(RewriteError, match="to mix by a share"):
            verify_mixture(result.gm, result.sites, result.shares)

    def test_one_share_for_two_layers(self, stack):
        result = self.unverified(stack)
        result.shares.layers[1] = 0
        with pytest.raises(RewriteError, match="one share a layer"):
            verify_mixture(result.gm, result.sites, result.shares)

    def test_where_gradients_are_off(self, stack):
        result = self.unverified(stack)
        with result.gm.graph.inserting_before(self.mixture(result)):
            result.gm.graph.call_function(torch._C._set_grad_enabled, (False,))
        with pytest.raises(RewriteError, match="under gradients"):
            verify_mixture(result.gm, result.sites, result.shares)


def test_seconds_of_every_pass(stack):
    passes = ["mix_attention", "store_rotary", "verify", "verify_mixture", "recompile"]
    assert list(mixed(stack).seconds)[-5:] == passes


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("last", [0, 1, 3, 50])
def test_dense_queries(last, answer):
    valid = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    prompts, query = torch.tensor([1, 4, 5, 100]), torch.zeros(4, 2, 12, 8)

    def expected(places, prompt):
        ends = places[:prompt]
        return ends[max(0, len(ends) - last) :] + (places[len(ends) :] if answer else [])

    for length in (None, prompts):
        limits = [None] * 4 if length is None else length.tolist()
        for keys in (valid, None):
            found = dense_queries(query, keys, length, last, answer)
            for i_row, row in enumerate(found.expand(4, -1)):
                places = list(range(12)) if keys is None else keys[i_row].nonzero()[:, 0].tolist()
                assert row.nonzero()[:, 0].tolist() == expected(places, limits[i_row])


def test_plans_say_how_they_train():
    assert RoutingPlan(CONFIG).training is None
    assert replace(RoutingPlan(CONFIG), training=Training.SOFT).training is Training.SOFT
