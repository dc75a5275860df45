"""Saved routers: bit-exact round trip, atomic writes, and an answer to every kind of damage."""

import hashlib
import json
import os
import random
import resource
import types

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from fluxcompile import router_io
from fluxcompile.config import FluxConfig
from fluxcompile.errors import RouterError
from fluxcompile.router import FluxRouter
from tests.router_models import random_router


@pytest.fixture
def saved(tmp_path):
    """A directory with a saved router, and the router."""
    router = random_router(base_model="org/base", backbone={"hidden_size": 16})
    router.save_pretrained(tmp_path / "router")
    return tmp_path / "router", router


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_weights(directory, data, *, sign=True):
    """Replace the weights, with a matching digest unless told otherwise."""
    (directory / "model.safetensors").write_bytes(data)
    if sign:
        edit_config(directory, weights_sha256=hashlib.sha256(data).hexdigest())


def put_state(directory, state):
    put_weights(directory, safetensors.torch.save(state))


def refused(directory, *parts):
    """Loading fails with a RouterError that has every part in its message."""
    with pytest.raises(RouterError) as caught:
        FluxRouter.from_pretrained(directory)
    message = str(caught.value)
    assert "expected" in message
    assert "got" in message
    for part in (str(directory), *parts):
        assert part in message


def test_round_trip_is_bit_exact(saved):
    directory, router = saved
    loaded = FluxRouter.from_pretrained(directory)
    assert loaded.config == router.config == FluxConfig(sink=3, local=9)
    assert (loaded.layer_names, loaded.head_dim) == (router.layer_names, router.head_dim)
    assert (loaded.base_model, loaded.backbone) == ("org/base", {"hidden_size": 16})
    assert not loaded.training
    assert loaded.state_dict().keys() == router.state_dict().keys()
    for name, tensor in router.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].view(torch.int32), tensor.view(torch.int32))


def test_files_of_the_paper_s_router_have_the_keys_they_always_had(saved):
    directory, _ = saved
    record = json.loads((directory / "config.json").read_text())
    assert list(record) == list(router_io._KEYS)
    assert not {"segments", "heads", "standardize"} & record["flux"].keys()


EXTENDED = FluxConfig(
    prefix_size=7, suffix_size=5, segments="separate", heads="each", standardize=True
)


def extended_router():
    router = random_router(heads=3, config=EXTENDED)
    for layer in router.layers:
        layer.feature_mean.normal_()
        layer.feature_deviation.uniform_(0.5, 2)
    return router


def test_round_trip_of_a_router_that_reads_more(tmp_path):
    router = extended_router()
    router.save_pretrained(tmp_path)
    loaded = FluxRouter.from_pretrained(tmp_path)
    assert (loaded.config, loaded.heads) == (EXTENDED, 3)
    assert loaded.state_dict().keys() == router.state_dict().keys()
    for name, tensor in router.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_stored_in_half_the_size(tmp_path, dtype):
    router = extended_router()
    router.save_pretrained(tmp_path / "exact")
    router.save_pretrained(tmp_path / "half", dtype=dtype)
    stored = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    loaded = FluxRouter.from_pretrained(tmp_path / "half")
    for name, tensor in router.state_dict().items():
        standardising = name.endswith(("feature_mean", "feature_deviation"))
        assert stored[name].dtype == (torch.float32 if standardising else dtype)
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.to(stored[name].dtype).float())
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("exact", "half")]
    assert sizes[1] < 0.75 * sizes[0]  # the rest is the header, of so small a router
    loaded.save_pretrained(tmp_path / "again", dtype=dtype)
    assert contents(tmp_path / "again") == contents(tmp_path / "half")


