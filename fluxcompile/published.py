"""Routers out of the published Flux Attention checkpoints.

Those are whole models (sharded safetensors) with a router inside every attention:

    model.layers.{i}.self_attn.mask_allocator.cls_feat_extractor.{0,2}.{weight,bias}
    model.layers.{i}.self_attn.mask_allocator.cls_router_head_agnostic.{0,2,4}.{weight,bias}

and with the attention settings among the entries of ``config.json``.

``use_softmax`` says which head was trained: true, two logits (class 1 = full attention); false, one
logit ``z``, full attention where ``sigmoid(z) > 1/2``. At inference the second is exactly the first
with logits ``(0, z)``, so such a head is converted by giving it a zero row. The shape decides; a
flag that contradicts it is an error.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError, RouterError
from fluxcompile.router_io import check_weights, read_json, some

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

_ROUTER_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.mask_allocator\.(.+)")
_PARTS = {"cls_feat_extractor": "encoder", "cls_router_head_agnostic": "head"}
# Read in training only: the temperature cannot change an argmax, nor the task reach the router.
_TRAINING_ONLY = ("log_temp", "task_embedding.weight")

_MODES = {"streaming": "streaming", "xattn": "xattention", "triangle": "triangle"}
_RETRIEVAL = {"full": "full", "xattn": "xattention"}
# Entry of config.json -> (field of FluxConfig, the checkpoints' own default).
_LENGTHS = {
    "sink_size": ("sink", 128),
    "local_window_size": ("local", 1024),
    "pool_size": ("pool_size", 100),
    "triangle_n_last": ("last", 128),
}


def read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a checkpoint's routers: the arguments of :class:`FluxRouter`, and its state dict.

    Raises:
        RouterError: not such a checkpoint; a router is missing or inconsistent; or a setting has no
            counterpart here.
    """
    config_path = directory / "config.json"
    record = read_json(config_path)
    config = _flux_config(record, config_path)
    layers = _layers(_read_router_tensors(directory), record, directory)
    head_dim = _head_dim(layers, record, directory)
    weights = {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(layers)
        for name, tensor in _two_logits(layer, record, directory).items()
    }
    check_weights(weights, len(layers), head_dim, str(directory))
    backbone_keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    fields = {
        "config": config,
        "layer_names": [f"model.layers.{index}.self_attn" for index in range(len(layers))],
        "head_dim": head_dim,
        "base_model": str(record.get("_name_or_path") or directory.name),
        "backbone": {key: record[key] for key in backbone_keys if isinstance(record.get(key), int)},
    }
    return fields, weights


def _flux_config(record: Mapping[str, Any], path: Path) -> FluxConfig:
    pooling = record.get("pooling_mode", "ctx_q")
    if pooling != "ctx_q":
        raise RouterError.mismatch(f"pooling_mode in {path}", "'ctx_q'", f"{pooling!r}")
    fields = {
        "sparse": _choice(record, "toggle_type", _MODES, path),
        "retrieval": _choice(record, "retrieval_mode", _RETRIEVAL, path),
        **{field: record.get(key, default) for key, (field, default) in _LENGTHS.items()},
    }
    try:
        return FluxConfig(**fields)
    except ConfigError as error:
        raise RouterError(f"{path}: {error}") from error


def _choice(record: Mapping[str, Any], key: str, known: Mapping[str, str], path: Path) -> str:
    value = record.get(key, next(iter(known)))
    if not isinstance(value, str) or value not in known:
        raise RouterError.mismatch(f"{key} in {path}", f"one of {list(known)}", f"{value!r}")
    return known[value]


