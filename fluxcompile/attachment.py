"""Which router serves which model, without touching the model.

The compile backend sees a model only as the tensors among its graph's inputs, so the link is kept
in tables keyed weakly by identity: model -> :class:`Attachment`, and each of its parameters and
buffers -> (that attachment, layer index). Nothing is stored on the model: its state dict, saved
files, pickles and copies are what they would be without a router, and a copy is unattached.

Compiled code asks the same tables whether it still belongs to its caller (``owner_guard``), so
models may be attached, attached anew and detached at any time.
"""

import itertools
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fluxcompile.errors import FluxWarning, RouterError
from fluxcompile.model_layers import unwrap
from fluxcompile.route_record import Routes, record_routes, routes_of
from fluxcompile.router import FluxRouter

__all__ = [
    "NOBODY",
    "Attachment",
    "Owner",
    "Routes",
    "Tie",
    "any_attached",
    "attach",
    "attachment_of",
    "changes",
    "detach",
    "find",
    "layer_of",
    "owner_of",
    "record_routes",
    "routes_of",
    "tie_of",
]

#: the generation of the attachment that a tensor belongs to, and its layer if it is of just one
Owner = tuple[int, int | None]
NOBODY: Owner = (0, None)


@dataclass(frozen=True, eq=False)
class Attachment:
    """A router serving a model.

    Attributes:
        router: the router, as it was given.
        model_ref: weak reference to the model; a router does not keep its model alive.
        generation: differs between any two attachments of a process, so that compiled artefacts
            can tell whether they belong to this one.
    """

    router: FluxRouter
    model_ref: weakref.ref[nn.Module]
    generation: int

    @property
    def model(self) -> nn.Module | None:
        """The model, or None once it is gone."""
        return self.model_ref()


class Tie:
    """Lives exactly as long as one attachment is in force, whoever still holds the attachment."""


_attachments = WeakIdKeyDictionary(ref_type=weakref.ref)  # nn.Module -> (Attachment, Tie)
_owners = WeakIdKeyDictionary()  # Tensor -> (weak reference to Attachment, layer index or None)
_generations = itertools.count(1)
_changes = itertools.count(1)
_last_change = 0


def changes() -> int:
    """A number that differs after every :func:`attach` and :func:`detach`."""
    return _last_change


def attach(model: nn.Module, router: FluxRouter | str | os.PathLike[str]) -> Attachment:
    """Let ``router`` decide for ``model`` wherever it is compiled with ``backend="flux"``.

    A router attached before is replaced; a model compiled already compiles again at its next call.
    Compiled code has the router's weights of that time: attach it again when they have changed.
    Neither the model nor the router is changed or moved.

    Args:
        model: the model, or what ``torch.compile`` made of it.
        router: a router, or what :meth:`FluxRouter.from_pretrained` takes.

    Raises:
        RouterError: ``router`` is not a router, cannot be loaded, or belongs to another model.
    """
    model = unwrap(model)
    if isinstance(router, str | os.PathLike):
        router = FluxRouter.from_pretrained(router)
    if not isinstance(router, FluxRouter):
        raise RouterError.mismatch("router", "a FluxRouter or a path", type(router).__name__)
    router.check_model(model)
    attachment = Attachment(router, weakref.ref(model), next(_generations))
    _attachments[model] = attachment, Tie()
    _register(attachment)
    _changed()
    return attachment


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`: ``model``, compiled or not yet, runs full attention from its next call.

    Raises:
        RouterError: no router is attached to ``model``.
    """
    model = unwrap(model)
    attachment, _ = _attachments.pop(model, (None, None))
    if attachment is None:
        raise RouterError.mismatch(
            "detach", "a model with a router attached", f"a {type(model).__name__} without"
        )
    for tensor, (owner, _) in list(_owners.items()):
        if owner() is attachment:
            del _owners[tensor]
    _changed()


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return what is attached to ``model`` itself (not to a module inside or around it)."""
    return _attachments.get(unwrap(model), (None, None))[0]


def any_attached() -> bool:
    """Return whether any living model has a router attached."""
    return len(_attachments) > 0


def find(tensors: Iterable[object]) -> Attachment | None:
    """Return the attachment of the model that ``tensors``, a graph's inputs, belong to.

    Entries that are no tensors are skipped. Weights of the routed layers count before others,
    which two models may share (a tied embedding). If two attached models remain, it warns and
    returns None: full attention is right for both, the wrong router for neither.
    """
    known = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    owners = _owners_of(known)
    if not owners and _attachments:
        # Casting a buffer, assigning a state dict or tying weights puts new tensors in a model.
        _register_all()
        owners = _owners_of(known)
    layered = {attachment for attachment, layer in owners if layer is not None}
    candidates = layered or {attachment for attachment, _ in owners}
    if len(candidates) > 1:
        warnings.warn(
            f"one graph holds weights of {len(candidates)} models with routers: it runs full "
            "attention",
            FluxWarning,
            stacklevel=2,
        )
        return None
    return candidates.pop() if candidates else None


def owner_of(tensor: torch.Tensor) -> Owner:
    """Return which attachment and which layer ``tensor`` belongs to now, ``NOBODY`` if to none.

    The layer is None for tensors outside the routed layers or shared by several of them.
    """
    if tensor not in _owners:
        _register_all()  # its model may have got it after attach()
        _owners.setdefault(tensor, (_no_attachment, None))
    owner, layer = _owners[tensor]
    attachment = owner()
    return NOBODY if attachment is None else (attachment.generation, layer)


def layer_of(tensor: torch.Tensor) -> int | None:
    """Return the index in ``router.layer_names`` of the layer that ``tensor`` belongs to.

    None if it is of no attached model, outside the routed layers, or shared by several of them.
    """
    return owner_of(tensor)[1]


def tie_of(attachment: Attachment) -> Tie | None:
    """Return the tie of ``attachment``, or None if it is no longer in force."""
    model = attachment.model
    current, tie = _attachments.get(model, (None, None)) if model is not None else (None, None)
    return tie if current is attachment else None


def _no_attachment() -> None:
    """Stands for the weak reference of a tensor that is known to be of no attached model."""


def _changed() -> None:
    global _last_change
    _last_change = next(_changes)


def _owners_of(tensors: list[torch.Tensor]) -> list[tuple[Attachment, int | None]]:
    entries = (_owners[tensor] for tensor in tensors if tensor in _owners)
    return [(owner(), layer) for owner, layer in entries if owner() is not None]


def _register_all() -> None:
    for attachment, _ in list(_attachments.values()):
        _register(attachment)


def _register(attachment: Attachment) -> None:
    model = attachment.model
    if model is None:
        return
    owner = weakref.ref(attachment)
    for tensor in _tensors(model):
        _owners[tensor] = (owner, None)
    seen = WeakIdKeyDictionary()
    for index, name in enumerate(attachment.router.layer_names):
        for tensor in _tensors(model.get_submodule(name)):
            shared = seen.setdefault(tensor, index) != index
            _owners[tensor] = (owner, None if shared else index)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
