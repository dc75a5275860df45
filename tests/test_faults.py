"""Whatever is wrong with router, model or machine: an error that says so, or full attention."""

import hashlib
import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional

import fluxcompile
import fluxcompile.backend
from fluxcompile.errors import (
    FluxWarning,
    KernelError,
    RewriteError,
    RouterError,
)
from fluxcompile.kernels import ops
from fluxcompile.kernels.streaming import cuda as streaming_cuda
from fluxcompile.passes.site import SkipReason
from fluxcompile.router import FluxRouter
from tests.passes.graphs import Layer, Stack, hidden
from tests.router_models import random_router

CUDA_KERNELS = {
    "full_attention": streaming_cuda.full_attention,
    "streaming_attention": streaming_cuda.streaming_attention,
    "decode_attention": ops._decode_attention_cuda,
}
SMALL = {"sink": 2, "local": 4, "pool_size": 3}


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    """Each test sees the warnings that a process gives once."""
    monkeypatch.setattr(fluxcompile.backend, "_warned", set())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Stack(heads=2, kv_heads=2, head_dim=16).requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return hidden(length=12)


@pytest.fixture
def saved(tmp_path):
    random_router(head_dim=16).save_pretrained(tmp_path)
    return tmp_path


def compiled(model, **options):
    return torch.compile(model, backend="flux", options={"lowering": "eager", **options})


def raised(call):
    """The error behind Dynamo's own."""
    with pytest.raises(BackendCompilerFailed) as caught:
        call()
    return caught.value.inner_exception


def flux_warnings(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if issubclass(w.category, FluxWarning)]


