"""``explain``: one true row an attention, and a model that is as usable as before."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import DynamicCache, StaticCache

import fluxcompile
import fluxcompile.backend
from fluxcompile.passes.site import SkipReason
from tests.passes import hugging_face as hf
from tests.passes.graphs import Layer, Stack, eager_softmax, hidden
from tests.router_models import random_router, tiny_llama

SMALL = {"sink": 2, "local": 4, "pool_size": 3}
SPARSE = {"routes": "sparse", "config": SMALL}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_llama().requires_grad_(False)


@pytest.fixture
def ids():
    return torch.arange(24).reshape(2, 12)


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


class TestRows:
    def test_a_plain_prompt(self, model, ids):
        report = fluxcompile.explain(model, ids, options=SPARSE)
        assert [row.path for row in report.rows] == [
            "model.layers.0.self_attn",
            "model.layers.1.self_attn",
        ]
        for row in report.rows:
            assert row.query_shape == (2, 4, 12, 16)
            assert row.key_shape == (2, 2, 12, 16)  # before expansion
            assert row.mask == "causal"
            assert row.cache == "dynamic, empty"
            assert row.became == "streaming"
            assert (row.reason, row.detail) == (None, "")

    def test_a_padded_prompt_without_cache(self, model, ids):
        report = fluxcompile.explain(
            model, ids, attention_mask=padded(ids), use_cache=False, options=SPARSE
        )
        assert {(row.mask, row.cache) for row in report.rows} == {("causal + valid keys", "none")}

    def test_a_sliding_window(self, ids):
        report = fluxcompile.explain(hf.model("mistral"), ids, attention_mask=padded(ids))
        assert {row.mask for row in report.rows} == {"causal + valid keys + window 8"}

    def test_decode(self, model, ids):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        report = fluxcompile.explain(model, ids[:, :1], past_key_values=cache, options=SPARSE)
        assert {(row.cache, row.became) for row in report.rows} == {("dynamic", "streaming decode")}
        assert report.rows[0].query_shape[2] == 1
        assert report.rows[0].key_shape[2] == 13

    def test_a_static_cache(self, model, ids):
        cache = StaticCache(config=model.config, max_cache_len=20)
        inputs = {"attention_mask": padded(ids), "past_key_values": cache}
        report = fluxcompile.explain(model, ids, **inputs)
        assert {row.cache for row in report.rows} == {"static, new"}
        grown = functional.pad(padded(ids), (0, 1), value=1)
        report = fluxcompile.explain(
            model, ids[:, :1], attention_mask=grown, past_key_values=cache, options=SPARSE
        )
        assert {(row.cache, row.became) for row in report.rows} == {("static", "streaming decode")}

    def test_a_router(self, model, ids):
        router = random_router(head_dim=16, config=fluxcompile.FluxConfig(**SMALL))
        fluxcompile.attach(model, router)
        rows = fluxcompile.explain(model, ids).rows
        assert {row.became for row in rows} == {"routed: full or streaming"}
        assert {row.reason for row in rows} == {None}

    def test_nobody_routes(self, model, ids):
        rows = fluxcompile.explain(model, ids).rows
        assert {(row.became, row.reason) for row in rows} == {("full", SkipReason.NO_ROUTER)}

    def test_a_short_prompt(self, model, ids):
        rows = fluxcompile.explain(model, ids, options={"routes": "sparse"}).rows
        assert {row.became for row in rows} == {"full (short enough to be equal)"}

    def test_weights_that_are_returned(self, ids):
        model = hf.model("llama", "eager")
        rows = fluxcompile.explain(model, ids, output_attentions=True).rows
        assert {row.reason for row in rows} == {SkipReason.WEIGHTS_RETURNED}
        assert {row.became for row in rows} == {"left alone"}

    def test_mixed_layers(self):
        """Each attention has its own row and reason, in the order they run."""
        net = nn.Sequential(
            Layer(), Layer(functional.scaled_dot_product_attention), Layer(eager_softmax), Layer()
        )
        rows = fluxcompile.explain(net, hidden(), options=SPARSE).rows
        assert [row.reason for row in rows] == [
            *(None, SkipReason.NOT_CAUSAL, SkipReason.NOT_CAUSAL, None)
        ]
        assert [row.became for row in rows] == [
            *("streaming", "left alone", "left alone", "streaming")
        ]
        assert [row.path for row in rows] == ["0", "1", "2", "3"]
        assert rows[1].mask == "unread"

    def test_static_routes_by_layer(self):
        net = nn.Sequential(Layer(), Layer(functional.scaled_dot_product_attention), Layer())
        rows = fluxcompile.explain(net, hidden(), options={"routes": [1, 0], "config": SMALL}).rows
        assert [row.became for row in rows] == ["full", "left alone", "streaming"]

    def test_symbolic_sizes_stay_symbolic(self, model, ids):
        with torch._dynamo.config.patch(assume_static_by_default=False):
            rows = fluxcompile.explain(model, ids).rows
        assert isinstance(rows[0].query_shape[2], torch.SymInt)
        assert str(rows[0].query_shape[2]).startswith("s")

    def test_a_graph_break_makes_two_graphs(self):
        class Broken(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Layer(), Layer()

            def forward(self, x):
                x = self.first(x)
                torch._dynamo.graph_break()
                return self.second(x)

        report = fluxcompile.explain(Broken(), hidden())
        assert [len(graph.rows) for graph in report.graphs] == [1, 1]
        assert [row.path for row in report.rows] == ["first", "second"]

    def test_seconds(self, model, ids):
        (graph,) = fluxcompile.explain(model, ids).graphs
        assert 0 < graph.seconds < 10


class TestTable:
    def test_it_says_it_all(self, model, ids):
        text = str(fluxcompile.explain(model, ids, attention_mask=padded(ids)))
        assert "2 attention layers" in text
        for part in (
            *("layer", "query", "key", "mask", "cache", "became", "why"),
            *("model.layers.1.self_attn", "2 4 12 16", "2 2 12 16", "causal + valid keys"),
            *("dynamic, empty", "full", "no router is attached"),
        ):
            assert part in text
        assert max(map(len, text.splitlines())) <= 160

    def test_symbolic_sizes_print(self, model, ids):
        with torch._dynamo.config.patch(assume_static_by_default=False):
            report = fluxcompile.explain(model, ids)
        assert f"{report.rows[0].query_shape[2]}" in str(report)

    def test_a_detail_with_brackets(self):
        """Shapes in a reason are no markup."""

        def attend(q, k, v, mask):
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        mask = torch.ones(1, 4, 10, 10, dtype=torch.bool)
        text = " ".join(str(fluxcompile.explain(Layer(attend), hidden(), mask)).split())
        assert "[1," in text
        assert "[B," in text

    def test_through_rich(self, model, ids):
        from rich.console import Console

        console = Console(width=200, record=True)
        with console.capture() as captured:
            console.print(fluxcompile.explain(model, ids))
        assert "model.layers.0.self_attn" in captured.get()

    def test_empty(self):
        report = fluxcompile.explain(nn.Linear(3, 3), torch.ones(1, 3))
        assert "0 attention layers" in str(report)


class TestTheModelAfterwards:
    @pytest.fixture
    def model(self):
        return Stack().requires_grad_(False)

    @pytest.fixture
    def x(self):
        return hidden(length=12)

    def test_it_computes_what_it_did(self, model, x):
        before = model(x)
        state = copy.deepcopy(model.state_dict())
        fluxcompile.explain(model, x, options=SPARSE)
        assert torch.equal(model(x), before)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert not hasattr(model, "_orig_mod")
        assert model._compiled_call_impl is None

    def test_gradients_work(self, x):
        model = Stack()
        fluxcompile.explain(model, x)
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_its_own_compile_still_happens(self, model, x):
        for _ in range(3):
            fluxcompile.explain(model, x)
        compiled = torch.compile(model, backend="flux", options={"lowering": "eager", **SPARSE})
        with torch.no_grad():
            compiled(x)
        assert fluxcompile.routes(model).omega == 1.0

    def test_it_uses_up_no_recompilation(self, model, x):
        """Dynamo counts by code object: past its limit a model silently runs eagerly."""
        for _ in range(torch._dynamo.config.recompile_limit + 2):
            assert len(fluxcompile.explain(model, x).rows) == 2
        compiled = torch.compile(model, backend="flux", options={"lowering": "eager", **SPARSE})
        compiled(x)
        assert fluxcompile.routes(model).omega == 1.0

    def test_a_compiled_model_is_not_compiled_again(self, model, x):
        options = {"lowering": "eager", **SPARSE}
        compiled = torch.compile(model, backend="flux", options=options)
        with torch.no_grad():
            compiled(x)
            fluxcompile.explain(compiled, x)
            counters.clear()
            compiled(x)
        assert counters["stats"]["unique_graphs"] == 0

    def test_compiled_in_place(self, model, x):
        model.compile(backend="flux", options={"lowering": "eager", **SPARSE})
        with torch.no_grad():
            model(x)
        rows = fluxcompile.explain(model, x, options=SPARSE).rows
        assert {row.became for row in rows} == {"streaming"}

    def test_grad_mode_is_as_it_was(self, model, x):
        assert torch.is_grad_enabled()
        fluxcompile.explain(model, x)
        assert torch.is_grad_enabled()

    def test_under_grad_it_shows_inference(self, x):
        rows = fluxcompile.explain(Stack(), x, options=SPARSE).rows
        assert {row.became for row in rows} == {"streaming"}

    def test_it_warns_of_nothing_and_uses_up_no_warning(self, model, x, monkeypatch):
        """The table has the reasons; the compile itself still says them once."""
        monkeypatch.setattr(fluxcompile.backend, "_warned", set())
        with warnings.catch_warnings():
            warnings.simplefilter("error", fluxcompile.FluxWarning)
            fluxcompile.explain(model, x)
        compiled = torch.compile(model, backend="flux", options={"lowering": "eager"})
        with torch.no_grad(), pytest.warns(fluxcompile.FluxWarning, match="no router"):
            compiled(x)

    def test_strict_does_not_raise_here(self, model, x):
        rows = fluxcompile.explain(model, x, options={"strict": True}).rows
        assert {row.reason for row in rows} == {SkipReason.NO_ROUTER}


def test_not_a_model():
    with pytest.raises(fluxcompile.FluxError):
        fluxcompile.explain(lambda x: x, torch.ones(1))


def test_unknown_options(model, ids):
    with pytest.raises(fluxcompile.OptionError, match="expected any of"):
        fluxcompile.explain(model, ids, options={"routs": "full"})


def test_an_error_of_the_model_is_its_own(model):
    with pytest.raises(Exception, match="index"):
        fluxcompile.explain(model, torch.full((1, 4), 10**6))
