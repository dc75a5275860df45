"""Reading and writing a router's files, with every byte of input checked.

A saved router is a directory with ``config.json`` (what :func:`save` writes, no key more or less)
and ``model.safetensors`` (weights named ``layers.{i}.{encoder,head}.{j}.{weight,bias}``, all of one
of `STORAGE_DTYPES`, and of a router that standardises
``layers.{i}.{feature_mean,feature_deviation}``, in fp32 always). ``heads`` is there only if the
router reads each head.
``config.json`` carries the digest of the weights, and the weights' header that of the other fields
of ``config.json``: no changed byte passes, nor do files of two different saves pass as one router.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import HfHubHTTPError

from fluxcompile.atomic import write_all
from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError, RouterError
from fluxcompile.layer_router import LayerRouter
from fluxcompile.packaged import PACKAGED, packaged_directory

if TYPE_CHECKING:
    from fluxcompile.router import FluxRouter

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

FORMAT = "fluxcompile-router"
FORMAT_VERSION = 1

#: what weights may be stored in; a loaded router computes in fp32, to which widening is exact
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the features, not of the router: rounding them would shift what every weight is applied to.
_STANDARDISING = (".feature_mean", ".feature_deviation")

_KEYS = (
    "format",
    "format_version",
    "library_version",
    "base_model",
    "backbone",
    "head_dim",
    "layer_names",
    "flux",
    "weights_sha256",
)
_OPTIONAL_KEYS = ("heads",)
#: metadata in the weights' header: the digest of ``config.json``'s fields
_CONFIG_DIGEST = "config_sha256"
_PREVIOUS_WEIGHTS = f".{WEIGHTS_FILE}.previous"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str | None) -> bool:
    """Tell whether ``name`` has the form ``owner/name``."""
    return name is not None and _HUB_ID.fullmatch(name) is not None


def save(
    router: "FluxRouter", directory: Path, card: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write ``router`` to ``directory``, its weights rounded to ``dtype``; an old card is kept.

    Raises:
        RouterError: a weight is NaN or infinite, or beyond ``dtype``; or ``dtype`` is none of
            `STORAGE_DTYPES`.
        OSError: the directory cannot be written.
    """
    if dtype not in STORAGE_DTYPES:
        raise RouterError.mismatch("dtype", f"one of {_names(STORAGE_DTYPES)}", f"{dtype!r}")
    state = {
        name: tensor.detach().cpu().to(_stored_in(name, dtype))
        for name, tensor in router.state_dict().items()
    }
    check_finite(state, "router to save")
    fields = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": _library_version(),
        "base_model": router.base_model,
        "backbone": router.backbone,
        "head_dim": router.head_dim,
        **({} if router.heads is None else {"heads": router.heads}),
        "layer_names": list(router.layer_names),
        "flux": router.config.to_dict(),
    }
    metadata = {"format": "pt", _CONFIG_DIGEST: _digest_of(fields)}
    weights = _in_order(safetensors.torch.save(state, metadata=metadata))
    fields["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    files = {WEIGHTS_FILE: weights, CONFIG_FILE: (json.dumps(fields, indent=2) + "\n").encode()}
    if not (directory / CARD_FILE).exists():
        files[CARD_FILE] = card.encode()
    with _kept_until_replaced(directory / WEIGHTS_FILE, directory / _PREVIOUS_WEIGHTS):
        write_all({directory / name: data for name, data in files.items()})


def is_saved_router(directory: Path) -> bool:
    """Tell whether ``directory`` is one that :func:`save` wrote, damaged or not.

    Raises:
        RouterError: its ``config.json`` is missing or no JSON object.
    """
    return read_json(directory / CONFIG_FILE).get("format") == FORMAT


def locate(name: str | os.PathLike[str], **download: Any) -> Path:
    """Return the directory of a saved router, downloading it if ``name`` is a Hub id.

    Args:
        name: a directory, a packaged router's name, or a repository id.
        download: options of ``huggingface_hub.snapshot_download``.

    Raises:
        RouterError: none of them, or the download failed.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if (packaged := packaged_directory(name)) is not None:
        if not packaged.is_dir():
            raise RouterError.mismatch(f"packaged router {str(name)!r}", packaged, "no such folder")
        return packaged
    if path.exists() or not is_hub_id(str(name)):
        got = "a file" if path.exists() else "no such directory"
        known = f"a directory, owner/name or one of {list(PACKAGED)}"
        raise RouterError.mismatch(f"router {str(name)!r}", known, got)
    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(
            huggingface_hub.snapshot_download(str(name), allow_patterns=patterns, **download)
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise RouterError.mismatch(
            f"router {str(name)!r}", "a directory or a repository on the Hub", error
        ) from error


def load(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a saved router: the arguments of :class:`FluxRouter`, and its state dict, fp32 on CPU.

    Raises:
        RouterError: a file is missing, damaged, of another format, or not of the same save.
    """
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    record = read_json(config_path)
    fields = _parse(record, config_path)
    data = read_bytes(weights_path)
    digest = hashlib.sha256(data).hexdigest()
    previous = directory / _PREVIOUS_WEIGHTS
    if digest != record["weights_sha256"] and previous.is_file():
        data = read_bytes(previous)  # a save was killed before its config.json was in place
        if hashlib.sha256(data).hexdigest() == record["weights_sha256"]:
            digest = record["weights_sha256"]
    if digest != record["weights_sha256"]:
        raise RouterError.mismatch(
            f"sha256 of {weights_path} (damaged, or not saved together with {CONFIG_FILE})",
            record["weights_sha256"],
            digest,
        )
    try:
        weights = safetensors.torch.load(data)
    except Exception as error:  # The parser raises a dozen kinds on bytes it does not like.
        raise RouterError.mismatch(
            str(weights_path), "a safetensors file", f"{type(error).__name__}: {error}"
        ) from error
    config, head_dim = fields["config"], fields["head_dim"]
    shapes = LayerRouter.shapes(
        head_dim, config.pooling.features(head_dim, fields["heads"]), config.standardize
    )
    check_weights(weights, len(fields["layer_names"]), head_dim, str(weights_path), shapes)
    _check_config_digest(record, data, config_path)
    return fields, {name: tensor.float() for name, tensor in weights.items()}


def read_bytes(path: Path) -> bytes:
    """Read a file; whatever is in the way is a RouterError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RouterError.mismatch(str(path), "a readable file", error.strerror) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a RouterError that names the file."""
    data = read_bytes(path)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RouterError.mismatch(str(path), "a JSON object", f"bad JSON ({error})") from error
    if not isinstance(record, dict):
        raise RouterError.mismatch(str(path), "a JSON object", type(record).__name__)
    return record


def check_fields(
    layer_names: object, head_dim: object, base_model: object, backbone: object
) -> None:
    """Check the parts of a router that are neither its config nor its weights.

    Raises:
        RouterError: one of them has the wrong type or an impossible value.
    """
    names = layer_names if isinstance(layer_names, list | tuple) else ()
    strings = all(isinstance(name, str) and name for name in names)
    if not names or not strings or len(set(names)) != len(names):
        raise RouterError.mismatch("layer_names", "distinct module paths", f"{layer_names!r}")
    if not isinstance(head_dim, int) or isinstance(head_dim, bool) or head_dim < 1:
        raise RouterError.mismatch("head_dim", "an int >= 1", f"{head_dim!r}")
    if base_model is not None and not isinstance(base_model, str):
        raise RouterError.mismatch("base_model", "a name or None", f"{base_model!r}")
    entries = backbone.items() if isinstance(backbone, Mapping) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, int | str) for key, value in entries):
        raise RouterError.mismatch("backbone", "a mapping to ints and strings", f"{backbone!r}")


