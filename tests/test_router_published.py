"""Routers out of published checkpoints, on fabricated ones with the exact keys."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

from fluxcompile import published
from fluxcompile.config import FluxConfig
from fluxcompile.errors import RouterError
from fluxcompile.router import FluxRouter
from tests.router_models import random_router

LAYERS, HEAD_DIM = 3, 4
PREFIX = "model.layers.{}.self_attn.mask_allocator."
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 8,
    "head_dim": HEAD_DIM,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "toggle_type": "streaming",
    "retrieval_mode": "full",
    "sink_size": 128,
    "local_window_size": 2048,
    "pool_size": 100,
    "use_softmax": True,
}


def router_tensors(router, dtype=torch.bfloat16):
    """The router's weights under the published names."""
    tensors = {}
    for index, layer in enumerate(router.layers):
        for name, tensor in layer.state_dict().items():
            part, rest = name.split(".", 1)
            part = {"encoder": "cls_feat_extractor", "head": "cls_router_head_agnostic"}[part]
            tensors[f"{PREFIX.format(index)}{part}.{rest}"] = tensor.to(dtype)
    return tensors


def backbone_tensors():
    tensors = {"model.embed_tokens.weight": torch.zeros(1000, 8), "lm_head.weight": torch.ones(3)}
    for index in range(LAYERS):
        tensors[f"model.layers.{index}.self_attn.q_proj.weight"] = torch.zeros(8, 8)
        tensors[f"model.layers.{index}.self_attn.attn_mask_log_alphas"] = torch.zeros(1)
    return tensors


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint: router weights in two shards, the backbone's in a third, not on disk."""

    def write(tensors, *, config=None, sharded=True):
        directory = tmp_path / "Qwen3-4B-FA-SSA"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
        if not sharded:
            path = directory / "model.safetensors"
            safetensors.torch.save_file(tensors | backbone_tensors(), path)
            return directory
        shards = {"model-00001-of-00003.safetensors": {}, "model-00002-of-00003.safetensors": {}}
        for key, tensor in tensors.items():
            first = key.startswith(PREFIX.format(0))
            shards[f"model-0000{1 if first else 2}-of-00003.safetensors"][key] = tensor
        weight_map = {key: shard for shard, part in shards.items() for key in part}
        weight_map |= dict.fromkeys(backbone_tensors(), "model-00003-of-00003.safetensors")
        for shard, part in shards.items():
            extra = {"model.norm.weight": torch.zeros(1 << 16)}
            safetensors.torch.save_file(part | extra, directory / shard)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / published.INDEX_FILE).write_text(json.dumps(index))
        return directory

    return write


@pytest.fixture
def router():
    """Random weights that bf16 holds exactly, so that a conversion must be bit-exact."""
    router = random_router(HEAD_DIM, LAYERS)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(parameter.bfloat16())
    return router


def refused(directory, *parts):
    with pytest.raises(RouterError) as caught:
        FluxRouter.from_fluxattention(directory)
    for part in ("expected", "got", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_weights_arrive_bit_exact(write, router, sharded, dtype):
    converted = FluxRouter.from_fluxattention(write(router_tensors(router, dtype), sharded=sharded))
    assert converted.config == FluxConfig()
    assert converted.head_dim == HEAD_DIM
    assert converted.layer_names == router.layer_names
    assert converted.base_model == "Qwen3-4B-FA-SSA"
    assert converted.backbone == {
        "hidden_size": 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    }
    for name, tensor in router.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor)


def test_a_converted_router_saves_and_loads(write, router, tmp_path):
    converted = FluxRouter.from_fluxattention(str(write(router_tensors(router))))
    converted.save_pretrained(tmp_path / "saved")
    loaded = FluxRouter.from_pretrained(tmp_path / "saved")
    pooled = torch.randn(5, HEAD_DIM)
    assert torch.equal(loaded.layers[2](pooled), router.layers[2](pooled))


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_backbone_tensors_are_never_read(write, router, monkeypatch, sharded):
    directory = write(router_tensors(router), sharded=sharded)
    opened, read = [], []

    class Spy:
        def __init__(self, path, **options):
            opened.append(path.name)
            self.file = safe_open(path, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exc):
            return self.file.__exit__(*exc)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    safe_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Spy)
    FluxRouter.from_fluxattention(directory)
    assert sorted(read) == sorted(router_tensors(router))
    assert "model-00003-of-00003.safetensors" not in opened
    assert len(opened) == (2 if sharded else 1)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"toggle_type": "xattn"}, FluxConfig(sparse="xattention")),
        ({"toggle_type": "triangle"}, FluxConfig(sparse="triangle")),
        ({"toggle_type": "triangle", "triangle_n_last": 64}, FluxConfig("triangle", last=64)),
        ({"retrieval_mode": "xattn"}, FluxConfig(retrieval="xattention")),
        (
            {"sink_size": 64, "local_window_size": 1024, "pool_size": 50},
            FluxConfig(sink=64, local=1024, pool_size=50),
        ),
        ({"pooling_mode": "ctx_q"}, FluxConfig()),
    ],
    ids=str,
)
def test_settings(write, router, entries, expected):
    directory = write(router_tensors(router), config=entries)
    assert FluxRouter.from_fluxattention(directory).config == expected


def test_absent_settings_take_the_checkpoints_own_defaults(write, router):
    directory = write(router_tensors(router))
    (directory / "config.json").write_text("{}")
    assert FluxRouter.from_fluxattention(directory).config == FluxConfig(local=1024)