def _read_router_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read every tensor under a ``mask_allocator``, opening only the shards that hold one."""
    by_shard: dict[str, list[str]] = defaultdict(list)
    index_path = directory / INDEX_FILE
    if index_path.exists():
        for key, shard in _weight_map(index_path).items():
            if _ROUTER_KEY.fullmatch(key):
                by_shard[shard].append(key)
    else:
        by_shard[WEIGHTS_FILE] = []
    tensors: dict[str, torch.Tensor] = {}
    for shard, keys in by_shard.items():
        tensors |= _read_shard(directory / shard, keys)
    if not tensors:
        raise RouterError.mismatch(
            str(directory), "keys model.layers.*.self_attn.mask_allocator.*", "none"
        )
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    shards = read_json(path).get("weight_map")
    # A shard is a file beside the index; a path elsewhere is not ours to open.
    named = isinstance(shards, dict) and all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
    )
    if not named:
        raise RouterError.mismatch(
            f"weight_map in {path}", "tensor names -> names of files beside it", f"{shards!r:.200}"
        )
    return shards


def _read_shard(path: Path, keys: list[str]) -> dict[str, torch.Tensor]:
    """Read ``keys``, or every router key if empty, out of one shard."""
    if not path.is_file():
        raise RouterError.mismatch(str(path), "a safetensors file", "no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            present = set(file.keys())
            keys = keys or [key for key in present if _ROUTER_KEY.fullmatch(key)]
            absent = set(keys) - present
            if not absent:
                return {key: file.get_tensor(key) for key in keys}
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise RouterError.mismatch(str(path), "a safetensors file", error) from error
    raise RouterError.mismatch(str(path), "the tensors its index names", f"no {some(absent)}")


def _layers(
    tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], directory: Path
) -> list[dict[str, torch.Tensor]]:
    """Group the tensors by layer under a layer router's names, in fp32."""
    layers: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        index, name = _ROUTER_KEY.fullmatch(key).groups()
        part, _, rest = name.partition(".")
        if not tensor.is_floating_point():
            raise RouterError.mismatch(f"{key} in {directory}", "a float dtype", tensor.dtype)
        if part in _PARTS:
            # Published weights are bf16; widening them is exact.
            layers[int(index)][f"{_PARTS[part]}.{rest}"] = tensor.float()
        elif name not in _TRAINING_ONLY:
            unknown.append(key)
    if unknown:
        raise RouterError.mismatch(
            str(directory), f"only {list(_PARTS)} in a router", some(unknown)
        )
    count = record.get("num_hidden_layers", len(layers))
    if count != len(layers) or layers.keys() != set(range(len(layers))):
        raise RouterError.mismatch(
            f"routers in {directory}", f"one in each of {count} layers", f"layers {sorted(layers)}"
        )
    return [layers[index] for index in range(count)]


def _head_dim(
    layers: list[dict[str, torch.Tensor]], record: Mapping[str, Any], directory: Path
) -> int:
    first = layers[0].get("encoder.0.weight")
    if first is None or first.dim() != 2:
        got = "none" if first is None else tuple(first.shape)
        raise RouterError.mismatch(
            f"layer 0's cls_feat_extractor.0.weight in {directory}", "[8 D, D]", got
        )
    head_dim = first.shape[1]
    hidden, heads = record.get("hidden_size"), record.get("num_attention_heads")
    divided = (
        hidden // heads
        if isinstance(hidden, int) and isinstance(heads, int) and heads
        else head_dim
    )
    stated = record.get("head_dim") or divided
    if stated != head_dim:
        raise RouterError.mismatch(
            f"input of the routers in {directory}", f"head_dim {stated} (config.json)", head_dim
        )
    return head_dim


def _two_logits(
    layer: dict[str, torch.Tensor], record: Mapping[str, Any], directory: Path
) -> dict[str, torch.Tensor]:
    """Turn a one-logit head into the two-logit head that decides alike."""
    names = ("head.4.weight", "head.4.bias")
    single = all(name in layer and layer[name].shape[:1] == (1,) for name in names)
    stated = record.get("use_softmax")
    if stated is not None and bool(stated) == single:
        raise RouterError.mismatch(
            f"router heads in {directory}",
            f"{2 if stated else 1} logits (use_softmax is {stated})",
            "1" if single else "2",
        )
    if not single:
        return layer
    return layer | {name: torch.cat([torch.zeros_like(layer[name]), layer[name]]) for name in names}