def test_rounded_buffers_and_what_was_rounded_away_are_refused(tmp_path):
    router = extended_router()
    router.save_pretrained(tmp_path, dtype=torch.bfloat16)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state["layers.0.feature_mean"] = state["layers.0.feature_mean"].bfloat16()
    put_state(tmp_path, state)
    refused(tmp_path, "layers.0.feature_mean", "(24,)", "torch.bfloat16")
    router.layers[0].head[0].bias.data[2] = 1e5  # beyond fp16
    router.save_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(RouterError, match=r"layers.0.head.0.bias.*finite"):
        router.save_pretrained(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16", None])
def test_other_storage_is_refused(tmp_path, dtype):
    with pytest.raises(
        RouterError, match=r"dtype: expected one of torch\.float32 or torch\.bfloat16"
    ):
        random_router().save_pretrained(tmp_path, dtype=dtype)
    assert contents(tmp_path) == {}


def test_damage_to_a_router_that_reads_more(tmp_path):
    extended_router().save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, heads=None)
    refused(tmp_path, "heads (the router reads each)", "None")
    edit_config(tmp_path, heads=4)
    refused(tmp_path, "encoder.0.weight", "(32, 32)", "(32, 24)")
    edit_config(tmp_path, heads=3, flux=config["flux"] | {"standardize": False})
    refused(tmp_path, "feature_mean")
    edit_config(tmp_path, **config)
    state["layers.1.feature_deviation"][2] = 0
    put_state(tmp_path, state)
    refused(tmp_path, "layers.1.feature_deviation", "values > 0")


def test_saving_is_deterministic(saved, tmp_path):
    directory, _ = saved
    FluxRouter.from_pretrained(str(directory)).save_pretrained(str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(directory)


def test_files_are_readable_as_any_new_file(saved):
    directory, _ = saved
    (directory / "new").touch()
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


def test_card_names_the_base_model_and_is_kept(saved):
    directory, router = saved
    card = ModelCard.load(directory / "README.md")
    assert card.data.library_name == "fluxcompile"
    assert card.data.base_model == "org/base"
    assert "| `local` | 9 |" in card.text
    (directory / "README.md").write_text("mine")
    router.save_pretrained(directory)
    assert (directory / "README.md").read_text() == "mine"


def test_card_of_a_nameless_base_model(tmp_path):
    random_router().save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_card_says_which_weights_it_was_trained_against(tmp_path):
    random_router().save_pretrained(tmp_path, model_card_kwargs={"trained_against": "these"})
    assert "trained against these." in (tmp_path / "README.md").read_text()


def test_push_to_hub_uploads_the_three_files(monkeypatch):
    uploaded = {}

    def create_repo(self, repo_id, **_):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **_):
        uploaded[repo_id] = contents(folder_path)
        return "a commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert random_router().push_to_hub("me/router") == "a commit"
    assert sorted(uploaded["me/router"]) == ["README.md", "config.json", "model.safetensors"]


def test_save_then_push(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(FluxRouter, "push_to_hub", lambda self, repo, **kw: pushed.append(repo))
    random_router().save_pretrained(tmp_path / "name", push_to_hub=True)
    random_router().save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/router")
    assert pushed == ["name", "me/router"]
    with pytest.raises(RouterError, match="save, then upload the folder"):
        random_router().save_pretrained(tmp_path / "b", push_to_hub=True, dtype=torch.bfloat16)


def test_hub_id_is_downloaded(saved, monkeypatch):
    directory, router = saved
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = FluxRouter.from_pretrained("me/router", revision="v2")
    assert loaded.layer_names == router.layer_names
    assert (asked["repo_id"], asked["revision"]) == ("me/router", "v2")
    assert sorted(asked["allow_patterns"]) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, ValueError, HfHubHTTPError, OSError])