@pytest.mark.parametrize("stated", [False, None])
def test_one_logit_heads_decide_alike(write, router, stated):
    tensors = router_tensors(router, torch.float32)
    for index in range(LAYERS):
        for name in ("weight", "bias"):
            key = f"{PREFIX.format(index)}cls_router_head_agnostic.4.{name}"
            tensors[key] = tensors[key][1:].clone()
    directory = write(tensors, config={"use_softmax": stated})
    converted = FluxRouter.from_fluxattention(directory)
    pooled = torch.randn(64, HEAD_DIM)
    for layer, original in zip(converted.layers, router.layers, strict=True):
        logits, one = layer(pooled), original(pooled)[:, 1]
        assert torch.equal(logits[:, 0], torch.zeros(64))
        torch.testing.assert_close(logits[:, 1], one)
        assert torch.equal(logits.argmax(dim=1) == 1, logits[:, 1].sigmoid() > 0.5)


def test_use_softmax_against_the_head_s_shape(write, router):
    directory = write(router_tensors(router), config={"use_softmax": False})
    refused(directory, "1 logits (use_softmax is False)", "got 2")


def test_training_only_tensors_are_ignored(write, router):
    extra = {
        f"{PREFIX.format(0)}log_temp": torch.zeros(()),
        f"{PREFIX.format(1)}task_embedding.weight": torch.zeros(4, HEAD_DIM),
    }
    converted = FluxRouter.from_fluxattention(write(router_tensors(router) | extra))
    assert converted.layer_names == router.layer_names


@pytest.mark.parametrize(
    ("entries", "parts"),
    [
        ({"toggle_type": "topk"}, ["toggle_type", "'streaming', 'xattn', 'triangle'", "'topk'"]),
        ({"toggle_type": ["xattn"]}, ["toggle_type", "['xattn']"]),
        ({"retrieval_mode": "half"}, ["retrieval_mode", "'full', 'xattn'", "'half'"]),
        ({"pooling_mode": "first_token"}, ["pooling_mode", "'ctx_q'", "'first_token'"]),
        ({"sink_size": 0}, ["config.json", "FluxConfig.sink", "an int >= 1", "0"]),
        ({"local_window_size": "2048"}, ["config.json", "FluxConfig.local"]),
        ({"num_hidden_layers": 4}, ["one in each of 4 layers", "[0, 1, 2]"]),
        ({"num_hidden_layers": 10**12}, ["one in each of 1000000000000 layers"]),
        ({"num_hidden_layers": "3"}, ["one in each of 3 layers"]),
        ({"head_dim": 8}, ["head_dim 8 (config.json)", "4"]),
        ({"head_dim": None, "num_attention_heads": 1}, ["head_dim 8 (config.json)", "4"]),
    ],
    ids=str,
)
def test_settings_it_cannot_honour(write, router, entries, parts):
    refused(write(router_tensors(router), config=entries), *parts)


def test_a_layer_without_router(write, router):
    tensors = {k: t for k, t in router_tensors(router).items() if ".layers.1." not in k}
    refused(write(tensors), "one in each of 3 layers", "layers [0, 2]")


def test_a_router_without_one_weight(write, router):
    tensors = router_tensors(router)
    del tensors[f"{PREFIX.format(1)}cls_router_head_agnostic.2.bias"]
    refused(write(tensors), "missing ['layers.1.head.2.bias']")


def test_a_first_router_without_its_first_weight(write, router):
    tensors = router_tensors(router)
    del tensors[f"{PREFIX.format(0)}cls_feat_extractor.0.weight"]
    refused(write(tensors), "layer 0's cls_feat_extractor.0.weight", "none")


def test_a_router_of_other_width(write, router):
    tensors = router_tensors(router)
    tensors[f"{PREFIX.format(2)}cls_feat_extractor.0.weight"] = torch.zeros(64, 8)
    refused(write(tensors), "layers.2.encoder.0.weight", "(32, 4)", "(64, 8)")


def test_an_unknown_router_tensor(write, router):
    extra = {f"{PREFIX.format(0)}gate.weight": torch.zeros(2)}
    refused(write(router_tensors(router) | extra), "cls_feat_extractor", "gate.weight")


def test_integer_weights(write, router):
    refused(write(router_tensors(router, torch.int8)), "a float dtype", "torch.int8")


def test_nan_weights(write, router):
    tensors = router_tensors(router)
    tensors[f"{PREFIX.format(1)}cls_router_head_agnostic.4.bias"][0] = float("nan")
    refused(write(tensors), "layers.1.head.4.bias", "finite values", "1 of 2 NaN")


def test_a_plain_model_has_no_routers(write):
    refused(write({}, sharded=False), "mask_allocator", "none")
    refused(write({}, sharded=True), "mask_allocator", "none")


def test_a_missing_shard_that_is_needed(write, router):
    directory = write(router_tensors(router))
    (directory / "model-00002-of-00003.safetensors").unlink()
    refused(directory, "model-00002-of-00003.safetensors", "no such file")


def test_a_damaged_shard(write, router):
    directory = write(router_tensors(router))
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    refused(directory, "model-00002-of-00003.safetensors", "a safetensors file")


def test_a_shard_without_what_its_index_names(write, router):
    directory = write(router_tensors(router))
    shard = directory / "model-00001-of-00003.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, shard)
    refused(directory, "the tensors its index names", "cls_feat_extractor.0.bias", "more")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": "../../secrets.safetensors"}])
def test_a_bad_index(write, router, weight_map):
    directory = write(router_tensors(router))
    (directory / published.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refused(directory, "weight_map", "names of files beside it")


def test_no_checkpoint_at_all(tmp_path):
    refused(tmp_path / "nowhere", "config.json", "No such file")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "model.safetensors", "no such file")