class TestRouterFiles:
    """Through ``options={"router": path}``: what the user of ``torch.compile`` sees."""

    @staticmethod
    def error(model, x, path, kind=RouterError):
        with torch.no_grad():
            error = raised(lambda: compiled(model, router=path)(x))
        assert type(error) is kind, error
        return str(error)

    def test_sound(self, model, x, saved):
        with torch.no_grad():
            compiled(model, router=saved)(x)
        assert fluxcompile.routes(model).fa.shape == (2, 2)

    @pytest.mark.parametrize("kept", [0, 4, 100, -10])
    def test_truncated(self, model, x, saved, kept):
        weights = saved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
        assert "model.safetensors" in self.error(model, x, saved)

    @pytest.mark.parametrize("content", [b"not tensors at all", b"\x80\x02}q\x00."])
    def test_not_safetensors(self, model, x, saved, content):
        (saved / "model.safetensors").write_bytes(content)
        assert "model.safetensors" in self.error(model, x, saved)

    def test_not_numbers(self, model, x, saved):
        weights = saved / "model.safetensors"
        tensors = load_file(weights)
        tensors["layers.1.head.4.weight"][1, 2] = float("nan")
        save_file(tensors, weights)
        self.edit(saved, weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
        assert "layers.1.head.4.weight" in self.error(model, x, saved)

    @staticmethod
    def edit(saved, **changes):
        path = saved / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_no_file(self, model, x, tmp_path):
        self.error(model, x, tmp_path)

    def test_wrong_head_dim(self, model, x, tmp_path):
        random_router(head_dim=8).save_pretrained(tmp_path)
        message = self.error(model, x, tmp_path)
        assert "expected 16" in message
        assert "got 8" in message

    @pytest.mark.parametrize(
        "fields", [{"sink": 0}, {"local": -3}, {"pool_size": 0}, {"sparse": "blockwise"}], ids=str
    )
    def test_impossible_config(self, model, x, saved, fields):
        self.edit(saved, flux=fields)
        (name,) = fields
        assert name in self.error(model, x, saved)


class TestRouterOfAnotherModel:
    """By path or object the backend sees no model to check against, only layers without entry."""

    @staticmethod
    def stranger():
        return FluxRouter(
            fluxcompile.FluxConfig(**SMALL), layer_names=["encoder.0.attention"], head_dim=16
        )

    def test_it_routes_nothing(self, model, x):
        with torch.no_grad():
            out, messages = flux_warnings(lambda: compiled(model, router=self.stranger())(x))
            torch.testing.assert_close(out, model(x), atol=2e-5, rtol=2e-5)
        (message,) = messages
        assert "no entry for this layer" in message
        assert "2 layers" in message

    def test_strict(self, model, x):
        with torch.no_grad():
            error = raised(lambda: compiled(model, router=self.stranger(), strict=True)(x))
        assert type(error) is RewriteError

    def test_attached(self, model):
        with pytest.raises(RouterError):
            fluxcompile.attach(model, self.stranger())

    def test_fewer_layers(self, x):
        deep = Stack(3, heads=2, kv_heads=2, head_dim=16).requires_grad_(False)
        router = random_router(head_dim=16, config=fluxcompile.FluxConfig(**SMALL))
        with torch.no_grad():
            _, messages = flux_warnings(lambda: compiled(deep, router=router)(x))
        (message,) = messages
        assert "model.layers.2.self_attn" in message
        assert fluxcompile.routes(deep).layer_names == router.layer_names


class Mixer(nn.Module):
    """A model with a softmax and no attention."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return functional.softmax(self.inner(x), dim=-1)


class TestNoAttention:
    @pytest.mark.parametrize(
        "options",
        [{}, {"strict": True}, {"routes": "sparse"}, {"routes": "full"}, {"routes": [0, 1]}],
        ids=str,
    )
    def test_it_compiles(self, options):
        model, x = Mixer(), torch.randn(3, 8)
        with torch.no_grad():
            out, messages = flux_warnings(lambda: compiled(model, **options)(x))
            torch.testing.assert_close(out, model(x))
        assert messages == []

    def test_with_gradients(self):
        model, x = Mixer(), torch.randn(3, 8)
        out, messages = flux_warnings(lambda: compiled(model)(x))
        out.sum().backward()
        assert model.inner.weight.grad is not None
        assert messages == []

    def test_explained(self):
        report = fluxcompile.explain(Mixer(), torch.randn(3, 8))
        assert report.rows == ()
        assert "0 attention layers" in str(report)

    def test_no_routes(self):
        model = Mixer()
        with torch.no_grad():
            compiled(model, routes="sparse")(torch.randn(3, 8))
        assert fluxcompile.routes(model) is None

    def test_a_graph_break_leaves_a_part_without(self):
        class Broken(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = Layer()

            def forward(self, x):
                x = x * 2
                torch._dynamo.graph_break()
                return self.layer(x)

        model, x = Broken(), hidden()
        with torch.no_grad():
            out = compiled(model, routes=[1])(x)
            torch.testing.assert_close(out, model(x), atol=2e-5, rtol=2e-5)


class TestGradients:
    @pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
    @pytest.mark.parametrize("routes", ["sparse", None])
    def test_they_equal_eager_s(self, lowering, routes):
        model, x = Stack(), hidden()
        options = {"routes": routes, "config": SMALL, "lowering": lowering}
        runner = compiled(model, **options)

        def step(forward):
            model.zero_grad()
            loss = forward(x).square().mean()
            loss.backward()
            return loss.detach(), [p.grad.clone() for p in model.parameters()]

        (loss, gradients), messages = flux_warnings(lambda: step(runner))
        eager_loss, eager_gradients = step(model)
        torch.testing.assert_close(loss, eager_loss)
        for got, expected in zip(gradients, eager_gradients, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        (message,) = messages
        assert "gradients are enabled" in message

    def test_the_warning_comes_once(self):
        model = Layer()
        _, first = flux_warnings(lambda: compiled(model)(hidden()))
        torch._dynamo.reset()
        _, second = flux_warnings(lambda: compiled(model)(hidden()))
        assert (len(first), len(second)) == (1, 0)

    def test_strict(self):
        error = raised(lambda: compiled(Layer(), strict=True)(hidden()))
        assert type(error) is RewriteError
        assert "gradients" in str(error)

    def test_frozen_weights_route_under_grad_mode(self):
        model = Layer().requires_grad_(False)
        compiled(model, routes="sparse", config=SMALL)(hidden())
        assert fluxcompile.routes(model).omega == 1.0

    def test_an_input_that_needs_a_gradient(self):
        model, x = Layer().requires_grad_(False), hidden().requires_grad_()
        out, messages = flux_warnings(lambda: compiled(model, routes="sparse", config=SMALL)(x))
        out.sum().backward()
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(x.grad, gradient)
        assert len(messages) == 1

    def test_inference_after_training(self):
        """The same callable: full attention under grad, routed without."""
        model = Layer()
        runner = compiled(model, routes="sparse", config=SMALL)
        x = hidden()
        with pytest.warns(FluxWarning, match="gradients"):
            torch.testing.assert_close(runner(x), model(x))
        with torch.no_grad():
            assert not torch.allclose(runner(x), model(x), atol=1e-3)
        torch.testing.assert_close(runner(x), model(x))


def dotted(q, k, v):
    """Every query sees every other key: no causal term."""
    place = torch.arange(q.shape[2])
    mask = ((place[None] + place[:, None]) % 2 == 0)[None, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def with_eye(q, k, v):
    mask = torch.eye(q.shape[2], dtype=torch.bool) | (torch.arange(q.shape[2]) == 0)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def with_weights(q, k, v):
    place = torch.arange(q.shape[2])
    bias = torch.where(place[None] <= place[:, None], 0.0, float("-inf"))[None, None]
    weights = torch.softmax(q @ k.transpose(2, 3) + bias, -1)
    return weights @ v + weights.mean()


def with_scores_filled(q, k, v):
    blocked = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.transpose(2, 3)).masked_fill(blocked, -1e3), -1) @ v


FALLBACKS = {
    dotted: SkipReason.MASK_UNREADABLE,
    with_eye: SkipReason.MASK_UNREADABLE,
    with_weights: SkipReason.WEIGHTS_RETURNED,
    with_scores_filled: SkipReason.SCORES_UNREADABLE,
}


class TestFallback:
    """What cannot be read runs as it was, is explained, and raises when that was asked for."""

    @pytest.mark.parametrize("attend", FALLBACKS, ids=lambda f: f.__name__)
    def test_equal_to_eager(self, attend):
        model, x = Layer(attend), hidden()
        with torch.no_grad():
            runner = compiled(model, routes="sparse", config=SMALL)
            out, messages = flux_warnings(lambda: runner(x))
            torch.testing.assert_close(out, model(x))
        (message,) = messages
        assert FALLBACKS[attend].value in message

    @pytest.mark.parametrize("attend", FALLBACKS, ids=lambda f: f.__name__)
    def test_explained(self, attend):
        (row,) = fluxcompile.explain(Layer(attend), hidden(), options={"routes": "sparse"}).rows
        assert row.reason is FALLBACKS[attend]
        assert row.became == "left alone"

    @pytest.mark.parametrize("attend", FALLBACKS, ids=lambda f: f.__name__)
    def test_strict(self, attend):
        with torch.no_grad():
            error = raised(lambda: compiled(Layer(attend), routes="sparse", strict=True)(hidden()))
        assert type(error) is RewriteError
        assert FALLBACKS[attend].value in str(error)

    def test_dropout(self):
        def attend(q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)

        with torch.no_grad():
            _, messages = flux_warnings(lambda: compiled(Layer(attend), routes="full")(hidden()))
            error = raised(lambda: compiled(Layer(attend), strict=True)(hidden()))
        assert "dropout" in messages[0]
        assert type(error) is RewriteError

    def test_what_is_not_causal_is_no_fallback(self):
        """Bidirectional attention is what it should be: neither a warning nor an error."""
        model, x = Layer(functional.scaled_dot_product_attention), hidden()
        with torch.no_grad():
            runner = compiled(model, routes="sparse", strict=True)
            out, messages = flux_warnings(lambda: runner(x))
            torch.testing.assert_close(out, model(x))
        assert messages == []

    def test_no_router(self):
        model, x = Layer(), hidden()
        with torch.no_grad():
            out, messages = flux_warnings(lambda: compiled(model)(x))
            torch.testing.assert_close(out, model(x), atol=2e-5, rtol=2e-5)
            assert len(messages) == 1
            assert "no router" in messages[0]
            error = raised(lambda: compiled(model, strict=True)(x))
        assert type(error) is RewriteError

    def test_routes_full_are_no_fallback(self):
        with torch.no_grad():
            _, messages = flux_warnings(
                lambda: compiled(Layer(), routes="full", strict=True)(hidden())
            )
        assert messages == []

    def test_a_query_that_is_not_found(self):
        """A router needs it; static routes do not."""

        def rotated_in_place(q):
            q = q.clone()
            q[..., :2] = q[..., :2] * torch.arange(q.shape[2])[:, None]
            return q

        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = Layer(rotary=rotated_in_place)

            def forward(self, x):
                return self.attention(x)

        model, x = Named(), hidden()
        router = FluxRouter(fluxcompile.FluxConfig(**SMALL), layer_names=["attention"], head_dim=8)
        with torch.no_grad():
            _, messages = flux_warnings(lambda: compiled(model, router=router)(x))
            assert "before rotary embedding" in messages[0]
            error = raised(lambda: compiled(model, router=router, strict=True)(x))
            assert type(error) is RewriteError
            static = {"routes": "sparse", "config": SMALL, "strict": True}
            _, messages = flux_warnings(lambda: compiled(model, **static)(x))
        assert messages == []
        assert fluxcompile.routes(model).omega == 1.0

    def test_a_cache_of_an_unknown_kind(self):
        """Keys that come from elsewhere: nobody knows their routes."""

        def attend(q, k, v, keys, values):
            k, v = torch.cat((keys, keys, k), 2), torch.cat((values, values, v), 2)
            place = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
            mask = (torch.arange(k.shape[2]) <= place)[None, None]
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        model, x = Layer(attend), hidden()
        past = [torch.randn(2, 4, 3, 8) for _ in range(2)]
        options = {"routes": "sparse", "config": SMALL}
        with torch.no_grad():
            out, messages = flux_warnings(lambda: compiled(model, **options)(x, *past))
            torch.testing.assert_close(out, model(x, *past), atol=2e-5, rtol=2e-5)
            assert "cache is of an unknown kind" in messages[0]
            error = raised(lambda: compiled(model, strict=True, **options)(x, *past))
        assert type(error) is RewriteError


class TestCudaWithoutTriton:
    """Asked for on a GPU without Triton installed: an error that says how to install it."""

    @pytest.fixture(autouse=True)
    def no_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)  # importing it now fails
        for name in ("decode", "streaming"):
            monkeypatch.delitem(sys.modules, f"fluxcompile.kernels.{name}.triton", raising=False)

    @pytest.mark.parametrize("op", ["full_attention", "streaming_attention", "decode_attention"])
    def test_the_cuda_kernel_says_how(self, op):
        """The very functions that CUDA dispatches to, called without a GPU."""
        q, k, v = (torch.randn(1, 2, 1, 64) for _ in range(3))
        bounds = torch.tensor([[[0, 1, 0, 1]]], dtype=torch.int32)
        operands = {
            "full_attention": (q, k, v, *[None] * 5, 1, 0.1, 0.0),
            "streaming_attention": (q, k, v, *[None] * 6, 2, 4, 0, 0.1, 0.0),
            "decode_attention": (q, k, v, bounds, None, None, 0.1, 0.0),
        }[op]
        with pytest.raises(KernelError, match=r"fluxcompile\[gpu\]"):
            CUDA_KERNELS[op](*operands)

    def test_the_cpu_needs_none(self):
        model, x = Layer(), hidden()
        with torch.no_grad():
            compiled(model, routes="sparse", config=SMALL)(x)
        assert fluxcompile.routes(model).omega == 1.0
