"""LayerRouter's arithmetic, and which models a FluxRouter fits."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError, FluxWarning, RouterError
from fluxcompile.router import FluxRouter, LayerRouter
from tests.router_models import HandWritten, random_router, tiny_llama

LLAMA_LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


@pytest.fixture
def noisy() -> LayerRouter:
    return random_router(head_dim=16, layers=1).layers[0]


@pytest.mark.parametrize("head_dim", [16, 64])
def test_new_router_chooses_full_attention(head_dim):
    logits = LayerRouter(head_dim)(100 * torch.randn(5, head_dim))
    assert torch.equal(logits, torch.tensor([[0.0, 4.5]]).expand(5, 2))


def test_shapes_are_the_module_s():
    actual = {name: tuple(p.shape) for name, p in LayerRouter(16).named_parameters()}
    assert LayerRouter.shapes(16) == actual


def test_a_biased_copy_adds_to_the_logit_of_full_attention():
    router, features = random_router(head_dim=16, layers=2), torch.randn(5, 16)
    before = [layer(features) for layer in router.layers]
    for layer, logits in zip(router.biased(0.5).layers, before, strict=True):
        torch.testing.assert_close(layer(features), logits + torch.tensor([0.0, 0.5]))
    for layer, logits in zip(router.layers, before, strict=True):
        assert torch.equal(layer(features), logits)
    with pytest.raises(RouterError, match="bias: expected a finite number"):
        router.biased(float("nan"))


@pytest.mark.parametrize("standardize", [False, True])
def test_shapes_of_a_router_that_reads_more(standardize):
    actual = {n: tuple(x.shape) for n, x in LayerRouter(16, 96, standardize).state_dict().items()}
    assert LayerRouter.shapes(16, 96, standardize) == actual
    assert actual["encoder.0.weight"] == (128, 96)


def test_a_router_of_the_paper_has_no_more_than_the_paper_s():
    router = FluxRouter.from_model(tiny_llama())
    assert not list(router.buffers())
    assert router.heads is None


def test_standardised_features():
    plain, standardising = LayerRouter(4), LayerRouter(4, standardize=True)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    standardising.load_state_dict(plain.state_dict(), strict=False)
    read = torch.randn(3, 4)
    assert torch.equal(standardising(read), plain(read))
    assert not standardising.calibrated
    standardising.feature_mean.fill_(2.0)
    standardising.feature_deviation.fill_(0.5)
    assert standardising.calibrated
    torch.testing.assert_close(standardising(read), plain(2 * read - 4))


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({"segments": "separate"}, 32),
        ({"segments": "separate", "suffix_size": 0}, 16),
        ({"heads": "each"}, 64),
        ({"segments": "separate", "heads": "each", "standardize": True}, 128),
    ],
    ids=str,
)
def test_from_model_with_more_to_read(fields, inputs):
    router = FluxRouter.from_model(tiny_llama(), FluxConfig(**fields))
    assert router.heads == (4 if "heads" in fields else None)
    for layer in router.layers:
        assert layer.encoder[0].weight.shape == (128, inputs)
        assert layer.standardizes == ("standardize" in fields)
        assert torch.equal(layer(torch.randn(2, inputs)), torch.tensor([[0.0, 4.5]] * 2))


def test_heads_where_the_model_does_not_tell():
    each = {"config": FluxConfig(heads="each"), "layers": ["blocks.0.attn"], "head_dim": 8}
    with pytest.raises(RouterError, match=r"query heads of HandWritten: expected.*heads= given"):
        FluxRouter.from_model(HandWritten(), **each)
    assert FluxRouter.from_model(HandWritten(), **each, heads=4).heads == 4


def test_check_model_refuses_another_number_of_heads():
    router = FluxRouter.from_model(tiny_llama(), FluxConfig(heads="each"))
    router.backbone = {}
    with pytest.raises(RouterError, match=r"query heads of .*: expected 4 \(the router's\), got 8"):
        router.check_model(tiny_llama(num_attention_heads=8, head_dim=16))


def test_it_is_the_method_s_mlp(noisy):
    pooled = torch.randn(3, 16)
    p = dict(noisy.named_parameters())

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def silu(x):
        return x * torch.sigmoid(x)

    context = linear(silu(linear(pooled, "encoder.0")), "encoder.2")
    expected = linear(silu(linear(silu(linear(context, "head.0")), "head.2")), "head.4")
    torch.testing.assert_close(noisy(pooled), expected)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting_changes_nothing(noisy, cast):
    pooled = torch.randn(3, 16)
    before, weights = noisy(pooled), copy.deepcopy(noisy.state_dict())
    getattr(nn.Sequential(noisy), cast)()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in noisy.state_dict().items())
    assert torch.equal(noisy(pooled), before)


def test_moving_works_together_with_a_cast(noisy):
    assert {p.device.type for p in noisy.to("meta", torch.bfloat16).parameters()} == {"meta"}
    assert {p.dtype for p in noisy.parameters()} == {torch.float32}


def test_autocast_and_low_precision_inputs(noisy):
    pooled = torch.randn(3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = noisy(pooled)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, noisy(pooled.float()))


def test_default_dtype_does_not_leak_in():
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = LayerRouter(16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in router.parameters()} == {torch.float32}


def test_it_compiles_to_one_graph(noisy):
    pooled = torch.randn(3, 16).bfloat16()
    compiled = torch.compile(noisy, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pooled), noisy(pooled))


def test_from_model_finds_llama():
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    router = FluxRouter.from_model(model, FluxConfig(sink=7))
    assert router.layer_names == LLAMA_LAYERS
    assert (router.head_dim, len(router.layers), router.config.sink) == (16, 2, 7)
    assert router.base_model.startswith("LlamaForCausalLM(model_type=llama, hidden_size=64")
    assert router.backbone["num_key_value_heads"] == 2
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_base_model_is_the_name_it_was_loaded_by():
    model = tiny_llama()
    model.config._name_or_path = "someone/something"
    assert FluxRouter.from_model(model).base_model == "someone/something"


def test_layers_are_ordered_by_index_not_by_name():
    names = FluxRouter.from_model(tiny_llama(num_hidden_layers=11, hidden_size=32)).layer_names
    assert names == tuple(f"model.layers.{index}.self_attn" for index in range(11))


def test_head_dim_of_its_own():
    config = Qwen3Config(
        hidden_size=64,
        head_dim=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=61,
    )
    assert FluxRouter.from_model(Qwen3ForCausalLM(config)).head_dim == 64


def test_cross_attention_is_left_out():
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=64, add_cross_attention=True
    )
    names = FluxRouter.from_model(GPT2LMHeadModel(config)).layer_names
    assert names == ("transformer.h.0.attn", "transformer.h.1.attn")


def test_a_decoder_layer_with_an_index_is_not_an_attention():
    model = tiny_llama()
    for index, layer in enumerate(model.model.layers):
        layer.layer_idx = index
        layer.head_dim = 16
    assert FluxRouter.from_model(model).layer_names == LLAMA_LAYERS


def test_a_shared_attention_counts_once():
    model = tiny_llama()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    assert FluxRouter.from_model(model).layer_names == LLAMA_LAYERS[:1]


@pytest.mark.parametrize("missing", ["head_dim", "config"])
def test_head_dim_falls_back_to_the_config(missing):
    model = tiny_llama()
    for layer in model.model.layers:
        delattr(layer.self_attn, "head_dim")
        if missing == "config":
            delattr(layer.self_attn, "config")
    model.config.head_dim = None
    assert FluxRouter.from_model(model).head_dim == 16


def test_compiled_wrapper_is_looked_through():
    model = torch.compile(tiny_llama(), backend="eager")
    assert FluxRouter.from_model(model).layer_names == LLAMA_LAYERS


def test_hand_written_layers():
    router = FluxRouter.from_model(
        HandWritten(), layers=["blocks.2.attn", "blocks.0.attn"], head_dim=8
    )
    assert router.layer_names == ("blocks.2.attn", "blocks.0.attn")
    assert router.head_dim == 8
    assert router.base_model == "HandWritten()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "attention layers of HandWritten: expected modules with an integer layer_idx.*none"),
        ({"layers": ["blocks.0.attn"]}, "'blocks.0.attn': expected a head_dim.*got none of them"),
        (
            {"layers": ["blocks.7.attn"]},
            r"'blocks.7.attn'.*got no such module \(closest: \['blocks",
        ),
        ({"layers": []}, r"layers: expected distinct module paths, got \[\]"),
        ({"layers": "blocks.0.attn"}, "expected distinct module paths, got 'blocks.0.attn'"),
        ({"layers": ["blocks.0.attn"] * 2}, "expected distinct module paths"),
        ({"layers": ["blocks.0.attn"], "head_dim": -4}, "head_dim: expected an int >= 1, got -4"),
    ],
)
def test_models_it_cannot_read(arguments, message):
    with pytest.raises(RouterError, match=message):
        FluxRouter.from_model(HandWritten(), **arguments)


def test_differing_head_dims():
    model = tiny_llama()
    model.model.layers[1].self_attn.head_dim = 32
    with pytest.raises(RouterError, match=r"the same in every attention layer.*got.*: 16.*: 32"):
        FluxRouter.from_model(model)


def test_not_a_model():
    with pytest.raises(RouterError, match=r"model: expected a torch.nn.Module, got str"):
        FluxRouter.from_model("meta-llama/Llama-3.1-8B")


def test_not_a_config():
    with pytest.raises(ConfigError, match=r"expected a FluxConfig, got \{'sink': 4\}"):
        FluxRouter.from_model(tiny_llama(), {"sink": 4})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_names": []}, r"layer_names: expected distinct module paths, got \[\]"),
        ({"layer_names": "abc"}, "layer_names: expected distinct module paths, got 'abc'"),
        ({"layer_names": ["a", "a"]}, "layer_names: expected distinct module paths"),
        ({"head_dim": 0}, "head_dim: expected an int >= 1, got 0"),
        ({"head_dim": 4.0}, "head_dim: expected an int >= 1, got 4.0"),
        ({"base_model": 3}, "base_model: expected a name or None, got 3"),
        ({"backbone": ["x"]}, "backbone: expected a mapping"),
        ({"heads": 4}, r"heads \(the router reads their mean\): expected None, got 4"),
        (
            {"config": FluxConfig(heads="each")},
            r"heads \(the router reads each\): expected an int >= 1, got None",
        ),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(RouterError, match=message):
        FluxRouter(**({"layer_names": ["a"], "head_dim": 4} | fields))


def test_check_model_accepts_its_own():
    model = tiny_llama()
    router = FluxRouter.from_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.check_model(model)
        router.check_model(copy.deepcopy(model))
        router.check_model(torch.compile(model, backend="eager"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 1}, "'model.layers.1.self_attn' of the router.*got no such module"),
        ({"num_attention_heads": 2}, r"head_dim of .*: expected 16 \(the router's\), got 32"),
        ({"hidden_size": 32, "head_dim": 16}, "hidden_size of LlamaForCausalLM: expected 64.*32"),
        ({"num_key_value_heads": 4}, "num_key_value_heads of LlamaForCausalLM: expected 2.*got 4"),
        ({"num_hidden_layers": 3}, "num_hidden_layers of LlamaForCausalLM: expected 2.*got 3"),
    ],
)
def test_check_model_refuses_another(other, message):
    router = FluxRouter.from_model(tiny_llama())
    with pytest.raises(RouterError, match=message):
        router.check_model(tiny_llama(**other))


def test_check_model_refuses_another_type():
    router = FluxRouter.from_model(tiny_llama())
    router.backbone["model_type"] = "qwen3"
    with pytest.raises(RouterError, match=r"model_type of .*expected 'qwen3'.*got 'llama'"):
        router.check_model(tiny_llama())


@pytest.mark.parametrize(
    ("name", "warns"),
    [("org/base", False), ("org/finetune", True), ("/data/finetune", False), ("", False)],
)
def test_another_hub_name_only_warns(name, warns):
    model = tiny_llama()
    model.config._name_or_path = "org/base"
    router = FluxRouter.from_model(model)
    model.config._name_or_path = name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        router.check_model(model)
    assert [w.category for w in caught] == [FluxWarning] * warns


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_routers_can_be_copied(copied):
    router = random_router(base_model="org/base")
    other = copied(router)
    assert (other.config, other.layer_names, other.base_model) == (
        router.config,
        router.layer_names,
        "org/base",
    )
    assert all(
        torch.equal(a, b) for a, b in zip(other.parameters(), router.parameters(), strict=True)
    )
