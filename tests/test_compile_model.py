"""``fluxcompile.compile``: one call attaches and compiles in place."""

import copy

import pytest
import torch
from torch import nn

import fluxcompile
from fluxcompile import FluxConfig, FluxRouter, OptionError, RouterError
from fluxcompile.attachment import attachment_of
from tests.router_models import tiny_llama
from tests.test_owner import compiled_graphs, llama, logits, routed, router_for


@pytest.fixture
def ids():
    return torch.randint(0, 61, (1, 40))


def with_router(letters: str, **options):
    model = llama(None)
    return fluxcompile.compile(model, router_for(model, letters), lowering="eager", **options)


def test_returns_the_model_and_generate_runs_what_was_compiled(ids):
    model = llama(None)
    eager = logits(model, ids)
    assert fluxcompile.compile(model, router_for(model, "FF"), lowering="eager") is model
    torch.testing.assert_close(logits(model, ids), eager)
    assert str(fluxcompile.routes(model)).startswith("row 0: FF")


@pytest.mark.parametrize("by", ["object", "directory"])
def test_router_by_object_and_by_directory(ids, tmp_path, by):
    model = llama(None)
    router = router_for(model, "SF")
    if by == "directory":
        router.save_pretrained(tmp_path)
        router = tmp_path
    fluxcompile.compile(model, router, lowering="eager")
    assert routed(model, ids) == "SF"


def test_without_a_router_it_keeps_the_attached_one(ids):
    model = fluxcompile.compile(llama("FS"), lowering="eager")
    assert routed(model, ids) == "FS"


def test_static_routes(ids):
    config = FluxConfig(sink=4, local=8)
    model = fluxcompile.compile(llama(None), routes=[0, 1], config=config, lowering="eager")
    assert routed(model, ids) == "SF"


def test_again_with_the_same_options_compiles_nothing(ids):
    model = with_router("SF")
    before = logits(model, ids)
    held = len(compiled_graphs())
    fluxcompile.compile(model, lowering="eager")
    torch.testing.assert_close(logits(model, ids), before)
    assert len(compiled_graphs()) == held


def test_again_with_other_options_and_another_router(ids):
    model = with_router("SF")
    assert routed(model, ids) == "SF"
    fluxcompile.compile(model, routes="sparse", lowering="eager")
    assert routed(model, ids) == "SS"
    fluxcompile.compile(model, router_for(model, "FS"), lowering="eager")
    assert routed(model, ids) == "FS"


def test_a_copy_is_not_compiled(ids):
    assert copy.deepcopy(with_router("SF"))._compiled_call_impl is None


def test_unknown_option_and_bad_values():
    model = llama(None)
    with pytest.raises(OptionError, match=r"got unknown .'streams'"):
        fluxcompile.compile(model, streams=2)
    with pytest.raises(OptionError, match=r"fluxcompile\.compile's inductor_mode"):
        fluxcompile.compile(model, mode="reduce-overhead")
    with pytest.raises(OptionError, match="mode: expected one of"):
        fluxcompile.compile(model, inductor_mode="fast")
    with pytest.raises(RouterError, match="router: expected a FluxRouter or a path"):
        fluxcompile.compile(model, 3)
    with pytest.raises(RouterError):
        fluxcompile.compile(model, FluxRouter(FluxConfig(), layer_names=["no.layer"], head_dim=16))
    assert model._compiled_call_impl is None
    assert attachment_of(model) is None


def test_inductor_mode_goes_along_with_options(ids):
    model = with_router("SF", inductor_mode="default", strict=True)
    assert routed(model, ids) == "SF"


@pytest.mark.parametrize("wrong", [None, "gpt2", lambda x: x], ids=["none", "name", "function"])
def test_what_is_no_model(wrong):
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Module, got"):
        fluxcompile.compile(wrong)


def test_a_model_compiled_otherwise_is_refused():
    model = tiny_llama()
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(OptionError, match=r"LlamaForCausalLM\.model\.layers\.1, compiled by"):
        fluxcompile.compile(model)
    model.model.layers[1]._compiled_call_impl = None
    fluxcompile.compile(model)


def test_a_wrapper_is_refused():
    with pytest.raises(OptionError, match=r"pass its _orig_mod"):
        fluxcompile.compile(torch.compile(tiny_llama(), backend="eager"))
    with pytest.raises(OptionError, match=r"wrapper at Sequential\.0"):
        fluxcompile.compile(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")))
