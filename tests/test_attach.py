"""Attaching a router leaves the model as it is and is found from any of its tensors."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from fluxcompile.attachment import (
    Routes,
    attach,
    attachment_of,
    detach,
    find,
    layer_of,
    record_routes,
    routes_of,
)
from fluxcompile.errors import FluxWarning, RouterError
from fluxcompile.router import FluxRouter
from tests.router_models import tiny_llama


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def router(model):
    return FluxRouter.from_model(model)


def test_every_parameter_and_buffer_finds_it(model, router):
    attachment = attach(model, router)
    assert attachment is attachment_of(model)
    assert (attachment.router, attachment.model) == (router, model)
    for tensor in [*model.parameters(), *model.buffers()]:
        assert find([tensor]) is attachment
    assert find([3, None, torch.zeros(2), model.lm_head.weight]) is attachment
    assert find([torch.zeros(2)]) is None
    assert find([]) is None


def test_layer_of(model, router):
    attach(model, router)
    for index, layer in enumerate(model.model.layers):
        assert {layer_of(p) for p in layer.self_attn.parameters()} == {index}
        assert {layer_of(p) for p in layer.mlp.parameters()} == {None}
    assert layer_of(model.lm_head.weight) is None
    assert layer_of(torch.zeros(1)) is None


def test_layers_are_numbered_by_the_router(model):
    names = ["model.layers.1.self_attn"]
    attach(model, FluxRouter.from_model(model, layers=names))
    assert layer_of(model.model.layers[1].self_attn.q_proj.weight) == 0
    assert layer_of(model.model.layers[0].self_attn.q_proj.weight) is None


def test_buffers_of_a_layer_count_and_shared_tensors_do_not(model, router):
    first, second = (layer.self_attn for layer in model.model.layers)
    first.register_buffer("scale", torch.ones(1))
    second.q_proj.weight = first.q_proj.weight
    attach(model, router)
    assert layer_of(first.scale) == 0
    assert layer_of(first.q_proj.weight) is None
    assert layer_of(second.k_proj.weight) == 1


def test_the_backend_finds_it_from_graph_inputs(model, router):
    attachment = attach(model, router)
    found = []

    def backend(gm, example_inputs):
        found.append(find(example_inputs))
        return gm

    torch.compile(model, backend=backend)(torch.arange(5)[None], use_cache=False)
    assert found == [attachment]


def test_from_a_saved_router(model, router, tmp_path):
    router.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        assert attach(model, path).router.layer_names == router.layer_names


def test_attaching_again_replaces(model, router):
    first = attach(model, router)
    other = FluxRouter.from_model(model)
    second = attach(model, other)
    assert second.generation != first.generation
    assert find(model.parameters()) is attachment_of(model) is second
    assert attach(model, other).generation not in (first.generation, second.generation)


def test_detach(model, router):
    attach(model, router)
    detach(model)
    assert attachment_of(model) is None
    assert find(model.parameters()) is None
    assert layer_of(model.model.layers[0].self_attn.q_proj.weight) is None
    with pytest.raises(RouterError, match="expected a model with a router attached, got a Llama"):
        detach(model)


def test_detach_leaves_other_models_alone(model, router):
    other = tiny_llama()
    attach(model, router)
    attachment = attach(other, router)
    detach(model)
    assert find(other.parameters()) is attachment


def test_compiled_wrapper_is_its_model(model, router):
    wrapper = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment = attach(wrapper, router)
    assert attachment_of(model) is attachment_of(wrapper) is attachment
    detach(wrapper)
    assert attachment_of(model) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "router: expected a FluxRouter or a path, got NoneType"),
        (nn.Linear(2, 2), "router: expected a FluxRouter or a path, got Linear"),
        ("no_such_directory", "'no_such_directory': expected a directory.*no such directory"),
    ],
    ids=["none", "module", "path"],
)
def test_not_a_router(model, bad, message):
    with pytest.raises(RouterError, match=message):
        attach(model, bad)


def test_not_a_model(router):
    with pytest.raises(RouterError, match=r"model: expected a torch.nn.Module, got dict"):
        attach({}, router)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 1}, "'model.layers.1.self_attn'.*got no such module"),
        ({"num_attention_heads": 2}, "head_dim of .*expected 16 .*got 32"),
        ({"num_key_value_heads": 1}, "num_key_value_heads of .*expected 2 .*got 1"),
    ],
    ids=str,
)
def test_a_router_for_another_model_changes_nothing(model, router, other, message):
    wrong = tiny_llama(**other)
    attachment = attach(wrong, FluxRouter.from_model(wrong))
    with pytest.raises(RouterError, match=message):
        attach(wrong, router)
    assert find(wrong.parameters()) is attachment_of(wrong) is attachment


# What attaching must not change


def test_state_dict_and_modules_stay(model, router):
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    attributes = set(vars(model))
    attach(model, router)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    assert set(vars(model)) == attributes


def test_the_router_is_not_touched(model, router):
    before = {name: (t.data_ptr(), t.clone()) for name, t in router.state_dict().items()}
    attach(model.to(torch.bfloat16), router)
    for name, tensor in router.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_save_pretrained_writes_the_plain_model(model, router, tmp_path):
    attach(model, router)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert attachment_of(loaded) is None


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_is_unattached_and_can_be_attached(model, router, copied):
    attachment = attach(model, router)
    other = copied(model)
    assert attachment_of(other) is None
    assert find([*other.parameters(), *other.buffers()]) is None
    assert find([*model.parameters(), *other.parameters()]) is attachment
    assert attach(other, router) is find(other.parameters())
    assert find(model.parameters()) is attachment


def test_it_survives_casts(model, router):
    attachment = attach(model, router)
    model.to(torch.bfloat16).to(torch.float32)
    assert find(model.parameters()) is attachment
    assert layer_of(model.model.layers[1].self_attn.o_proj.weight) == 1


@pytest.mark.parametrize("replace", ["assigned state", "recreated parameters", "buffers only"])
def test_it_survives_new_tensor_objects(model, router, replace):
    attachment = attach(model, router)
    if replace == "assigned state":
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        tensors = list(model.parameters())
    elif replace == "recreated parameters":
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        tensors = list(model.parameters())
    else:
        model._apply(lambda tensor: tensor.clone())
        tensors = list(model.buffers())
    assert find(tensors) is attachment
    assert layer_of(model.model.layers[0].self_attn.v_proj.weight) == 0


def test_nothing_keeps_the_model_alive(router):
    model = tiny_llama()
    attachment = attach(model, router)
    weight, gone = model.lm_head.weight, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert attachment.model is None
    del attachment
    gc.collect()
    assert find([weight]) is None


def test_two_models_in_one_graph(model, router):
    other = tiny_llama()
    first, second = attach(model, router), attach(other, router)
    with pytest.warns(FluxWarning, match="weights of 2 models with routers"):
        assert find([*model.parameters(), *other.parameters()]) is None
    assert find(model.parameters()) is first
    assert find(other.parameters()) is second


def test_a_tied_embedding_does_not_decide(model, router):
    other = tiny_llama()
    other.model.embed_tokens.weight = model.model.embed_tokens.weight
    first = attach(model, router)
    attach(other, router)
    assert find(model.parameters()) is first


# Routes


@pytest.fixture
def routes():
    fa = torch.tensor([[True, False, False, False], [True, True, False, False]])
    return Routes(fa, ("a", "b", "c", "d"))


def test_omega_is_the_sparse_share(routes):
    assert routes.omega_per_row.tolist() == [0.75, 0.5]
    assert routes.omega == 0.625


def test_routes_print_one_line_a_row(routes):
    assert str(routes) == "row 0: FSSS  Ω=0.75\nrow 1: FFSS  Ω=0.50"


@pytest.mark.parametrize("fa", [torch.ones(1, 2), torch.ones(2, dtype=torch.bool),
                                torch.ones(1, 3, dtype=torch.bool)])  # fmt: skip
def test_routes_of_wrong_shape_or_dtype(fa):
    with pytest.raises(RouterError, match=r"expected bool \[batch, 2\], got torch"):
        Routes(fa, ("a", "b"))


def test_routes_are_found_from_any_parameter_and_the_last_ones_win(model, routes):
    assert routes_of(model) is None
    record_routes(model.lm_head.weight, routes)
    assert routes_of(model) is routes_of(torch.compile(model, backend="eager")) is routes
    later = Routes(~routes.fa, routes.layer_names)
    record_routes(model.model.layers[0].self_attn.q_proj.weight, later)
    assert routes_of(model) is routes_of(model.model) is later
    record_routes(model.lm_head.weight, routes)
    assert routes_of(model) is routes
    assert routes_of(tiny_llama()) is None


def test_routes_do_not_outlive_their_model(routes):
    from fluxcompile import route_record

    before = len(route_record._records)
    model = tiny_llama()
    record_routes(model.lm_head.weight, routes)
    del model
    gc.collect()
    assert len(route_record._records) == before