def check_heads(heads: object, config: FluxConfig) -> None:
    """Check the number of query heads that a router records.

    Raises:
        RouterError: it is missing, has no use, or is no number of heads.
    """
    if config.pooling.each_head:
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
            raise RouterError.mismatch("heads (the router reads each)", "an int >= 1", f"{heads!r}")
    elif heads is not None:
        raise RouterError.mismatch("heads (the router reads their mean)", "None", f"{heads!r}")


def check_weights(
    weights: Mapping[str, torch.Tensor],
    layers: int,
    head_dim: int,
    where: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Check names, shapes, dtypes and finiteness of a router's state dict, as it is stored.

    Args:
        weights: by name.
        layers: how many layer routers there are.
        head_dim: of each.
        where: they are from.
        shapes: of one layer router; None for the paper's.

    Raises:
        RouterError: naming ``where``, the weight, and what was expected of it.
    """
    expected = {
        f"layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in (shapes or LayerRouter.shapes(head_dim)).items()
    }
    if weights.keys() != expected.keys():
        missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
        raise RouterError.mismatch(
            f"weights in {where}",
            f"the {len(expected)} of {layers} layers",
            f"{len(weights)}, missing {some(missing)}, unknown {some(unknown)}",
        )
    stored = {weights[name].dtype for name in expected if not name.endswith(_STANDARDISING)}
    allowed = STORAGE_DTYPES if len(stored) == 1 else STORAGE_DTYPES[:1]
    for name, shape in expected.items():
        found = weights[name]
        dtypes = STORAGE_DTYPES[:1] if name.endswith(_STANDARDISING) else allowed
        if tuple(found.shape) != shape or found.dtype not in dtypes:
            raise RouterError.mismatch(
                f"{name} in {where}",
                f"{shape} {_names(dtypes)} (head_dim {head_dim})",
                f"{tuple(found.shape)} {found.dtype}",
            )
    check_finite(weights, where)
    for name, tensor in weights.items():
        if name.endswith(".feature_deviation") and not (tensor > 0).all():
            raise RouterError.mismatch(f"{name} in {where}", "values > 0", f"{float(tensor.min())}")


def check_finite(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise RouterError if a weight is NaN or infinite."""
    for name, tensor in weights.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise RouterError.mismatch(
                f"{name} in {where}", "finite values", f"{bad} of {tensor.numel()} NaN or infinite"
            )


def some(names: Any, limit: int = 3) -> str:
    """Write the first few of ``names``, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{ordered[:limit]}{more}"


def _digest_of(record: Mapping[str, Any]) -> str:
    """Of everything in ``config.json`` but the weights' digest, whatever its layout."""
    fields = {key: value for key, value in record.items() if key != "weights_sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _in_order(weights: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes several entries in any order."""
    start, size = 8, int.from_bytes(weights[:8], "little")
    header = json.loads(weights[start : start + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    return weights[:start] + written + weights[start + size :]


def _check_config_digest(record: Mapping[str, Any], weights: bytes, path: Path) -> None:
    """A changed number in ``config.json`` may be a valid one: the weights know what it was.

    Files of earlier versions have no such digest and are taken as they are.
    """
    size = int.from_bytes(weights[:8], "little")
    metadata = json.loads(weights[8 : 8 + size]).get("__metadata__") or {}
    expected = metadata.get(_CONFIG_DIGEST)
    if expected not in (None, got := _digest_of(record)):
        raise RouterError.mismatch(
            f"sha256 of the fields of {path} (changed after it was saved)", expected, got
        )


@contextlib.contextmanager
def _kept_until_replaced(path: Path, previous: Path) -> Iterator[None]:
    """Two files cannot be replaced at once: in between, the old weights are at ``previous``.

    An error inside puts them back. If the process is killed, :func:`load` finds them there.
    """
    if not path.is_file():
        yield
        return
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without links
        shutil.copyfile(path, previous)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # then it stays where `load` looks for it
            if path.is_file() and path.samefile(previous):
                previous.unlink()
            else:
                os.replace(previous, path)
        raise
    previous.unlink(missing_ok=True)


def _stored_in(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(_STANDARDISING) else dtype


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def _parse(record: dict[str, Any], path: Path) -> dict[str, Any]:
    if record.get("format") != FORMAT:
        got = f"{record.get('format')!r}"
        if "toggle_type" in record:
            got += " (a published checkpoint: use FluxRouter.from_fluxattention)"
        raise RouterError.mismatch(f"format of {path}", repr(FORMAT), got)
    version = record.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise RouterError.mismatch(f"format_version of {path}", FORMAT_VERSION, f"{version!r}")
    if record.keys() - set(_OPTIONAL_KEYS) != set(_KEYS):
        missing, unknown = (
            set(_KEYS) - record.keys(),
            record.keys() - set(_KEYS) - set(_OPTIONAL_KEYS),
        )
        raise RouterError.mismatch(
            f"keys of {path}", list(_KEYS), f"missing {some(missing)}, unknown {some(unknown)}"
        )
    fields = {key: record[key] for key in ("layer_names", "head_dim", "base_model", "backbone")}
    try:
        check_fields(**fields)
        config = FluxConfig.from_dict(record["flux"])
        heads = record.get("heads")
        check_heads(heads, config)
        return {**fields, "heads": heads, "config": config}
    except (RouterError, ConfigError) as error:
        raise RouterError(f"{path}: {error}") from error


def _library_version() -> str:
    try:
        return importlib.metadata.version("fluxcompile")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
