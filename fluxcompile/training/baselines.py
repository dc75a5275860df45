"""Static routes to compare a router with: chosen once for a model, the same for every prompt.

Each function returns one 0/1 a layer, 1 for full attention, as
``model.compile(backend="flux", options={"routes": ...})`` takes it.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError
from fluxcompile.model_layers import attention_layers, unwrap
from fluxcompile.training.backbone import (
    check_trainable,
    compiler_settings,
    examples_for,
    frozen,
)
from fluxcompile.training.patterns import PatternLoss
from fluxcompile.training.route_search import Routes, search_routes, with_sparse
from fluxcompile.training.tasks import resolve_tasks


def random_routes(layers: int, sparse_layers: int, seed: int = 0) -> Routes:
    """``sparse_layers`` of ``layers`` layers chosen at random; the same for the same seed.

    Raises:
        ConfigError: more sparse layers than layers, or fewer than none.
    """
    _check_count(sparse_layers, layers)
    chosen = random.Random(seed).sample(range(layers), sparse_layers)
    return with_sparse(chosen, layers)


@torch.no_grad()
def entropy_routes(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    sparse_layers: int,
    tokenizer: Any = None,
    tasks: Mapping[str, float | str] | None = None,
    max_length: int = 65536,
) -> Routes:
    """Sparse where the layer's input has the least matrix-based entropy.

    The kind of static baseline that Flux Attention compares with (arXiv 2604.07394, App. C). The
    entropy is the general one that :func:`matrix_entropies` defines; that it is the paper's to the
    letter has not been checked. Equal ones go by the order of the layers.

    Args:
        model: a causal language model; run eagerly, one example at a time.
        data: as :func:`fluxcompile.train_router` takes it. Labels do not matter.
        sparse_layers: how many layers to make sparse.
        tokenizer: for data that is text.
        tasks: as :func:`fluxcompile.train_router` takes them.
        max_length: longer examples are cut or refused.

    Raises:
        ConfigError: an impossible ``sparse_layers``.
        DataError: data that cannot be used.
        RouterError: ``model`` has no attention layers.
    """
    model = unwrap(model)
    _check_count(sparse_layers, len(attention_layers(model)))
    examples = examples_for(model, data, tokenizer, resolve_tasks(tasks), 2, max_length)
    entropies = matrix_entropies(model, [example.input_ids for example in examples])
    order = sorted(range(len(entropies)), key=entropies.__getitem__)
    return with_sparse(order[:sparse_layers], len(entropies))


@torch.no_grad()
def matrix_entropies(model: nn.Module, prompts: Sequence[torch.Tensor]) -> list[float]:
    """Matrix-based entropy of the input of every attention layer, mean over the prompts.

    With the hidden states of a prompt scaled to unit length as the rows of ``X`` ``[S, D]``, the
    Gram matrix ``X Xᵀ / S`` has trace 1. The entropy is the Shannon entropy of its eigenvalues, as
    a share of the greatest possible, ``log min(S, D)``: 0 if all tokens point the same way, 1 if
    they spread over every direction alike. A low one says that the tokens have little of their own
    that a token far away could need.

    This is the matrix-based Rényi entropy of Sánchez Giraldo, Rao and Príncipe (arXiv 1211.2459),
    ``A_ij = K_ij / (S √(K_ii K_jj))`` and ``S_α = log tr(A^α) / (1 - α)``, with the linear kernel
    and in the limit ``α → 1``, where it is von Neumann's. It is taken of every prompt by itself and
    divided by its maximum as Skean et al. do for layers of language models (arXiv 2502.02013, there
    without the scaling to unit length; these states come out of a norm, and nearly have it). Matrix
    entropy as Wei et al. define it (arXiv 2401.17139) subtracts the mean state first; here the
    direction that all tokens share counts.

    Args:
        model: in whatever mode; run eagerly, in eval mode.
        prompts: int64 ``[S]`` each.

    Returns:
        One number in [0, 1] a layer, in the order of the layers.
    """
    layers = list(attention_layers(model))
    sums = dict.fromkeys(layers, 0.0)

    def measure(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            sums[name] += _entropy(hidden[0])

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(measure(name), with_kwargs=True)
        for name in layers
    ]
    device = next(model.parameters()).device
    try:
        with frozen(model):
            for prompt in prompts:
                model(prompt[None].to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [sums[name] / len(prompts) for name in layers]


def _entropy(hidden: torch.Tensor) -> float:
    states = nn.functional.normalize(hidden.double(), dim=-1)
    length, dim = states.shape
    if min(length, dim) < 2:
        return 0.0
    # The smaller of the two products: the eigenvalues other than 0 are the same.
    gram = states.T @ states if dim < length else states @ states.T
    values = torch.linalg.eigvalsh(gram / length).clamp(min=0)
    return float(torch.special.entr(values).sum()) / math.log(min(length, dim))


def greedy_routes(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    sparse_layers: int,
    config: FluxConfig | None = None,
    tokenizer: Any = None,
    tasks: Mapping[str, float | str] | None = None,
    max_length: int = 65536,
    lowering: str = "inductor",
) -> Routes:
    """From all layers full, again and again make sparse the layer that costs the least loss.

    One compile serves every pattern; with ``L`` layers the data is run up to
    ``sparse_layers · L`` times, each a forward of both attentions. A few examples of each task
    that are longer than ``sink + local`` do.

    Args:
        model: a causal language model, not compiled.
        data: as :func:`fluxcompile.train_router` takes it.
        sparse_layers: how many layers to make sparse.
        config: of the sparse attention.
        tokenizer: for data that is text.
        tasks: as :func:`fluxcompile.train_router` takes them.
        max_length: longer examples are cut or refused.
        lowering: as the backend's option.

    Raises:
        ConfigError: an impossible ``sparse_layers``.
        DataError: data that cannot be used.
        RouterError: ``model`` has no attention layers.
        TrainingError: ``model`` is compiled already.
    """
    model = unwrap(model)
    check_trainable(model)
    layers = len(attention_layers(model))
    _check_count(sparse_layers, layers)
    config = FluxConfig() if config is None else config
    shortest = config.sink + config.local + 1
    examples = examples_for(model, data, tokenizer, resolve_tasks(tasks), shortest, max_length)
    with compiler_settings(None), PatternLoss.of(model, config, lowering=lowering) as loss:
        return search_routes(lambda routes: loss(routes, examples), layers, sparse_layers)


def _check_count(sparse_layers: int, layers: int) -> None:
    if not isinstance(sparse_layers, int) or not 0 <= sparse_layers <= layers:
        raise ConfigError.mismatch("sparse_layers", f"an int from 0 to {layers}", sparse_layers)
