"""Which modules of a model are its routed attention layers, and what identifies its backbone."""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from fluxcompile.errors import RouterError

# Config entries that must agree between the model a router was made for and the one it serves.
_BACKBONE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def unwrap(model: Any) -> nn.Module:
    """Return the plain module behind ``torch.compile(model)``'s wrapper, or ``model`` itself.

    Raises:
        RouterError: not an ``nn.Module``.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise RouterError.mismatch("model", "a torch.nn.Module", type(model).__name__)
    return model


def attention_layers(model: nn.Module) -> dict[str, int]:
    """Find the self-attention modules of a Hugging Face model.

    An attention module carries an integer ``layer_idx`` and either its own ``head_dim`` or
    "Attention" in its class name; a decoder layer that merely contains such a module, and
    attention that says it is not causal (an encoder's, cross-attention), are left out.

    Returns:
        Module path -> head dimension, ordered by ``layer_idx``.

    Raises:
        RouterError: there is none, or a head dimension cannot be found.
    """
    found = [
        (module.layer_idx, path)
        for path, module in model.named_modules()
        if _is_attention(module) and not _wraps_layer(module)
    ]
    if not found:
        raise RouterError.mismatch(
            f"attention layers of {type(model).__name__}",
            "modules with an integer layer_idx and a head_dim "
            "(for a hand-written model pass layers=[module paths])",
            "none",
        )
    # Sorting is stable: equal indices (two stacks in one model) keep the order of the modules.
    paths = [path for _, path in sorted(found, key=lambda item: item[0])]
    return {path: _require_head_dim(model, path) for path in paths}


def named_layers(
    model: nn.Module, layers: Sequence[str], head_dim: int | None = None
) -> dict[str, int]:
    """Look up attention modules by path: path -> ``head_dim``, or each module's own if None.

    Raises:
        RouterError: ``layers`` is empty, repeats a path or names no module of the model; or a head
            dimension is neither given nor found.
    """
    if isinstance(layers, str) or not layers or len(set(layers)) != len(layers):
        raise RouterError.mismatch("layers", "distinct module paths", f"{layers!r}")
    for path in layers:
        submodule(model, path)
    if head_dim is not None:
        return dict.fromkeys(layers, head_dim)
    return {path: _require_head_dim(model, path) for path in layers}


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return ``model``'s module at ``path``.

    Raises:
        RouterError: no such module; the message names the closest paths there are.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        paths = [name for name, _ in model.named_modules() if name]
        close = difflib.get_close_matches(path, paths, n=3)
        raise RouterError.mismatch(
            f"layer {path!r} of the router",
            f"a module of {type(model).__name__}",
            f"no such module (closest: {close})" if close else "no such module",
        ) from None


def head_dim_of(model: nn.Module, path: str) -> int | None:
    """Return the head dimension of the attention at ``path``; None if nothing tells it.

    The module's own ``head_dim`` (or ``head_size``) counts before its config's ``head_dim``, and
    that before ``hidden_size // num_attention_heads``.
    """
    module = model.get_submodule(path)
    config = getattr(module, "config", None) or text_config(model)
    sources = [(module, "head_dim"), (module, "head_size"), (config, "head_dim")]
    for owner, name in sources:
        value = getattr(owner, name, None)
        if _is_int(value):
            return value
    hidden, heads = (getattr(config, key, None) for key in ("hidden_size", "num_attention_heads"))
    return hidden // heads if _is_int(hidden) and _is_int(heads) and heads else None


def heads_of(model: nn.Module, path: str) -> int | None:
    """Return the number of query heads of the attention at ``path``; None if nothing tells it."""
    module = model.get_submodule(path)
    config = getattr(module, "config", None) or text_config(model)
    for owner, name in ((module, "num_heads"), (config, "num_attention_heads")):
        value = getattr(owner, name, None)
        if _is_int(value):
            return value
    return None


def same_heads(model: nn.Module, paths: Sequence[str]) -> int:
    """Return the number of query heads that the attentions at ``paths`` have.

    Raises:
        RouterError: nothing tells it, or they differ.
    """
    found = {path: heads_of(model, path) for path in paths}
    if len(set(found.values())) != 1 or None in found.values():
        raise RouterError.mismatch(
            f"query heads of {type(model).__name__}",
            "a num_attention_heads in the model's config, the same in every layer, or heads= given",
            found,
        )
    return found[paths[0]]


def backbone_of(model: nn.Module) -> dict[str, int | str]:
    """Return the dimensions and type in the model's config, as far as it has any."""
    config = text_config(model)
    values = {key: getattr(config, key, None) for key in _BACKBONE_KEYS}
    return {key: value for key, value in values.items() if _is_int(value) or isinstance(value, str)}


def base_model_of(model: nn.Module) -> str:
    """Return the name the model was loaded by, or its class with its dimensions."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name:
        return str(name)
    dims = ", ".join(f"{key}={value}" for key, value in backbone_of(model).items())
    return f"{type(model).__name__}({dims})"


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model (inside a multimodal one too), or None."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else config


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__
    if not _is_int(getattr(module, "layer_idx", None)):
        return False
    if "CrossAttention" in kind or getattr(module, "is_cross_attention", False):
        return False
    if getattr(module, "is_causal", True) is False:  # an encoder's, or cross-attention
        return False
    return _is_int(getattr(module, "head_dim", None)) or "Attention" in kind


def _wraps_layer(module: nn.Module) -> bool:
    inner = (child for child in module.modules() if child is not module)
    return any(_is_int(getattr(child, "layer_idx", None)) for child in inner)


def _require_head_dim(model: nn.Module, path: str) -> int:
    head_dim = head_dim_of(model, path)
    if head_dim is None:
        raise RouterError.mismatch(
            f"layer {path!r}",
            "a head_dim on the module or in the model's config, or head_dim= given",
            "none of them",
        )
    return head_dim