def test_download_failures(monkeypatch, error):
    def snapshot_download(*_, **__):
        if error is HfHubHTTPError:
            response = types.SimpleNamespace(headers={}, request=None, status_code=404)
            raise HfHubHTTPError("404", response=response)
        raise error("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(RouterError, match="'me/router': expected a directory or a repository"):
        FluxRouter.from_pretrained("me/router")


@pytest.mark.parametrize("name", ["/no/such/dir", "nothing_here", "./a/b", "a/b/c", "\0"])
def test_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # must not be asked
    with pytest.raises(RouterError, match=r"expected .*got .*no such"):
        FluxRouter.from_pretrained(name)


def test_a_file_is_no_directory(saved):
    directory, _ = saved
    with pytest.raises(RouterError, match=r"expected a directory, owner/name or .*, got a file"):
        FluxRouter.from_pretrained(directory / "model.safetensors")


def test_config_is_the_router_s_own(tmp_path):
    with pytest.raises(RouterError, match=r"expected None.*saved with its own config"):
        random_router().save_pretrained(tmp_path, config={"sink": 3})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_are_not_saved(saved, value):
    directory, router = saved
    before = contents(directory)
    router.layers[1].head[2].bias.data[1] = value
    with pytest.raises(RouterError, match=r"layers.1.head.2.bias.*finite values, got 1 of 4 NaN"):
        router.save_pretrained(directory)
    assert contents(directory) == before


# Atomic writes


@pytest.mark.parametrize("failing", [1, 2], ids=["weights", "config"])
def test_interrupted_save_leaves_the_old_router(saved, monkeypatch, failing):
    directory, router = saved
    before, fsync, calls = contents(directory), os.fsync, []

    def interrupted(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_router(head_dim=8).save_pretrained(directory)
    monkeypatch.undo()
    assert contents(directory) == before
    assert FluxRouter.from_pretrained(directory).head_dim == router.head_dim


def test_a_full_disk_leaves_the_old_router(saved):
    directory, _ = saved
    before = contents(directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            random_router(head_dim=8).save_pretrained(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(directory) == before


def test_a_save_torn_between_two_renames_leaves_the_old_router(saved, monkeypatch):
    directory, router = saved
    replace, done = os.replace, []

    def torn(source, target):
        if done:
            raise OSError("power cut")
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", torn)
    with pytest.raises(OSError, match="power cut"):
        random_router().save_pretrained(directory)
    monkeypatch.undo()
    loaded = FluxRouter.from_pretrained(directory)
    assert all(map(torch.equal, loaded.parameters(), router.parameters()))
    (directory / ".model.safetensors.previous").unlink()
    refused(directory, "sha256", "not saved together with config.json")
    random_router().save_pretrained(directory)
    assert sorted(contents(directory)) == ["README.md", "config.json", "model.safetensors"]


# Damaged and foreign files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(saved, name):
    directory, _ = saved
    (directory / name).unlink()
    refused(directory, name, "No such file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_in_place_of_a_file(saved, name):
    directory, _ = saved
    (directory / name).unlink()
    (directory / name).mkdir()
    refused(directory, name, "a readable file")


@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_weights(saved, kept, sign):
    directory, _ = saved
    put_weights(directory, (directory / "model.safetensors").read_bytes()[:kept], sign=sign)
    refused(directory, "a safetensors file" if sign else "sha256")


@pytest.mark.parametrize("data", [b"PK\x03\x04" * 100, b"{}", b"\xff" * 64, b"\0" * 64])
def test_not_safetensors(saved, data):
    directory, _ = saved
    put_weights(directory, data)
    with pytest.raises(RouterError, match=r"expected (a safetensors file|the 20 of 2 layers)"):
        FluxRouter.from_pretrained(directory)


def test_missing_and_unknown_keys(saved):
    directory, router = saved
    state = router.state_dict()
    state["layers.2.head.0.bias"] = state.pop("layers.1.head.0.bias")
    put_state(directory, state)
    refused(directory, "the 20 of 2 layers", "missing ['layers.1.head.0.bias']",
            "unknown ['layers.2.head.0.bias']")  # fmt: skip


def test_wrong_shape(saved):
    directory, router = saved
    state = router.state_dict()
    state["layers.0.encoder.0.weight"] = torch.zeros(4, 32)
    put_state(directory, state)
    refused(directory, "layers.0.encoder.0.weight", "(32, 4) torch.float32", "(4, 32)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_wrong_dtype(saved, dtype):
    directory, router = saved
    put_state(directory, {name: tensor.to(dtype) for name, tensor in router.state_dict().items()})
    refused(directory, "torch.float32 or torch.bfloat16 or torch.float16", str(dtype))


def test_weights_of_two_dtypes(saved):
    directory, router = saved
    state = router.state_dict()
    state["layers.1.head.0.bias"] = state["layers.1.head.0.bias"].bfloat16()
    put_state(directory, state)
    refused(directory, "layers.1.head.0.bias", "torch.float32 (head_dim 4)", "torch.bfloat16")


@pytest.mark.parametrize("name", ["F31", "BF17", "", "C64"])
def test_a_dtype_that_does_not_exist(saved, name):
    directory, _ = saved
    data = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"F32"', f'"{name}"'.encode(), 1)
    put_weights(directory, len(header).to_bytes(8, "little") + header + data[8 + size :])
    refused(directory, "a safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_not_loaded(saved, value):
    directory, router = saved
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    state["layers.1.head.4.weight"][1, 2] = value
    put_state(directory, state)
    refused(directory, "layers.1.head.4.weight", "finite values", "1 of 8 NaN or infinite")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"format": "gguf"}, ["'fluxcompile-router'", "'gguf'"]),
        ({"format": None, "toggle_type": "xattn"}, ["from_fluxattention"]),
        ({"format_version": 2}, ["format_version", "expected 1", "got 2"]),
        ({"format_version": True}, ["expected 1", "got True"]),
        ({"format_version": "1"}, ["expected 1", "got '1'"]),
        ({"head_dim": 8}, ["(64, 8) torch.float32", "(head_dim 8)", "(32, 4)"]),
        ({"head_dim": 10**15}, ["head_dim 1000000000000000"]),
        ({"head_dim": "4"}, ["config.json", "head_dim", "an int >= 1", "'4'"]),
        ({"layer_names": ["a"]}, ["the 10 of 1 layers", "20", "unknown"]),
        ({"layer_names": {"a": 1}}, ["config.json", "distinct module paths"]),
        ({"layer_names": ["a", 3]}, ["config.json", "distinct module paths"]),
        ({"base_model": []}, ["config.json", "base_model"]),
        ({"backbone": {"hidden_size": [1]}}, ["config.json", "backbone"]),
        ({"backbone": None}, ["config.json", "backbone"]),
        ({"flux": {"sink": 0}}, ["config.json", "FluxConfig.sink", "an int >= 1"]),
        ({"flux": {"sparse": "dilated"}}, ["config.json", "'streaming'", "'dilated'"]),
        ({"flux": {"sinks": 4}}, ["config.json", "unknown ['sinks']"]),
        ({"flux": None}, ["config.json", "a mapping of fields", "NoneType"]),
        ({"weights_sha256": "00"}, ["sha256", "expected 00"]),
        ({"weights_sha256": None}, ["sha256"]),
        ({"surprise": 1}, ["keys", "unknown ['surprise']"]),
    ],
    ids=str,
)  # fmt: skip
def test_bad_config(saved, changes, parts):
    directory, _ = saved
    edit_config(directory, **changes)
    refused(directory, *parts)


@pytest.mark.parametrize("key", ["flux", "head_dim", "layer_names", "weights_sha256", "backbone"])
def test_config_without_a_key(saved, key):
    directory, _ = saved
    record = json.loads((directory / "config.json").read_text())
    del record[key]
    (directory / "config.json").write_text(json.dumps(record))
    refused(directory, f"missing ['{key}']")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b"[" * 100_000])
def test_config_is_no_json_object(saved, text):
    directory, _ = saved
    (directory / "config.json").write_bytes(text)
    refused(directory, "config.json", "a JSON object")


@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_flipped_bytes_load_sanely_or_are_refused(saved, name, sign):
    """No damage may surface as anything else than a RouterError, even behind a right digest."""
    directory, router = saved
    expected = {key: tensor.shape for key, tensor in router.state_dict().items()}
    good, good_config = (directory / name).read_bytes(), (directory / "config.json").read_bytes()
    draw = random.Random(7)
    header = 8 + int.from_bytes(good[:8], "little") if name == "model.safetensors" else len(good)
    offsets = [draw.randrange(header) for _ in range(250)]
    offsets += [draw.randrange(len(good)) for _ in range(100)]
    outcomes = {"loaded": 0, "refused": 0}
    for offset in offsets:
        damaged = bytearray(good)
        damaged[offset] ^= 1 << draw.randrange(8)
        (directory / "config.json").write_bytes(good_config)
        if name == "config.json":
            (directory / name).write_bytes(damaged)
        else:
            put_weights(directory, bytes(damaged), sign=sign)
        try:
            loaded = FluxRouter.from_pretrained(directory)
        except RouterError as error:
            assert "expected" in str(error)  # noqa: PT017
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1
            assert {key: t.shape for key, t in loaded.state_dict().items()} == expected
            assert all(torch.isfinite(t).all() for t in loaded.state_dict().values())
    assert outcomes["refused"] > 100
    if name == "model.safetensors":
        assert (outcomes["loaded"] > 0) == sign


def test_random_bytes_after_the_header_length(saved):
    directory, _ = saved
    draw = random.Random(3)
    for _ in range(100):
        body = draw.randbytes(draw.randrange(200))
        put_weights(directory, draw.randrange(256).to_bytes(8, "little") + body)
        with pytest.raises(RouterError, match="expected a safetensors file"):
            FluxRouter.from_pretrained(directory)


def test_some_names_the_first_few():
    assert router_io.some({"c", "a", "d", "b"}) == "['a', 'b', 'c'] and 1 more"
