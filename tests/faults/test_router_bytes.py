"""A saved router with any one byte changed: the very same router, or an error that says so."""

import hashlib
import json
import random

import pytest
import safetensors.torch
import torch

from fluxcompile.config import FluxConfig
from fluxcompile.errors import RouterError
from fluxcompile.router import FluxRouter
from tests.router_models import random_router

#: what tells bytes apart for a parser: a digit and a bracket; for the others, NaN's exponent
CHANGES = {"config.json": b"1{\x00", "model.safetensors": b"\xff"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("router")
    router = random_router(base_model="org/base", backbone={"hidden_size": 16})
    router.save_pretrained(directory)
    return directory, router


def same(loaded: FluxRouter, router: FluxRouter) -> bool:
    fields = ("config", "layer_names", "head_dim", "heads", "base_model", "backbone")
    return all(getattr(loaded, f) == getattr(router, f) for f in fields) and all(
        map(torch.equal, loaded.state_dict().values(), router.state_dict().values())
    )


def loading(directory, router: FluxRouter) -> str | None:
    """The error, or None once the router has turned out to be the very one that was saved."""
    try:
        loaded = FluxRouter.from_pretrained(directory)
    except RouterError as error:
        return str(error)
    assert same(loaded, router)
    return None


def positions(data: bytes, name: str) -> list[int]:
    """Every byte of the config, of the length field and of the header; a sample of the tensors."""
    if name == "config.json":
        return list(range(len(data)))
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(5)
    tensors = draw.sample(range(header, len(data)), 300)
    return [*range(header), *tensors, len(data) - 1]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_byte(saved, name):
    directory, router = saved
    path = directory / name
    good = path.read_bytes()
    refused = 0
    try:
        for place in positions(good, name):
            for change in (*CHANGES[name], good[place] ^ 0x01):
                if good[place] == change:
                    continue
                path.write_bytes(good[:place] + bytes([change]) + good[place + 1 :])
                error = loading(directory, router)
                if error is not None:
                    refused += 1
                    assert "expected" in error, f"byte {place} of {name}: {error}"
                    assert str(directory) in error, f"byte {place} of {name}: {error}"
    finally:
        path.write_bytes(good)
    assert refused > 0.9 * len(positions(good, name))


@pytest.mark.parametrize("extra", [b"\x00", b"}", b"\n\n{}"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_bytes_at_the_end(saved, name, extra):
    directory, _ = saved
    path = directory / name
    good = path.read_bytes()
    path.write_bytes(good + extra)
    try:
        with pytest.raises(RouterError, match="expected"):
            FluxRouter.from_pretrained(directory)
    finally:
        path.write_bytes(good)


def test_a_number_that_would_also_do(tmp_path):
    """Of all damage the least visible: another router, whole and valid."""
    random_router(config=FluxConfig(sink=128)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"sink": 128', '"sink": 328'))
    with pytest.raises(RouterError, match=r"config.json \(changed after it was saved\)"):
        FluxRouter.from_pretrained(tmp_path)


def test_another_layout_of_the_same_config(saved, tmp_path):
    directory, router = saved
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    record = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(record.items()))))
    assert same(FluxRouter.from_pretrained(tmp_path), router)


def test_files_without_the_digest(saved, tmp_path):
    """As earlier versions wrote them."""
    directory, router = saved
    record = json.loads((directory / "config.json").read_text())
    state = safetensors.torch.load_file(directory / "model.safetensors")
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes(weights)
    record["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert same(FluxRouter.from_pretrained(tmp_path), router)
