"""The compiled callable of training mode: live router tensors in, shares of full attention out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fluxcompile.errors import RewriteError, RouterError
from fluxcompile.kernels.masks.flags import READABLE
from fluxcompile.passes.graph_util import hint, op_name, value_of
from fluxcompile.passes.insert_shares import RouterTensor
from fluxcompile.passes.pipeline import Rewrite
from fluxcompile.passes.site import SkipReason
from fluxcompile.planning import Planner
from fluxcompile.route_io import append_output
from fluxcompile.router import FluxRouter
from fluxcompile.shared_graph import SharedGraph, Sharing
from fluxcompile.soft_routes import active_soft_routes


@dataclass(frozen=True)
class TrainingIO:
    """What one training graph takes beyond the traced inputs, in this order, and what it leaves.

    Attributes:
        router: the live router.
        soft: the graph takes temperature, noise and hardness.
        prompts: the graph takes the lengths of the prompts.
        tensors: the router tensors that the graph takes.
        layers: the columns of the graph's shares, fp32 ``[B, len(layers)]``, the first output
            that it has beyond the traced ones.
        features: the next is what those layers' routers read, fp32 ``[B, len(layers), F]``.
        masks: the last are the flags of masks that are read as it runs, bool ``[4, N]``.
        fixed: layers that are full attention whatever their router says.
        batch: the batch size, or the input (and its axis, if a tensor) that has it.
        device: where the graph computes.
        shared: the graph serves several layers, of which this is one: it takes that one's noise.
    """

    router: FluxRouter
    soft: bool
    prompts: bool
    tensors: tuple[RouterTensor, ...]
    layers: tuple[int, ...]
    features: bool
    masks: bool
    fixed: tuple[int, ...]
    batch: int | tuple[int, int | None]
    device: torch.device
    shared: bool = False

    def of_layer(self, layer: int) -> TrainingIO:
        """What a shared graph takes and leaves when it is called for ``layer``."""
        return replace(
            self,
            tensors=tuple(replace(name, layer=layer) for name in self.tensors),
            layers=(layer,) * len(self.layers),
            fixed=(layer,) * len(self.fixed),
        )

    def inputs(self, traced: Sequence[Any]) -> list[torch.Tensor]:
        """This call's additional inputs.

        Raises:
            RouterError: the router is on another device, or noise or temperature do not fit.
        """
        active = active_soft_routes(self.router)
        found: list[torch.Tensor] = []
        if self.soft:
            noise = active.noise_on(self.device, self._batch_of(traced))
            if self.shared:
                (layer,) = self.layers  # as a slice: an index would be sent to the device
                noise = noise[:, layer : layer + 1].contiguous()
            found += [
                active.temperature_on(self.device),
                noise,
                active.hardness_on(self.device),
            ]
        if self.prompts:
            found.append(active.prompt_length_on(self.device, self._batch_of(traced)))
        return [*found, *(self._tensor(name) for name in self.tensors)]

    def examples(self, batch: int | torch.SymInt) -> list[torch.Tensor]:
        """Stand-ins for :meth:`inputs` to compile with, under Dynamo's fake mode.

        Args:
            batch: the batch size, symbolic where the graph's is.
        """
        context = torch._guards.TracingContext.try_get()
        mode = None if context is None else context.fake_mode
        with mode or contextlib.nullcontext():
            return self._empty(batch if mode else hint(batch))

    def _empty(self, batch: int | torch.SymInt) -> list[torch.Tensor]:
        on = {"dtype": torch.float32, "device": self.device}
        found = []
        if self.soft:
            columns = 1 if self.shared else len(self.router.layer_names)
            noise = torch.empty(batch, columns, 2, **on)
            found = [torch.empty((), **on), noise, torch.empty((), **on)]
        if self.prompts:
            found.append(torch.empty(batch, dtype=torch.int64, device=self.device))
        for name in self.tensors:
            live = self._tensor(name)
            like = torch.empty(live.shape, dtype=live.dtype, device=live.device)
            # Parameters that are frozen now may be trained later: the graph is ready for it.
            found.append(like.requires_grad_(self.soft and isinstance(live, torch.nn.Parameter)))
        return found

    def _tensor(self, name: RouterTensor) -> torch.Tensor:
        owner, _, attribute = name.path.rpartition(".")
        tensor = getattr(self.router.layers[name.layer].get_submodule(owner), attribute)
        if tensor.device != self.device:
            raise RouterError.mismatch(
                "the router's device", f"{self.device} (the model's)", tensor.device
            )
        return tensor

    def _batch_of(self, traced: Sequence[Any]) -> int:
        if isinstance(self.batch, int):
            return self.batch
        position, axis = self.batch
        return traced[position] if axis is None else traced[position].shape[axis]


class TrainingGraph:
    """Callable that Dynamo runs in place of the graph it traced."""

    def __init__(self, compiled: Callable[..., Any], io: TrainingIO) -> None:
        self._compiled = compiled
        self._io = io

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        io = self._io
        outputs = self._compiled(*inputs, *io.inputs(inputs))
        soft = active_soft_routes(io.router)
        if io.layers:
            if io.masks:
                *outputs, flags = outputs
                _check_readable(flags)
            if io.features:
                *outputs, features = outputs
                soft.leave_features(io.layers, features)
            *outputs, shares = outputs
            soft.leave(io.layers, shares)
        soft.leave(io.fixed, None)
        return outputs


def share_training(compiled: Callable[..., Any], io: TrainingIO, sharing: Sharing) -> SharedGraph:
    """``compiled`` for every layer: with its router's tensors and noise, leaving its shares."""
    return SharedGraph(sharing, lambda layer: TrainingGraph(compiled, io.of_layer(layer)))


def prepare_training(
    result: Rewrite, planner: Planner
) -> tuple[TrainingIO, list[torch.Tensor]] | None:
    """Add the graph's outputs, and describe what the runtime passes in and takes off.

    Returns:
        The description and stand-ins for the graph's additional inputs; None where the graph has
        no layer with a router.
    """
    source = result.shares
    if not source.layers and not source.fixed:
        return None
    if source.layers:
        append_output(result.gm, source.shares)
    if source.features:
        append_output(result.gm, source.features)
    if source.mask_flags:
        append_output(result.gm, source.mask_flags)
    batch, example = source.batch, source.batch
    if not isinstance(batch, int):
        node, axis = batch
        placeholders = [n for n in result.gm.graph.nodes if n.op == "placeholder"]
        batch = placeholders.index(node), axis
        example = value_of(node) if axis is None else value_of(node).shape[axis]
    io = TrainingIO(
        router=planner.router,
        soft=source.noise is not None,
        prompts=source.prompt_length is not None,
        tensors=tuple(source.tensors),
        layers=tuple(source.layers),
        features=bool(source.features),
        masks=bool(source.mask_flags),
        fixed=tuple(source.fixed),
        batch=batch,
        device=source.device,
        shared=planner.shared is not None,
    )
    return io, io.examples(example)


def _check_readable(flags: torch.Tensor) -> None:
    """What sparse attention is under any other mask nobody has said: a route would change nothing.

    Raises:
        RewriteError: a mask is not causal attention to valid keys.
    """
    if not bool(flags[READABLE].all()):
        raise RewriteError(
            'mode "train": expected masks that are causal over valid keys, got one that is not (a '
            "sliding window's, where decoder layers are compiled one by one: compile the model as "
            "a whole)"
        )


def refuse_untrained(result: Rewrite) -> None:
    """Training over a layer that is silently not routed would be a defect: say so instead.

    Raises:
        RewriteError: an attention that is causal was left alone.
    """
    for site in result.sites:
        if site.skip is not None and site.skip.reason is not SkipReason.NOT_CAUSAL:
            raise RewriteError(
                f'mode "train": expected attentions that can be rewritten, got '
                f"{site.path or site.output.name}: {site.skip}"
            )


def refuse_checkpointed(gm: fx.GraphModule) -> None:
    """Attentions inside ``torch.utils.checkpoint`` are out of the passes' sight.

    Raises:
        RewriteError: the graph holds a checkpointed region.
    """
    if any("checkpoint" in op_name(node) for node in gm.graph.nodes if node.op != "placeholder"):
        raise RewriteError(
            'mode "train": expected a graph without torch.utils.checkpoint regions, got some: '
            "disable the model's gradient checkpointing, and to save memory set "
            "torch._functorch.config.activation_memory_budget below 1 instead"
        )
